"""Convert a checkpoint to a safetensors file that names its system and holds its settings.

    python tools/convert_checkpoint.py deblurring.pth restormer_gopro.safetensors

The file holds weights only, so that reading it cannot run code; its metadata hold the system's name and
settings.  It is read back and compared before it is renamed to OUT.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from dsgformer_arch import zoo
from dsgformer_arch.utils.errors import guarded


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description='Write a checkpoint as safetensors with the name and the settings of its system.'
    )
    result.add_argument(
        'source', metavar='IN', type=Path, help='a .pth, .pt, .ckpt or .safetensors file, as published'
    )
    result.add_argument('target', metavar='OUT', type=Path, help='the .safetensors file to write')
    result.add_argument(
        '--system',
        metavar='NAME',
        help='the system that it has to be (default: recognise it); one of ' + ', '.join(zoo.names()),
    )
    result.add_argument(
        '--half', action='store_true', help='store float16 numbers: half the size; reading makes them float32'
    )
    result.add_argument(
        '--param-key',
        metavar='KEY',
        help='the key of the weights in IN (default: the first of params_ema, params, state_dict, …)',
    )
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    dtype = torch.float16 if args.half else None
    system, settings = zoo.convert(args.source, args.target, args.system, dtype, args.param_key)
    stated = ', '.join(f'{key}={value}' for key, value in settings.items())
    print(f'{args.target}: {system} ({stated})')


if __name__ == '__main__':
    raise SystemExit(guarded(main))
