"""What tests of the training model share."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture
def run_log() -> list[str]:
    """The warnings of BasicSR's logger, which does not propagate them to pytest's."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logging.getLogger('basicsr').addHandler(Keep(logging.WARNING))
    return messages
