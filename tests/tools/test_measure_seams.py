"""`tools/measure_seams.py` compares tiles with the whole image and counts what they cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsgformer_arch.utils.errors import UserError
from tools import measure_seams


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).integers(0, 255, (6, 10, 3), dtype=np.uint8)
    path = tmp_path / 'picture.png'
    Image.fromarray(values).resize((160, 96), Image.Resampling.BICUBIC).save(path)
    return path


def test_a_line_for_each_tile(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure_seams.main([str(picture), '--tiles', '400', '64', '--mosaic', '2'])
    title, _, whole, tiled = capsys.readouterr().out.splitlines()
    assert title == '| tile | picture | cost |'
    assert whole == '| 400 | 0.00 / 0.0 | 1.00 |'
    tile, difference, cost = tiled.strip('| ').split(' | ')
    mean, most = map(float, difference.split(' / '))
    assert tile == '64'
    assert 0 < mean < most < 255
    assert 1 < float(cost) < 4


def test_what_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / 'text.png'
    path.write_text('text', encoding='utf-8')
    with pytest.raises(UserError, match='cannot be read as an image'):
        measure_seams.main([str(path)])
