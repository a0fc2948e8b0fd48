"""Problems of the batch_norm op: images in channels_last, float32 parameters as under autocast."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bigkern.core.problem import Call, Inputs, Problem
from bigkern.ops import batch_norm as op


def batch_norm(
    N: int,
    C: int,
    *size: int,
    residual: bool = False,
    relu: bool = True,
    training: bool = True,
    affine: bool = True,
    narrow: bool = False,
    statistics: bool = False,
) -> Problem:
    """An image is drawn as [N, *size, C], and seen as [N, C, *size].

    ``narrow``: parameters and statistics have x's dtype. ``statistics``: where they moved to is an output.
    """
    words = ["x".join(map(str, (N, C, *size))), "" if training else "eval", "+ residual" if residual else ""]
    words += ["relu" if relu else "", "" if affine else "not affine", "narrow" if narrow else ""]
    channels = ("fixed_mean", "fixed_var", *(("weight", "bias") if affine else ()))
    shapes = dict.fromkeys(channels, (C,))
    images = dict.fromkeys(("x", "residual")[: 1 + residual], (N, *size, C))

    def call(inputs: Inputs) -> Call:
        moved = [inputs[n].clone() if statistics else inputs[n] for n in ("fixed_mean", "fixed_var")]
        arguments = (inputs["x"], *moved, inputs.get("weight"), inputs.get("bias"), training)
        return arguments, {"residual": inputs.get("residual"), "activation": "relu" if relu else None}

    def public(x: Tensor, mean: Tensor, var: Tensor, *rest: Any, **options: Any) -> Any:
        y = op.batch_norm(x, mean, var, *rest, **options)
        return (y, mean, var) if statistics else y

    def stock(inputs: Inputs) -> Any:
        (x, mean, var, *rest), options = call(inputs)
        y = F.batch_norm(x, mean, var, *rest)
        y = y + options["residual"] if residual else y
        y = F.relu(y, inplace=True) if relu else y
        return (y, mean, var) if statistics else y

    def values(drawn: Inputs) -> Inputs:
        return drawn | {"x": 2 * drawn["x"] + 0.5, "fixed_var": drawn["fixed_var"].abs() + 0.5}

    forward = 2 + training + residual  # x twice in training, residual, y
    return Problem(
        "batch_norm",
        " ".join(filter(None, words)),
        images | shapes,
        public if statistics else op.batch_norm,
        call,
        stock,
        values=values,
        views={name: lambda image: image.movedim(-1, 1) for name in images},
        float32=() if narrow or not affine else channels,
        outputs=("output", "running_mean", "running_var") if statistics else ("output",),
        elements=forward * N * C * math.prod(size),
        backward_factor=(5 + 2 * (residual and relu)) / forward,  # g and x twice, dx; y, dresidual
        parameters=("weight", "bias"),
        kernels=("triton",),
    )


def forms() -> list[Problem]:
    shapes = (
        (2, 3, 5, 7), (4, 64, 1, 1), (1, 1, 9, 9), (3, 129, 7, 3),
        (2, 24, 8, 8), (5, 40), (2, 6, 11), (2, 3, 2, 3, 4),
    )  # fmt: skip
    either = (True, False)
    found = []
    for i, shape in enumerate(shapes):
        options = {"training": i % 3 != 2, "relu": i % 2 == 0, "residual": i % 4 < 2}
        found.append(batch_norm(*shape, **options, statistics=True))
    for training, relu, residual in itertools.product(either, either, either):
        options = {"training": training, "relu": relu, "residual": residual}
        found.append(batch_norm(2, 24, 5, 4, **options, statistics=True))
        if residual == relu:
            found.append(batch_norm(3, 17, 2, 2, **options, affine=False, statistics=True))
    return [*found, batch_norm(2, 16, 6, 6, residual=True, narrow=True, statistics=True)]


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


def grid() -> list[Problem]:
    sizes = ((8, 64, 56, 56), (8, 256, 28, 28), (32, 512, 7, 7))
    return [
        batch_norm(*size, residual=residual, relu=relu, training=training)
        for size in sizes
        for training in (False, True)
        for residual, relu in ((False, False), (False, True), (True, True))
    ]


def large() -> list[Problem]:
    sizes = ((128, 64, 56, 56), (128, 256, 28, 28), (128, 2048, 7, 7))
    return [batch_norm(*size, residual=residual, relu=True) for size in sizes for residual in (False, True)]


def typical() -> Problem:
    return batch_norm(8, 64, 56, 56, residual=True)
