"""Fuzz readers with atheris, guided by coverage: `python -m tests.fuzz [TARGET …] --minutes 30`.

Each target runs in a process of its own, which is started again where a library ends it.  The first input of
each kind of finding is kept as `FOLDER/TARGET/crash-…`.  A table of all targets is printed at the end and
written to `FOLDER/summary.json`.  Read one input again: `python -m tests.fuzz TARGET --input FILE`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import atheris

INSTRUMENTED = ['dsgformer_arch', 'yaml', 'PIL', 'tifffile', 'zipfile', 'safetensors']
"""Packages whose branches guide the fuzzer; of torch only its restricted unpickler does."""

with atheris.instrument_imports(include=INSTRUMENTED):
    from tests.fuzz.limits import FindingError
    from tests.fuzz.targets import TARGETS

MEMORY_LIMIT = 4096
"""MiB of resident memory at which libFuzzer ends a target: `limits.MEMORY` finds out before, as a rule."""
HANG = 1200
"""Seconds of real time after which libFuzzer reports a hang, on a machine that may be busy with other work;
`limits.SECONDS` of processor time are what an input may take."""
FINDINGS = ('crash-', 'timeout-', 'oom-')
"""How the names of the inputs begin that libFuzzer keeps."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('targets', nargs='*', metavar='TARGET', help=f'{", ".join(TARGETS)}; default: all')
    parser.add_argument('--minutes', type=float, default=30.0, help='of each target (default 30)')
    parser.add_argument('--out', type=Path, default=Path('results/fuzz'), metavar='FOLDER')
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='targets at a time (default: cores)')
    parser.add_argument('--input', type=Path, help='read this one input instead')
    arguments = parser.parse_args()
    unknown = [name for name in arguments.targets if name not in TARGETS]
    if unknown:
        parser.error(f'there is no target {unknown[0]}; choose from {", ".join(TARGETS)}')
    names = arguments.targets or list(TARGETS)
    if arguments.input:
        TARGETS[names[0]].examine(arguments.input.read_bytes())
        return 0
    rows = supervise([Run(name, arguments.out / name, arguments.minutes) for name in names], arguments.jobs)
    (arguments.out / 'summary.json').write_text(json.dumps(rows, indent=1), encoding='utf-8')
    print('| target | minutes | of a core | executions | branches | peak memory | findings |')
    print('| --- | --- | --- | --- | --- | --- | --- |')
    for row in rows:
        print(
            f'| {row["target"]} | {row["minutes"]:.0f} | {row["processor_minutes"]:.1f} | '
            f'{row["executions"]:,} | {row["branches"]:,} | {row["peak_mib"]:,} MiB | {row["findings"]} |'
        )
    return 1 if any(row['findings'] for row in rows) else 0


@dataclass
class Run:
    """A target, and the time that it still has."""

    name: str
    folder: Path
    minutes: float
    began: float = 0.0
    processor: float = 0.0
    """Seconds of processor time so far."""

    @property
    def left(self) -> float:
        """Seconds."""
        return 60 * self.minutes - (time.monotonic() - self.began if self.began else 0)

    def start(self) -> int:
        """Go on in a new process; returns its number."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.began:
            (self.folder / 'log.txt').unlink(missing_ok=True)
            self.began = time.monotonic()
        if process := os.fork():
            return process
        log = os.open(self.folder / 'log.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            fuzz(self.name, self.folder, self.left)
        finally:
            os._exit(1)

    def row(self) -> dict[str, Any]:
        """What the logs say."""
        executions = branches = peak = 0
        for part in (self.folder / 'log.txt').read_text('utf-8', 'replace').split('INFO: Seed:')[1:]:
            counts = re.findall(r'(?:^#|number_of_executed_units: )(\d+)', part, re.MULTILINE)
            executions += max(map(int, counts), default=0)
            branches = max([branches, *map(int, re.findall(r' cov: (\d+)', part))])
            peak = max([peak, *map(int, re.findall(r'(?: rss: |peak_rss_mb:\s+)(\d+)', part))])
        return {
            'target': self.name,
            'minutes': (time.monotonic() - self.began) / 60,
            'processor_minutes': self.processor / 60,
            'executions': executions,
            'branches': branches,
            'peak_mib': peak,
            'findings': sum(file.name.startswith(FINDINGS) for file in self.folder.iterdir()),
        }


def supervise(runs: list[Run], jobs: int) -> list[dict[str, Any]]:
    """Run targets until their time is over, starting each again where its process ends."""
    waiting, running, rows = runs[::-1], dict[int, Run](), dict[str, dict[str, Any]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            run = waiting.pop()
            running[run.start()] = run
        process, _, used = os.wait4(-1, 0)
        run = running.pop(process)
        run.processor += used.ru_utime + used.ru_stime
        if run.left > 5:
            waiting.append(run)
        else:
            rows[run.name] = run.row()
            print(f'{run.name}: {rows[run.name]["findings"]} findings', flush=True)
    return [rows[run.name] for run in runs]


def fuzz(name: str, folder: Path, seconds: float) -> None:
    """Fuzz one target in this process; does not return."""
    from torch import _weights_only_unpickler as unpickler

    unpickler.Unpickler.load = atheris.instrument_func(unpickler.Unpickler.load)
    target = TARGETS[name]
    corpus = folder / 'corpus'
    corpus.mkdir(exist_ok=True)
    for seed in target.seeds():
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)

        def change(part: bytes) -> bytes:
            return bytes(atheris.Mutate(part, min(most, len(part) + rng.choice([0, 8, 64]) + 1)))

        if target.mutate is not None and rng.random() < 0.8:
            changed = target.mutate(data, rng, change)
            if len(changed) <= most:
                return changed
        return bytes(atheris.Mutate(data, most))

    flags = {
        'max_total_time': int(seconds),
        'max_len': target.most,
        'rss_limit_mb': MEMORY_LIMIT,
        'timeout': HANG,
        'artifact_prefix': f'{folder}{os.sep}',
        'print_final_stats': 1,
        'len_control': 0,
        'report_slow_units': HANG,
        'reload': 0,
    }

    def read(data: bytes) -> None:
        try:
            target.examine(data)
        except FindingError as error:
            keep(error, data, folder)

    arguments = [sys.argv[0], *(f'-{key}={value}' for key, value in flags.items()), str(corpus)]
    how = {'custom_mutator': mutate} if target.mutate is not None else {}
    atheris.Setup(arguments, read, **how)
    atheris.Fuzz()


def keep(error: FindingError, data: bytes, folder: Path) -> None:
    """Keep the first input of each kind of finding; fuzzing goes on."""
    cause = error.__cause__
    last = traceback.extract_tb(cause.__traceback__)[-1] if cause is not None else None
    kind = f'{type(cause).__name__}, {last.filename}:{last.lineno}' if last else 'limits'
    file = folder / f'crash-{hashlib.sha1(kind.encode()).hexdigest()}'
    if not file.exists():
        file.write_bytes(data)
        print(f'FINDING {file.name}: {error} ({kind})', flush=True)


if __name__ == '__main__':
    sys.exit(main())
