"""The linear layer."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from bigkern.ops.linear import stock
from bigkern.ops.linear.backends import LINEAR, of_torch_alone


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""The linear layer, ``y = x @ weight.T + bias``.

    Args:
        x: ``[..., K]``; float32, bfloat16 or float16 (float64 runs on stock PyTorch).
        weight: ``[N, K]``; a transposed view, as of a ``[K, N]`` parameter, is read where it lies.
        bias: ``[N]`` or None.

    Returns:
        ``y`` ``[..., N]`` of x's dtype; sums are fp32.

    Saved for backward: x and the weight. Differentiable twice.

    Raises:
        torch's own errors, with the argument's name before them: what the kernels do not take goes to
            :func:`torch.nn.functional.linear`.

    Source: :func:`torch.nn.functional.linear`.

    Example:
        >>> import torch, bigkern
        >>> bigkern.linear(torch.randn(2, 16, 64), torch.randn(256, 64)).shape
        torch.Size([2, 16, 256])
    """
    whole = type(x) is Tensor and isinstance(weight, Tensor)
    if whole and LINEAR.stocks.have(x.numel(), weight.numel(), x.dtype):
        return stock.linear(x, weight, bias)
    if of_torch_alone(x, weight, bias):
        return stock.linear(x, weight, bias)
    candidate, call, needs_grad = LINEAR.decided(x, weight, bias)
    if whole:
        LINEAR.stocks.learn(candidate.by_torch, x.numel(), weight.numel(), x.dtype)
    return cast(Tensor, LINEAR.run(candidate, call, needs_grad))
