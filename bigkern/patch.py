"""Make a model that exists run on our ops, and take it back: ``patch(model)`` and ``unpatch(model)``.

A module is patched when its type is *exactly* one of torch's; a subclass may mean something else by its
forward and is left alone, visibly. Patching changes the module's class to ours, which is torch's class with
another forward, and nothing else: the module, its parameters, buffers, hooks and state_dict stay the same
objects. That is why it can be undone, shared, deep-copied and pickled.

The blocks of Hugging Face models are patched in the same way: their table stands in
:mod:`bigkern.integrations.transformers_blocks`, and is imported when there are any.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

import bigkern.nn as ours
from bigkern import registry
from bigkern.nn.frozen import explain_frozen
from bigkern.nn.transformer import activation_name

PATCHED_MARK = "_bigkern_patched_from"  # on a patched instance: it was stock before, and can be again

REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: ours.LayerNorm,
    nn.RMSNorm: ours.RMSNorm,
    nn.MultiheadAttention: ours.MultiheadAttention,
    nn.TransformerEncoderLayer: ours.TransformerEncoderLayer,
    nn.TransformerDecoderLayer: ours.TransformerDecoderLayer,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One module of the model: the op it now calls, the backend that runs it, or why it was left alone."""

    module: str
    type: str
    op: str
    backend: str
    reason: str


class Report(tuple[Row, ...]):
    """What :func:`patch` did, module by module; prints as a table."""

    @property
    def patched(self) -> int:
        return len({row.module for row in self if row.op != "-"})

    def json(self) -> str:
        return json.dumps([asdict(row) for row in self])

    def __str__(self) -> str:
        header = ("module", "type", "op", "backend", "reason")
        lines = [header, *((r.module, r.type, r.op, r.backend, r.reason) for r in self)]
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        table = [
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(line[:4], widths, strict=True)), line[4]]
            ).rstrip()
            for line in lines
        ]
        left = len(self) - sum(row.op != "-" for row in self)
        return "\n".join([*table, f"{self.patched} modules patched, {left} left alone"])

    __repr__ = __str__


def patch(model: nn.Module) -> Report:
    """Run the model's LayerNorm, RMSNorm, MultiheadAttention and Transformer layers on our ops, in place.

    Patching twice is the same as once. Outputs stay the same within rounding; parameters, state_dict keys
    and hooks are untouched. Of a Hugging Face model, the feed-forward blocks and RMSNorms are patched, too;
    its attention is the business of :func:`bigkern.integrations.transformers.enable`.

    Args:
        model: any module; modules inside it are found by exact type.

    Returns:
        A :class:`Report` that prints as a table: module, op, backend, reason. The backend is what runs the
        op for 512 tokens on the module's device and dtype in its present mode.

    Raises:
        TypeError: ``model`` is not a :class:`torch.nn.Module`.

    Example:
        >>> import torch, bigkern
        >>> model = torch.nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
        >>> report = bigkern.patch(model)
        >>> report.patched
        4
        >>> bigkern.unpatch(model)
        4
    """
    _check(model)
    rows: list[Row] = []
    replacements = _replacements(model)
    for name, module in model.named_modules():
        if type(module) in replacements:
            stock = type(module)
            module.__class__ = replacements[stock]
            setattr(module, PATCHED_MARK, stock.__name__)
        if type(module) in replacements.values():
            rows += _describe(name or "(model)", module)
        elif isinstance(module, tuple(replacements)):
            base = next(stock for stock in replacements if isinstance(module, stock))
            why = f"a subclass of {base.__name__}: its forward may differ"
            rows.append(Row(name or "(model)", type(module).__name__, "-", "torch", why))
    return Report(rows)


