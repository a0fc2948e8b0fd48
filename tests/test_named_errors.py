"""A wrong argument raises an error that names it, whatever is wrong, before anything is computed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bigkern

B, H, S, D = 2, 4, 6, 8


def T(*shape: int) -> Tensor:
    return torch.randn(shape)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attention() -> dict[str, Any]:
    tensors = {name: T(B, H, S, D) for name in ("q", "k", "v")}
    masks = {"mask": torch.ones(B, H, S, S, dtype=torch.bool), "bias": T(B, H, S, S)}
    return tensors | masks | {"alibi_slopes": T(H), "sinks": T(H), "scale": 0.5, "dropout_p": 0.1} | RULES


RULES: dict[str, Any] = {"causal": False, "window": (2, 2), "softcap": 1.0, "seed": 3, "offset": 2}


def varlen() -> dict[str, Any]:
    tensors = {name: T(7, H, D) for name in ("q", "k", "v")}
    ends = {"cu_seqlens_q": int32(0, 3, 7), "cu_seqlens_k": int32(0, 3, 7)}
    return tensors | ends | {"max_seqlen_q": 4, "max_seqlen_k": 4, "scale": 0.5, "dropout_p": 0.1} | RULES


def decode() -> dict[str, Any]:
    caches = {"k_cache": T(4, H, 5, D), "v_cache": T(4, H, 5, D), "cache_seqlens": int32(3, 4)}
    new = {name: T(B, H, 1, D) for name in ("q", "k", "v")}
    return caches | new | {"page_table": int32(0, 1, 2, 3).view(2, 2), "scale": 0.5, "softcap": 1.0}


def merge() -> dict[str, Any]:
    return {"outputs": [T(B, H, S, D), T(B, H, S, D)], "lses": [T(B, H, S), T(B, H, S)]}


def sdpa() -> dict[str, Any]:
    tensors = {name: T(B, H, S, D) for name in ("query", "key", "value")}
    return tensors | {"attn_mask": T(S, S), "dropout_p": 0.1, "scale": 0.5, "is_causal": False}


def norm() -> dict[str, Any]:
    numbers = {"eps": 1e-5, "dropout_p": 0.1, "seed": 1, "offset": 2}
    return {"x": T(4, 8), "normalized_shape": (8,), "weight": T(8), "residual": T(4, 8), **numbers}


def ffn() -> dict[str, Any]:
    weights = {"w1": T(16, 8), "b1": T(16), "w2": T(8, 16), "b2": T(8)}
    words = {"norm": "layer", "activation": "gelu", "placement": "pre", "residual": True, "save": "input"}
    numbers = {"eps": 1e-5, "dropout_p": 0.1, "hidden_dropout_p": 0.1, "seed": 1, "offset": 2}
    return {"x": T(4, 8), **weights, "norm_weight": T(8), "norm_bias": T(8), **words, **numbers}


def frozen() -> dict[str, Any]:
    weights = {
        name: bigkern.freeze_weight(T(*shape), "int8") for name, shape in (("w1", (16, 8)), ("w2", (8, 16)))
    }
    return {"x": T(4, 8), **weights, "b1": T(16), "b2": T(8), "norm_weight": T(8), "eps": 1e-5}


def linear() -> dict[str, Any]:
    return {"x": T(600, 128), "weight": T(160, 128), "bias": T(160)}


def batch_norm() -> dict[str, Any]:
    statistics = {"running_mean": T(8), "running_var": torch.ones(8), "weight": T(8), "bias": T(8)}
    options = {"training": True, "momentum": 0.1, "eps": 1e-5, "activation": "relu"}
    return {"x": T(4, 8, 3, 3), **statistics, "residual": T(4, 8, 3, 3), **options}


def recurrent() -> dict[str, Any]:
    weights = [T(32, 5), T(32, 8), T(32), T(32)]
    hx = T(1, 2, 8), T(1, 2, 8)
    return {"x": T(6, 2, 5), "hx": hx, "weights": weights, "mode": "LSTM", "zoneout": T(12, 8)}


def feed_forward() -> dict[str, Any]:
    sizes = {"d_model": 8, "dim_feedforward": 16, "dropout": 0.1, "hidden_dropout": 0.1}
    return {**sizes, "activation": "gelu", "save": "input", "bias": True}


CALLS: dict[Callable[..., Any], Callable[[], dict[str, Any]]] = {
    bigkern.attention: attention,
    bigkern.varlen_attention: varlen,
    bigkern.decode_attention: decode,
    bigkern.merge_attention: merge,
    bigkern.scaled_dot_product_attention: sdpa,
    bigkern.layer_norm: norm,
    bigkern.rms_norm: norm,
    bigkern.layernorm_ffn: ffn,
    bigkern.frozen_layernorm_ffn: frozen,
    bigkern.freeze_weight: lambda: {"weight": T(16, 8), "weights": "int8", "gated": True},
    bigkern.linear: linear,
    bigkern.batch_norm: batch_norm,
    bigkern.recurrent: recurrent,
    bigkern.patch: lambda: {"model": torch.nn.Linear(8, 8), "ops": ("linear",)},
    bigkern.nn.FeedForward: feed_forward,
    bigkern.nn.LayerNormFFN: lambda: {**feed_forward(), "norm": "layer", "placement": "pre", "eps": 1e-5},
}

VALUES: dict[str, Any] = {
    "str": "x", "list": ["x"], "dict": {}, "nan": float("nan"), "inf": float("inf"), "complex": 1j,
    "object": object(), "negative": -1, "huge": 10**30, "pair": (None, None),
}  # fmt: skip

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "complex64": lambda t: t.to(torch.complex64),
    "int": lambda t: t.to(torch.int16),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "wider": lambda t: t.repeat_interleave(3, -1),
    "deeper": lambda t: t[..., None],
    "scalar": lambda _: torch.zeros(()),
    "nested": lambda t: torch.nested.nested_tensor(list(t.unbind()) if t.dim() > 1 else [t]),
}


def table() -> Iterator[Any]:
    for function, arguments in CALLS.items():
        for name, value in arguments().items():
            for label in (*VALUES, *(CHANGES if isinstance(value, Tensor) else ())):
                yield pytest.param(function, name, label, id=f"{function.__name__}-{name}-{label}")


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning", "ignore:.*Sparse.*:UserWarning")
def test_every_wrong_argument_is_named() -> None:
    unnamed = []
    for parameter in table():
        function, name, label = parameter.values
        arguments = CALLS[function]()
        try:
            arguments[name] = VALUES[label] if label in VALUES else CHANGES[label](arguments[name])
        except RuntimeError:
            continue  # torch makes no such tensor
        try:
            function(**arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            if re.search(rf"(?<!\w){name}(?!\w)", str(error)) is None:
                unnamed.append(f"{parameter.id}: {type(error).__name__}: {error}")
        except Exception as error:
            unnamed.append(f"{parameter.id}: {type(error).__name__}: {error}")
    assert not unnamed, "\n".join(unnamed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bigkern.rms_norm(T(4, 8), 8, eps="x"), "eps must be a number, not str"),
        (lambda: bigkern.attention(*[T(B, H, S, D)] * 3, scale="x"), "scale must be a number, not str"),
        (
            lambda: bigkern.attention(*[T(B, H, S, D).to_sparse()] * 3),
            "q must be a dense Tensor, not torch.sparse",
        ),
        (
            lambda: bigkern.layernorm_ffn(**{**ffn(), "residual": "x"}),
            "residual must be True or False, not str",
        ),
        (
            lambda: bigkern.linear(T(4, 8), T(9, 7)),
            r"weight must be \[N, 8\] to match x \(4, 8\), not \(9, 7\): ",
        ),
        (lambda: bigkern.linear(T(4, 8), T(9, 8).double()), "weight must have x's dtype torch.float32, not "),
        (
            lambda: bigkern.scaled_dot_product_attention(None, T(2, 8), T(2, 8)),
            "query must be a Tensor, not None",
        ),
        (
            lambda: bigkern.scaled_dot_product_attention(T(3, 8), T(3, 7), T(3, 8)),
            r"key must be \[..., S, 8\]",
        ),
        (lambda: bigkern.scaled_dot_product_attention(*[T(B, H, S, D)] * 2, T(B, H, 9, D)), "value must be "),
        (
            lambda: bigkern.merge_attention([T(4, 8), T(4, 8).double()], [T(4), T(4)]),
            "outputs must all be torch",
        ),
        (lambda: bigkern.merge_attention(T(2, 4, 8), [T(4), T(4)]), "outputs must be a sequence of Tensors"),
        (lambda: bigkern.recurrent("x", None, [], zoneout=T(3)), "x must be a Tensor, not str"),
        (
            lambda: bigkern.recurrent(T(6, 2, 5), None, None),
            "weights must be a sequence of Tensors, not NoneType",
        ),
        (lambda: bigkern.nn.FeedForward("x", 8), "d_model must be an int, not str"),
        (lambda: bigkern.nn.FeedForward(8, 8, device="gpu"), "device must be a device of torch's, not 'gpu'"),
        (
            lambda: bigkern.nn.FeedForward(8, 8, dtype=torch.int32),
            "dtype must be floating point, not torch.int32",
        ),
        (lambda: bigkern.nn.LayerNormFFN(8, 8, dtype="half"), "dtype must be a torch.dtype or None, not str"),
        (lambda: bigkern.nn.LSTM(8, 8, zoneout="x"), "zoneout must be a number, not str"),
        (lambda: bigkern.use(norm=3).__enter__(), "norm must be a backend"),
        (lambda: bigkern.explain(["norm"]), "op must be a declared one"),
    ],
)
def test_the_error_begins_with_the_argument(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=f"^{message}"):
        call()


def test_scaled_dot_product_attention_speaks_of_torchs_arguments() -> None:
    q = T(B, H, S, D)
    with pytest.raises(ValueError, match=r"^key must be .* to match query"):
        bigkern.scaled_dot_product_attention(q, T(B, H, S, 7), q)
    with pytest.raises(ValueError, match=r"^attn_mask of shape .* does not broadcast"):
        bigkern.scaled_dot_product_attention(q, q, q, T(S, 5))
