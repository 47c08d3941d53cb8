"""The README's table of systems, from `zoo.systems` and `complexity`."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from dsgformer_arch import zoo
from dsgformer_arch.benchmark.measure import complexity
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.files import write_text
from dsgformer_arch.utils.progress import track
from dsgformer_arch.zoo.systems import SYSTEMS, Reported, System

BEGIN, END = '<!-- systems:begin -->', '<!-- systems:end -->'

NAMES = tuple(system.name for system in SYSTEMS)

SIZE = 256
"""Side of the image for which MACs are counted."""

DERAINING = ('Test100', 'Rain100H', 'Rain100L', 'Test2800', 'Test1200')
"""Rain13K's test sets."""

COLUMNS = (
    'system',
    'paper',
    'parameters',
    f'MACs at {SIZE}×{SIZE}',
    'pads to multiples of',
    '`torch.compile`',
    'bf16',
    'TLC',
    'GoPro',
    *DERAINING,
)

LEGEND = f"""\
MACs: multiply-accumulate operations of convolutions and matrix products, those of attention included, for
{SIZE}×{SIZE}; `+` FFTs. "Official" is what the official implementation spends where the code here computes
the same with less. TLC: whether the test-time local converter applies. GoPro and the five test sets of
Rain13K: PSNR / SSIM as the system's own paper reports them; empty where it does not, or where the number
could not be confirmed.
`dsgformer_arch/zoo/systems.py` has the table and the source of each number, and results on other sets.
"""


def rewrite(readme: str | os.PathLike[str]) -> bool:
    """Put the table between the markers of a Markdown file.

    Returns:
        Whether the file has changed.

    Raises:
        UserError: it cannot be read, or has not the two markers in order.
    """
    path = Path(readme)
    try:
        text = path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'cannot read {path}: {error}') from None
    start, end = text.find(BEGIN), text.find(END)
    if not 0 <= start < end:
        raise UserError(f'{path} needs the lines {BEGIN} and {END}, in this order')
    changed = f'{text[: start + len(BEGIN)]}\n{table()}\n{text[end:]}'
    if changed == text:
        return False
    write_text(changed, path)
    return True


def table() -> str:
    """The table in Markdown, with its legend."""
    lines = [COLUMNS, ('---',) * len(COLUMNS)]
    lines += [row(zoo.get(name)) for name in track(NAMES, 'counting systems')]
    return '\n'.join([*(f'| {" | ".join(line)} |' for line in lines), '', LEGEND])


def row(system: System) -> tuple[str, ...]:
    """The cells of one system."""
    first = system.authors.split(' ')[0]
    others = ' et al.' if ',' in system.authors else ''
    paper = f'{first}{others}, {system.venue} {system.year}'.replace(',  ', ', ')
    return (
        f'`{system.name}`',
        f'[{paper}]({system.url})' if system.url else paper,
        f'{system.parameters / 1e6:.2f} M',
        macs_text(system.name, SIZE),
        padding(system),
        system.compiles,
        system.bf16,
        'yes' if system.tlc else 'no',
        *(result(system.reported, dataset) for dataset in ('GoPro', *DERAINING)),
    )


@cache
def macs_text(name: str, side: int) -> str:
    """MACs of a system for a square image: what papers count, FFTs apart, the official implementation's."""
    spent, system = complexity.count(name, side), zoo.get(name)
    text = f'{spent.published / 1e9:.1f} G'
    if spent.fourier:
        text += f' + {spent.fourier / 1e9:.1f} G'
    if system.release_excess and side == SIZE:
        text += f' (official: {(spent.published + system.release_excess) / 1e9:.1f} G)'
    return text


def padding(system: System) -> str:
    """What a system pads to: a multiple, and the least size where that is larger."""
    network: Any = zoo.create_on_meta(system.name)
    multiple, least = network.pad_multiple, network.min_size
    return f'{multiple}, at least {least}' if least > multiple else f'{multiple}'


def result(reported: tuple[Reported, ...], dataset: str) -> str:
    """`PSNR / SSIM` on a test set; empty where nothing is reported."""
    for entry in reported:
        if entry.dataset == dataset:
            return f'{entry.psnr:.2f} / {entry.ssim:.3f}' if entry.ssim is not None else f'{entry.psnr:.2f}'
    return ''
