"""The parity rule itself: what it must let pass and what it must catch."""

from __future__ import annotations

import torch

from bigkern.parity import compare

N = 4096


def case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A float64 reference and a stock result with the rounding error of ``dtype``."""
    torch.manual_seed(0)
    reference = torch.randn(N, dtype=torch.float64)
    return reference, reference.to(dtype)


def test_stock_passes_against_itself() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        reference, stock = case(dtype)
        assert compare(stock, reference, stock).passed


def test_a_larger_error_fails_and_the_ratio_tells() -> None:
    reference, stock = case(torch.bfloat16)
    ours = (reference + 5 * (stock.double() - reference)).float()
    verdict = compare(ours.bfloat16().float(), reference, stock)
    assert not verdict.passed
    assert 3 < verdict.ratio < 7


def test_gradients_are_allowed_three_times() -> None:
    reference = torch.zeros(N, dtype=torch.float64)
    stock = torch.full((N,), 1e-3)
    ours = torch.full((N,), 2.5e-3)
    assert not compare(ours, reference, stock).passed
    assert compare(ours, reference, stock, gradient=True).passed


def test_one_wrong_element_fails() -> None:
    reference, stock = case(torch.float32)
    ours = stock.clone()
    ours[17] += 1e-3
    assert "max error" in str(compare(ours, reference, stock).problem)


def test_a_small_error_everywhere_fails() -> None:
    """The mean is held too: a systematic error hides under one large stock error otherwise."""
    reference, stock = case(torch.float32)
    stock = stock.clone()
    stock[0] += 1.0
    assert "mean error" in str(compare(stock + 0.01, reference, stock).problem)


def test_nan_infinity_and_shape_fail() -> None:
    reference, stock = case(torch.float32)
    ours = stock.clone()
    ours[3] = float("nan")
    assert "NaN" in str(compare(ours, reference, stock).problem)
    ours[3] = float("-inf")
    assert "infinities" in str(compare(ours, reference, stock).problem)
    assert "shape" in str(compare(stock[1:], reference, stock).problem)


def test_the_same_infinities_pass() -> None:
    reference, stock = case(torch.float32)
    reference[5], stock[5] = float("-inf"), float("-inf")
    assert compare(stock, reference, stock).passed


def test_an_unwritten_output_fails() -> None:
    reference, stock = case(torch.bfloat16)
    assert not compare(torch.zeros_like(stock), reference, stock).passed
