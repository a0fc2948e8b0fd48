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
    ours = LINEAR.backends["cpu"]
    return cast(Tensor, (ours if ours.objection(call) is None else LINEAR.reference).forward(call))


def product_backward(call: LinearBackward) -> Gradients:
    """A weight's gradient sums over all rows: stock's product of few columns in one go, ours in parts."""
    forward, ours = Linear(call.x, call.weight, None), LINEAR.backends["cpu"]
    long_sums = call.x.dtype == torch.float32 and len(call.x) >= LONG and ours.refuses(forward) is None
    takes = long_sums or ours.objection(forward) is None
    backward = cast(Any, ours if takes else LINEAR.reference).backward
    return cast(Gradients, backward(call))
