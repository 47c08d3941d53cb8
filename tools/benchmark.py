#!/usr/bin/env python3
"""Measure every system the same way; argument parsing for `dsgformer_arch.benchmark`.

benchmark.py speed    --models dsgformer,restormer,nafnet64 --size 256
benchmark.py cost     --models dsgformer_s,nafnet32 --size 1920x1200 --no-latency
benchmark.py latency  --models dsgformer_h,nafnet32,restormer --size 256 --size 720x1280
benchmark.py quality  --models dsgformer --weights dsgformer=net.pth --data GOPRO/test --protocol gopro
benchmark.py training --models dsgformer_t,nafnet32 --data datasets/sample --seconds 120 --seeds 2
benchmark.py ablation --data datasets/sample --iterations 300 --seeds 2
benchmark.py recipe   --data datasets/study --iterations 600 --seeds 3
benchmark.py report   results/benchmark
"""

from __future__ import annotations

import argparse
import math
import os
from importlib.util import find_spec
from pathlib import Path

import torch

from dsgformer_arch import zoo
from dsgformer_arch.utils.allocator import keep_freed_memory
from dsgformer_arch.utils.arguments import positive
from dsgformer_arch.utils.errors import UserError, guarded

RESULTS = Path('results') / 'benchmark'


def main(arguments: list[str] | None = None) -> int:
    return guarded(lambda: run(parser().parse_args(arguments)))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog='benchmark.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest='command', required=True)
    speed(commands.add_parser('speed', help='latency, throughput, memory, MACs'))
    cost(commands.add_parser('cost', help='parameters, MACs, memory, latency against the efficient track'))
    latency(commands.add_parser('latency', help='PyTorch against onnxruntime, OpenVINO and AOTInductor'))
    quality(commands.add_parser('quality', help='PSNR, SSIM and more on a data set, under its protocol'))
    training(commands.add_parser('training', help='quality reached with the same data and budget'))
    ablation(commands.add_parser('ablation', help="the paper's table 2 on a budget"))
    recipe(commands.add_parser('recipe', help='initial values, k_n, optimiser, loss and resolution compared'))
    loader(commands.add_parser('loader', help='crops a second of the data loaders'))
    report(commands.add_parser('report', help='one page of all results'))
    return top


def common(command: argparse.ArgumentParser, kind: str) -> None:
    command.add_argument(
        '--out', type=result, default=RESULTS / kind, metavar='PATH',
        help='results are PATH.json, PATH.md and PATH.png (default: %(default)s)',
    )  # fmt: skip
    command.add_argument('--resume', action='store_true', help='keep what PATH.json holds already')
    command.add_argument('--device', default='cpu', help='cpu, cuda or cuda:N (default: %(default)s)')
    command.add_argument('--threads', type=cores, help='CPU threads (default: one a core)')


def speed(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        '--models', type=names, required=True, metavar='A,B,…', help='names of the zoo, or all'
    )
    command.add_argument(
        '--size',
        type=size,
        action='append',
        metavar='N or HxW',
        help='image size; may be repeated (default: 256)',
    )
    command.add_argument(
        '--precision', default='fp32', choices=['fp32', 'bf16', 'fp16'], help='autocast type'
    )
    command.add_argument('--compile', action='store_true', help='torch.compile the networks')
    command.add_argument('--channels-last', action='store_true', help='memory format of images and kernels')
    command.add_argument('--batch', type=positive, default=1, help='images at once (default: %(default)s)')
    command.add_argument('--train', action='store_true', help='forward, backward and an AdamW step')
    command.add_argument(
        '--best', action='store_true', help='try every memory format and precision for each system'
    )
    command.add_argument('--scaling', action='store_true', help='sweep sizes and fit growth with pixels')
    command.add_argument(
        '--rounds', type=positive, default=5, help='turns A B C A B C … (default: %(default)s)'
    )
    command.add_argument(
        '--no-memory', action='store_true', help='skip the processes that measure peak memory'
    )
    command.add_argument(
        '--keep-memory',
        action='store_true',
        help='on a CPU, let all systems keep freed memory for their next tensors, as test and quality do',
    )
    command.add_argument(
        '--cuda-graphs', action='store_true', help="replay each system's kernels as a CUDA graph"
    )
    command.add_argument(
        '--roofline', action='store_true', help='measure what the device can do at best, and compare'
    )
    common(command, 'speed')


