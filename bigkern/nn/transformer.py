"""``Transformer``, its encoder and decoder and their layers: torch's modules on our ops.

A layer is torch's class with another ``forward``. Its submodules keep their names and parameters;
attention, norms fused with the residual, and the feed-forward block run as one op each. Where an op does
not cover a call (a hook on a part, another activation), that part runs as torch wrote it. The containers
are torch's, with our layers in them.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from bigkern.nn.attention import MultiheadAttention, canonical_masks
from bigkern.nn.frozen import FrozenLinear, frozen_feed_forward
from bigkern.nn.layer_norm import LayerNorm
from bigkern.nn.linear import PLAIN
from bigkern.nn.torchscript import ScriptsAsStock
from bigkern.ops.layernorm_ffn import layernorm_ffn
from bigkern.ops.layernorm_ffn.call import Activation, Placement
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
    """Whether these modules must really be called: for a hook, or a forward set on the instance."""
    return _has_any_global_hook() or any(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or "forward" in m.__dict__
        for m in modules
    )


def add_norm(norm: nn.LayerNorm, x: Tensor, residual: Tensor) -> Tensor:
    """``norm(x + residual)``, the sum and the norm in one pass where the norm is a plain LayerNorm.

    Under autocast the two may have different dtypes.
    """
    if type(norm) not in (nn.LayerNorm, LayerNorm) or hooked(norm) or x.dtype != residual.dtype:
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
    kinds = {type(layer.linear1), type(layer.linear2)}
    if not kinds <= set(PLAIN) and kinds != {FrozenLinear}:
        return "linear1 or linear2 is not a plain nn.Linear"
    if type(layer.linear1) is FrozenLinear and any(active(dropout) > 0.0 for dropout in dropouts):
        return "frozen weights are for inference, and a dropout is active"
    parts = norm, layer.linear1, layer.linear2, layer.activation, *dropouts
    if hooked(*(part for part in parts if isinstance(part, nn.Module))):
        return "a hook watches a part of the feed-forward block"
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
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


def _use_ours(*fresh: nn.Module) -> None:
    """Turn freshly built stock modules into ours: same parameters, another forward."""
    for module in fresh:
        module.__class__ = OURS.get(type(module), type(module))


class TransformerEncoderLayer(ScriptsAsStock, nn.TransformerEncoderLayer):
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
        _use_ours(self.self_attn, self.norm1, self.norm2)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        padding, mask = canonical_masks(
            src_key_padding_mask, src_mask, src.dtype, "src_key_padding_mask", "src_mask"
        )
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), mask, padding, is_causal)
        else:
            x = add_norm(self.norm1, self._sa_block(x, mask, padding, is_causal), x)
        return feed_forward(self, x, self.norm2, self.dropout2)


class TransformerDecoderLayer(ScriptsAsStock, nn.TransformerDecoderLayer):
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
        _use_ours(self.self_attn, self.multihead_attn, self.norm1, self.norm2, self.norm3)

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


class TransformerEncoder(ScriptsAsStock, nn.TransformerEncoder):
    r"""Drop-in for :class:`torch.nn.TransformerEncoder`: same constructor, keys, defaults, errors.

    Copies of ``encoder_layer`` one after the other, then ``norm``. Stock layers among the copies become
    ours; ``encoder_layer`` and ``norm`` stay as they are.

    Args:
        encoder_layer, num_layers, norm, enable_nested_tensor, mask_check: as torch's. Where torch makes
            nested tensors of padded input (inference, padding at the end, ``enable_nested_tensor``), its
            own kernels run on them.

    Raises:
        torch's own errors, from torch's own checks.

    Source: Vaswani et al., Attention Is All You Need (2017); :class:`torch.nn.TransformerEncoder`.

    Example:
        >>> import torch, bigkern
        >>> layer = bigkern.nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
        >>> bigkern.nn.TransformerEncoder(layer, 2)(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _use_ours(*self.layers.modules())


class TransformerDecoder(ScriptsAsStock, nn.TransformerDecoder):
    r"""Drop-in for :class:`torch.nn.TransformerDecoder`: same constructor, keys, defaults, errors.

    Copies of ``decoder_layer`` one after the other, then ``norm``. Stock layers among the copies become
    ours; ``decoder_layer`` and ``norm`` stay as they are.

    Raises:
        torch's own errors, from torch's own checks.

    Source: Vaswani et al., Attention Is All You Need (2017); :class:`torch.nn.TransformerDecoder`.

    Example:
        >>> import torch, bigkern
        >>> layer = bigkern.nn.TransformerDecoderLayer(64, 4, 256, batch_first=True)
        >>> decoder = bigkern.nn.TransformerDecoder(layer, 2)
        >>> decoder(torch.randn(2, 10, 64), torch.randn(2, 7, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _use_ours(*self.layers.modules())


class Transformer(ScriptsAsStock, nn.Transformer):
    r"""Drop-in for :class:`torch.nn.Transformer`: same constructor, keys, defaults, errors.

    ``decoder(tgt, encoder(src))``. A ``custom_encoder`` or ``custom_decoder`` stays as it is.

    Raises:
        torch's own errors, from torch's own checks.

    Source: Vaswani et al., Attention Is All You Need (2017); :class:`torch.nn.Transformer`.

    Example:
        >>> import torch, bigkern
        >>> model = bigkern.nn.Transformer(64, 4, 1, 1, 256, batch_first=True)
        >>> model(torch.randn(2, 10, 64), torch.randn(2, 7, 64)).shape
        torch.Size([2, 7, 64])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = inspect.signature(nn.Transformer).bind(*args, **kwargs).arguments
        for stack in ("encoder", "decoder"):
            if given.get(f"custom_{stack}") is None:
                _use_ours(*getattr(self, stack).modules())


OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: LayerNorm,
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerDecoder: TransformerDecoder,
}
