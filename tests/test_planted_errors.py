"""Mistakes that the parity rule must catch, planted one at a time in every op.

Stock's own computation is run with one mistake in it: in one of its sums, forward or backward, or in one
element of a result. By the yardstick of the same computation the rule has to find each. ``make test`` prints
what was found: in how many of an op's sums a mistake shows, all of which are caught.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import pytest
import torch
from parity import DTYPES, RECORD
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bigkern.core.parity import Yardstick
from bigkern.core.problem import Problem, results, widened
from bigkern.core.random_rounding import COMPOUND, SUMS, aten, taken_apart
from bigkern.ops.attention.problems import form
from bigkern.ops.batch_norm.problems import batch_norm
from bigkern.ops.layernorm_ffn.problems import layernorm_ffn
from bigkern.ops.linear.problems import linear
from bigkern.ops.norm.problems import norm
from bigkern.ops.recurrent.problems import recurrent

pytestmark = pytest.mark.usefixtures("one_thread")

Results = Mapping[str, Tensor]


# ---- the ops: stock's computation, in float64 and in a dtype ------------------------------------------


def adam(dtype: torch.dtype) -> tuple[Results, Callable[[], Results]]:
    p, *grads = ((1 + torch.rand(64)) * torch.randn(64).sign() for _ in range(4))
    p, *grads = (4 * p).to(dtype), *(g.to(dtype) for g in grads)  # none whose square is 0 in float16

    def steps(dtype: torch.dtype) -> Results:
        leaf = torch.nn.Parameter(p.to(dtype, copy=True))
        optimizer = torch.optim.AdamW([leaf], lr=0.1, eps=1e-3, weight_decay=0.1)
        for g in grads:
            leaf.grad = g.to(dtype)
            optimizer.step()
        state = optimizer.state[leaf]
        return {"p": leaf.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}

    return steps(torch.float64), partial(steps, dtype)


def grad_norm(dtype: torch.dtype) -> tuple[Results, Callable[[], Results]]:
    grads = [torch.randn(n).to(dtype) for n in (40, 30)]

    def norm(wide: torch.dtype) -> Results:
        squares = torch.stack([g.to(wide).square().sum() for g in grads])
        return {"norm": squares.sum().sqrt()}

    return norm(torch.float64), partial(norm, torch.float32)


def of_problem(problem: Problem, dtype: torch.dtype, seed: int = 0) -> tuple[Results, Callable[[], Results]]:
    inputs = problem.make(dtype, torch.device("cpu"), seed)
    by_stock = partial(results, problem.specification or problem.stock, names=problem.outputs)
    return by_stock(widened(inputs)), partial(by_stock, inputs)


OPS: dict[str, Callable[[torch.dtype], tuple[Results, Callable[[], Results]]]] = {
    "attention": partial(of_problem, form(S=20, keys=20, D=4)),
    "norm": partial(of_problem, norm(12, 24, residual=True, both=True)),
    "layernorm_ffn": partial(of_problem, layernorm_ffn(12, 12, 8, residual=False), seed=1),
    "linear": partial(of_problem, linear(12, 24, 16)),
    "batch_norm": partial(of_problem, batch_norm(2, 6, 2, 3, residual=True, relu=False, statistics=True)),
    "recurrent": partial(of_problem, recurrent("GRU", 1, 12, 8, 16), seed=3),
    "adam": adam,
    "grad_norm": grad_norm,
}


@cache
def stock_and_yardstick(op: str, dtype: torch.dtype) -> tuple[Callable[[], Results], Yardstick]:
    exact, stock = OPS[op](dtype)
    return stock, Yardstick(exact, stock)


# ---- mistakes in a sum -----------------------------------------------------------------------------

FOLDED = {aten.lerp, aten.lerp_, aten.addcmul, aten.addcmul_, aten.addcdiv, aten.addcdiv_}  # Adam's


class Mistaken(TorchDispatchMode):
    """Makes the mistake in sum number ``which`` alone; ``sums`` counts them."""

    def __init__(self, mistake: Callable[..., Any], which: int):
        super().__init__()
        self.mistake, self.which, self.sums = mistake, which, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op.overloadpacket in COMPOUND:
            with self:
                return taken_apart(op, args, kwargs)
        if op.overloadpacket in SUMS | FOLDED and args[0].is_floating_point():
            self.sums += 1
            if self.sums - 1 == self.which:
                return self.mistake(op, args, kwargs)
        return op(*args, **kwargs)


def terms(op: Any, args: Any) -> tuple[int, int]:
    """Which argument holds the terms that are added, and along which dimension of it."""
    place = {aten.addmm: 1, aten.baddbmm: 1, aten.addmv: 1}.get(op.overloadpacket, 0)
    if op.overloadpacket in (aten.sum, aten.mean) and len(args) > 1 and args[1]:
        return 0, args[1][0]
    return place, -1


def without(op: Any, args: Any, kwargs: Any, rows: slice, last: int) -> Any:
    """The sums of ``rows`` lack their ``last`` terms."""
    if op.overloadpacket in FOLDED:  # the last elements stay as they were
        kept = args[0].clone()
        result = op(*args, **kwargs)
        result.view(-1)[-last:] = kept.view(-1)[-last:]
        return result
    place, along = terms(op, args)
    x = args[place].clone()
    ends = x.movedim(along, -1)
    ends = ends.reshape(1, -1) if ends.dim() == 1 else ends
    ends[..., rows, max(0, ends.shape[-1] - last) :] = 0.0
    return op(*args[:place], x, *args[place + 1 :], **kwargs)


def in_bfloat16(op: Any, args: Any, kwargs: Any) -> Any:
    """Each partial sum is rounded to bfloat16."""
    if op.overloadpacket in FOLDED:
        result = op(*args, **kwargs)
        return result.copy_(result.bfloat16())
    result = op(*args, **kwargs)
    place, along = terms(op, args)
    x, total = args[place], torch.zeros_like(result)
    for i in range(x.shape[along]):
        one = torch.zeros_like(x)
        one.movedim(along, -1)[..., i] = x.movedim(along, -1)[..., i]
        only = (torch.zeros_like(args[0]), one, *args[2:]) if place else (one, *args[1:])
        total = (total + op(*only, **kwargs)).bfloat16().to(result.dtype)
    return total + (args[0] if place else 0.0)


MISTAKES: dict[str, Callable[..., Any]] = {
    "a dropped term": partial(without, rows=slice(0, 1), last=1),
    "a skipped block": partial(without, rows=slice(None), last=8),
    "a mask off by one": partial(without, rows=slice(None), last=1),
    "sums in bfloat16": in_bfloat16,
}


def beyond(yardstick: Yardstick, results: Results) -> float:
    """How many times what the rule allows the worst result is off: above 1 it is caught."""
    verdicts = [yardstick.judge(name, t) for name, t in results.items()]
    return max(v.ratio / v.factor if v.passed else max(1.001, v.ratio / v.factor) for v in verdicts)


def roundings(wrong: Tensor, right: Tensor) -> float:
    """The largest difference, in roundings of the largest element."""
    wide = right.double()
    largest = float(wide.abs().max()) * torch.finfo(right.dtype).eps
    return float((wrong.double() - wide).abs().max()) / largest if largest > 0.0 else 0.0


SHOWN = {torch.float32: 16.0, torch.bfloat16: 6.0, torch.float16: 6.0}  # roundings


PLANTED = [
    (mistake, dtype)
    for mistake in MISTAKES
    for dtype in DTYPES
    if mistake != "sums in bfloat16" or dtype == torch.float32  # test_long_sums_in_bfloat16 has the others
]


@pytest.mark.parametrize(("mistake", "dtype"), PLANTED, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_mistakes_in_a_sum(mistake: str, op: str, dtype: torch.dtype) -> None:
    """In each sum in turn. Where it changes nothing by more roundings than ``SHOWN``, it counts as none."""
    stock, yardstick = stock_and_yardstick(op, dtype)
    with Mistaken(MISTAKES[mistake], -1) as counted:
        right = stock()
    assert beyond(yardstick, right) <= 1.0
    found: list[float] = []
    for which in range(counted.sums):
        with Mistaken(MISTAKES[mistake], which):
            wrong = stock()
        if max(roundings(wrong[name], right[name]) for name in right) > SHOWN[dtype]:
            found.append(beyond(yardstick, wrong))
    RECORD.planted(op, str(dtype).removeprefix("torch."), mistake, f"{len(found)}/{counted.sums}")
    assert found
    assert min(found) > 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_long_sums_in_bfloat16(dtype: torch.dtype) -> None:
    x, w = torch.randn(8, 512).to(dtype), torch.randn(8, 512).to(dtype)
    yardstick = Yardstick({"y": x.double() @ w.double().t()}, lambda: {"y": x @ w.t()})
    with Mistaken(in_bfloat16, 0):
        assert beyond(yardstick, {"y": x @ w.t()}) > 1.0


# ---- mistakes in an element ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_roundings_in_one_element(op: str, dtype: torch.dtype) -> None:
    """The largest element of a result is off by a few roundings more than stock's; in a gradient by 16.

    Of float32 sums such as these the last two or three roundings are nobody's fault.
    """
    stock, yardstick = stock_and_yardstick(op, dtype)
    few = 6 if dtype == torch.float32 else 4
    for number, of_gradients in ((few, False), (16, True)):
        missed = []
        for name, right in stock().items():
            wrong = right.detach().clone()
            largest = torch.unravel_index(wrong.abs().argmax(), wrong.shape)
            wrong[largest] *= 1 + number * torch.finfo(wrong.dtype).eps
            asked = of_gradients or not name.startswith("d")
            if asked and wrong.dtype == dtype:  # stock sums some coarsely
                missed += [] if beyond(yardstick, {name: wrong}) > 1.0 else [name]
        assert not missed, number
        of = "all results" if of_gradients else "outputs"
        RECORD.planted(op, str(dtype).removeprefix("torch."), f"{number} roundings, {of}", "found")
