"""What is known of this machine."""

from __future__ import annotations

import platform


def processor() -> str:
    """The model of the CPU; its architecture where the system does not name it."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as file:
            for line in file:
                if line.startswith('model name'):
                    return line.partition(':')[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
