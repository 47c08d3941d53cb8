from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dsgformer_arch import zoo
from dsgformer_arch.benchmark.measure import learning
from dsgformer_arch.metrics.protocols import protocol
from dsgformer_arch.utils.errors import UserError
from tests.trees import random_image, write_lmdb

CPU = torch.device('cpu')
RECIPE = learning.Recipe(iterations=4, seconds=None, batch=2, patch=16, lr=1e-3, validations=2)


@pytest.fixture
def data(sample: Path) -> learning.Data:
    return learning.read(sample, 16)


class Recorder(nn.Module):
    """Keeps the training crops that it sees; its output depends on `gain`."""

    input_offset = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.append(x.detach().clone())
        return x * self.gain


def test_equal_seeds_give_bit_identical_crops(data: learning.Data) -> None:
    first, again, other = (list(islice(learning.batches(data.train, RECIPE, seed), 5)) for seed in (3, 3, 4))
    for (gt, lq), (gt_again, lq_again) in zip(first, again, strict=True):
        assert torch.equal(gt, gt_again)
        assert torch.equal(lq, lq_again)
        assert gt.shape == lq.shape == (2, 3, 16, 16)
    assert not torch.equal(first[0][0], other[0][0])


def test_all_systems_are_trained_on_the_same_crops(data: learning.Data) -> None:
    recorders = [Recorder(), Recorder()]
    nn.init.constant_(recorders[1].gain, 0.5)
    for recorder in recorders:
        learning.train(lambda r=recorder: r, data, RECIPE, 7, CPU)  # type: ignore[misc]
    expected = [lq for _, lq in islice(learning.batches(data.train, RECIPE, 7), 4)]
    for recorder in recorders:
        assert len(recorder.seen) == 4
        assert all(torch.equal(a, b) for a, b in zip(recorder.seen, expected, strict=True))


