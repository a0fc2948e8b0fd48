"""The forms that blocks of transformers have, whatever the model: what their forward is on our ops.

A block of :mod:`bigkern.patch.transformers.blocks` or :mod:`bigkern.patch.transformers.layers`
is one of these forms above the stock class that knows what else to do. Where the op does not cover a call (a
hook on a part, LoRA, quantised weights, another activation), the stock forward runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bigkern.core import registry
from bigkern.nn import LayerNorm
from bigkern.nn.transformer import active, hooked
from bigkern.ops.layernorm_ffn import layernorm_ffn
from bigkern.ops.layernorm_ffn.frozen import Weights
from bigkern.ops.norm import layer_norm, rms_norm
from bigkern.patch.transformers.parts import (
    FrozenParts,
    Parts,
    few_rows,
    freezing_reason,
    joining_reason,
    operands,
    options,
    other_block,
    stock_reason,
    unfit,
    unfused,
)

Explained = tuple[str, registry.Explanation | None, str]  # op, what runs it, or why the stock forward does


# ---- feed-forward blocks ---------------------------------------------------------------------------


class Block(nn.Module):
    """What calls the feed-forward op with its parts."""

    joins = False  # whether gate and up are two weights, which the op takes as one

    def _parts(self: Any) -> Parts | str:
        """The parts of this block as they are now, or why they are not its stock class's."""
        raise NotImplementedError

    def _known_parts(self) -> Parts | str:
        try:
            return self._parts()
        except AttributeError as error:
            return f"another version of transformers builds it otherwise: {error}"

    def _plan(self, x: Tensor, width: int) -> Parts | str:
        """The parts to call the op with on x, of rows of so many elements, or why the stock forward runs."""
        parts = few_rows(x, width, self.joins) or self._known_parts()
        if isinstance(parts, str):
            return parts
        return stock_reason(parts, x) or joining_reason(parts, x) or parts

    def _op(self, x: Tensor, parts: Parts) -> Tensor:
        return layernorm_ffn(x, *operands(parts), **options(parts))

    def explain_op(self, tokens: int) -> Explained:
        """The op of this block, which backend runs it for so many tokens, or why the stock forward does."""
        op, parts = "layernorm_ffn", self._known_parts()
        if isinstance(parts, str):
            return op, None, parts
        if (reason := other_block(parts)) is not None:
            return op, None, reason
        weight = cast(Tensor, parts.up.weight)
        x = weight.new_empty(tokens, weight.shape[0 if isinstance(parts.up, Conv1D) else -1])
        if (reason := stock_reason(parts, x)) is not None:
            return op, None, reason
        if (reason := joining_reason(parts, x)) is not None:
            return op, unfused(op, reason), ""
        return op, registry.explain(op, x, *operands(parts), **options(parts)), ""


class FeedForwardBlock(Block):
    """A block with two linear layers of its own."""

    @property
    def frozen(self: Any) -> FrozenParts | None:
        """What :func:`bigkern.freeze` put in the place of the linear layers."""
        return cast(FrozenParts | None, self._modules.get("frozen"))

    def freeze(self, weights: Weights) -> str | None:
        """Put frozen weights in the place of the linear layers, or say why not."""
        parts = self._known_parts()
        reason = parts if isinstance(parts, str) else freezing_reason(parts)
        if reason is not None:
            return reason
        self._modules["frozen"] = FrozenParts(cast(Parts, parts), weights)
        gone = {id(linear) for linear in cast(Parts, parts).linears()}
        for parent in list(self.modules()):
            for name, child in parent.named_children():
                if id(child) in gone:
                    setattr(parent, name, None)
        return None

    def _run(self, x: Tensor, stock: Callable[[Tensor], Any]) -> Tensor:
        if self.frozen is not None:
            return cast(Tensor, self.frozen(x))
        parts = self._plan(x, x.shape[-1])
        if isinstance(parts, str):
            return cast(Tensor, stock(x))
        return self._op(x, parts)

    def explain_op(self, tokens: int) -> Explained:
        if self.frozen is not None:
            return "frozen_layernorm_ffn", self.frozen.explain(tokens), ""
        return super().explain_op(tokens)


class PostNorm(FeedForwardBlock):
    """``norm(x + drop(down(act(up(x)))))``, of a block called in chunks of the sequence if so configured."""

    inner: tuple[type, type]  # of intermediate and output

    def _parts(self: Any) -> Parts | str:
        up, down = self.intermediate, self.output
        if (type(up), type(down)) != self.inner:
            return f"intermediate is a {type(up).__name__}, output a {type(down).__name__}"
        act = up.intermediate_act_fn
        block = {"dropout": down.dropout, "norm": down.LayerNorm, "placement": "post", "residual": True}
        return Parts(up.dense, act, down.dense, **block, around=(up, down))

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        return self._run(attention_output, super().feed_forward_chunk)  # type: ignore[misc]


class TwoLinears(FeedForwardBlock):
    """``down(act(up(x)))``."""

    def _parts(self: Any) -> Parts | str:
        return Parts(self.fc1, self.activation_fn, self.fc2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self._run(hidden_states, super().forward)


class Gated(FeedForwardBlock):
    """``down(act(gate(x)) * up(x))``."""

    joins = True

    def _parts(self: Any) -> Parts | str:
        return Parts(self.up_proj, self.act_fn, self.down_proj, gate=self.gate_proj)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, super().forward)


