"""The linear layer in plain torch: what every kernel must compute.

y  = x W^T + b              x [..., K], W [N, K], b [N], y [..., N]
dx = dy W,  dW = dy^T x,  db = sum of dy's rows
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y in x's dtype."""
    return F.linear(x, weight, bias)


def linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of the weight."""
    dx = dy.matmul(weight) if want_x else None
    if not want_weight:
        return dx, None
    rows = dy.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])
    return dx, rows[0].t().mm(rows[1])
