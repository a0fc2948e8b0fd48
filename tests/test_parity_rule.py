"""The parity rule itself: what it must let pass and what it must catch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bigkern.core.parity import Verdict, Yardstick
from bigkern.core.random_rounding import RandomRounding, random_rounding

N = 4096
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def judged(ours: Tensor, exact: Tensor, stock: Tensor, name: str = "y") -> Verdict:
    """By a stock that always gives the same."""
    return Yardstick({name: exact}, lambda: {name: stock}).judge(name, ours)


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A float64 reference and a stock result with the rounding error of ``dtype``."""
    exact = torch.randn(N, dtype=torch.float64)
    return exact, exact.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stock_passes_against_itself(dtype: torch.dtype) -> None:
    exact, stock = case(dtype)
    assert judged(stock, exact, stock).passed


def test_a_larger_error_fails_and_the_ratio_tells() -> None:
    exact, stock = case(torch.bfloat16)
    ours = (exact + 5 * (stock.double() - exact)).float()
    verdict = judged(ours, exact, stock.float())
    assert not verdict.passed
    assert 4.9 < verdict.ratio < 5.1


def test_gradients_are_allowed_three_times() -> None:
    exact, stock, ours = torch.zeros(N).double(), torch.full((N,), 1e-3), torch.full((N,), 2.5e-3)
    assert not judged(ours, exact, stock).passed
    assert judged(ours, exact, stock, "dy").passed


def test_one_wrong_element_fails() -> None:
    exact, stock = case(torch.float32)
    ours = stock.clone()
    ours[17] += 1e-3
    assert "largest error" in str(judged(ours, exact, stock).problem)


def test_a_small_error_everywhere_fails() -> None:
    """The mean is held too: a systematic error hides under one large stock error otherwise."""
    exact, stock = case(torch.float32)
    stock[0] += 1.0
    assert "mean error" in str(judged(stock + 0.01, exact, stock).problem)


def test_errors_of_a_part_fail() -> None:
    """And the root of the mean square: many large errors hide in a mean, not one of them in the largest."""
    exact, stock = case(torch.float32)
    stock += 0.01
    stock[0] += 1.0
    ours = stock.clone()
    ours[:40] += 0.5
    assert "rms error" in str(judged(ours, exact, stock).problem)


def test_nan_infinity_shape_and_dtype_fail() -> None:
    exact, stock = case(torch.float32)
    ours = stock.clone()
    ours[3] = float("nan")
    assert "NaN" in str(judged(ours, exact, stock).problem)
    ours[3] = float("-inf")
    assert "infinities" in str(judged(ours, exact, stock).problem)
    assert "shape" in str(judged(stock[1:], exact, stock).problem)
    assert "torch.float16" in str(judged(stock.half(), exact, stock).problem)


def test_the_same_infinities_pass() -> None:
    exact, stock = case(torch.float32)
    exact[5], stock[5] = float("-inf"), float("-inf")
    assert judged(stock, exact, stock).passed


def test_an_unwritten_output_fails() -> None:
    exact, stock = case(torch.bfloat16)
    assert not judged(torch.zeros_like(stock), exact, stock).passed


# ---- luck ------------------------------------------------------------------------------------------


def test_where_stock_is_exact_by_luck() -> None:
    """One sum of eighteen terms: stock's happens to be right to the last digit, one in turn is not."""
    for seed in range(300):
        torch.manual_seed(seed)
        x, w = torch.randn(1, 18), torch.randn(1, 18)
        exact, stock = x.double() @ w.double().t(), x @ w.t()
        if stock.double().sub(exact).abs() < 0.02 * torch.finfo(torch.float32).eps * exact.abs():
            break
    in_turn = torch.zeros(1, 1)
    for i in range(18):
        in_turn += x[:, i : i + 1] * w[:, i : i + 1]
    yardstick = Yardstick({"y": exact}, lambda: {"y": x @ w.t()})
    assert yardstick.judge("y", in_turn).passed
    assert not yardstick.judge(
        "y", in_turn + 16 * torch.finfo(torch.float32).eps * exact.abs().float()
    ).passed


