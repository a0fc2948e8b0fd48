"""``TransformerEncoderLayer`` and ``TransformerDecoderLayer``: torch's layers on our ops.

Each is torch's class with another ``forward``. Its submodules keep their names and parameters; attention,
norms fused with the residual, and the feed-forward block run as one op each. Where an op does not cover a
call (a hook on a part, another activation), that part runs as torch wrote it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigkern.nn.attention import MultiheadAttention
from bigkern.nn.frozen import FrozenLinear, frozen_feed_forward
from bigkern.nn.layer_norm import LayerNorm
from bigkern.ops.layernorm_ffn import Activation, Placement, layernorm_ffn
from bigkern.ops.norm import layer_norm


def activation_name(activation: Any) -> Activation | None:
    """The op's name for an activation function or module, None if it has none."""
    if activation is F.relu or activation is torch.relu or type(activation) is nn.ReLU:
        return "relu"
    if activation is F.gelu:
        return "gelu"
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if activation is F.silu or type(activation) is nn.SiLU:
        return "silu"
    return None


def hooked(*modules: nn.Module) -> bool:
    """Whether someone watches these modules' calls, so that they must really be called."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in modules
    )


def add_norm(norm: nn.LayerNorm, x: Tensor, residual: Tensor) -> Tensor:
    """``norm(x + residual)``, the sum and the norm in one pass where the norm is a plain LayerNorm."""
    if type(norm) not in (nn.LayerNorm, LayerNorm) or hooked(norm):
        return cast(Tensor, norm(x + residual))
    shape = tuple(norm.normalized_shape)
    y, _sum = layer_norm(x, shape, norm.weight, norm.bias, norm.eps, residual=residual)
    return y


def active(dropout: nn.Module) -> float:
    """The probability with which a dropout layer drops now."""
    return cast(float, dropout.p) if dropout.training else 0.0


def ffn_stock_reason(layer: nn.Module, norm: nn.Module, *dropouts: nn.Module) -> str | None:
    """Why the fused feed-forward op cannot stand in for these parts of a layer, or None if it can."""
    if any(type(dropout) is not nn.Dropout for dropout in dropouts):
        return "a dropout is not a plain nn.Dropout"
    if any(active(dropout) >= 1.0 for dropout in dropouts):
        return "a dropout that drops everything"
    if activation_name(layer.activation) is None:
        return "an activation that the op does not have"
    if type(norm) not in (nn.LayerNorm, LayerNorm):
        return f"the norm is a {type(norm).__name__}"
    if type(layer.linear1) not in (nn.Linear, FrozenLinear) or type(layer.linear2) is not type(layer.linear1):
        return "linear1 or linear2 is not a plain nn.Linear"
    if type(layer.linear1) is FrozenLinear and any(active(dropout) > 0.0 for dropout in dropouts):
        return "frozen weights are for inference, and a dropout is active"
    if hooked(norm, cast(nn.Module, layer.linear1), cast(nn.Module, layer.linear2), *dropouts):
        return "a hook watches a part of the feed-forward block"
    if torch.is_autocast_enabled():
        return "autocast is on"
    return None


def feed_forward(layer: Any, x: Tensor, norm: nn.LayerNorm, dropout: nn.Dropout) -> Tensor:
    """The layer's second half, ``x + ffn(norm(x))`` or ``norm(x + ffn(x))``, as one op where it can be."""
    activation = activation_name(layer.activation)
    if activation is not None and ffn_stock_reason(layer, norm, layer.dropout, dropout) is None:
        first, second, affine = layer.linear1, layer.linear2, (norm.weight, norm.bias)
        placement: Placement = "pre" if layer.norm_first else "post"
        options: dict[str, Any] = {"activation": activation, "placement": placement, "eps": norm.eps}
        if type(first) is FrozenLinear:
            return frozen_feed_forward(x, first, second, *affine, **options)
        weights = first.weight, first.bias, second.weight, second.bias
        options |= {"dropout_p": active(dropout), "hidden_dropout_p": active(layer.dropout)}
        return layernorm_ffn(x, *weights, *affine, **options)
    if layer.norm_first:
        return cast(Tensor, x + layer._ff_block(norm(x)))
    return add_norm(norm, layer._ff_block(x), x)


def _use_our_parts(layer: nn.Module, names: tuple[str, ...]) -> None:
    """Turn the freshly built stock parts of a layer into ours: same parameters, another forward."""
    ours = {nn.MultiheadAttention: MultiheadAttention, nn.LayerNorm: LayerNorm}
    for name in names:
        part = getattr(layer, name)
        part.__class__ = ours[type(part)]


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    r"""Drop-in for :class:`torch.nn.TransformerEncoderLayer`: same constructor, keys, defaults, errors.

        norm_first:   x = x + attention(norm1(x));     x = x + ffn(norm2(x))
        otherwise:    x = norm1(x + attention(x));     x = norm2(x + ffn(x))

    Raises:
        torch's own errors, from torch's own checks.

    Source: Vaswani et al., Attention Is All You Need (2017); :class:`torch.nn.TransformerEncoderLayer`.

    Example:
        >>> import torch, bigkern
        >>> layer = bigkern.nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, dropout=0.0)
        >>> layer(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _use_our_parts(self, ("self_attn", "norm1", "norm2"))

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal)
        else:
            x = add_norm(self.norm1, self._sa_block(x, src_mask, src_key_padding_mask, is_causal), x)
        return feed_forward(self, x, self.norm2, self.dropout2)


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    r"""Drop-in for :class:`torch.nn.TransformerDecoderLayer`: same constructor, keys, defaults, errors.

        norm_first:   x = x + self_attention(norm1(x));  x = x + cross_attention(norm2(x), memory)
                      x = x + ffn(norm3(x))
        otherwise:    each norm after its sum

    Raises:
        torch's own errors, from torch's own checks.

    Source: Vaswani et al., Attention Is All You Need (2017); :class:`torch.nn.TransformerDecoderLayer`.

    Example:
        >>> import torch, bigkern
        >>> layer = bigkern.nn.TransformerDecoderLayer(64, 4, 256, batch_first=True, dropout=0.0)
        >>> layer(torch.randn(2, 10, 64), torch.randn(2, 7, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _use_our_parts(self, ("self_attn", "multihead_attn", "norm1", "norm2", "norm3"))

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        of_tgt = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        of_memory = (memory, memory_mask, memory_key_padding_mask, memory_is_causal)
        x = tgt
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), *of_tgt)
            x = x + self._mha_block(self.norm2(x), *of_memory)
        else:
            x = add_norm(self.norm1, self._sa_block(x, *of_tgt), x)
            x = add_norm(self.norm2, self._mha_block(x, *of_memory), x)
        return feed_forward(self, x, self.norm3, self.dropout3)
