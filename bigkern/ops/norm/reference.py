"""LayerNorm and RMSNorm in plain torch: what every norm kernel must compute, on rows of N.

    s    = dropout(x) + residual        rounded to x's dtype; x itself without a residual   [M, N]
    mean = mean(s)                      layer only                                          [M] fp32
    rstd = 1 / sqrt(mean((s - mean)^2) + eps)                                               [M] fp32
    y    = (s - mean) * rstd * weight + bias                                                [M, N]

For ``kind="rms"`` the mean counts as 0. Statistics are fp32 (fp64 for fp64). Dropout needs a residual;
``dropout.py`` says what it keeps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigkern.core.dropout import OUTPUT, dropped


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    dropout_p: float = 0.0,
    dropout_key: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """``(y, sum, mean, rstd)``: y and sum in x's dtype; no sum without a residual, no mean for rms."""
    total = None if residual is None else dropped(x, dropout_key, dropout_p, OUTPUT) + residual
    s = x if total is None else total
    centred = s.to(torch.promote_types(s.dtype, torch.float32))
    mean = centred.mean(-1) if kind == "layer" else None
    if mean is not None:
        centred = centred - mean.unsqueeze(-1)
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    y = centred * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype), total, mean, rstd


def norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    kind: str,
    want_weight: bool,
    want_bias: bool,
    dropout_p: float = 0.0,
    dropout_key: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients ``(ds, dx, dweight, dbias)``: ds is the residual's; dx, what dropout lets through of it, is
    None without dropout, for then x's is ds too.

    xhat = (s - mean) * rstd                g = dy * weight
    ds   = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum         mean(g) for layer only
    dweight = sum(dy * xhat)                dbias = sum(dy)            over all rows
    """
    wide = s.to(rstd.dtype)
    xhat = (wide if mean is None else wide - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    dy_ = dy.to(rstd.dtype)
    g = dy_ if weight is None else dy_ * weight.to(rstd.dtype)
    ds = g - xhat * (g * xhat).mean(-1, keepdim=True)
    if kind == "layer":
        ds = ds - g.mean(-1, keepdim=True)
    ds = ds * rstd.unsqueeze(-1)
    if dsum is not None:
        ds = ds + dsum.to(rstd.dtype)
    ds = ds.to(s.dtype)
    dx = None if dropout_p == 0.0 else dropped(ds, dropout_key, dropout_p, OUTPUT)
    parameter_dtype = s.dtype if weight is None else weight.dtype
    dweight = (dy_ * xhat).sum(0).to(parameter_dtype) if want_weight else None
    dbias = dy_.sum(0).to(parameter_dtype) if want_bias else None
    return ds, dx, dweight, dbias
