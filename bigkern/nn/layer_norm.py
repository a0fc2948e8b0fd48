"""``LayerNorm`` and ``RMSNorm``: torch's layers on the norm op."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from bigkern.nn.torchscript import ScriptsAsStock
from bigkern.ops.norm import layer_norm, rms_norm


class LayerNorm(ScriptsAsStock, nn.LayerNorm):
    r"""Drop-in for :class:`torch.nn.LayerNorm`: same constructor, parameters, keys and errors.

    ``y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias``

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as torch's.

    Shapes: ``x [*, *normalized_shape]`` to the same; float32, bfloat16, float16; float64 on stock.

    Saved for backward: x, weight, and one fp32 mean and one fp32 1 / deviation a row.

    Raises:
        TypeError, RuntimeError, ValueError: as :func:`bigkern.layer_norm`.

    Source: Ba, Kiros and Hinton, Layer Normalization (2016); :class:`torch.nn.LayerNorm`.

    Example:
        >>> import torch, bigkern
        >>> bigkern.nn.LayerNorm(64)(torch.randn(2, 16, 64)).shape
        torch.Size([2, 16, 64])
    """

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps))


class RMSNorm(ScriptsAsStock, nn.RMSNorm):
    r"""Drop-in for :class:`torch.nn.RMSNorm`: same constructor, parameters, keys and errors.

    ``y = x / sqrt(mean(x^2) + eps) * weight``

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as torch's.

    Shapes: ``x [*, *normalized_shape]`` to the same; float32, bfloat16, float16; float64 on stock.

    Saved for backward: x, weight, and one fp32 1 / root-mean-square a row.

    Raises:
        TypeError, RuntimeError, ValueError: as :func:`bigkern.rms_norm`.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019); :class:`torch.nn.RMSNorm`.

    Example:
        >>> import torch, bigkern
        >>> bigkern.nn.RMSNorm(64)(torch.randn(2, 16, 64)).shape
        torch.Size([2, 16, 64])
    """

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, rms_norm(x, self.normalized_shape, self.weight, self.eps))
