"""Turn a data set, as its authors pack it, into streams: shards for `StreamingPairedDataset`.

    python tools/create_stream.py gopro GOPRO_Large datasets/gopro_stream
    python tools/create_stream.py gopro GOPRO_Large s3://bucket/gopro

write a stream of each split, `train` and `test`, below the folder or the address.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dsgformer_arch.data.prepare.arguments import add_choices, add_source, layouts, splits_of
from dsgformer_arch.data.prepare.stream_writer import create_streams
from dsgformer_arch.utils.arguments import positive
from dsgformer_arch.utils.errors import UserError, guarded

MOST_MEGABYTES = 1024


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description='Turn a data set, as its authors pack it, into streams for StreamingPairedDataset: for '
        'each split OUT/<split>, with shards of pairs of images as their files hold them.',
        epilog=f'presets and what they expect below ROOT:\n{layouts()}\n\n'
        'Images are checked as they are copied; where anything is wrong, all of it is listed, the exit\n'
        'status is 2 and no stream is written.  Run the same command again to continue an interrupted run.\n'
        'For S3, credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, and\n'
        "AWS_ENDPOINT_URL is the address of a store other than Amazon's.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source(result)
    result.add_argument(
        'out',
        metavar='OUT',
        help='the folder for the streams, as datasets/gopro_stream, or s3://bucket/prefix',
    )
    add_choices(result)
    result.add_argument(
        '--shard-size',
        metavar='MB',
        type=positive,
        default=64,
        help='megabytes of images in a shard (default: %(default)s)',
    )
    result.add_argument('--verify', action='store_true', help='compare every stored image with its file')
    result.add_argument('--force', action='store_true', help='replace streams that OUT already holds')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.shard_size > MOST_MEGABYTES:
        raise UserError(f'--shard-size is {args.shard_size}; shards have at most {MOST_MEGABYTES} MB')
    splits = splits_of(args)
    size = args.shard_size * 10**6
    create_streams(splits, args.out, args.preset, size, args.workers, args.verify, args.force)


if __name__ == '__main__':
    raise SystemExit(guarded(main))
