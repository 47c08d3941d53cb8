"""The data behind `dsgformer models` and `dsgformer info`: systems, their weights, and files."""

from __future__ import annotations

import math
import os
from typing import Any

from dsgformer_arch import zoo
from dsgformer_arch.inference import official_weights
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.zoo.checkpoint import read_checkpoint


def table() -> list[dict[str, Any]]:
    """One dict for each system: name, task, parameters, giga_macs, reported, weights, paper, licence.

    `giga_macs` are 10⁹ MACs at 256×256, None if not counted.
    `reported` are dicts of dataset, psnr and ssim.  `weights` are dicts of name, state (`'in the package'`,
    `'downloaded'`, `'can be downloaded'` or `'by hand'`) and page.
    """
    rows = []
    for name in zoo.names():
        system = zoo.get(name)
        rows.append(
            {
                'name': name,
                'task': system.task,
                'parameters': system.parameters,
                'giga_macs': system.giga_macs,
                'paper': ' '.join(part for part in (system.authors, system.venue, str(system.year)) if part),
                'licence': system.licence,
                'reported': [
                    {'dataset': one.dataset, 'psnr': one.psnr, 'ssim': one.ssim} for one in system.reported
                ],
                'weights': _weights(name),
            }
        )
    return rows


def _weights(name: str) -> list[dict[str, str]]:
    found = []
    if name in zoo.shipped():
        found.append({'name': name, 'state': 'in the package', 'page': ''})
    for entry in official_weights.TABLE:
        if entry.system == name:
            state = (
                'downloaded'
                if official_weights.cached(entry)
                else 'can be downloaded'
                if entry.url
                else 'by hand'
            )
            found.append({'name': entry.key, 'state': state, 'page': entry.page})
    return found


def as_text(rows: list[dict[str, Any]]) -> str:
    """The table for a terminal."""
    titles = ('system', 'task', 'parameters', 'GMACs at 256×256', 'reported on GoPro', 'weights')
    cells = [titles]
    for row in rows:
        gopro = next((one for one in row['reported'] if one['dataset'] == 'GoPro'), None)
        reported = '' if gopro is None else f'{gopro["psnr"]:.2f} dB'
        if gopro is not None and gopro['ssim'] is not None:
            reported += f', {gopro["ssim"]:.3f}'
        states = ', '.join(
            f'{one["name"].partition("/")[2] or "default"}: {one["state"]}' for one in row['weights']
        )
        macs = '' if row['giga_macs'] is None else f'{row["giga_macs"]:g}'
        parameters = f'{row["parameters"] / 1e6:.2f} M'
        cells.append((row['name'], row['task'], parameters, macs, reported, states or 'none known'))
    widths = [max(len(line[i]) for line in cells) for i in range(len(titles) - 1)]
    lines = []
    for line in cells:
        padded = [
            text.rjust(width) if i in (2, 3) else text.ljust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=False))
        ]
        lines.append('  '.join([*padded, line[-1]]).rstrip())
    return '\n'.join(lines)


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a file: an image, a video or a checkpoint.

    Returns:
        JSON-compatible entries; `kind` is `'image'`, `'video'` or `'weights'`.

    Raises:
        UserError: it is missing, or none of these.
    """
    from dsgformer_arch.inference.images import open_image, sniff
    from dsgformer_arch.inference.jobs import VIDEOS

    file = os.fspath(path)
    if not os.path.isfile(file):
        raise UserError(f'{file}: there is no such file')
    size = os.path.getsize(file)
    with open(file, 'rb') as stream:
        head = stream.read(64)
    found: dict[str, Any] = {'file': file, 'bytes': size}
    if sniff(head) is not None:
        image = open_image(file)
        height, width = image.size
        return found | {
            'kind': 'image',
            'format': image.format,
            'width': width,
            'height': height,
            'channels': {1: 'grey', 2: 'grey and alpha', 3: 'RGB', 4: 'RGB and alpha'}[image.channels],
            'bits': image.dtype.itemsize * 8,
            'icc profile': image.metadata.icc is not None,
            'exif': image.metadata.exif is not None,
            'notes': image.notes,
        }
    if os.path.splitext(file)[1].lower() in VIDEOS:
        from dsgformer_arch.inference.video import describe_video

        return found | describe_video(file)
    checkpoint = read_checkpoint(file)
    name, settings = zoo.identify(checkpoint.state)
    stated = checkpoint.metadata.get('system')
    return found | {
        'kind': 'weights',
        'system': stated or name,
        'settings': settings,
        'parameters': sum(math.prod(tensor.shape) for tensor in checkpoint.state.values()),
        'types': sorted({str(tensor.dtype).removeprefix('torch.') for tensor in checkpoint.state.values()}),
    }
