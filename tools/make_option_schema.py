"""Write the JSON Schema of the option files, for editors: `python tools/make_option_schema.py`.

Each option file names options/schema.json in its first line, so that editors with a YAML language server
complete keys, explain them and underline faults.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dsgformer_arch.models.option_schema import schema_text
from dsgformer_arch.utils.errors import guarded

TARGET = Path(__file__).resolve().parents[1] / 'options' / 'schema.json'


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description='Write options/schema.json from the option models.')
    parser.parse_args(arguments)
    new = schema_text()
    changed = not TARGET.is_file() or TARGET.read_text(encoding='utf-8') != new
    if changed:
        TARGET.write_text(new, encoding='utf-8')
    print(f'{TARGET}: {"changed" if changed else "up to date"}')


if __name__ == '__main__':
    raise SystemExit(guarded(main))
