"""The linear layer in plain torch: what every kernel must compute.

y  = x W^T + b              x [..., K], W [N, K], b [N], y [..., N]
dx = dy W,  dW = dy^T x,  db = sum of dy's rows
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bigkern.ops.linear.call import Gradients, Linear, LinearBackward


def linear(call: Linear) -> Tensor:
    """y in x's dtype."""
    return F.linear(call.x, call.weight, call.bias)


def linear_backward(call: LinearBackward) -> Gradients:
    """The gradients of x and of the weight."""
    dy, x, weight = call.dy, call.x, call.weight
    dx = dy.matmul(weight) if call.want_x else None
    if not call.want_weight:
        return Gradients(dx, None)
    N, K = weight.shape
    return Gradients(dx, dy.reshape(-1, N).t().mm(x.reshape(-1, K)))
