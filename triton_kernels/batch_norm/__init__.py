"""BatchNorm of [M, C] rows of channels, with the residual addition and the ReLU after it: the launchers.

A channels_last image [N, C, H, W] is a matrix of M = N H W rows. Every arrow is a kernel:

    x          read   ->  mean, M2 of spans of rows [2, P, C]  ->  mean, var [C]
    x, residual read  ->  y = max(xhat weight + bias + residual, 0)
    dy, x, y   read   ->  sums of g, g xhat over spans [2, P, C]  ->  sums [2, C], dweight, dbias
                          and dresidual = g, which is dy where y > 0
    g, x       read   ->  dx

A program has a span of rows and 64 columns. Statistics are those of x - origin, the mean of the first rows,
which a mean far from zero leaves small. M2 is the sum of squares around the span's own mean, and is merged
with others as in Chan, Golub and LeVeque, Algorithms for Computing the Sample Variance (1983), so first rows
that are like no other do no harm. Each sum has one owner and one order: the same bits in every run.

For the ReLU's backward, the sign is that of y where there was a residual: then that need not be kept. Without
one it is computed again from x, and y is neither kept nor read.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from bigkern.triton_kernels.batch_norm.backward import (
    batch_norm_backward_kernel,
    gradient_kernel,
    gradient_sums_kernel,
)
from bigkern.triton_kernels.batch_norm.forward import batch_norm_kernel, merge_kernel, statistics_kernel
from bigkern.triton_kernels.common import launch

BM, BN, WARPS = 32, 64, 4  # a tile: 2048 elements, 16 a thread
MOST_SPANS = 1024  # whose partial sums one program merges at once
MERGED = 8  # columns of them
SWEEP = 8  # tiles one below the other that a program normalizes


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
    """``y`` like x, and x's fp32 ``mean`` and ``var [C]`` unless others are given.

    x ``[N, C, *]`` in channels_last; residual of x's shape and dtype; weight, bias, mean and var ``[C]``.
    """
    given = mean is not None and var is not None
    y, x_rows = torch.empty_like(x), rows(x)
    M, C = x_rows.shape
    if not given:
        mean, var = statistics(x_rows)
    span, columns, grid = sweep(M, C)
    batch_norm_kernel[grid](
        x_rows, dense(residual), dense(weight), dense(bias), dense(mean), dense(var), rows(y),
        M, C, span, eps, RELU=relu, BM=BM, BN=columns, num_warps=WARPS, **launch.OPTIONS,
    )  # fmt: skip
    return (y, None, None) if given else (y, mean, var)


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
    """``dx`` like x; ``dresidual`` like x with a ReLU, ``dweight`` and ``dbias [C]``: those that are wanted.

    y is needed with a ReLU after a residual; else the sign comes from x, weight and bias.
    """
    g, x_rows = dense(dy), rows(x)
    M, C = x_rows.shape
    channels = [dense(t) for t in (weight, bias, mean, var)]
    like = next((t for t in (weight, bias) if t is not None), mean)
    dweight, dbias = (like.new_empty(C) if want else None for want in (want_weight, want_bias))
    dresidual = torch.empty_like(x) if relu and want_residual else None
    y_rows, sums = dense(y), None
    if training or want_weight or want_bias or dresidual is not None:
        span, P, columns, grid = spans(x_rows, 4)
        partial = torch.empty(2, P, C, dtype=torch.float32, device=x.device)
        gradient_kernel[grid](
            g, x_rows, y_rows, *channels, rows(dresidual), partial, M, C, span, eps,
            RELU=relu, BM=BM, BN=columns, num_warps=WARPS, **launch.OPTIONS,
        )  # fmt: skip
        sums = torch.empty(2, C, dtype=torch.float32, device=x.device)
        gradient_sums_kernel[(triton.cdiv(C, MERGED),)](
            partial, sums, dweight, dbias, P, C,
            BP=launch.padded(P), BN=MERGED, num_warps=8, **launch.OPTIONS,
        )  # fmt: skip
    if dresidual is not None:
        g, y_rows, relu = rows(dresidual), None, False  # the ReLU is behind us
    dx = torch.empty_like(x)
    span, columns, grid = sweep(M, C)
    batch_norm_backward_kernel[grid](
        g, x_rows, y_rows, *channels, sums if training else None, rows(dx), M, C, span, eps,
        RELU=relu, BM=BM, BN=columns, num_warps=WARPS, **launch.OPTIONS,
    )  # fmt: skip
    return dx, dresidual, dweight, dbias


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 mean and biased variance of the columns of x ``[M, C]``."""
    M, C = x.shape
    span, P, columns, grid = spans(x, 8)
    origin, mean, var = (torch.empty(C, dtype=torch.float32, device=x.device) for _ in range(3))
    partial = torch.empty(2, P, C, dtype=torch.float32, device=x.device)
    statistics_kernel[grid](
        x, origin, partial, M, C, span, BM=BM, BN=columns, num_warps=WARPS, **launch.OPTIONS
    )  # fmt: skip
    merge_kernel[(triton.cdiv(C, MERGED),)](
        origin,
        partial,
        mean,
        var,
        M,
        C,
        span,
        P,
        BP=launch.padded(P),
        BN=MERGED,
        num_warps=8,
        **launch.OPTIONS,
    )
    return mean, var


# ---- how the work is cut -----------------------------------------------------------------------------


def spans(x: Tensor, resident: int) -> tuple[int, int, int, tuple[int, int]]:
    """(rows a span, spans, columns a tile, grid) of passes that add up, ``resident`` programs a processor."""
    M, C = x.shape
    columns = min(BN, launch.padded(C))
    tiles = triton.cdiv(C, columns)
    wanted = min(MOST_SPANS, max(1, launch.multiprocessors(x.device) * resident // tiles))
    span = triton.cdiv(triton.cdiv(M, BM), wanted) * BM
    P = triton.cdiv(M, span)
    return span, P, columns, (P, tiles)


def sweep(M: int, C: int) -> tuple[int, int, tuple[int, int]]:
    """(rows a program, columns a tile, grid) of the passes that go over everything once."""
    columns = min(BN, launch.padded(C))
    span = SWEEP * BM
    return span, columns, (triton.cdiv(M, span), triton.cdiv(C, columns))


def rows(x: Tensor | None) -> Tensor | None:
    """``[N, C, *]`` as rows of channels ``[M, C]``: a view of x in channels_last."""
    return None if x is None else x.movedim(1, -1).view(-1, x.shape[1])


def dense(x: Tensor | None) -> Tensor | None:
    """The same of what may lie otherwise: copied if it does. ``[C]`` stays ``[C]``."""
    if x is None or x.dim() == 1:
        return x if x is None else x.contiguous()
    return x.movedim(1, -1).reshape(-1, x.shape[1]).contiguous()
