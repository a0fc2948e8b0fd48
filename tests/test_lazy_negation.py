"""Every public function takes lazily negated tensors (``torch._neg_view``) for the numbers that they are.

Their memory holds the negatives. torch's dispatcher resolves them ahead of compiled kernels; whoever reads an
address without asking it, as Triton does, must resolve them himself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from parity import BACKENDS, device_of, run_backend
from torch import Tensor

import bigkern
from bigkern.core import registry
from bigkern.ops.adam.grad_norm import grad_norm
from bigkern.ops.layernorm_ffn.frozen import frozen_linear

Tensors = dict[str, Tensor]


class Case(NamedTuple):
    op: str
    shapes: dict[str, tuple[int, ...]]
    call: Callable[[Tensors], Any]
    differentiable: bool = True


def heads(x: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    return x["q"], x["k"], x["v"]


def packed(x: Tensors) -> Tensor:
    starts = torch.tensor([0, 4, 9], dtype=torch.int32, device=x["q"].device)
    return bigkern.varlen_attention(*heads(x), starts, starts, 5, 5)


def decoded(x: Tensors) -> Tensor:
    return bigkern.decode_attention(*heads(x), torch.tensor([5, 8], dtype=torch.int32, device=x["q"].device))


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def frozen_ffn(x: Tensors) -> Tensor:
    w1, w2 = (bigkern.freeze_weight(x[name], "int8") for name in ("w1", "w2"))
    return bigkern.frozen_layernorm_ffn(x["x"], w1, x["b1"], w2, x["b2"], x["weight"], x["bias"])


QKV = {"q": (1, 2, 5, 16), "k": (1, 2, 7, 16), "v": (1, 2, 7, 16)}
PACKED = {"q": (9, 2, 16), "k": (9, 2, 16), "v": (9, 2, 16)}
FFN = {"x": (3, 16), "w1": (32, 16), "b1": (32,), "w2": (16, 32), "b2": (16,), "weight": (16,), "bias": (16,)}
LSTM = {"x": (4, 3, 16), "h": (1, 3, 16), "c": (1, 3, 16), "w_ih": (64, 16), "w_hh": (64, 16), "b": (64,)}

CASES = {
    "attention": Case(
        "attention",
        {**QKV, "bias": (1, 2, 5, 7), "sinks": (2,)},
        lambda x: bigkern.attention(*heads(x), bias=x["bias"], sinks=x["sinks"]),
    ),
    "scaled_dot_product_attention": Case(
        "attention", QKV, lambda x: bigkern.scaled_dot_product_attention(*heads(x))
    ),
    "varlen_attention": Case("attention", PACKED, packed),
    "decode_attention": Case(
        "decode_attention", {"q": (2, 2, 1, 16), "k": (2, 2, 8, 16), "v": (2, 2, 8, 16)}, decoded, False
    ),
    "merge_attention": Case(
        "attention",
        {"o1": (1, 2, 5, 16), "o2": (1, 2, 5, 16), "lse1": (1, 2, 5), "lse2": (1, 2, 5)},
        lambda x: bigkern.merge_attention([x["o1"], x["o2"]], [x["lse1"], x["lse2"]])[0],
    ),
    "layer_norm": Case(
        "norm",
        {"x": (3, 16), "weight": (16,), "bias": (16,), "residual": (3, 16)},
        lambda x: bigkern.layer_norm(x["x"], 16, x["weight"], x["bias"], residual=x["residual"])[0],
    ),
    "rms_norm": Case(
        "norm", {"x": (3, 16), "weight": (16,)}, lambda x: bigkern.rms_norm(x["x"], 16, x["weight"])
    ),
    "layernorm_ffn": Case("layernorm_ffn", FFN, lambda x: bigkern.layernorm_ffn(*x.values())),
    "frozen_layernorm_ffn": Case("frozen_layernorm_ffn", FFN, frozen_ffn, False),
    "linear": Case(
        "linear",
        {"x": (3, 16), "weight": (8, 16), "bias": (8,)},
        lambda x: bigkern.linear(*x.values()),
    ),
    "batch_norm": Case(
        "batch_norm",
        {"x": (2, 3, 3, 16), "weight": (16,), "bias": (16,), "residual": (2, 3, 3, 16)},
        lambda x: bigkern.batch_norm(
            channels_last(x["x"]),
            None,
            None,
            x["weight"],
            x["bias"],
            training=True,
            residual=channels_last(x["residual"]),
        ),
    ),
    "recurrent": Case(
        "recurrent",
        LSTM,
        lambda x: bigkern.recurrent(x["x"], (x["h"], x["c"]), [x["w_ih"], x["w_hh"], x["b"], x["b"]], "LSTM")[
            0
        ],
    ),
    "grad_norm": Case("grad_norm", {"a": (300,), "b": (3, 4)}, lambda x: grad_norm(list(x.values())), False),
}


def made(case: Case, device: torch.device) -> Tensors:
    torch.manual_seed(0)
    return {name: torch.randn(shape, device=device) for name, shape in case.shapes.items()}


@pytest.mark.parametrize("backend", [*BACKENDS, None], ids=lambda b: b or "chosen")
@pytest.mark.parametrize("name", CASES)
def test_negated_inputs_and_gradients(name: str, backend: str | None) -> None:
    case = CASES[name]
    if backend == "simt" and "cuda" not in registry.get(case.op).backends:
        pytest.skip(f"there are no CUDA kernels of {case.op}")
    plain = made(case, device_of(backend or "cpu"))
    leaves = [x.requires_grad_(case.differentiable) for x in plain.values()]
    with run_backend(case.op, backend) if backend else nullcontext():
        try:
            expected = case.call(plain)
        except bigkern.BackendRefused as reason:
            pytest.skip(str(reason))
        for negated in plain:
            lazy = {**plain, negated: torch._neg_view(-plain[negated])}
            torch.testing.assert_close(case.call(lazy), expected, rtol=1e-5, atol=1e-6)
        if not case.differentiable:
            return
        dy = torch.randn_like(expected)
        want = torch.autograd.grad(expected, leaves, dy, allow_unused=True)
        have = torch.autograd.grad(case.call(plain), leaves, torch._neg_view(-dy), allow_unused=True)
        for x, y in zip(have, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_negated_weights_are_frozen_as_the_numbers_that_they_are() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(32, 16), torch.randn(3, 16)
    for weights in ("packed", "int8"):
        plain = bigkern.freeze_weight(w, weights)
        lazy = bigkern.freeze_weight(torch._neg_view(-w), weights)
        for one, other in zip(plain, lazy, strict=True):
            assert one is other is None or (not other.is_neg() and torch.equal(one, other))
        torch.testing.assert_close(frozen_linear(torch._neg_view(-x), lazy), frozen_linear(x, plain))
