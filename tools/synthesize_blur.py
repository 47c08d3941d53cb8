"""Make pairs of blurred and sharp images from photographs or high-frame-rate video.

    python tools/synthesize_blur.py shake photos/ --out datasets/shake --count 500 --seed 1

writes `train_lq.lmdb` and `train_gt.lmdb` below `datasets/shake`.  docs/blur.md explains the stages.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dsgformer_arch.data.prepare.blur.settings import from_options
from dsgformer_arch.data.prepare.blur.sources import ObjectsSource, ShakeSource
from dsgformer_arch.data.prepare.blur.synthesis import (
    Recipe,
    fingerprint,
    photograph_files,
    photograph_jobs,
    synthesize,
    window_jobs,
)
from dsgformer_arch.data.prepare.blur.video import Averaging, find_clips, find_windows
from dsgformer_arch.utils.arguments import natural, positive
from dsgformer_arch.utils.errors import UserError, guarded

SOURCES = {'shake': ShakeSource, 'objects': ObjectsSource}
MEGABYTES = 2048
"""For reduced photographs, in all processes together."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description='Make pairs of blurred and sharp images: from video by averaging consecutive frames, '
        'from sharp photographs by a shaking camera, or by objects that move over them as well.',
        epilog='A seed gives the same data set, however many processes make it.  Run the same command again '
        'to complete an interrupted run.',
    )
    result.add_argument('kind', choices=['video', *SOURCES], help='where the blur comes from')
    result.add_argument(
        'input', metavar='INPUT', nargs='+', help='folders of photographs; video files or folders of frames'
    )
    result.add_argument('--out', metavar='OUT', type=Path, required=True, help='the folder for the data set')
    result.add_argument('--name', default='train', help='its name in that folder (default: %(default)s)')
    result.add_argument(
        '--count',
        metavar='N',
        type=positive,
        help='how many pairs (default: as many as photographs, or as the video gives)',
    )
    result.add_argument(
        '--seed', metavar='N', type=natural, default=0, help='all follows from it (default: 0)'
    )
    result.add_argument(
        '--crop', metavar='S', type=positive, help='photographs: make crops of SxS, not whole images'
    )
    result.add_argument('--folders', action='store_true', help='write folders of PNG files, not LMDBs')
    result.add_argument('--force', action='store_true', help='replace an existing data set')
    result.add_argument(
        '--workers',
        metavar='N',
        type=positive,
        default=min(8, os.cpu_count() or 1),
        help='processes (default: %(default)s)',
    )
    result.add_argument(
        '--settings',
        metavar='FILE',
        type=Path,
        help='YAML file with the keys of a source in an option file, for what the options below do not set',
    )

    strength = result.add_argument_group('strength of blur (photographs)')
    strength.add_argument('--none', metavar='P', type=float, help='share of images without blur')
    strength.add_argument(
        '--length', metavar=('LOW', 'HIGH'), nargs=2, type=float, help='length of the others in pixels'
    )
    strength.add_argument('--power', metavar='P', type=float, help='above 1: short blurs are more frequent')

    frames = result.add_argument_group('frames (video)')
    frames.add_argument('--frames', metavar=('LOW', 'HIGH'), nargs=2, type=int, help='how many are averaged')
    frames.add_argument(
        '--interpolate',
        metavar='N',
        type=positive,
        help='up to N steps from frame to frame, along the optical flow',
    )

    camera = result.add_argument_group(
        'camera', 'each switch takes the share of images that get it, from 0 (off) to 1 (all)'
    )
    camera.add_argument('--response', metavar='R', help='of the input: srgb, gamma2.2, linear or a .npy file')
    for switch, meaning in (
        ('saturation', 'highlights leave saturated streaks'),
        ('noise', 'shot and read noise'),
        ('isp', 'noise arises in the colours of a raw file'),
        ('demosaic', 'one colour a pixel, the others interpolated'),
        ('jpeg', 'JPEG compression'),
    ):
        camera.add_argument(f'--{switch}', metavar='P', type=float, help=meaning)
    camera.add_argument('--plain', action='store_true', help='none of these, unless switched on')
    return result


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the file and the options give, as the sections of an option file."""
    result: dict[str, Any] = {}
    if args.settings:
        try:
            result = yaml.safe_load(args.settings.read_text(encoding='utf-8')) or {}
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f'cannot read the settings {args.settings}: {error}') from None
        if not isinstance(result, dict):
            raise UserError(f'{args.settings} should hold keys and values, such as strength: {{none: 0.2}}')
    switches = ('saturation', 'noise', 'isp', 'demosaic', 'jpeg')
    sections = {
        'strength': {key: getattr(args, key) for key in ('none', 'length', 'power')},
        'realism': dict.fromkeys(switches, 0 if args.plain else None),
    }
    sections['realism'] |= {key: getattr(args, key) for key in switches if getattr(args, key) is not None}
    for name, section in sections.items():
        given = {key: value for key, value in section.items() if value is not None}
        if given:
            result[name] = {**(result.get(name) or {}), **given}
    for key, value in (('camera', args.response), ('frames', args.frames), ('interpolate', args.interpolate)):
        if value is not None:
            result[key] = value
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9_-]*', args.name):
        raise UserError(f'--name {args.name!r} cannot name a data set; use letters, digits, - and _ only')
    given = settings(args)
    where = str(args.settings) if args.settings else 'settings'
    if args.kind == 'video':
        if args.crop:
            raise UserError('--crop is for photographs; --folders and tools/create_lmdb.py --crop cut video')
        averaging = from_options(Averaging, given, where)
        windows = find_windows(find_clips([Path(name) for name in args.input]), averaging, args.seed)
        recipe = Recipe(args.kind, args.seed, averaging=averaging)
        jobs = window_jobs(windows, args.count, args.seed)
    else:
        given = {**given, 'root': list(args.input), 'memory': MEGABYTES / args.workers}
        source = from_options(SOURCES[args.kind], given, where)
        files = photograph_files(source.root, source.match)
        recipe = Recipe(args.kind, args.seed, args.crop, source=source, files=fingerprint(files))
        jobs = photograph_jobs(args.kind, args.count or len(files))
    synthesize(recipe, jobs, args.out, args.name, not args.folders, args.workers, args.force)


if __name__ == '__main__':
    raise SystemExit(guarded(main))
