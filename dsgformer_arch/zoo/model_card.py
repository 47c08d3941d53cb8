"""Model cards, as Hugging Face shows them, generated from the table of systems."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dsgformer_arch.zoo.systems import System

LIBRARY = 'dsgformer'

LICENCES = {'MIT': 'mit', 'Apache 2.0': 'apache-2.0', "this repository's": 'apache-2.0'}
"""The hub's identifiers of `System.licence`; every other one is `other`, with its text as its name."""

CARD = """\
---
{front}
---

# {system}: {architecture} for image {task}

{title}. {authors}{venue}{year}.{paper}

{parameters:.2f} M parameters. The network takes RGB images as float32 tensors (N, 3, H, W) in [0, 1], of any
height and width, and returns the same shape. Official implementation: {release} (licence: {licence}).

## Usage

    pip install 'dsgformer[hub]'

```python
import torch
import dsgformer_arch
from dsgformer_arch import zoo
from dsgformer_arch.restore import restore

network = zoo.from_pretrained('{repo}')
restored = restore(network, torch.rand(1, 3, 256, 256)).clamp(0, 1)
```

`dsgformer_arch.Deblurrer(network)` restores NumPy arrays and PIL images, in tiles where memory is short.

## Settings

```json
{settings}
```

## Training data and evaluation

State here what these weights were trained on and what you measured.
{reported}"""

REPORTED = """
The paper reports for its own weights, which need not be these:

| test set | PSNR, dB | SSIM |
|---|---:|---:|
{rows}
"""


def text(
    about: System, system: str, settings: Mapping[str, Any], parameters: int, repo: str, licence: str | None
) -> str:
    """The model card of a network, `README.md`.

    Args:
        about: the system, or one of the same architecture where the settings are no system's.
        system: what the network is called.
        settings: all of them.
        parameters: their number.
        repo: `owner/name` or a folder, for the usage.
        licence: the hub's identifier; None for the one of the official implementation.
    """
    reported = about.reported if system == about.name else ()
    rows = [f'| {one.dataset} | {one.psnr:.2f} | {one.ssim or "–"} |' for one in reported]
    return CARD.format(
        front='\n'.join(front_matter(about, system, licence)),
        system=system,
        architecture=about.architecture,
        task=about.task,
        title=about.title,
        authors=about.authors,
        venue=f' {about.venue}' if about.venue else '',
        year=f' {about.year}',
        paper=f' {about.url}' if about.url else '',
        parameters=parameters / 1e6,
        release=about.release,
        licence=about.licence,
        repo=repo,
        settings=json.dumps(dict(settings), indent=2),
        reported=REPORTED.format(rows='\n'.join(rows)) if rows else '',
    )


def front_matter(about: System, system: str, licence: str | None) -> list[str]:
    """The card's metadata in YAML, which the hub indexes."""
    identifier = licence or LICENCES.get(about.licence, 'other')
    lines = [f'library_name: {LIBRARY}', 'pipeline_tag: image-to-image', f'license: {identifier}']
    if identifier == 'other':
        # Text in JSON's quotes is valid YAML.
        lines += [f'license_name: {json.dumps(about.licence)}', f'license_link: {about.release}']
    tags = dict.fromkeys([about.task, 'image-restoration', about.architecture.lower(), system.lower()])
    return [*lines, 'tags:', *(f'- {tag}' for tag in tags)]