def test_both_images_of_a_pair_are_cropped_flipped_and_rotated_alike() -> None:
    sharp = [random_image(i, 30, 34) // 2 for i in range(3)]
    stream = learning.batches((sharp, [image + 20 for image in sharp]), RECIPE, 0)
    for gt, lq in islice(stream, 20):
        torch.testing.assert_close(lq - gt, torch.full_like(gt, 20 / 255), atol=1e-6, rtol=0)


def test_crops_come_from_everywhere_in_all_eight_positions() -> None:
    marked = np.zeros((16, 16, 3), np.uint8)
    marked[0, 1] = 255  # one pixel whose place tells flips and turns apart
    found = {
        tuple(np.argwhere(crop[0].numpy() > 0)[0].tolist())
        for gt, _ in islice(learning.batches(([marked], [marked]), RECIPE, 0), 60)
        for crop in gt
    }
    assert found == {(a, b) for a in (0, 15) for b in (1, 14)} | {(a, b) for a in (1, 14) for b in (0, 15)}


def test_the_learning_rate_warms_up_and_falls_as_a_cosine() -> None:
    peak = 1e-3
    assert learning.learning_rate(0.0, peak) == pytest.approx(0.02 * peak)
    assert learning.learning_rate(0.025, peak) == pytest.approx(0.5 * peak)
    assert learning.learning_rate(0.05, peak) == pytest.approx(peak)
    assert learning.learning_rate(0.525, peak) == pytest.approx((peak + 1e-6) / 2)
    assert learning.learning_rate(1.0, peak) == pytest.approx(1e-6)


def test_a_run_is_measured_as_often_as_asked_and_at_its_end(data: learning.Data) -> None:
    ticks: list[float] = []
    result = learning.train(lambda: zoo.create('tiny'), data, RECIPE, 0, CPU, ticks.append)
    assert [point['iteration'] for point in result['curve']] == [2, 4]
    assert ticks == [0.25, 0.5, 0.75, 1.0]
    assert (result['iterations'], result['psnr']) == (4, result['curve'][-1]['psnr'])
    assert all(math.isfinite(point['loss']) for point in result['curve'])


def test_equal_seeds_give_equal_results(data: learning.Data) -> None:
    def psnr(seed: int) -> float:
        return float(learning.train(lambda: zoo.create('tiny'), data, RECIPE, seed, CPU)['psnr'])

    assert psnr(5) == psnr(5)
    assert psnr(5) != psnr(6)


@pytest.mark.parametrize(('threads', 'clock'), [(1, 'process_time'), (2, 'perf_counter')])
def test_a_budget_in_seconds_counts_training_only(
    threads: int, clock: str, data: learning.Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    class Slow(Recorder):
        def forward(self, x: Tensor) -> Tensor:
            now[0] += 1.0 if self.training else 100.0
            return super().forward(x)

    monkeypatch.setattr(learning.time, clock, lambda: now[0])
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    recipe = learning.Recipe(None, seconds=3.0, batch=1, patch=16, lr=1e-3, validations=3)
    result = learning.train(Slow, data, recipe, 0, CPU)
    assert (result['iterations'], result['seconds']) == (3, 3.0)
    assert [point['seconds'] for point in result['curve']] == [1.0, 2.0, 3.0]


def test_images_are_shifted_for_the_networks_that_want_it(data: learning.Data) -> None:
    recorder = Recorder()
    recorder.input_offset = 0.5
    result = learning.train(lambda: recorder, data, RECIPE, 0, CPU)
    _, lq = next(learning.batches(data.train, RECIPE, 0))
    torch.testing.assert_close(recorder.seen[0], lq - 0.5)
    assert result['psnr'] > 15, 'shifted back before it is measured'


def test_training_lowers_the_loss_of_something_simple() -> None:
    sharp = [random_image(i, 24, 24) // 2 for i in range(3)]
    pairs = (sharp, [image + 60 for image in sharp])

    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.by

    recipe = learning.Recipe(60, None, batch=2, patch=16, lr=2e-2, validations=2)
    result = learning.train(Shift, learning.Data(pairs, pairs), recipe, 0, CPU)
    assert result['curve'][-1]['loss'] < 0.3 * 60 / 255
    assert result['psnr'] > 10 + 20 * math.log10(255 / 60)


def test_scores_of_the_blurred_images(data: learning.Data) -> None:
    evaluated = [protocol('gopro').evaluate(b, s) for s, b in zip(*data.test, strict=True)]
    for key, value in learning.blurred_scores(data).items():
        assert value == pytest.approx(np.mean([scores[key] for scores in evaluated]), abs=1e-9)


def test_reading(sample: Path, tmp_path: Path) -> None:
    data = learning.read(sample, 40)
    assert (len(data.train[0]), len(data.test[0])) == (3, 2)
    np.testing.assert_array_equal(data.train[0][1], random_image(1, 40, 48)[..., ::-1])
    with pytest.raises(UserError, match=r'--patch is 41, but .* training images of 40 pixels'):
        learning.read(sample, 41)
    with pytest.raises(UserError, match='no finished LMDB'):
        learning.read(tmp_path, 16)
    images: dict[str, Any] = {'a': random_image(0, 20, 20)}
    write_lmdb(tmp_path / 'train_lq.lmdb', images)
    write_lmdb(tmp_path / 'train_gt.lmdb', {**images, 'b': random_image(0, 20, 20)})
    with pytest.raises(UserError, match='the image b has no partner'):
        learning.read(tmp_path, 16)


def test_betas_frequency_loss_and_precision_change_the_training(data: learning.Data) -> None:
    def psnr(**changes: Any) -> float:
        def build() -> nn.Module:
            return zoo.create('tiny')

        return learning.train(build, data, replace(RECIPE, lr=1e-2, **changes), 0, CPU)['psnr']

    plain = psnr()
    found = [psnr(betas=(0.9, 0.9)), psnr(frequency=0.1), psnr(precision='bf16')]
    assert len({plain, *found}) == 4
    words = replace(RECIPE, betas=(0.9, 0.9), frequency=0.1, precision='bf16').describe()
    assert 'L1 + 0.1·FFT loss' in words
    assert 'betas 0.9 and 0.9,' in words
    assert 'bfloat16 autocast' in words
    assert 'L1 loss' in RECIPE.describe()
    assert 'float32' in RECIPE.describe()
