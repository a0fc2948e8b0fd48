"""BatchNorm, the residual addition and the ReLU after it in plain torch: what every kernel must compute.

    mean = mean(x)   var = mean((x - mean)^2)       over all dimensions but channels, or given      [C] fp32
    xhat = (x - mean) / sqrt(var + eps)                                                             [N, C, *]
    z    = xhat * weight + bias + residual
    y    = max(z, 0) with a ReLU, else z                                                            [N, C, *]

Statistics are fp32 (fp64 for fp64), whatever the dtype of x; y has x's dtype, and its strides if x is dense.
"""

from __future__ import annotations

import torch
from torch import Tensor


def batch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(y, mean, var)``: statistics that are given are used, and not returned."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    found_mean, found_var = None, None
    if mean is None or var is None:
        var, mean = torch.var_mean(wide, _all_but_channels(x), correction=0)
        found_mean, found_var = mean, var
    z = _per_channel(wide, weight) * _normalised(wide, mean, var, eps)
    if bias is not None:
        z = z + _per_channel(wide, bias)
    if residual is not None:
        z = z + residual
    return (z.relu() if relu else z).to(x.dtype), found_mean, found_var


def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
    training: bool,
    want_residual: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients ``(dx, dresidual, dweight, dbias)``; without a ReLU the residual's is dy, and None here.

    g  = dy where z > 0, else 0             the sign of z is y's, or without y that of xhat * weight + bias
    dx = weight / sqrt(var + eps) * (g - mean(g) - xhat * mean(g * xhat))       the means in training only
    dresidual = g       dweight = sum(g * xhat)       dbias = sum(g)
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    over = _all_but_channels(x)
    xhat = _normalised(wide, mean, var, eps)
    g = dy.to(wide.dtype)
    if relu:
        z = y
        if z is None:
            z = _per_channel(wide, weight) * xhat
            z = z if bias is None else z + _per_channel(wide, bias)
        g = g.masked_fill(z <= 0, 0.0)
    centred = g
    if training:
        centred = g - g.mean(over, keepdim=True) - xhat * (g * xhat).mean(over, keepdim=True)
    scale = _per_channel(wide, weight) * torch.rsqrt(_per_channel(wide, var) + eps)
    like = weight if weight is not None else bias
    dtype = wide.dtype if like is None else like.dtype
    return (
        (scale * centred).to(x.dtype),
        g.to(x.dtype) if relu and want_residual else None,
        (g * xhat).sum(over).to(dtype) if want_weight else None,
        g.sum(over).to(dtype) if want_bias else None,
    )


def _normalised(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return (x - _per_channel(x, mean)) * torch.rsqrt(_per_channel(x, var) + eps)


def _per_channel(x: Tensor, values: Tensor | None) -> Tensor:
    """``[C]`` so that it broadcasts over ``x [N, C, *]``, in x's dtype; None is 1."""
    if values is None:
        return x.new_ones(())
    return values.to(x.dtype).view(-1, *(1,) * (x.dim() - 2))


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]
