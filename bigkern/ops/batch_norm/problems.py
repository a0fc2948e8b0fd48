"""Problems of the batch_norm op: images in channels_last, float32 parameters as under autocast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.core.problem import Call, Inputs, Problem
from bigkern.ops import batch_norm as op


def batch_norm(
    N: int, C: int, H: int, W: int, residual: bool = False, relu: bool = True, training: bool = True
) -> Problem:
    """An image is drawn as [N, H, W, C], and seen as [N, C, H, W]."""
    words = [f"{N}x{C}x{H}x{W}", "" if training else "eval"]
    words += ["+ residual" if residual else "", "relu" if relu else ""]
    shapes: dict[str, tuple[int, ...]] = {"x": (N, H, W, C)}
    if residual:
        shapes["residual"] = (N, H, W, C)

    def images(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        x, r = (inputs[name].permute(0, 3, 1, 2) if name in inputs else None for name in ("x", "residual"))
        assert x is not None
        return x, r

    def channels(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return inputs["running_mean"], inputs["running_var"], inputs["weight"], inputs["bias"]

    def call(inputs: Inputs) -> Call:
        x, r = images(inputs)
        return (x, *channels(inputs), training), {"residual": r, "activation": "relu" if relu else None}

    def stock(inputs: Inputs) -> Tensor:
        x, r = images(inputs)
        y = F.batch_norm(x, *channels(inputs), training)
        y = y if r is None else y + r
        return F.relu(y, inplace=True) if relu else y

    def constants(device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(C)
        mean, weight, bias = torch.randn(3, C, generator=generator).mul_(0.1).unbind(0)
        var = torch.rand(C, generator=generator) + 0.5
        made = {"running_mean": mean, "running_var": var, "weight": 1 + weight, "bias": bias}
        return {
            name: value.clone().to(device).requires_grad_(not name.startswith("running"))
            for name, value in made.items()
        }

    forward = 2 + training + residual  # x twice in training, residual, y
    return Problem(
        "batch_norm",
        " ".join(filter(None, words)),
        shapes,
        op.batch_norm,
        call,
        stock,
        constants=constants,
        elements=forward * N * C * H * W,
        backward_factor=(5 + 2 * (residual and relu)) / forward,  # g and x twice, dx; y, dresidual
        parameters=("weight", "bias"),
    )


def small() -> list[Problem]:
    """Odd sizes, and every feature once."""
    return [
        batch_norm(2, 24, 7, 5, residual=True),
        batch_norm(3, 129, 6, 3),
        batch_norm(2, 16, 9, 9, residual=True, relu=False),
        batch_norm(4, 40, 5, 5, residual=True, training=False),
    ]


def thorough() -> list[Problem]:
    """Few and many rows, few and many channels."""
    return [
        batch_norm(16, 64, 56, 56),
        batch_norm(8, 256, 28, 28, residual=True),
        batch_norm(16, 2048, 7, 7, residual=True),
        batch_norm(64, 512, 1, 1, relu=False),
        batch_norm(2, 3, 224, 224),
        batch_norm(3, 1001, 9, 9, residual=True, training=False),
    ]


def typical() -> Problem:
    return batch_norm(8, 64, 56, 56, residual=True)
