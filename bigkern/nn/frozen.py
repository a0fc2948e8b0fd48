"""``FrozenLinear``: a linear layer whose weight will not change any more, packed or in 8 bits."""

from __future__ import annotations

from typing import Any, NoReturn, cast

from torch import Tensor, nn

from bigkern.core import registry
from bigkern.nn.torchscript import refuse
from bigkern.ops.layernorm_ffn.call import GATED, Activation
from bigkern.ops.layernorm_ffn.frozen import (
    Weights,
    freeze_weight,
    frozen_layernorm_ffn,
    frozen_linear,
    packed,
)
from bigkern.ops.layernorm_ffn.frozen_call import FP8, FrozenWeight, check_fp8


class FrozenLinear(nn.Module):
    r"""A :class:`torch.nn.Linear` for inference; what :func:`bigkern.freeze` puts in its place.

    ``y = x @ w.T + bias``, with ``w = weight * weight_scale`` where the weight has 8 bits

    ``weight`` and ``weight_scale`` are buffers and in the state_dict; ``bias`` stays the parameter that it
    was. The order in which a CPU's kernel reads the weight is made again when the layer moves or loads a
    state_dict. Nothing else may write to the weight.

    Args:
        weight: ``[N, K]``, a linear layer's; ``"packed"`` shares its memory.
        bias: ``[N]`` or None.
        weights: ``"packed"``, ``"int8"`` or ``"fp8"``, see :func:`bigkern.freeze`.
        gated: whether the layer is the first of a gated feed-forward block.

    Shapes: ``x [..., K]`` to ``[..., N]``.

    Saved for backward: what torch's own product saves; the weight has no gradient.

    Raises:
        ValueError: as :func:`bigkern.ops.layernorm_ffn.frozen.freeze_weight`.

    Example:
        >>> import torch, bigkern
        >>> linear = torch.nn.Linear(64, 256)
        >>> frozen = bigkern.nn.FrozenLinear(linear.weight, linear.bias, "int8")
        >>> frozen(torch.randn(2, 64)).shape
        torch.Size([2, 256])
    """

    weight: Tensor
    weight_scale: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor,
        bias: nn.Parameter | None = None,
        weights: Weights = "packed",
        gated: bool = False,
    ) -> None:
        super().__init__()
        values, scale, self._packed = freeze_weight(weight, weights, gated=gated)
        self.out_features, self.in_features = weight.shape
        self.weights, self.gated = weights, gated
        self.register_buffer("weight", values)
        self.register_buffer("weight_scale", scale)
        self.bias = bias

    def frozen(self) -> FrozenWeight:
        """The weight as :func:`bigkern.frozen_layernorm_ffn` takes it."""
        return FrozenWeight(self.weight, self.weight_scale, self._packed)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.frozen(), self.bias)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse(type(self).__name__)

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

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._pack()

    def _pack(self) -> None:
        if self.weight.dtype == FP8 and self.weight.is_cuda:
            check_fp8(self.weight.device, "weights")
        self._packed = packed(self.weight, self.gated)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # another machine reads it in another order

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()


class FrozenFeedForward(nn.Module):
    """The linear layers of a feed-forward block, frozen, in the places of ``linear1`` and ``linear2``."""

    def __init__(
        self,
        w1: Tensor,
        b1: nn.Parameter | None,
        w2: Tensor,
        b2: nn.Parameter | None,
        activation: Activation,
        weights: Weights,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.linear1 = FrozenLinear(w1, b1, weights, activation in GATED)
        self.linear2 = FrozenLinear(w2, b2, weights)

    def forward(self, x: Tensor, *norm_parameters: Tensor | None, **options: Any) -> Tensor:
        layers = self.linear1, self.linear2
        return frozen_feed_forward(x, *layers, *norm_parameters, activation=self.activation, **options)


def frozen_feed_forward(
    x: Tensor, linear1: Any, linear2: Any, *norm_parameters: Tensor | None, **options: Any
) -> Tensor:
    """The op on two :class:`FrozenLinear`."""
    weights = linear1.frozen(), linear1.bias, linear2.frozen(), linear2.bias
    return frozen_layernorm_ffn(x, *weights, *norm_parameters, **options)


def explain_frozen(x: Tensor, linear1: Any, linear2: Any, activation: Activation) -> registry.Explanation:
    """Which backend runs these two on x."""
    operands = linear1.frozen(), linear1.bias, linear2.frozen(), linear2.bias
    return registry.explain("frozen_layernorm_ffn", x, *operands, norm="none", activation=activation)


def freeze_layers(module: Any, weights: Weights, activation: Activation) -> None:
    """``module.linear1`` and ``module.linear2``, both or neither."""
    first, second = module.linear1, module.linear2
    frozen = FrozenFeedForward(first.weight, first.bias, second.weight, second.bias, activation, weights)
    module.linear1, module.linear2 = frozen.linear1, frozen.linear2
