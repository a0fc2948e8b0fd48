"""The problems of every op: what doctor examines, what env asks about, what the benchmarks measure."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bigkern.cli import batch_norm_problems, linear_problems, recurrent_problems
from bigkern.cli.adam_problems import STORAGE, adam, adam_storage, grad_norm
from bigkern.cli.attention_problems import attention, decode, varlen
from bigkern.cli.batch_norm_problems import batch_norm
from bigkern.cli.frozen_problems import frozen
from bigkern.cli.linear_problems import linear
from bigkern.cli.problem import Call, Inputs, Problem
from bigkern.cli.recurrent_problems import recurrent
from bigkern.ops import layernorm_ffn as ffn_room
from bigkern.ops import norm as norm_room


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
        norm_room.layer_norm if kind == "layer" else norm_room.rms_norm,
        call,
        stock,
        elements=elements,
        backward_factor=1.5,
        parameters=tuple(name for name in shapes if name in ("weight", "bias")),
        explain_options={} if kind == "layer" else {"kind": "rms"},
    )


def layernorm_ffn(
    M: int,
    D: int,
    hidden: int,
    activation: str = "gelu",
    placement: str = "pre",
    norm: str = "layer",
    save: str = "preactivation",
    name: str = "",
) -> Problem:
    """Biases belong to LayerNorm, as they do in the models that use one or the other."""
    rows = 2 * hidden if activation in ("swiglu", "geglu") else hidden
    biases = norm == "layer"
    shapes: dict[str, tuple[int, ...]] = {
        "x": (M, D),
        "w1": (rows, D),
        "w2": (D, hidden),
        "norm_weight": (D,),
    }
    shapes |= {"b1": (rows,), "b2": (D,), "norm_bias": (D,)} if biases else {}
    options = {"activation": activation, "placement": placement, "norm": norm, "save": save}

    def ordered(inputs: Inputs) -> tuple[Any, ...]:
        names = ("x", "w1", "b1", "w2", "b2", "norm_weight", "norm_bias")
        return tuple(inputs.get(name) for name in names)

    def stock(inputs: Inputs) -> Tensor:
        x, w1, b1, w2, b2, weight, bias = ordered(inputs)

        def normalise(s: Tensor) -> Tensor:
            return F.layer_norm(s, (D,), weight, bias) if biases else F.rms_norm(s, (D,), weight, 1e-5)

        n = normalise(x) if placement == "pre" else x
        y = x + F.linear(_activate(F.linear(n, w1, b1), activation), w2, b2)
        return y if placement == "pre" else normalise(y)

    words = [name, f"{M}x{D}x{hidden}", activation, placement, "" if biases else norm]
    words += ["" if save == "preactivation" else f"save {save}"]
    return Problem(
        "layernorm_ffn",
        " ".join(filter(None, words)),
        shapes,
        ffn_room.layernorm_ffn,
        lambda inputs: (ordered(inputs), options),
        stock if save == "preactivation" else partial(checkpoint, stock, use_reentrant=False),
        flops=2 * M * D * (rows + hidden),
        elements=2 * M * D + D * (rows + hidden),
        parameters=tuple(name for name in shapes if name != "x"),
    )


def _activate(h: Tensor, activation: str) -> Tensor:
    if activation in ("swiglu", "geglu"):
        gate, up = h.chunk(2, dim=-1)
        return _activate(gate, "silu" if activation == "swiglu" else "gelu") * up
    if activation == "gelu_tanh":
        return F.gelu(h, approximate="tanh")
    return getattr(F, activation)(h)  # type: ignore[no-any-return]


OPS = (
    "attention", "decode_attention", "norm", "batch_norm", "linear", "layernorm_ffn", "frozen_layernorm_ffn",
    "recurrent", "adam", "grad_norm",
)  # fmt: skip


def small(op: str) -> list[Problem]:
    """Small calls with odd sizes, for ``bigkern doctor``: seconds for all of them."""
    return {
        "attention": _small_attention(),
        "decode_attention": _small_decode(),
        "norm": [norm(65, 768), norm(7, 1023, residual=True), norm(33, 512, "rms")],
        "batch_norm": batch_norm_problems.small(),
        "linear": linear_problems.small(),
        "recurrent": recurrent_problems.small(),
        "layernorm_ffn": [
            layernorm_ffn(33, 64, 256),
            layernorm_ffn(63, 96, 160, "swiglu"),
            layernorm_ffn(17, 128, 192, "relu", "post"),
            layernorm_ffn(65, 64, 96, "swiglu", norm="rms", save="input"),
        ],
        "frozen_layernorm_ffn": [
            frozen(5, 64, 256, "int8"),
            frozen(33, 96, 160, "int8", "swiglu"),
            frozen(17, 64, 256, "packed"),
        ],
        "adam": [
            adam([(1,), (7, 5), (4097,)], "3 tensors, AdamW"),
            adam([(63, 65), (1023,)], "2 tensors, Adam", decoupled=False),
            *(adam_storage(name, [(63, 65), (1023,)]) for name in STORAGE),
        ],
        "grad_norm": [grad_norm([(1,), (7, 5), (4097,)])],
    }[op]


def thorough(op: str) -> list[Problem]:
    """More calls, for ``bigkern doctor --verify``: sizes and options that choose other code in a kernel."""
    if op == "attention":
        return _thorough_attention()
    if op == "decode_attention":
        return _thorough_decode()
    if op == "norm":
        sizes = ((1, 1), (3, 63), (129, 1024), (1000, 4096), (17, 8191))
        return [
            norm(M, N, kind, residual)
            for M, N in sizes
            for kind in ("layer", "rms")
            for residual in (False, True)
        ]
    if op == "batch_norm":
        return batch_norm_problems.thorough()
    if op == "linear":
        return linear_problems.thorough()
    if op == "recurrent":
        return recurrent_problems.thorough()
    if op == "layernorm_ffn":
        activations = ("gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu")
        return [
            *(layernorm_ffn(129, 256, 520, a, p) for a in activations for p in ("pre", "post")),
            layernorm_ffn(1024, 1024, 4096),
        ]
    if op == "frozen_layernorm_ffn":
        return [frozen(M, 1024, 4096, "int8", a) for M in (1, 16, 300) for a in ("gelu", "swiglu")]
    if op == "grad_norm":
        return [grad_norm([(1 << 20,), (1,), (1023, 7)]), grad_norm([(n,) for n in range(1, 500)])]
    return [
        *(adam_storage(name, [(1 << 18,), (1,), (1023, 7)]) for name in STORAGE),
        adam([(1 << 20,), (1,), (1023, 7)], "3 tensors, AdamW"),
        adam([(n,) for n in range(1, 200)], "199 tensors, Adam", decoupled=False),
    ]


def typical(op: str) -> Problem:
    """The call that ``bigkern env`` asks about: of an ordinary size."""
    return {
        "attention": attention(4, 12, 512, 64, causal=True),
        "decode_attention": decode([4096] * 8, 12, 4096, 64),
        "norm": norm(2048, 768),
        "batch_norm": batch_norm(8, 64, 56, 56, residual=True),
        "linear": linear(512, 768, 768),
        "recurrent": recurrent("LSTM", 128, 32, 256, 512),
        "layernorm_ffn": layernorm_ffn(512, 768, 3072),
        "frozen_layernorm_ffn": frozen(16, 768, 3072, "int8"),
        "adam": adam([(768, 768), (768,)], "2 tensors"),
        "grad_norm": grad_norm([(768, 768), (768,)]),
    }[op]


# ---- attention, feature by feature ------------------------------------------------------------------


def _small_attention() -> list[Problem]:
    """Odd sizes, and every feature once."""
    return [
        attention(2, 4, 129, 64, causal=True),
        attention(1, 4, 63, 32, causal=False, kv_heads=2),
        attention(1, 2, 257, 128, causal=False),
        attention(2, 4, 33, 64, "bottom_right", kv_heads=2, keys=97),
        attention(1, 2, 97, 64, True, window=(31, 0)),
        attention(1, 2, 65, 64, softcap=2.0),
        attention(1, 4, 65, 64, True, alibi=True),
        attention(1, 4, 65, 64, True, sinks=True, kv_heads=2),
        attention(1, 2, 65, 64, dropout=0.2),
        attention(2, 2, 65, 64, True, bias="learned"),
        attention(1, 2, 65, 64, lse=True),
        varlen((33, 1, 65), 2, 64, True),
    ]


def _thorough_attention() -> list[Problem]:
    """Sizes that choose other code in a kernel, and the features together."""
    every: dict[str, Any] = {
        "kv_heads": 2, "keys": 231, "bias": "learned", "window": (99, 0), "softcap": 5.0, "alibi": True,
        "sinks": True, "dropout": 0.1, "lse": True,
    }  # fmt: skip
    return [
        *(
            attention(1, 2, 193, D, causal)
            for D in (16, 40, 64, 80, 96, 128, 160, 256)
            for causal in (False, True)
        ),
        *(attention(2, 4, S, 64, True, kv_heads=1) for S in (1, 7, 128, 1023)),
        attention(1, 4, 65, 128, "bottom_right", keys=511),
        attention(1, 4, 300, 64, keys=77, masked=True),
        attention(2, 2, 130, 64, True, bias="fixed"),
        attention(4, 8, 1024, 128, True),
        *(attention(1, 2, 321, 64, window=window) for window in ((0, 0), (17, 40), (200, 0))),
        attention(1, 4, 190, 128, "bottom_right", kv_heads=2, keys=401, window=(129, 0)),
        *(attention(2, 4, 193, D, "bottom_right", **every) for D in (64, 128, 256)),
        attention(2, 4, 259, 64, masked=True, bias="learned", dropout=0.3),
        varlen((129, 0, 1, 300, 64), 4, 128, True, kv_heads=2),
        varlen((65, 7, 0, 128), 4, 64, "bottom_right", keys=(200, 0, 33, 128)),
        varlen((65, 200), 2, 256, True, window=(33, 0), dropout=0.1),
    ]


def _small_decode() -> list[Problem]:
    return [
        decode((129, 1, 0), 4, 150, 64),
        decode((129, 64, 7), 8, 150, 64, kv_heads=2),
        decode((129, 33), 4, 160, 64, kv_heads=2, page_size=16),
        decode((97, 33), 4, 100, 64, kv_heads=2, queries=3, window=(40, 0)),
        decode((65, 9), 4, 65, 64, softcap=2.0, alibi=True, sinks=True),
    ]


def _thorough_decode() -> list[Problem]:
    return [
        *(decode((301, 44), 4, 301, D, kv_heads=2) for D in (16, 40, 80, 96, 128, 160, 256)),
        *(decode((4097, 513, 1), 8, 4100, 128, kv_heads=n) for n in (1, 2, 8)),
        *(decode((1000, 77, 0), 8, 1024, 128, kv_heads=2, page_size=size) for size in (16, 64, 256)),
        decode((700, 41), 8, 720, 64, kv_heads=1, queries=8, page_size=16, window=(300, 0)),
        decode((700, 41), 8, 700, 256, kv_heads=4, queries=5, softcap=5.0, alibi=True, sinks=True),
    ]
