"""Freeze the weights of a model's feed-forward blocks for inference: ``freeze(model, weights)``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bigkern import registry
from bigkern.nn import FeedForward, FrozenLinear, LayerNormFFN
from bigkern.nn.frozen import freeze_layers
from bigkern.ops.frozen_layernorm_ffn import Weights
from bigkern.ops.layernorm_ffn import GATED
from bigkern.patch import Report, Row

TOKENS = 16  # the size at which the report asks which backend runs: a decoding batch


def freeze(model: nn.Module, weights: Weights = "packed") -> Report:
    """Make the linear weights of the model's feed-forward blocks constants, for inference, in place.

    Blocks are :class:`bigkern.nn.LayerNormFFN` and :class:`bigkern.nn.FeedForward`, by exact type. Their
    ``linear1`` and ``linear2`` become :class:`bigkern.nn.FrozenLinear`. It cannot be undone. Biases, norms
    and everything else in the model stay what they are; gradients pass through a frozen block to them and to
    what lies below, on stock PyTorch.

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
    for name, module in model.named_modules():
        if type(module) in (LayerNormFFN, FeedForward):
            if isinstance(module.linear1, FrozenLinear):
                rows.append(Row(name or "(model)", type(module).__name__, "-", "-", "frozen before"))
                continue
            x = module.linear1.weight.new_empty(TOKENS, module.linear1.in_features)
            freeze_layers(module, weights, module.activation in GATED)
            rows.append(_row(name or "(model)", module, x))
    return Report(rows)


def _row(name: str, module: Any, x: Tensor) -> Row:
    first, second = module.linear1, module.linear2
    operands = (x, first.frozen(), first.bias, second.frozen(), second.bias)
    op = "frozen_layernorm_ffn"
    explanation = registry.explain(op, *operands, activation=module.activation, norm="none")
    why = next((choice.reason for choice in explanation if choice.chosen), "what use() forces refuses it")
    return Row(name, type(module).__name__, op, explanation.chosen, why)
