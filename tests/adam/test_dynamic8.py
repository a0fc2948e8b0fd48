"""The 8-bit codes: the codebook, what comes back from it, and its error."""

from __future__ import annotations

import pytest
import torch

from bigkern.ops.adam.dynamic8 import BLOCK, blocks_of, codebook, dequantised, quantised


@pytest.mark.parametrize("signed", [True, False])
def test_codebook(signed: bool) -> None:
    """256 values, ascending, from -1 or 0 to 1; 0 among them; seven decades, twice as fine each."""
    values = codebook(signed)
    assert values.shape == (256,)
    assert (values.diff() > 0).all()
    assert values[127 if signed else 0] == 0
    assert values[-1] == 1
    positive = values[values > 0][:-1]
    per_decade = [int(((positive > 10.0 ** (d - 1)) & (positive < 10.0**d)).sum()) for d in range(-6, 1)]
    assert per_decade == [(1 if signed else 2) * 2**i for i in range(7)]
    if signed:
        torch.testing.assert_close(values[:127], -values[128:255].flip(0), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_come_back(signed: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    x = dequantised(codes, torch.tensor([3.0]), signed)
    again, scales = quantised(x, signed)
    assert torch.equal(again, codes)
    assert scales.tolist() == [3.0]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 1000])
def test_nearest(signed: bool, n: int) -> None:
    torch.manual_seed(n)
    x = torch.randn(n) * 10.0 ** (torch.rand(n) * -8)
    x = x if signed else x.square()
    codes, scales = quantised(x, signed)
    assert codes.dtype == torch.uint8
    assert codes.shape == (n,)
    assert scales.shape == (blocks_of(n),) == ((n + BLOCK - 1) // BLOCK,)
    back = dequantised(codes, scales, signed).double()
    share = scales.repeat_interleave(BLOCK)[:n].double()
    distances = (x.double()[:, None] - codebook(signed) * share[:, None]).abs()
    if not signed:
        distances[:, 0] = torch.where(x > 0, torch.inf, distances[:, 0])  # is not for a v above 0
    assert ((back - x).abs() <= distances.amin(1) + 1e-6 * back.abs()).all()


def test_a_v_above_0_keeps_a_code_above_0() -> None:
    codes, _ = quantised(torch.tensor([1.0, 1e-30, 0.0]), signed=False)
    assert codes.tolist() == [255, 1, 0]


@pytest.mark.parametrize("signed", [True, False])
def test_zeros(signed: bool) -> None:
    codes, scales = quantised(torch.zeros(300), signed)
    assert codes.unique().tolist() == [127 if signed else 0]
    assert scales.tolist() == [0.0, 0.0]
    assert not dequantised(codes, scales, signed).any()


def test_a_nan_spoils_its_block_and_no_other() -> None:
    x = torch.ones(600)
    x[3] = float("nan")
    back = dequantised(*quantised(x, signed=True), signed=True)
    assert back[:BLOCK].isnan().all()
    assert torch.equal(back[BLOCK:], x[BLOCK:])
