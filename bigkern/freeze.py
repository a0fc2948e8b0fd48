"""Freeze the weights of a model's feed-forward blocks for inference: ``freeze(model, weights)``."""

from __future__ import annotations

from typing import Any

from torch import nn

from bigkern.nn import (
    FeedForward,
    FrozenLinear,
    LayerNormFFN,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)
from bigkern.nn.frozen import explain_frozen, freeze_layers
from bigkern.nn.linear import PLAIN
from bigkern.nn.transformer import activation_name
from bigkern.ops.layernorm_ffn.frozen import Weights
from bigkern.patch import Report, Row

OP = "frozen_layernorm_ffn"
TOKENS = 16  # the size at which the report asks which backend runs: a decoding batch


def freeze(model: nn.Module, weights: Weights = "packed") -> Report:
    """Make the linear weights of the model's feed-forward blocks constants, for inference, in place.

    Blocks are :class:`bigkern.nn.LayerNormFFN` and :class:`bigkern.nn.FeedForward`, bigkern's Transformer
    layers, and what :func:`bigkern.patch` has made of torch's and of Hugging Face's. Their two linear layers
    become :class:`bigkern.nn.FrozenLinear`; a gate is joined to its other half once and for all, in
    ``frozen``, where the original linear layers were. It cannot be undone. Biases, norms and everything else
    in the model stay what they are; gradients pass through a frozen block to them and to what lies below, on
    stock PyTorch.

    Args:
        model: any module, or one of these blocks.
        weights: how the weights are kept.

            ======== ============ ==================================== ==========================
            weights  bytes        error of a block's output            runs on
            ======== ============ ==================================== ==========================
            packed   as before;   none: the same to the last bit       CPU: nothing left to pack;
                     on a CPU x2                                       GPU: as before
            int8     1; on a      about 1 % of its size: weights move  CPU and GPU
                     CPU 2        by at most 1/254 of a row's largest
            fp8      1            about 5 %: weights and activations   GPU of compute capability
                                  keep 4 binary digits                 8.9 or higher
            ======== ============ ==================================== ==========================

            Measured on normally distributed weights; a row's outliers make it worse.

    Returns:
        A table: module, op, backend, reason. The backend is what runs the op for 16 tokens.

    Raises:
        TypeError: ``model`` is not a :class:`torch.nn.Module`.
        ValueError: ``weights`` is not one of the above, or ``"fp8"`` is asked of a device without it.

    Source: Dettmers et al., LLM.int8() (2022); Micikevicius et al., FP8 Formats for Deep Learning (2022).

    Example:
        >>> import torch, bigkern
        >>> model = torch.nn.Sequential(bigkern.nn.LayerNormFFN(64, 256), bigkern.nn.LayerNormFFN(64, 256))
        >>> bigkern.freeze(model.eval(), "int8").patched
        2
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if weights not in ("packed", "int8", "fp8"):
        raise ValueError(f'weights must be "packed", "int8" or "fp8", not {weights!r}')
    rows = []
    for name, module in list(model.named_modules()):
        if type(module) in (LayerNormFFN, FeedForward, TransformerEncoderLayer, TransformerDecoderLayer):
            rows.append(_freeze_layer(name or "(model)", module, weights))
        elif hasattr(module, "freeze") and hasattr(module, "explain_op"):  # a patched block of transformers
            rows.append(_freeze_block(name or "(model)", module, weights))
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # torch's own path for these reads the weights itself
    return Report(rows)


def _freeze_layer(name: str, layer: Any, weights: Weights) -> Row:
    kind, linear = type(layer).__name__, layer.linear1
    activation = layer.activation if isinstance(layer, FeedForward) else activation_name(layer.activation)
    if isinstance(linear, FrozenLinear):
        return Row(name, kind, "-", "-", "frozen before")
    if activation is None:
        return Row(name, kind, "-", "torch", "an activation that the op does not have", refused=True)
    if not {type(linear), type(layer.linear2)} <= set(PLAIN):
        return Row(name, kind, "-", "torch", "linear1 or linear2 is not a plain nn.Linear", refused=True)
    x = linear.weight.new_empty(TOKENS, linear.in_features)
    freeze_layers(layer, weights, activation)
    return Row.of(name, kind, OP, explain_frozen(x, layer.linear1, layer.linear2, activation), "")


def _freeze_block(name: str, block: Any, weights: Weights) -> Row:
    kind = type(block).__name__
    reason = "frozen before" if block.frozen is not None else block.freeze(weights)
    if reason is not None:
        done = reason == "frozen before"
        return Row(name, kind, "-", "-" if done else "torch", reason, refused=not done)
    return Row.of(name, kind, OP, block.frozen.explain(TOKENS), "")
