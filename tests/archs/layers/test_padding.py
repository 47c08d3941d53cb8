"""Reflection of any image to any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsgformer_arch.archs.layers.padding import pad_to_multiple, padded_size


@pytest.mark.parametrize('size', [(1, 3), (16, 17), (5, 40), (64, 64)])
@pytest.mark.parametrize(('multiple', 'minimum'), [(8, 8), (32, 64), (1, 1)])
def test_equals_numpy_reflection(size: tuple[int, int], multiple: int, minimum: int) -> None:
    x = torch.rand(2, 3, *size)
    y = pad_to_multiple(x, multiple, minimum)
    target = [padded_size(side, multiple, minimum) for side in size]
    assert list(y.shape[-2:]) == target
    widths = [(0, 0), (0, 0), *((0, t - s) for t, s in zip(target, size, strict=True))]
    np.testing.assert_array_equal(y.numpy(), np.pad(x.numpy(), widths, mode='reflect'))


def test_nothing_is_copied_where_nothing_is_missing() -> None:
    x = torch.rand(1, 3, 16, 24)
    assert pad_to_multiple(x, 8) is x


def test_padded_size() -> None:
    assert [padded_size(n, 8) for n in (1, 8, 9)] == [8, 8, 16]
    assert padded_size(16, 8, 64) == 64
