"""Measure `dsgformer deblur` on one large JPEG: `python tools/measure_deblur.py`.

Each run is the whole command in a process of its own, from the start of Python to the finished file, beside
the time that its forward passes took alone.

A system whose weights the package does not ship runs with random ones of the same shapes.  Their output layer
is scaled by `OUTPUT_SCALE`, so that the result stays near the input: without it the command finds blocks of a
foreign colour and restores those tiles again in float32, which it does not do with trained weights.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from dsgformer_arch import zoo
from dsgformer_arch.restore import evaluating
from dsgformer_arch.utils.errors import UserError, guarded

ROOT = Path(__file__).resolve().parents[1]

PICTURE = ROOT / 'docs' / 'images' / 'before_after.jpg'
"""What the JPEG is made of, enlarged: the content does not change the time."""

COMMAND = 'import sys\nfrom dsgformer_arch.cli.dsgformer import main\nsys.exit(main())\n'
"""The console script, as pip installs it."""

OUTPUT_SCALE = 1e-3
"""Factor of the output layer's random weights."""

SHIPPED, RANDOM = 'of the package', 'random, output layer scaled'
"""What the last column says about a system's weights."""


@dataclass
class Run:
    """One call of the command: seconds of the whole, and of the forward passes in it."""

    wall: float
    network: float
    megapixels: float
    notes: list[str]


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description='Seconds of `dsgformer deblur` for one JPEG, start-up included, beside the network alone.'
    )
    result.add_argument(
        '--systems', nargs='+', default=['dsgformer_h', 'nafnet32', 'restormer'], metavar='NAME'
    )
    result.add_argument('--size', type=_size, default=(4000, 3000), metavar='WxH', help='default: 4000x3000')
    result.add_argument('--threads', type=int, default=0, metavar='N', help='default: as the command chooses')
    result.add_argument('--repeats', type=int, default=3, metavar='N', help='the fastest counts; default: 3')
    result.add_argument('--precision', default='auto', help='as for `dsgformer deblur`; default: auto')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.repeats < 1:
        raise UserError(f'--repeats {args.repeats}: give a number from 1 up')
    systems = [zoo.get(name).name for name in args.systems]
    compileall.compile_dir(ROOT / 'dsgformer_arch', quiet=2)  # as pip does when it installs the package
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Image.open(PICTURE).convert('RGB').resize(args.size, Image.Resampling.BICUBIC).save(
            folder / 'in.jpg', quality=92
        )
        (folder / 'dsgformer').write_text(COMMAND, encoding='utf-8')
        print(f'{"system":<24}{"command, s":>12}{"network, s":>12}{"ratio":>8}{"MP/s":>8}  weights')
        for system in systems:
            options = ['--precision', args.precision, *_weights(system, folder)]
            runs = [_run(folder, options, args.threads) for _ in range(args.repeats)]
            best = min(runs, key=lambda run: run.wall)
            print(
                f'{system:<24}{best.wall:>12.2f}{best.network:>12.2f}{best.wall / best.network:>8.2f}'
                f'{best.megapixels / best.wall:>8.2f}  {SHIPPED if system in zoo.shipped() else RANDOM}',
                flush=True,
            )
            for note in best.notes:
                print(f'note: {system}: {note}', file=sys.stderr, flush=True)


def _weights(system: str, folder: Path) -> list[str]:
    """The options that choose a system: by default the command takes the first that is shipped."""
    if system in zoo.shipped():
        return ['--model', system] if system != 'dsgformer_h' else []
    path = folder / f'{system}.pth'
    torch.manual_seed(0)
    network = zoo.create(system)
    for parameter in output_layer(network).parameters():
        parameter.data *= OUTPUT_SCALE
    torch.save({'params': network.state_dict()}, path)
    return ['--weights', str(path)]


def output_layer(network: nn.Module) -> nn.Module:
    """The last convolution that a network calls."""
    called: list[nn.Module] = []
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: called.append(module))
        for module in convolutions
    ]
    with evaluating(network):
        network(torch.zeros(1, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    return called[-1]


def _run(folder: Path, options: list[str], threads: int) -> Run:
    environment = dict(os.environ)
    environment['PYTHONPATH'] = os.pathsep.join([str(ROOT), *filter(None, [environment.get('PYTHONPATH')])])
    if threads:
        environment['OMP_NUM_THREADS'] = str(threads)
    command = [sys.executable, str(folder / 'dsgformer'), 'deblur', str(folder / 'in.jpg')]
    begun = time.perf_counter()
    done = subprocess.run(
        [*command, '-o', str(folder / 'out.jpg'), '--force', '--json', *options],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    wall = time.perf_counter() - begun
    if done.returncode:
        raise UserError(f'dsgformer deblur {" ".join(options)} failed: {done.stderr.strip()[-300:]}')
    told = json.loads(done.stdout)
    return Run(wall, told['network_seconds'], told['megapixels'], told['notes'])


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition('x')
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f'{text!r} is not a size such as 4000x3000')
    return int(width), int(height)


if __name__ == '__main__':
    raise SystemExit(guarded(main))
