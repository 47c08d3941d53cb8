"""Every data set class is measured in the same turns."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsgformer_arch.benchmark.measure import loader
from dsgformer_arch.benchmark.render import loader as rendering
from dsgformer_arch.utils.errors import UserError
from tests.streams import write_images, write_lmdbs, write_stream


def test_streams_are_measured_next_to_lmdbs(tmp_path: Path) -> None:
    pytest.importorskip('litdata')
    images = write_images(tmp_path / 'images', 4)
    write_lmdbs(images, tmp_path)
    stream = write_stream(images, tmp_path / 'stream')
    record = loader.run(
        str(tmp_path / 'train'),
        patch=16,
        batch=2,
        workers=0,
        rounds=1,
        seconds=0.05,
        out=tmp_path / 'loader',
        streams=[stream],
    )
    names = [row['dataset'] for row in record.rows]
    assert names == ['PairedImageDataset', 'PairedCropDataset', 'StreamingPairedDataset, folder']
    assert all(row['pairs_per_second'] > 0 for row in record.rows)
    assert record.settings['streams'] == ['stream/train']
    page = rendering.RENDERING.page(record)
    assert all(f'| {name} |' in page for name in names)


def test_an_unreadable_image_ends_the_measurement(tmp_path: Path) -> None:
    pytest.importorskip('litdata')
    images = write_images(tmp_path / 'images', 2)
    write_lmdbs(images, tmp_path)
    stream = Path(write_stream(images, tmp_path / 'stream'))
    (shard,) = stream.glob('chunk-*.bin')
    data = shard.read_bytes()
    shard.write_bytes(bytes(len(data)))
    with pytest.raises(UserError, match=f'{shard.name} is damaged'):
        loader.crops_per_second('StreamingPairedDataset', {'dataroot': str(stream)}, 16, 2, 0, 1.0)
