"""What runs each module that ``patch`` changed: the op, and which backend for 512 tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

import bigkern.nn as ours
from bigkern.core import registry
from bigkern.nn.frozen import explain_frozen
from bigkern.nn.transformer import activation_name, ffn_stock_reason
from bigkern.patch.report import Row

TOKENS = 512  # the size at which the report asks which backend runs
IMAGE = (8, 28, 28)  # the same for images: how many, height and width
SEQUENCES = (64, 8)  # and for sequences: steps and how many

Description = Iterator[tuple[str, registry.Explanation | None, str]]  # op, what runs it, or why stock does


def describe(name: str, module: nn.Module) -> Iterator[Row]:
    for description in _description(module):
        yield Row.of(name, type(module).__name__, *description)


def _description(module: nn.Module) -> Description:
    if hasattr(module, "explain_op"):  # a block of transformers
        yield cast(Any, module).explain_op(TOKENS)
        return
    for kind, description in DESCRIPTIONS.items():
        if isinstance(module, kind):
            yield from description(module)
            return


def _example(module: nn.Module, *shape: int) -> Tensor:
    parameter = next(module.parameters(), None)
    if parameter is None:
        return torch.empty(shape)
    return torch.empty(shape, dtype=parameter.dtype, device=parameter.device)


def _norm(module: nn.Module) -> Description:
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    shape = tuple(module.normalized_shape)
    x = _example(module, TOKENS, *shape)
    weight, bias = module.weight, getattr(module, "bias", None)
    kind = "rms" if isinstance(module, nn.RMSNorm) else "layer"
    yield "norm", registry.explain("norm", x, shape, weight, bias, kind=kind), ""


def _batch_norm(module: nn.Module) -> Description:
    assert isinstance(module, nn.BatchNorm2d)
    N, H, W = IMAGE
    x = _example(module, N, H, W, module.num_features).permute(0, 3, 1, 2)  # channels_last
    statistics = (module.running_mean, module.running_var, module.weight, module.bias)
    training = module.training or module.running_mean is None
    yield "batch_norm", registry.explain("batch_norm", x, *statistics, training), ""


def _recurrent(module: nn.Module) -> Description:
    assert isinstance(module, nn.RNNBase)
    if getattr(module, "layer_norm", False):
        yield "recurrent", None, "layer_norm is a loop of torch's operations"
        return
    first = module._flat_weights[: len(module._flat_weights) // module.num_layers]
    x = _example(module, *SEQUENCES, module.input_size)
    yield "recurrent", registry.explain("recurrent", x, None, first, module.mode), ""


def _cell(module: nn.Module) -> Description:
    assert isinstance(module, ours.LSTMCell | ours.GRUCell | ours.RNNCell)
    x = _example(module, TOKENS, module.input_size)
    yield "recurrent", registry.explain("recurrent", *module.step(x, ())), ""


def _linear(module: nn.Module) -> Description:
    assert isinstance(module, nn.Linear)
    x = _example(module, TOKENS, module.in_features)
    yield "linear", registry.explain("linear", x, module.weight, module.bias), ""


def _attention(module: nn.Module) -> Description:
    assert isinstance(module, ours.MultiheadAttention)
    x = _example(module, *((1, TOKENS) if module.batch_first else (TOKENS, 1)), module.embed_dim)
    k, v = (x.new_empty(*x.shape[:2], width) for width in (module.kdim, module.vdim))
    reason = module.stock_reason(x, k, v, need_weights=False)
    if reason is not None:
        yield "attention", None, reason
        return
    heads = x.new_empty(1, module.num_heads, TOKENS, module.head_dim)
    yield "attention", registry.explain("attention", heads, heads, heads), ""


def _layer(module: nn.Module) -> Description:
    decoder = isinstance(module, nn.TransformerDecoderLayer)
    norm, dropout = (module.norm3, module.dropout3) if decoder else (module.norm2, module.dropout2)
    reason = ffn_stock_reason(module, norm, module.dropout, dropout)  # type: ignore[arg-type]
    if reason is not None:
        yield "layernorm_ffn", None, reason
        return
    up, down = module.linear1, module.linear2
    if isinstance(up, ours.FrozenLinear):
        activation = activation_name(module.activation)
        x = _example(module, TOKENS, up.in_features)
        yield "frozen_layernorm_ffn", explain_frozen(x, up, down, cast(Any, activation)), ""
        return
    explanation = registry.explain(
        "layernorm_ffn",
        _example(module, TOKENS, up.in_features),  # type: ignore[union-attr,arg-type]
        up.weight, up.bias, down.weight, down.bias, norm.weight, norm.bias,  # type: ignore[union-attr]
        activation=activation_name(module.activation),
        placement="pre" if module.norm_first else "post",
    )  # fmt: skip
    yield "layernorm_ffn", explanation, ""


DESCRIPTIONS: dict[type[nn.Module], Callable[[nn.Module], Description]] = {
    nn.LayerNorm: _norm,
    nn.RMSNorm: _norm,
    nn.BatchNorm2d: _batch_norm,
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _cell,
    nn.Linear: _linear,
    nn.MultiheadAttention: _attention,
    nn.TransformerEncoderLayer: _layer,
    nn.TransformerDecoderLayer: _layer,
}
