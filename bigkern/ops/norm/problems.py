"""Problems of LayerNorm and RMSNorm, with and without the residual before them."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bigkern.core.dropout import OUTPUT, dropout_key, dropped
from bigkern.core.problem import Call, Inputs, Problem
from bigkern.ops.norm import layer_norm, rms_norm

KINDS = ("layer", "rms")


def norm(
    M: int,
    N: int,
    kind: str = "layer",
    residual: bool = False,
    *,
    weight: bool = True,
    bias: bool = True,
    dropout: float = 0.0,
    both: bool = False,
) -> Problem:
    """RMSNorm has no bias. ``both``: the sum of x and the residual is an output as well."""
    shapes: dict[str, tuple[int, ...]] = {"x": (M, N)}
    shapes |= {"weight": (N,)} if weight else {}
    shapes |= {"bias": (N,)} if bias and kind == "layer" else {}
    shapes |= {"residual": (M, N)} if residual else {}
    drop: dict[str, Any] = {"dropout_p": dropout, "seed": M} if dropout else {}

    def call(inputs: Inputs) -> Call:
        named: dict[str, Any] = {
            name: inputs[name] for name in ("weight", "bias", "residual") if name in inputs
        }
        return (inputs["x"], inputs["x"].shape[-1:]), {**named, "eps": 1e-5, **drop}

    def stock(inputs: Inputs) -> Tensor | tuple[Tensor, Tensor]:
        s, weight = inputs["x"], inputs.get("weight")
        if residual:
            s = dropped(s, dropout_key(dropout, M, 0), dropout, OUTPUT) + inputs["residual"]
        if kind == "rms":
            y = F.rms_norm(s, s.shape[-1:], weight, 1e-5)
        else:
            y = F.layer_norm(s, s.shape[-1:], weight, inputs.get("bias"), 1e-5)
        return (y, s) if both else y

    words = [kind, f"{M}x{N}", "+ residual" if residual else "", f"dropout {dropout:g}" if dropout else ""]
    words += ["" if weight else "no weight", "" if bias else "no bias"]
    return Problem(
        "norm",
        " ".join(filter(None, words)),
        shapes,
        layer_norm if kind == "layer" else rms_norm,
        call,
        stock,
        outputs=("output", "sum") if both else ("output",),
        elements=(4 if residual else 2) * M * N,
        backward_factor=1.5,
        parameters=tuple(name for name in shapes if name in ("weight", "bias")),
        explain_options={} if kind == "layer" else {"kind": "rms"},
    )


def forms() -> list[Problem]:
    sizes = ((5, 1), (3, 7), (4, 63), (6, 129), (9, 768), (3, 1023), (2, 4104), (1, 5000))
    dropouts = ((5, 1, 0.5), (6, 129, 0.1), (9, 768, 0.25), (2, 5000, 0.9))
    inputs = itertools.product((64, 100), (True, False), (True, False), (True, False))
    return [
        *(norm(*size, kind, True, both=True) for kind in KINDS for size in sizes),
        *(norm(M, N, kind, True, dropout=p, both=True) for kind in KINDS for M, N, p in dropouts),
        *(
            norm(6, N, kind, residual, weight=weight, bias=bias, both=residual)
            for N, weight, bias, residual in inputs
            for kind in (KINDS if bias else ("layer",))
        ),
    ]


def drawn(draw: random.Random, largest: int) -> Problem:
    kind, residual = draw.choice(KINDS), draw.random() < 0.5
    weight, bias = (draw.random() < 0.7 for _ in range(2))
    M, N = draw.randint(1, largest), draw.randint(1, 20 * largest)
    dropout = draw.choice((0.0, 0.3)) if residual else 0.0
    return norm(M, N, kind, residual, weight=weight, bias=bias, dropout=dropout, both=residual)


def small() -> list[Problem]:
    return [norm(65, 768), norm(7, 1023, residual=True), norm(33, 512, "rms")]


def thorough() -> list[Problem]:
    sizes = ((1, 1), (3, 63), (129, 1024), (1000, 4096), (17, 8191))
    wide = [norm(3, 20001, kind, residual) for kind in KINDS for residual in (False, True)]
    dropped = [norm(*size, kind, True, dropout=0.2) for size in sizes[2:] for kind in KINDS]
    every = [norm(*size, kind, residual) for size in sizes for kind in KINDS for residual in (False, True)]
    return [*every, *dropped, *wide]


def grid() -> list[Problem]:
    rows = (4, 32, 256, 2048, 16384)
    sizes = [(M, N) for N in (64, 256, 1024, 4096) for M in rows if M * N <= 1 << 23]
    return [norm(*size, kind, residual) for kind in KINDS for residual in (False, True) for size in sizes]


def large() -> list[Problem]:
    sizes = ((65536, 768), (16384, 4096), (65536, 4096))
    return [norm(*size, kind, residual) for kind in KINDS for residual in (False, True) for size in sizes]


def typical() -> Problem:
    return norm(2048, 768)