def unpatch(model: nn.Module) -> int:
    """Give every module that :func:`patch` changed its stock class back; returns how many there were.

    Modules that were built as ``bigkern.nn`` layers stay what they are, and so do those whose weights
    :func:`bigkern.freeze` has frozen: stock layers could not read them.

    Raises:
        TypeError: ``model`` is not a :class:`torch.nn.Module`.
    """
    _check(model)
    stock_of = {replacement: stock for stock, replacement in _replacements(model).items()}
    count = 0
    for module in model.modules():
        if PATCHED_MARK in module.__dict__ and not _frozen(module):
            module.__class__ = stock_of[type(module)]
            delattr(module, PATCHED_MARK)
            count += 1
    return count


def _replacements(model: nn.Module) -> dict[type[nn.Module], type[nn.Module]]:
    """Torch's layers, and the blocks of transformers if there is a module of transformers in the model."""
    bases = {base for module in model.modules() for base in type(module).__mro__}
    if not any(base.__module__.startswith("transformers.") for base in bases):
        return REPLACEMENTS
    try:
        from bigkern.integrations.transformers_blocks import BLOCKS
    except ImportError as error:
        reason = f"its feed-forward blocks need transformers 5.17 or later, and run as they are: {error}"
        warnings.warn(f"{type(model).__name__}: {reason}", stacklevel=3)
        return REPLACEMENTS
    return REPLACEMENTS | BLOCKS


def _frozen(module: nn.Module) -> bool:
    linear = getattr(module, "linear1", None)
    return isinstance(linear, ours.FrozenLinear) or getattr(module, "frozen", None) is not None


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")


# ---- what the report says of each kind of module ------------------------------------------------------

TOKENS = 512  # the size at which the report asks which backend runs


def _describe(name: str, module: nn.Module) -> Iterator[Row]:
    for op, explanation, reason in _description(module):
        if explanation is None:
            yield Row(name, type(module).__name__, op, "torch", reason)
        else:
            why = next(
                (choice.reason for choice in explanation if choice.chosen), "what use() forces refuses it"
            )
            yield Row(name, type(module).__name__, op, explanation.chosen, why)


def _description(module: nn.Module) -> Description:
    if hasattr(module, "explain_op"):  # a block of transformers
        yield cast(Any, module).explain_op(TOKENS)
        return
    for kind, describe in DESCRIPTIONS.items():
        if isinstance(module, kind):
            yield from describe(module)
            return


Description = Iterator[tuple[str, registry.Explanation | None, str]]


def _example(module: nn.Module, *shape: int) -> Tensor:
    parameter = next(module.parameters(), None)
    if parameter is None:
        return torch.empty(shape)
    return torch.empty(shape, dtype=parameter.dtype, device=parameter.device)


def _describe_norm(module: nn.Module) -> Description:
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    shape = tuple(module.normalized_shape)
    x = _example(module, TOKENS, *shape)
    weight, bias = module.weight, getattr(module, "bias", None)
    kind = "rms" if isinstance(module, nn.RMSNorm) else "layer"
    yield "norm", registry.explain("norm", x, shape, weight, bias, kind=kind), ""


def _describe_attention(module: nn.Module) -> Description:
    assert isinstance(module, ours.MultiheadAttention)
    x = _example(module, *((1, TOKENS) if module.batch_first else (TOKENS, 1)), module.embed_dim)
    k, v = (x.new_empty(*x.shape[:2], width) for width in (module.kdim, module.vdim))
    reason = module.stock_reason(x, k, v, need_weights=False)
    if reason is not None:
        yield "attention", None, reason
        return
    heads = x.new_empty(1, module.num_heads, TOKENS, module.head_dim)
    yield "attention", registry.explain("attention", heads, heads, heads), ""


def _describe_layer(module: nn.Module) -> Description:
    from bigkern.nn.transformer import ffn_stock_reason

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
    nn.LayerNorm: _describe_norm,
    nn.RMSNorm: _describe_norm,
    nn.MultiheadAttention: _describe_attention,
    nn.TransformerEncoderLayer: _describe_layer,
    nn.TransformerDecoderLayer: _describe_layer,
}