def cost(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        '--models', type=names, default='all', metavar='A,B,…', help='names of the zoo (default: all)'
    )
    command.add_argument(
        '--size', type=width_first, default='1920x1200', metavar='WxH',
        help='image size, width first as the challenges write it (default: %(default)s)',
    )  # fmt: skip
    command.add_argument(
        '--precision', default='fp32', choices=['fp32', 'bf16', 'fp16'], help='autocast type'
    )
    command.add_argument('--rounds', type=positive, default=3, help='turns of latency (default: %(default)s)')
    command.add_argument(
        '--no-latency', action='store_true', help='count only: run no system for latency and peak memory'
    )
    command.add_argument(
        '--limit', type=positive, default=argparse.SUPPRESS, metavar='SECONDS',
        help='do not run systems of which one call is expected to take longer (default: 120)',
    )  # fmt: skip
    common(command, 'cost')


def latency(command: argparse.ArgumentParser) -> None:
    command.add_argument('--models', type=names, required=True, metavar='A,B,…', help='names of the zoo')
    command.add_argument(
        '--size', type=size, action='append', metavar='N or HxW', help='may be repeated (default: 256)'
    )
    command.add_argument(
        '--backends', type=words, default=argparse.SUPPRESS, metavar='A,B,…',
        help='pytorch, pytorch-nhwc, pytorch-bf16, pytorch-nhwc-bf16, onnxruntime, openvino, openvino-bf16, '
        'aoti (default: all)',
    )  # fmt: skip
    command.add_argument(
        '--rounds', type=positive, default=5, help='turns A B C A B C … (default: %(default)s)'
    )
    common(command, 'latency')


def quality(command: argparse.ArgumentParser) -> None:
    command.add_argument('--models', type=names, required=True, metavar='A,B,…', help='names of the zoo')
    command.add_argument(
        '--weights', type=assignment, nargs='+', action='extend', default=[], metavar='NAME=PATH',
        help='a checkpoint for each system',
    )  # fmt: skip
    command.add_argument(
        '--data', required=True, nargs='+', action='extend', metavar='PATH',
        help='folder with blur/ and sharp/ (or input/ and target/, lq/ and gt/), a set in its own layout, or '
        'the common start of two LMDBs PATH_lq.lmdb and PATH_gt.lmdb; several for the mean over sets',
    )  # fmt: skip
    command.add_argument('--protocol', required=True, help='gopro, hide, realblur, rsblur, rain or mhnet')
    command.add_argument(
        '--precision', default='fp32', choices=['fp32', 'bf16', 'fp16'], help='autocast type'
    )
    command.add_argument('--tile', type=positive, help='side of tiles for images that do not fit in memory')
    command.add_argument('--tlc', type=positive, metavar='N', help='local test-time pooling, trained at N×N')
    command.add_argument(
        '--metrics', type=words, default=[], metavar='A,B,…', help='more metrics, through pyiqa'
    )
    command.add_argument('--save-images', action='store_true', help='keep the restored images below PATH/')
    command.add_argument('--limit', type=positive, help='only the first N images')
    common(command, 'quality')


def training(command: argparse.ArgumentParser) -> None:
    command.add_argument('--models', type=names, required=True, metavar='A,B,…', help='names of the zoo')
    command.add_argument(
        '--match', metavar='NAME', help='scale the others to the MACs of NAME (default: as they are)'
    )
    budget = command.add_mutually_exclusive_group(required=True)
    budget.add_argument('--iterations', type=positive, help='iterations for each system')
    budget.add_argument('--seconds', type=positive, help='seconds of training for each system')
    learning(command, several_rates=True)
    command.add_argument(
        '--rates',
        type=Path,
        metavar='JSON',
        help='in place of --lr: the best of each system in these results',
    )
    command.add_argument(
        '--precision', choices=('fp32', 'bf16'), default='fp32', help='autocast type (default: %(default)s)'
    )
    common(command, 'training')


def ablation(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        '--iterations', type=positive, default=300, help='for each variant (default: %(default)s)'
    )
    command.add_argument('--model', default='dsgformer_t', help='preset to vary (default: %(default)s)')
    learning(command)
    common(command, 'ablation')


def recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        '--iterations', type=positive, default=600, help='for each variant (default: %(default)s)'
    )
    command.add_argument('--model', default='dsgformer_h', help='preset to vary (default: %(default)s)')
    command.add_argument(
        '--variants', type=words, default=[], metavar='A,B,…', help='only these (default: all)'
    )
    learning(command)
    command.set_defaults(seeds=3, batch=4, patch=96, validations=1)
    common(command, 'recipe')


