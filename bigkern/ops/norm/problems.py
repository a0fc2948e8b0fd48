"""Problems of LayerNorm and RMSNorm, with and without the residual before them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bigkern.core.problem import Call, Inputs, Problem
from bigkern.ops.norm import layer_norm, rms_norm


def norm(M: int, N: int, kind: str = "layer", residual: bool = False) -> Problem:
    label = f"{kind} {M}x{N}" + (" + residual" if residual else "")
    shapes: dict[str, tuple[int, ...]] = {"x": (M, N), "weight": (N,)}
    if kind == "layer":
        shapes["bias"] = (N,)
    if residual:
        shapes["residual"] = (M, N)

    def call(inputs: Inputs) -> Call:
        bias = {"bias": inputs["bias"]} if kind == "layer" else {}
        extra = {"residual": inputs["residual"]} if residual else {}
        return (inputs["x"], (N,), inputs["weight"]), {**bias, "eps": 1e-5, **extra}

    def stock(inputs: Inputs) -> Tensor:
        s = inputs["x"] + inputs["residual"] if residual else inputs["x"]
        if kind == "rms":
            return F.rms_norm(s, (N,), inputs["weight"], 1e-5)
        return F.layer_norm(s, (N,), inputs["weight"], inputs["bias"], 1e-5)

    elements = (4 if residual else 2) * M * N
    return Problem(
        "norm",
        label,
        shapes,
        layer_norm if kind == "layer" else rms_norm,
        call,
        stock,
        elements=elements,
        backward_factor=1.5,
        parameters=tuple(name for name in shapes if name in ("weight", "bias")),
        explain_options={} if kind == "layer" else {"kind": "rms"},
    )


def small() -> list[Problem]:
    return [norm(65, 768), norm(7, 1023, residual=True), norm(33, 512, "rms")]


def thorough() -> list[Problem]:
    sizes = ((1, 1), (3, 63), (129, 1024), (1000, 4096), (17, 8191))
    return [
        norm(M, N, kind, residual)
        for M, N in sizes
        for kind in ("layer", "rms")
        for residual in (False, True)
    ]


def typical() -> Problem:
    return norm(2048, 768)
