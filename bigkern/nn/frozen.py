"""``FrozenLinear``: a linear layer whose weight will not change any more, packed or in 8 bits."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from bigkern.ops.frozen_layernorm_ffn import (
    FP8,
    FrozenWeight,
    Weights,
    check_fp8,
    freeze_weight,
    frozen_linear,
    packed,
)


class FrozenLinear(nn.Module):
    r"""A :class:`torch.nn.Linear` for inference; what :func:`bigkern.freeze` puts in its place.

    ``y = x @ w.T + bias``, with ``w = weight * weight_scale`` where the weight has 8 bits

    ``weight`` and ``weight_scale`` are buffers and in the state_dict; ``bias`` stays the parameter that it
    was. The order in which a CPU's kernel reads the weight is made again when the layer moves or loads a
    state_dict. Nothing else may write to the weight.

    Args:
        linear: the layer whose weight is taken; ``"packed"`` shares its memory.
        weights: ``"packed"``, ``"int8"`` or ``"fp8"``, see :func:`bigkern.freeze`.
        gated: whether the layer is the first of a gated feed-forward block.

    Shapes: ``x [..., K]`` to ``[..., N]``.

    Saved for backward: what torch's own product saves; the weight has no gradient.

    Raises:
        ValueError: as :func:`bigkern.ops.frozen_layernorm_ffn.freeze_weight`.

    Example:
        >>> import torch, bigkern
        >>> frozen = bigkern.nn.FrozenLinear(torch.nn.Linear(64, 256), "int8")
        >>> frozen(torch.randn(2, 64)).shape
        torch.Size([2, 256])
    """

    weight: Tensor
    weight_scale: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, weights: Weights = "packed", gated: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weights, self.gated = weights, gated
        values, scale, self._packed = freeze_weight(linear.weight, weights, gated=gated)
        self.register_buffer("weight", values)
        self.register_buffer("weight_scale", scale)
        self.bias = linear.bias
        self.register_load_state_dict_post_hook(lambda *_: self._pack())

    def frozen(self) -> FrozenWeight:
        """The weight as :func:`bigkern.frozen_layernorm_ffn` takes it."""
        return FrozenWeight(self.weight, self.weight_scale, self._packed)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.frozen(), self.bias)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, weights={self.weights!r}"

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenLinear:
        """``to``, ``half``, ``cuda`` and the like: 8-bit weights and their scales only move."""
        kept = {} if self.weight_scale is None else dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in kept.items():
            setattr(self, name, cast(Tensor, before).to(getattr(self, name).device))
        self._pack()
        return self

    def _pack(self) -> None:
        if self.weight.dtype == FP8 and self.weight.is_cuda:
            check_fp8(self.weight.device, "weights")
        self._packed = packed(self.weight, self.gated)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # another machine reads it in another order

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()


def freeze_layers(module: Any, weights: Weights, gated: bool) -> None:
    """linear1 and linear2 of a feed-forward block, both or neither."""
    first = FrozenLinear(module.linear1, weights, gated)
    second = FrozenLinear(module.linear2, weights)
    module.linear1, module.linear2 = first, second
