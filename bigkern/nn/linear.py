"""``Linear``: torch's layer on the linear op."""

from __future__ import annotations

from torch import Tensor, nn

from bigkern.nn.torchscript import ScriptsAsStock
from bigkern.ops.linear import linear


class Linear(ScriptsAsStock, nn.Linear):
    r"""Drop-in for :class:`torch.nn.Linear`: same constructor, parameters, keys and errors.

    ``y = x @ weight.T + bias``

    Args:
        in_features, out_features, bias, device, dtype: as torch's.

    Shapes: ``x [..., in_features]`` to ``[..., out_features]``.

    Saved for backward: x and the weight.

    Raises:
        torch's own errors.

    Source: :class:`torch.nn.Linear`.

    Example:
        >>> import torch, bigkern
        >>> bigkern.nn.Linear(64, 256)(torch.randn(2, 16, 64)).shape
        torch.Size([2, 16, 256])
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


PLAIN = (nn.Linear, Linear)  # whose forward is known: a weight, a bias, and nothing else
