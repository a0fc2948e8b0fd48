"""The parity rule: when a kernel's result counts as right. The one place with tolerances.

A kernel is compared with a float64 reference, and its error with the error that stock PyTorch makes on
the same inputs in the same precision, for the largest error, the root of the mean square and the mean:

    error(ours)  <=  factor * error(stock) + tiny          factor = 2, or 3 for gradients

**Stock's error is a random number.** Of a few numbers it can be next to nothing by luck, and of many where
torch happens to add in float64 or in sixteen sums at once; another machine or another build of torch has
other luck. So ``error(stock)`` is the largest of stock's own runs and of :data:`RUNS` runs of stock with
every rounding drawn at random (:mod:`bigkern.core.random_rounding`). Those know the sizes of the terms that
are summed, so a gradient that is 0 as a difference of equal sums gets the error that such a difference has.
Rounding at random has twice the variance of rounding to nearest: their errors count divided by sqrt(2).

512 runs are enough even for a single number: a result whose error has the same distribution is beyond twice
the largest of 512 others with a probability of 2 / 512^2, where the tails are Laplace's, and of less than one
in a million where they are a bell curve's. Of many numbers every run says the same, and the rule is as sharp
as one run makes it: then 8 will do. The runs are made one at a time until the result passes, which changes no
verdict, since more runs only raise the largest.

``tiny`` is one epsilon of the reference: what two correct results may differ by where stock is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bigkern.core.random_rounding import random_rounding

FACTOR = 2.0
GRADIENT_FACTOR = 3.0
RUNS = 512
LEAST_RUNS, NUMBERS = 8, 2**19  # where every result is large, as many runs as make so many numbers

Results = Mapping[str, Tensor]


class Errors(NamedTuple):
    """Of one tensor: the largest error, the root of the mean of the squares, the mean."""

    largest: float
    rms: float
    mean: float

    @staticmethod
    def of(magnitudes: Tensor) -> Errors:
        return Errors(
            float(magnitudes.amax()), float(magnitudes.square().mean().sqrt()), float(magnitudes.mean())
        )

    def at_least(self, other: Errors) -> Errors:
        return Errors(*map(max, self, other))

    def times(self, factor: float) -> Errors:
        return Errors(*(factor * value for value in self))


@dataclass(frozen=True, slots=True)
class Verdict:
    """How our error compares with stock's; ``ratio`` is what the rule bounds by ``factor``."""

    ratio: float
    factor: float
    ours: float
    stock: float
    problem: str | None

    @property
    def passed(self) -> bool:
        return self.problem is None


class Yardstick:
    """What a call should give, and how far stock's own results in a dtype are from it.

    Args:
        exact: every result by name, in float64. A name that begins with ``d`` is a gradient's.
        *stocks: functions that compute the same by stock PyTorch in the dtype in question, each in its own
            way. They are called again for every run with random roundings, and must give the same each time.

    Example:
        >>> x = torch.randn(4, 8)
        >>> yardstick = Yardstick({"y": x.double().exp()}, lambda: {"y": x.exp()})
        >>> yardstick.judge("y", x.exp()).passed
        True
    """

    def __init__(self, exact: Results, *stocks: Callable[[], Results]):
        self.exact = {name: x.detach().double().cpu() for name, x in exact.items()}
        runs = [stock() for stock in stocks]
        self.dtypes = {name: runs[0][name].dtype for name in exact}
        self._errors = [self._errors_of(run) for run in runs]
        self._more_runs = self._at_random(stocks)

    def judge(self, name: str, ours: Tensor) -> Verdict:
        """Hold one result to the rule.

        Infinities must stand in the same places with the same sign; a NaN in ours is a failure wherever the
        reference has none.
        """
        factor = GRADIENT_FACTOR if name.startswith("d") else FACTOR
        problem = self._difference_in_kind(name, ours)
        if problem is not None:
            return Verdict(float("inf"), factor, float("inf"), 0.0, problem)
        exact = self.exact[name]
        finite = exact.isfinite()
        if not bool(finite.any()):
            return Verdict(0.0, factor, 0.0, 0.0, None)
        errors = Errors.of((ours.detach().double().cpu()[finite] - exact[finite]).abs())
        smallest = torch.finfo(torch.float32).tiny  # where the reference is 0
        tiny = Errors.of(exact[finite].abs()).times(torch.finfo(ours.dtype).eps)
        beyond = Errors(*(max(0.0, e - t - smallest) for e, t in zip(errors, tiny, strict=True)))
        for stock in self._stock(name):
            ratios = [b / max(s, smallest**2) if b > 0.0 else 0.0 for b, s in zip(beyond, stock, strict=True)]
            if max(ratios) <= factor:
                return Verdict(max(ratios), factor, errors.largest, stock.largest, None)
        worst = ratios.index(max(ratios))
        problem = (
            f"{Errors._fields[worst]} error {errors[worst]:.3g} > {factor:g} x stock's {stock[worst]:.3g} + "
            f"{tiny[worst]:.3g}"
        )
        return Verdict(max(ratios), factor, errors.largest, stock.largest, problem)

    def _difference_in_kind(self, name: str, ours: Tensor) -> str | None:
        exact = self.exact[name]
        if ours.shape != exact.shape:
            return f"shape {tuple(ours.shape)} is not the reference's {tuple(exact.shape)}"
        if ours.dtype != self.dtypes[name]:
            return f"{ours.dtype} is not stock's {self.dtypes[name]}"
        ours = ours.detach().double().cpu()
        if not torch.equal(ours.isnan(), exact.isnan()):
            return "NaN where the reference has none"
        if not torch.equal(torch.where(exact.isinf(), exact, 0.0), torch.where(ours.isinf(), ours, 0.0)):
            return "infinities in other places than the reference"
        return None

    def _stock(self, name: str) -> Iterator[Errors]:
        """The largest errors of the runs made so far, then of one run more each time."""
        largest = Errors(0.0, 0.0, 0.0)
        for errors in self._errors:
            largest = largest.at_least(errors[name])
        yield largest
        for errors in self._more_runs:
            self._errors.append(errors)
            largest = largest.at_least(errors[name])
            yield largest

    def _at_random(self, stocks: tuple[Callable[[], Results], ...]) -> Iterator[dict[str, Errors]]:
        fewest = min((x.numel() for x in self.exact.values() if x.numel() > 0), default=NUMBERS)
        for seed in range(max(LEAST_RUNS, min(RUNS, NUMBERS // fewest))):
            for stock in stocks:
                with random_rounding(seed):
                    run = stock()
                yield {name: errors.times(0.5**0.5) for name, errors in self._errors_of(run).items()}

    def _errors_of(self, run: Results) -> dict[str, Errors]:
        """A number that stock makes NaN or infinite is no excuse for ours: its error counts as 0."""
        found = {}
        for name, exact in self.exact.items():
            finite = exact.isfinite()
            error = (run[name].detach().double().cpu()[finite] - exact[finite]).abs()
            error = torch.nan_to_num(error, nan=0.0, posinf=0.0)
            found[name] = Errors.of(error) if error.numel() > 0 else Errors(0.0, 0.0, 0.0)
        return found
