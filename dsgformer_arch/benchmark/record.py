"""The record of a benchmark: its numbers, and the data that are needed to interpret and repeat them.

Each subcommand fills one `Record` and writes it as JSON (for `report`, and for
`--resume`) and as a Markdown page (for reading).  A record is written after
each row, so that an interrupted run keeps its results.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.files import write_atomically
from dsgformer_arch.utils.machine import processor

PACKAGES = (
    *('torch', 'torchvision', 'basicsr', 'spandrel', 'spandrel_extra_arches'),
    *('numpy', 'opencv-python', 'pyvips', 'onnxruntime', 'openvino'),
)


@dataclass
class Record:
    """The results of one subcommand.

    Attributes:
        kind: a key of `commands.MEASURES`, such as `speed`.
        command: the command line that repeats it.
        settings: those of the run; it is resumed only with equal settings.
        protocol: how it was measured, in sentences.
        environment: machine and versions, see `environment`.
        rows: one flat dict per measurement, of strings, numbers, booleans and None.
        extra: other results (curves, fits, per-image values), by name.
    """

    kind: str
    command: str
    settings: dict[str, Any]
    protocol: str
    environment: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row whose entries equal `key`, or None."""
        return next((row for row in self.rows if all(row.get(k) == v for k, v in key.items())), None)

    def drop_failed(self) -> None:
        """Forget the rows with an `error`, so that a resumed run tries them again."""
        self.rows = [row for row in self.rows if not row.get('error')]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record as JSON, atomically."""
        write_text(path, json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + '\n')

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Record:
        """Read a record.

        Raises:
            UserError: the file is missing or holds none.
        """
        try:
            content = json.loads(Path(path).read_text(encoding='utf-8'))
            return cls(**content)
        except OSError as error:
            raise UserError(f'cannot read {path}: {error.strerror}') from None
        except (ValueError, TypeError):
            raise UserError(
                f'{path} is not a result of tools/benchmark.py; delete it or name another one'
            ) from None


def start(
    kind: str, settings: Mapping[str, Any], protocol: str, path: str | os.PathLike[str], resume: bool
) -> Record:
    """A new record, or with `resume` the one at `path` if it was made with the same settings.

    Raises:
        UserError: `resume`, and the file there was made with other settings; or nothing can be written there.
    """
    with writing(path):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    asked: dict[str, Any] = json.loads(json.dumps(settings))
    if resume and os.path.exists(path):
        record = Record.load(path)
        if record.settings != asked or record.kind != kind:
            keys = {*asked, *record.settings}
            changed = sorted(key for key in keys if asked.get(key) != record.settings.get(key))
            raise UserError(
                f'--resume: {path} was made with other settings ({", ".join(changed) or kind}); '
                'leave --resume out to start again, or write elsewhere with --out'
            )
        return record
    return Record(kind, command_line(), asked, protocol, environment())


def beside(out: Path, end: str) -> Path:
    """The path of a result's file with an ending such as `.json`."""
    return out.with_name(out.name + end)


def data_name(data: str | os.PathLike[str]) -> str:
    """The name of a data set in results: the end of its path, such as `GOPRO_Large/test`."""
    return '/'.join(part for part in Path(data).parts[-2:] if part not in (os.sep, '..'))


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a failure to write into a `UserError` that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f'cannot write {os.fspath(path)}: {error.strerror or error}; write elsewhere with --out'
        ) from None


def put(write: Callable[[str], Any], path: str | os.PathLike[str]) -> None:
    """Write a file atomically by `write(temporary_path)`; creates its folders."""
    with writing(path):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        write_atomically(write, path)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically."""
    put(lambda temporary: Path(temporary).write_text(text, encoding='utf-8'), path)


def command_line() -> str:
    """The command line, with the script's path relative to the checkout."""
    script = Path(sys.argv[0])
    shown = f'tools/{script.name}' if script.parent.name == 'tools' else script.name
    return shlex.join(['python', shown, *sys.argv[1:]])


def environment() -> dict[str, Any]:
    """Machine, versions and date."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        'date': datetime.datetime.now(datetime.timezone.utc).strftime('%Y-%m-%d'),
        'processor': processor(),
        'cores': os.cpu_count(),
        'threads': torch.get_num_threads(),
        'instructions': _instructions(),
        'memory_gib': _memory_gib(),
        'gpus': gpus,
        'system': platform.platform(),
        'python': platform.python_version(),
        'packages': {name: _version(name) for name in PACKAGES},
        'commit': _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _instructions() -> list[str]:
    try:
        text = Path('/proc/cpuinfo').read_text()
    except OSError:
        return []
    return [name for name in ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16') if f' {name} ' in text]


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30, 1)
    except (ValueError, OSError):
        return None


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ['git', 'describe', '--always', '--dirty'], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
