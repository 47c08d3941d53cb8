"""The real basis of DFGB against the real FFT."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsgformer_arch.archs.dsgformer_arch import DFGB
from dsgformer_arch.ops import dfgb


def _gate(channels: int) -> DFGB:
    gate = DFGB(channels).double()
    torch.nn.init.normal_(gate.mask)  # no symmetry: ±u differ in the columns 0 and 4
    return gate


def _filtered(gate: DFGB, U: torch.Tensor) -> torch.Tensor:
    return F.gelu(dfgb.filtered(U.permute(0, 2, 3, 1), gate.mask)).permute(0, 3, 1, 2)


def test_basis_is_orthonormal() -> None:
    B = dfgb.basis(torch.float64, torch.device('cpu'))
    torch.testing.assert_close(B @ B.t(), torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-14)


def test_each_row_of_the_basis_is_one_frequency() -> None:
    power = torch.fft.rfft2(dfgb.basis(torch.float64, torch.device('cpu')).view(64, 8, 8)).abs() > 1e-9
    # A wave that is not its own negative shows twice in the columns 0 and 4, elsewhere once.
    assert set(power.flatten(1).sum(1).tolist()) == {1, 2}
    assert not power[:, :, 1:4].flatten(1).sum(1).gt(1).any()


@pytest.mark.parametrize('shape', [(1, 3, 8, 8), (2, 3, 24, 16), (1, 2, 13, 9), (2, 1, 1, 3), (1, 2, 8, 20)])
def test_equals_the_fft(shape: tuple[int, ...]) -> None:
    gate, U = _gate(shape[1]), torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(_filtered(gate, U), gate(U), rtol=1e-12, atol=1e-12)


def test_gradients_equal_those_of_the_fft() -> None:
    gate, U = _gate(3), torch.randn(2, 3, 10, 17, dtype=torch.float64, requires_grad=True)
    seed = torch.randn_like(U)
    reference = torch.autograd.grad(gate(U), [U, gate.mask], seed)
    fast = torch.autograd.grad(_filtered(gate, U), [U, gate.mask], seed)
    for ours, theirs in zip(fast, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_bfloat16_is_as_near_as_bfloat16_allows() -> None:
    gate, U = _gate(4), torch.randn(1, 4, 64, 64, dtype=torch.float64)
    exact = gate(U)
    error = (_filtered(gate, U.bfloat16()).double() - exact).norm() / exact.norm()
    assert error < 3 * torch.finfo(torch.bfloat16).eps