# ---- whole layers ----------------------------------------------------------------------------------


class Layer(Block):
    """A Transformer layer whose second half is one op, with its norm and its residual.

    Its first half, attention, is written out again in ours, so that the stock forward must be one that was
    read: ``read`` are the names that it uses. Of another one nothing is known, and it runs as it is.
    """

    read: ClassVar[str]
    unread: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = next((c for c in cls.__mro__ if c.__module__.startswith("transformers.")), None)
        if stock is not None:
            names = inspect.unwrap(cast(Any, stock).forward).__code__.co_names
            cls.unread = set(names) != set(cls.read.split())

    def _first_half(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """What the second half takes; None, before anything is computed, if the stock forward is to run."""
        raise NotImplementedError

    def _known_parts(self) -> Parts | str:
        if self.unread:
            return "another version of transformers: its forward is not the one that was read"
        return super()._known_parts()

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts = self._plan(hidden_states, hidden_states.shape[-1])
        if not isinstance(parts, str):
            x = self._first_half(hidden_states, *args, **kwargs)
            if x is not None:
                return self._op(x, parts)
        return cast(Tensor, super().forward(hidden_states, *args, **kwargs))


class LayerAround(Layer):
    """A layer that has its feed-forward block, which is one of ours, as a module: ``x + drop(mlp(norm(x)))``.

    Where the layer as a whole cannot be one op, its stock forward calls that block.
    """

    def _block(self: Any) -> nn.Module:
        return cast(nn.Module, self.mlp)

    def explain_op(self, tokens: int) -> Explained:
        block = self._block()
        if isinstance(block, FeedForwardBlock) and block.frozen is not None:
            return block.explain_op(tokens)
        return super().explain_op(tokens)


def around(block: nn.Module, **more: Any) -> Parts | str:
    """The parts of a layer around a feed-forward block: that block's, and some more."""
    if not isinstance(block, FeedForwardBlock):
        return f"its {type(block).__name__} is not one of ours"
    if block.frozen is not None:
        return f"its {type(block).__name__} is frozen"
    parts = block._known_parts()
    if isinstance(parts, str):
        return parts
    return parts._replace(residual=True, around=(*parts.around, block), **more)


class LayerWithLinears(Layer, FeedForwardBlock):
    """A layer that has the two linear layers of its feed-forward block itself."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.frozen is not None:
            return cast(Tensor, self.frozen(self._first_half(hidden_states, *args, **kwargs)))
        return super().forward(hidden_states, *args, **kwargs)


# ---- norms -----------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if unfit(hidden_states, self.weight) is not None:
            return cast(Tensor, super().forward(hidden_states))
        return cast(Tensor, rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon))

    def explain_op(self: Any, tokens: int) -> Explained:
        x = self.weight.new_empty(tokens, *self.weight.shape)
        reason = unfit(x, self.weight)
        if reason is not None:
            return "norm", None, reason
        return "norm", registry.explain("norm", x, self.weight.shape, self.weight, kind="rms"), ""


def unfusable(norm: Any, x: Tensor, dropout: Any) -> str | None:
    """Why ``norm(dropout(x) + residual)`` cannot be one pass, or None if it can."""
    if type(norm) is not LayerNorm:
        return f"the norm is a {type(norm).__name__}"
    if active(dropout) >= 1.0:
        return "a dropout that drops everything"
    if hooked(norm, *([dropout] if isinstance(dropout, nn.Module) else [])):
        return "a hook watches the norm or the dropout"
    return unfit(x, norm.weight, norm.bias)


def add_norm(norm: nn.LayerNorm, x: Tensor, residual: Tensor, dropout: Any) -> Tensor:
    """``norm(dropout(x) + residual)``, in one pass if it can be."""
    if unfusable(norm, x, dropout) is not None or x.dtype != residual.dtype:
        return cast(Tensor, norm(F.dropout(x, dropout.p, dropout.training) + residual))
    shape, p = tuple(norm.normalized_shape), active(dropout)
    y, _ = layer_norm(x, shape, norm.weight, norm.bias, norm.eps, residual=residual, dropout_p=p)
    return y


class AddNorm(nn.Module):
    """``norm(drop(dense(x)) + residual)``, the last three in one pass."""

    def forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if type(self.dropout) is not nn.Dropout or unfusable(self.LayerNorm, input_tensor, self.dropout):
            return cast(Tensor, super().forward(hidden_states, input_tensor))  # type: ignore[misc]
        return add_norm(self.LayerNorm, self.dense(hidden_states), input_tensor, self.dropout)

    def explain_op(self: Any, tokens: int) -> Explained:
        norm = self.LayerNorm
        x = torch.empty(tokens, *norm.normalized_shape, dtype=norm.weight.dtype, device=norm.weight.device)
        plain = type(self.dropout) is nn.Dropout
        reason = unfusable(norm, x, self.dropout) if plain else "the dropout is not a plain nn.Dropout"
        if reason is not None:
            return "norm", None, reason
        return "norm", registry.explain("norm", x, x.shape[-1:], norm.weight, norm.bias, residual=x), ""
