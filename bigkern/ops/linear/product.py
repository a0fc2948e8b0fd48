"""The linear layer's products for other ops to build on: by our kernels where they would be chosen."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from bigkern.ops.linear.backends import LINEAR
from bigkern.ops.linear.call import Gradients, Linear, LinearBackward

LONG = 4096  # rows


def product(call: Linear) -> Tensor:
    """y, without a graph."""
    return cast(Tensor, _chosen(call).forward(call))


def product_backward(call: LinearBackward) -> Gradients:
    """A weight's gradient sums over all rows: stock's product of few columns in one go, ours in parts."""
    forward, ours = Linear(call.x, call.weight, None), LINEAR.backends["cpu"]
    long_sums = call.x.dtype == torch.float32 and len(call.x) >= LONG and ours.refuses(forward) is None
    candidate: Any = ours if long_sums else _chosen(forward)
    return cast(Gradients, candidate.backward(call))


def _chosen(call: Linear) -> Any:
    candidate = LINEAR.choose(call)
    return LINEAR.reference if candidate.by_torch else candidate
