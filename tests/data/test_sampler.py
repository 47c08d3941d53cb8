"""The stream of training samples: complete passes, any starting point, seeds by position, corrupt images."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from dsgformer_arch.data.sampler import SampleStream, SeededSamples, training_loader
from dsgformer_arch.utils.errors import UserError


class Draws(torch.utils.data.Dataset):
    """Returns its index and what it drew at random; one index may be corrupt."""

    def __init__(self, length: int = 5, corrupt: tuple[int, ...] = ()) -> None:
        self.paths = [{'lq_path': f'image-{index}'} for index in range(length)]
        self.corrupt = corrupt

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.corrupt:
            raise ValueError('no such marker')
        return {
            'index': index,
            'drawn': torch.tensor([random.random(), np.random.random(), torch.rand(1).item()]),
        }


def positions(stream: SampleStream) -> list[int]:
    return [position for batch in stream for position, _ in batch]


def test_each_pass_has_every_image_once() -> None:
    stream = SampleStream(length=5, batch_size=3, batches=10, seed=1)
    indices = [index for batch in stream for _, index in batch]
    passes = [indices[start : start + 5] for start in range(0, 30, 5)]
    assert all(sorted(each) == list(range(5)) for each in passes)
    assert len({tuple(each) for each in passes}) > 1
    assert positions(stream) == list(range(30))


def test_a_stream_starts_anywhere() -> None:
    whole = list(SampleStream(length=5, batch_size=3, batches=10, seed=1))
    assert list(SampleStream(length=5, batch_size=3, batches=6, seed=1, start=12)) == whole[4:]
    assert list(SampleStream(length=5, batch_size=3, batches=10, seed=2)) != whole


def test_processes_share_a_batch() -> None:
    alone = list(SampleStream(length=7, batch_size=4, batches=6, seed=1))
    shares = [
        list(SampleStream(length=7, batch_size=2, batches=6, seed=1, rank=rank, world_size=2))
        for rank in (0, 1)
    ]
    assert [first + second for first, second in zip(*shares, strict=True)] == alone


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(UserError, match='empty'):
        SampleStream(length=0, batch_size=1, batches=1, seed=0)


def load(workers: int, start: int = 0, **settings: Any) -> list[dict[str, Any]]:
    dataset = Draws(**settings.pop('dataset', {}))
    stream = SampleStream(len(dataset), 2, 8 - start // 2, seed=3, start=start)
    return list(training_loader(dataset, stream, workers, settings.get('replace', False), False))


@pytest.mark.parametrize('workers', [0, 1, 2])
def test_draws_follow_from_the_position(workers: int) -> None:
    """With any number of workers, and from the middle of a pass on."""
    expected = load(0)
    random.seed(9)
    found = load(workers, start=6)
    for before, after in zip(expected[3:], found, strict=True):
        assert torch.equal(before['drawn'], after['drawn'])
        assert torch.equal(before['index'], after['index'])
    drawn = torch.cat([batch['drawn'] for batch in expected]).flatten().tolist()
    assert max(Counter(drawn).values()) == 1, 'two samples drew alike'


@pytest.mark.parametrize('workers', [0, 2])
def test_a_corrupt_image_is_reported_in_one_sentence(workers: int) -> None:
    batches = load(workers, dataset={'corrupt': (2,)})
    errors = [batch['error'] for batch in batches if 'error' in batch]
    assert errors
    assert all('image-2 cannot be read (ValueError: no such marker)' in error for error in errors)
    assert all('\n' not in error for error in errors)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_corrupt_image_is_replaced(workers: int) -> None:
    batches = load(workers, dataset={'corrupt': (2,)}, replace=True)
    assert not any('error' in batch for batch in batches)
    indices = torch.cat([batch['index'] for batch in batches])
    assert 2 not in indices
    assert indices.numel() == 16
    faults = {fault for batch in batches for fault in batch['faults']}
    assert len(faults) == 1
    assert 'image-2' in faults.pop()


def test_a_set_of_corrupt_images_is_given_up() -> None:
    sample = SeededSamples(Draws(3, corrupt=(0, 1, 2)), seed=0, replace=True)[0, 1]
    assert '3 images in a row' in sample['error']
    assert 'image-1' in sample['error']


def test_items_of_an_epoch_are_those_of_the_pass() -> None:
    class Mixed(Draws):
        def item(self, index: int, epoch: int) -> dict[str, Any]:
            return {'index': index, 'epoch': epoch}

    samples = SeededSamples(Mixed(5), seed=0)
    assert samples[4, 1] == {'index': 1, 'epoch': 0, 'faults': []}
    assert samples[10, 1] == {'index': 1, 'epoch': 2, 'faults': []}
