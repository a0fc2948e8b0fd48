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

from bigkern.ops.batch_norm.call import BatchNorm, BatchNormBackward, Gradients, Result


def batch_norm(call: BatchNorm) -> Result:
    """Statistics that are given are used, and not returned."""
    x, mean, var = call.x, call.mean, call.var
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    found_mean, found_var = None, None
    if mean is None or var is None:
        var, mean = torch.var_mean(wide, _all_but_channels(x), correction=0)
        found_mean, found_var = mean, var
    z = _per_channel(wide, call.weight) * _normalised(wide, mean, var, call.eps)
    if call.bias is not None:
        z = z + _per_channel(wide, call.bias)
    if call.residual is not None:
        z = z + call.residual
    return Result(_like(x, z.relu() if call.relu else z), found_mean, found_var)


def batch_norm_backward(call: BatchNormBackward) -> Gradients:
    """Without a ReLU the residual's gradient is dy, and None here.

    g  = dy where z > 0, else 0             the sign of z is y's, or without y that of xhat * weight + bias
    dx = weight / sqrt(var + eps) * (g - mean(g) - xhat * mean(g * xhat))       the means in training only
    dresidual = g       dweight = sum(g * xhat)       dbias = sum(g)
    """
    x, weight, bias = call.x, call.weight, call.bias
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    over = _all_but_channels(x)
    xhat = _normalised(wide, call.mean, call.var, call.eps)
    g = call.dy.to(wide.dtype)
    if call.relu:
        z = call.y
        if z is None:
            z = _per_channel(wide, weight) * xhat
            z = z if bias is None else z + _per_channel(wide, bias)
        g = g.masked_fill(z <= 0, 0.0)
    centred = g
    if call.training:
        centred = g - g.mean(over, keepdim=True) - xhat * (g * xhat).mean(over, keepdim=True)
    scale = _per_channel(wide, weight) * torch.rsqrt(_per_channel(wide, call.var) + call.eps)
    like = weight if weight is not None else bias
    dtype = wide.dtype if like is None else like.dtype
    return Gradients(
        _like(x, scale * centred),
        _like(x, g) if call.relu and call.want_residual else None,
        (g * xhat).sum(over).to(dtype) if call.want_weight else None,
        g.sum(over).to(dtype) if call.want_bias else None,
    )


def _like(x: Tensor, result: Tensor) -> Tensor:
    """``result`` in x's dtype and, if x is dense, with its strides."""
    like = torch.empty_like(x)
    result = result.to(x.dtype)
    return result if result.stride() == like.stride() else like.copy_(result)


def _normalised(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return (x - _per_channel(x, mean)) * torch.rsqrt(_per_channel(x, var) + eps)


def _per_channel(x: Tensor, values: Tensor | None) -> Tensor:
    """``[C]`` so that it broadcasts over ``x [N, C, *]``, in x's dtype; None is 1."""
    if values is None:
        return x.new_ones(())
    return values.to(x.dtype).view(-1, *(1,) * (x.dim() - 2))


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]
