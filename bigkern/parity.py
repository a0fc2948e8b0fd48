"""The parity rule: when a kernel's result counts as right. The one place with tolerances.

A kernel is compared with a float64 reference, and its error with the error that stock PyTorch makes on
the same inputs in the same precision:

    max  |ours - ref64|  <=  factor * max  |stock - ref64| + tiny          factor = 2, or 3 for gradients
    mean |ours - ref64|  <=  factor * mean |stock - ref64| + tiny

``tiny`` is a few roundings of the largest reference value: what two correct results may differ by where
stock happens to be exact. It is part of the rule, not a knob.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0
GRADIENT_FACTOR = 3.0
ROUNDINGS = 1.0


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


def compare(ours: Tensor, reference: Tensor, stock: Tensor, *, gradient: bool = False) -> Verdict:
    """Judge ``ours`` against ``reference`` (float64) by the error of ``stock`` (same precision as ours).

    Infinities must stand in the same places with the same sign; a NaN in ours is a failure wherever the
    reference has none.
    """
    factor = GRADIENT_FACTOR if gradient else FACTOR
    if ours.shape != reference.shape:
        shapes = f"shape {tuple(ours.shape)} is not the reference's {tuple(reference.shape)}"
        return Verdict(float("inf"), factor, float("inf"), 0.0, shapes)
    if reference.numel() == 0:
        return Verdict(0.0, factor, 0.0, 0.0, None)
    tiny = ROUNDINGS * torch.finfo(ours.dtype).eps
    ours, stock, reference = (x.detach().double().cpu() for x in (ours, stock, reference))
    if not torch.equal(torch.isnan(ours), torch.isnan(reference)):
        return Verdict(float("inf"), factor, float("inf"), 0.0, "NaN where the reference has none")
    infinite = torch.isinf(reference)
    if not torch.equal(torch.where(infinite, reference, 0.0), torch.where(torch.isinf(ours), ours, 0.0)):
        return Verdict(
            float("inf"), factor, float("inf"), 0.0, "infinities in other places than the reference"
        )
    finite = torch.isfinite(reference)
    reference = reference[finite]
    if reference.numel() == 0:
        return Verdict(0.0, factor, 0.0, 0.0, None)
    error = (ours[finite] - reference).abs()
    stock_error = torch.nan_to_num((stock[finite] - reference).abs(), nan=0.0, posinf=0.0)
    scale = reference.abs()

    worst, problem = 0.0, None
    for name, reduce in (("max", torch.amax), ("mean", torch.mean)):
        e, allowed_error, floor = (float(reduce(x)) for x in (error, stock_error, scale))
        floor = floor * tiny + torch.finfo(torch.float32).tiny
        # The ratio reported is the smallest factor that would still pass.
        ratio = (
            max(0.0, e - floor) / max(allowed_error, torch.finfo(torch.float64).tiny) if e > floor else 0.0
        )
        worst = max(worst, ratio)
        if ratio > factor:
            problem = (
                problem or f"{name} error {e:.3g} > {factor:g} x stock's {allowed_error:.3g} + {floor:.3g}"
            )
    return Verdict(worst, factor, float(error.amax()), float(stock_error.amax()), problem)