def loader(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        '--data', required=True, metavar='PATH', help='common start of PATH_lq.lmdb and PATH_gt.lmdb'
    )
    command.add_argument(
        '--stream', dest='streams', action='append', default=[], metavar='PATH or s3://…',
        help='a stream of the same images, which tools/create_stream.py made; may be repeated',
    )  # fmt: skip
    command.add_argument('--patch', type=positive, default=256, help='side of crops (default: %(default)s)')
    command.add_argument('--batch', type=positive, default=8, help='pairs (default: %(default)s)')
    command.add_argument('--workers', type=positive, default=1, help='processes (default: %(default)s)')
    command.add_argument('--rounds', type=positive, default=3, help='turns (default: %(default)s)')
    command.add_argument(
        '--seconds', type=positive, default=5, help='length of a turn (default: %(default)s)'
    )
    common(command, 'loader')


def learning(command: argparse.ArgumentParser, several_rates: bool = False) -> None:
    command.add_argument('--data', required=True, metavar='DIR', help='folder of {train,test}_{lq,gt}.lmdb')
    command.add_argument('--seeds', type=positive, default=2, help='repetitions (default: %(default)s)')
    command.add_argument('--batch', type=positive, default=8, help='crops in a step (default: %(default)s)')
    command.add_argument(
        '--patch', type=positive, default=64, help='side of the crops (default: %(default)s)'
    )
    if several_rates:
        help_text = 'peak learning rate; with several, every system uses the best of them (default: 0.001)'
        command.add_argument('--lr', type=rates, default=[1e-3], metavar='LR[,LR…]', help=help_text)
    else:
        command.add_argument(
            '--lr', type=rate, default=1e-3, help='peak learning rate (default: %(default)s)'
        )
    command.add_argument('--validations', type=positive, default=4, help='how often to validate in a run')
    command.add_argument(
        '--protocol', default='gopro', help='scores the held-out images, as in quality (default: %(default)s)'
    )


def report(command: argparse.ArgumentParser) -> None:
    command.add_argument('inputs', nargs='*', default=[str(RESULTS)], help='result files or folders of them')
    command.add_argument(
        '--out', type=result, default=RESULTS / 'report', metavar='PATH', help='PATH.html and PATH.md'
    )


def run(arguments: argparse.Namespace) -> int:
    if find_spec('matplotlib') is None:
        raise UserError('the figures are drawn with matplotlib; install it with: pip install matplotlib')
    settings = vars(arguments)
    command = settings.pop('command')
    threads = settings.pop('threads', None)
    if threads:
        torch.set_num_threads(threads)
    if command in ('quality', 'latency'):  # as `dsgformer deblur` does
        keep_freed_memory()
    # Imported here: matplotlib and every measuring module take a second that --help need not wait for.
    from dsgformer_arch.benchmark import commands
    from dsgformer_arch.benchmark.render import report as reports

    try:
        return reports.run(**settings) if command == 'report' else commands.run(command, **settings)
    except MemoryError:
        raise UserError(f'{command} does not fit in memory; lower --batch, --patch or --size') from None


def names(text: str) -> list[str]:
    if text == 'all':
        return list(zoo.names())
    found = [zoo.get(name).name for name in words(text)]
    if not found:
        raise argparse.ArgumentTypeError('name at least one system, such as dsgformer')
    return found


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(',') if word.strip()]


def assignment(text: str) -> tuple[str, Path]:
    name, _, path = text.partition('=')
    if not path:
        raise argparse.ArgumentTypeError(f'{text!r} names no file; write NAME=PATH')
    return zoo.get(name).name, Path(path)


def result(text: str) -> Path:
    path = Path(text)
    if not path.name or path.name == '..':
        raise argparse.ArgumentTypeError(f'{text!r} names no file; write results/NAME, say')
    return path.with_suffix('') if path.suffix in ('.json', '.md', '.png', '.csv', '.html') else path


def rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f'{text} is not a positive number')
    return value


def rates(text: str) -> list[float]:
    return list(dict.fromkeys(map(rate, words(text) or [text])))


def cores(text: str) -> int:
    most = 4 * (os.cpu_count() or 1)
    value = positive(text)
    if value > most:
        raise argparse.ArgumentTypeError(f'{text} is too many for this machine; take {most} at most')
    return value


def size(text: str, example: str = '720x1280 (height first)') -> tuple[int, int]:
    sides = text.lower().split('x')
    if len(sides) > 2 or not all(side.isdigit() and int(side) >= 16 for side in sides):
        raise argparse.ArgumentTypeError(f'{text!r} is not a size; write 256 or {example}, from 16 up')
    return int(sides[0]), int(sides[-1])


def width_first(text: str) -> tuple[int, int]:
    width, height = size(text, '1280x720 (width first)')
    return height, width


if __name__ == '__main__':
    raise SystemExit(main())
