"""The blocks of every family: self-attention, cross-attention and FFN, each a residual branch.

    pre:   x = x + drop(proj(attention(qkv(norm(x)))))         post:   x = norm(x + drop(proj(...)))
           x = x + drop(cross.proj(attention(q, memory)))              the same, in decoders that read one
           x = x + drop(W2 act(W1 norm(x) + b1) + b2)

A block is put together from :class:`Parts`: bigkern's, or plain PyTorch's for the twin to compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from bigkern.models.transformer.cache import Cache
from bigkern.models.transformer.config import TransformerConfig
from bigkern.models.transformer.positions import rotate
from bigkern.nn import LayerNorm, LayerNormFFN, Linear, RMSNorm
from bigkern.ops.attention import attention
from bigkern.ops.linear import linear
from bigkern.ops.norm import layer_norm, rms_norm


class Look(NamedTuple):
    """Who may look at whom, the same for all blocks of one pass."""

    causal: bool = False
    mask: Tensor | None = None  # bool [B, 1, 1, S], True where a token stands
    rotary: tuple[Tensor, Tensor] | None = None  # cosine and sine, [S, R / 2] or [B, 1, S, R / 2]
    slopes: Tensor | None = None  # ALiBi's, fp32 [H]
    memory: Tensor | None = None  # [B, Sm, W], what cross-attention reads
    memory_mask: Tensor | None = None  # bool [B, 1, 1, Sm]
    cache: Cache | None = None


class Parts(NamedTuple):
    """What a block is made of; ``product`` is a linear layer whose weight is an embedding's."""

    linear: type[nn.Linear]
    product: Callable[..., Tensor]
    norm: Callable[[TransformerConfig], nn.Module]
    ffn: Callable[[TransformerConfig], nn.Module]
    attend: Callable[[Tensor, Tensor, Tensor, bool, Tensor | None, Tensor | None, float], Tensor]
    add_norm: Callable[[nn.Module, Tensor, Tensor, float], Tensor]


def make_norm(config: TransformerConfig) -> nn.Module:
    if config.norm == "rms":
        return cast(nn.Module, RMSNorm(config.width, eps=config.eps))
    return cast(nn.Module, LayerNorm(config.width, config.eps, bias=config.bias))


def make_ffn(config: TransformerConfig) -> nn.Module:
    return LayerNormFFN(
        config.width,
        config.ffn_width,
        activation=config.activation,
        norm=config.norm,
        placement=config.placement,
        bias=config.bias,
        dropout=config.dropout,
        eps=config.eps,
        hidden_dropout=config.hidden_dropout,
        save=config.save,
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    mask: Tensor | None,
    slopes: Tensor | None,
    dropout_p: float,
) -> Tensor:
    o = attention(q, k, v, causal=causal, mask=mask, alibi_slopes=slopes, dropout_p=dropout_p)
    return cast(Tensor, o)  # [B, H, S, D], stored as [B, S, H, D]


def add_norm(norm: nn.Module, x: Tensor, residual: Tensor, dropout_p: float) -> Tensor:
    """``norm(drop(x) + residual)`` in one pass."""
    if x.dtype != residual.dtype:  # autocast's linear layers and norms differ: the sum has the wider one
        wider = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wider), residual.to(wider)
    options: dict[str, Any] = {"residual": residual, "dropout_p": dropout_p}
    if isinstance(norm, RMSNorm):
        return rms_norm(x, norm.normalized_shape, norm.weight, norm.eps, **options)[0]  # type: ignore[arg-type]
    assert isinstance(norm, LayerNorm)
    return layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps, **options)[0]  # type: ignore[arg-type]


OURS = Parts(Linear, linear, make_norm, make_ffn, attend, add_norm)


class Branch(nn.Module):
    """What self- and cross-attention share: norm, heads, and the way back into the residual stream."""

    norm: nn.Module
    proj: nn.Linear
    drop: nn.Dropout

    def __init__(self, config: TransformerConfig, parts: Parts, layer: int):
        super().__init__()
        self.parts, self.layer = parts, layer
        self.head_dim, self.pre = config.head_dim, config.placement == "pre"
        self.attention_dropout = config.attention_dropout

    def enter(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(x)) if self.pre else x

    def heads(self, x: Tensor) -> Tensor:
        """[B, S, H * D] -> [B, H, S, D], a view."""
        return cast(Tensor, x.unflatten(-1, (-1, self.head_dim))).transpose(1, 2)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, slopes: Tensor | None
    ) -> Tensor:
        dropout_p = self.attention_dropout if self.training else 0.0
        return self.parts.attend(q, k, v, causal, mask, slopes, dropout_p)

    def leave(self, x: Tensor, o: Tensor) -> Tensor:
        """x and the attention output ``o [B, H, S, D]`` as the residual stream behind the branch."""
        branch = self.proj(o.transpose(1, 2).flatten(2))
        if self.pre:
            return cast(Tensor, x + self.drop(branch))
        return self.parts.add_norm(self.norm, branch, x, self.drop.p if self.training else 0.0)


class CrossAttention(Branch):
    """Attention to a memory ``[B, Sm, W]``, an encoder's output."""

    def __init__(self, config: TransformerConfig, parts: Parts, layer: int):
        super().__init__(config, parts, layer)
        W, kv = config.width, config.key_heads * config.head_dim
        self.norm = parts.norm(config)
        self.q = parts.linear(W, W, config.bias)
        self.kv = parts.linear(W, 2 * kv, config.bias)
        self.proj = parts.linear(W, W, config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, look: Look) -> Tensor:
        q = self.heads(self.q(self.enter(x)))
        cache, mask = look.cache, look.memory_mask
        if look.memory is not None:
            k, v = (self.heads(part) for part in self.kv(look.memory).chunk(2, dim=-1))
            if cache is not None:
                cache.memory[self.layer], cache.memory_mask = (k, v), mask
        else:
            assert cache is not None
            (k, v), mask = cache.memory[self.layer], cache.memory_mask
        return self.leave(x, self.attend(q, k, v, False, mask, None))


class Block(Branch):
    """Self-attention and FFN, and cross-attention between them if the block reads a memory."""

    def __init__(self, config: TransformerConfig, parts: Parts = OURS, layer: int = 0, cross: bool = False):
        super().__init__(config, parts, layer)
        W, kv = config.width, config.key_heads * config.head_dim
        self.widths = (W, kv, kv)
        self.norm = parts.norm(config)
        self.qkv = parts.linear(W, W + 2 * kv, config.bias)
        self.proj = parts.linear(W, W, config.bias)
        self.drop = nn.Dropout(config.dropout)
        self.ffn = parts.ffn(config)
        self.cross = CrossAttention(config, parts, layer) if cross else None

    def forward(self, x: Tensor, look: Look) -> Tensor:
        q, k, v = (self.heads(part) for part in self.qkv(self.enter(x)).split(self.widths, dim=-1))
        if look.rotary is not None:
            q, k = rotate(q, *look.rotary), rotate(k, *look.rotary)
        if look.cache is not None:
            o = look.cache.attend(self.layer, q, k, v, look.slopes)
        else:
            o = self.attend(q, k, v, look.causal, look.mask, look.slopes)
        x = self.leave(x, o)
        if self.cross is not None:
            x = self.cross(x, look)
        return cast(Tensor, self.ffn(x))