def test_a_difference_of_equal_sums_has_the_error_of_the_sums() -> None:
    """Softmax over one key: its gradient is 0, of which no multiple would let any rounding pass."""
    v, do = torch.randn(1, 40), torch.randn(1, 40)

    def gradient() -> dict[str, Tensor]:
        return {"dx": (do @ v.t()) - (do * v).sum()}

    yardstick = Yardstick({"dx": torch.zeros(1, 1)}, gradient)
    rounding = torch.finfo(torch.float32).eps * (do * v).abs().sum()
    assert yardstick.judge("dx", rounding.view(1, 1) / 4).passed
    assert not yardstick.judge("dx", rounding.view(1, 1) * 16).passed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_like_stocks_pass_in_every_run(dtype: torch.dtype) -> None:
    """Each of many other roundings of few numbers would pass as ours."""
    torch.manual_seed(3)
    x, w = torch.randn(2, 24).to(dtype), torch.randn(3, 24).to(dtype)

    def stock() -> dict[str, Tensor]:
        return {"y": torch.softmax(x @ w.t(), -1)}

    yardstick = Yardstick({"y": torch.softmax(x.double() @ w.double().t(), -1)}, stock)
    for seed in range(1000, 1200):
        with random_rounding(seed):
            other = stock()
        assert yardstick.judge("y", other["y"]).passed


# ---- rounding at random ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_rounding_is_to_a_neighbour_and_right_on_average(dtype: torch.dtype) -> None:
    x = torch.full((20_000,), 1.0, dtype=dtype)
    with random_rounding(0):
        y = x / 3
    below = torch.tensor(1.0 / 3).to(dtype).double()
    step = torch.finfo(dtype).eps / 4  # of numbers in [1/4, 1/2)
    assert bool(((y.double() - below).abs() <= step).all())
    assert y.unique().numel() == 2
    assert abs(float(y.double().mean()) - 1.0 / 3) < 0.02 * step


def test_a_sums_error_is_that_of_additions_in_turn() -> None:
    """Its standard deviation, and the largest in a hundred and a thousand, beside the sum of absolutes."""
    generator, shape = torch.Generator().manual_seed(0), (50_000,)
    added, exact, absolute = torch.zeros(shape), torch.zeros(shape).double(), torch.zeros(shape).double()
    for _ in range(64):
        term = torch.randn(shape, generator=generator).double() * torch.randn(shape, generator=generator)
        added = (added.double() + term).float()
        exact, absolute = exact + term, absolute + term.abs()
    modelled = torch.zeros_like(exact)
    RandomRounding(0)._add_in_turn(modelled, torch.ones_like(exact))
    errors = (added.double() - exact) / absolute, modelled
    for of in (lambda e: e.std(), lambda e: e.abs().quantile(0.99), lambda e: e.abs().quantile(0.999)):
        in_turn, drawn = map(of, errors)
        assert abs(float(drawn / in_turn) - 1.0) < 0.1


def test_random_rounding_leaves_what_is_exact() -> None:
    x, y = torch.randn(100).bfloat16(), torch.randn(100)
    with random_rounding(0):
        found = [x.float(), x * 2, torch.cat([y, -y]), y[::2].clone(), y.abs(), y.masked_fill(y > 0, 1.0)]
        z = y.clone()
        z[:50] = 0.5
    assert torch.equal(found[0], x.float())
    assert torch.equal(found[1], x * 2)
    assert torch.equal(found[2], torch.cat([y, -y]))
    assert torch.equal(found[3], y[::2])
    assert torch.equal(found[4], y.abs())
    assert torch.equal(found[5], y.masked_fill(y > 0, 1.0))
    assert torch.equal(z[50:], y[50:])


@pytest.mark.parametrize(
    ("of", "roundings"), [(torch.var, 1), (lambda x: torch.var_mean(x)[1], 2)], ids=["var", "mean"]
)
def test_random_rounding_adds_the_error_of_sums(of: Callable[[Tensor], Tensor], roundings: int) -> None:
    """More numbers come out than by the roundings of the sum and, for a mean, of the division."""
    torch.manual_seed(0)
    x, found = torch.randn(2000), set()
    for seed in range(200):
        with random_rounding(seed):
            found.add(float(of(x)))
    assert len(found) > roundings + 1


def test_random_rounding_differs_by_seed_and_repeats() -> None:
    x = torch.randn(50)

    def rounded(seed: int) -> Tensor:
        with random_rounding(seed):
            return x.exp()

    assert torch.equal(rounded(1), rounded(1))
    assert not torch.equal(rounded(1), rounded(2))


def test_random_rounding_reaches_backward() -> None:
    x = torch.randn(50, requires_grad=True)
    with random_rounding(1):
        (dx,) = torch.autograd.grad(x.exp().sum(), x)
    exact = x.detach().double().exp()
    error = (dx.double() - exact).abs() / exact
    assert 0.0 < float(error.max()) < 4 * torch.finfo(torch.float32).eps


def test_random_rounding_leaves_onednn_as_it_was() -> None:
    with random_rounding(1):
        torch.softmax(torch.randn(4), -1)  # is taken apart within
        assert not torch._C._get_mkldnn_enabled()
    assert torch._C._get_mkldnn_enabled()
