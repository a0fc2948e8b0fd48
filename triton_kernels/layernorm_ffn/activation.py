"""Bias and activation between a block's two products, forward and backward; told in `layernorm_ffn.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigkern.triton_kernels.common import launch
from bigkern.triton_kernels.common.dropout import HIDDEN, OUTPUT, dropout_of, dropped
from bigkern.triton_kernels.common.rows import affine, column_sum, dense_rows, pointers, programs, row_stride

GATED = ("swiglu", "geglu")


@triton.jit
def activate(u, ACT: tl.constexpr):
    """act(u), u fp32."""
    if ACT == "relu":
        out = tl.where(u <= 0.0, 0.0, u)  # a NaN stays one
    elif ACT == "gelu" or ACT == "geglu":
        out = 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    elif ACT == "gelu_tanh":  # (1 + tanh z) / 2 = sigmoid(2 z)
        out = u * tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
    else:
        out = u * tl.sigmoid(u)
    return out


@triton.jit
def derivative(u, ACT: tl.constexpr):
    """d act(u) / du, u fp32."""
    if ACT == "relu":
        out = tl.where(u > 0.0, 1.0, 0.0)
    elif ACT == "gelu" or ACT == "geglu":
        out = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)
    elif ACT == "gelu_tanh":
        v = tl.minimum(tl.maximum(u, -10.0), 10.0)  # beyond it is 0 or 1; within, e stays finite
        e = tl.exp(-1.5957691216057308 * (v + 0.044715 * v * v * v))
        f = 1.0 / (1.0 + e)
        out = f + v * f * (e * f) * (1.5957691216057308 + 0.2140644488178007 * v * v)  # e f = 1 - f, exactly
    else:
        f = tl.sigmoid(u)
        out = f * (1.0 + u * (1.0 - f))
    return out


@triton.jit
def load_biased(product, bias, at, columns, exists, column_exists):
    """product + bias as the preactivation stores it, rounded, in fp32."""
    p = affine(
        tl.load(product + at, mask=exists, other=0.0).to(tl.float32), None, bias, columns, column_exists
    )
    return p.to(product.dtype.element_ty).to(tl.float32)


@triton.jit
def bias_activation_kernel(
    product, bias, preactivation, out, dropout, M, F,
    ACT: tl.constexpr, GATES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile of out [M, F]; the preactivation, [M, F] or gated [M, 2 F], is stored if given."""
    tiles = tl.cdiv(F, BN)
    rows = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    columns = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    column_exists = columns < F
    exists = (rows < M)[:, None] & column_exists[None, :]
    i, j = rows.to(tl.int64)[:, None], columns[None, :]
    at = i * (F * (1 + GATES)) + j
    p = load_biased(product, bias, at, columns, exists, column_exists)
    result = activate(p, ACT)
    if preactivation is not None:
        tl.store(preactivation + at, p.to(preactivation.dtype.element_ty), mask=exists)
    if GATES:
        up = load_biased(product, bias, at + F, columns + F, exists, column_exists)
        result = result * up
        if preactivation is not None:
            tl.store(preactivation + at + F, up.to(preactivation.dtype.element_ty), mask=exists)
    result = dropped(result, dropout, HIDDEN, i, j)
    tl.store(out + i * F + j, result.to(out.dtype.element_ty), mask=exists)


@triton.jit
def store_gradients(
    gradient, preactivation, dpre, out, dropout, row, column, M, F,
    ACT: tl.constexpr, GATES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """From the tile of out's gradient at (row, column): stores dpre and, if it is given, out again.

    Returns dpre's values in fp32, gated also those of its second half; 0 in rows that do not exist.
    """
    rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
    exists = (rows < M)[:, None] & (columns < F)[None, :]
    i, j, width = rows[:, None], columns[None, :], F * (1 + GATES)
    gradient = dropped(gradient, dropout, HIDDEN, i, j)
    p = tl.load(pointers(preactivation, row, column, width, BM, BN), mask=exists, other=0.0).to(tl.float32)
    dp = gradient * derivative(p, ACT)
    dup = dp
    if GATES or out is not None:
        result = activate(p, ACT)
    if GATES:
        at_up = pointers(preactivation, row, column + F, width, BM, BN)
        up = tl.load(at_up, mask=exists, other=0.0).to(tl.float32)
        dp = dp * up
        dup = gradient * result
        result = result * up
        at_dup = pointers(dpre, row, column + F, width, BM, BN)
        tl.store(at_dup, dup.to(dpre.dtype.element_ty), mask=exists)
    tl.store(pointers(dpre, row, column, width, BM, BN), dp.to(dpre.dtype.element_ty), mask=exists)
    if out is not None:
        result = dropped(result, dropout, HIDDEN, i, j)
        tl.store(pointers(out, row, column, F, BM, BN), result.to(out.dtype.element_ty), mask=exists)
    return dp, dup


@triton.jit
def bias_activation_backward_kernel(
    dout, preactivation, dpre, out, dbias, dropout, dout_row, M, F,
    ACT: tl.constexpr, GATES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN columns of every P-th block of BM rows; dbias is a partial sum, [P, F] or gated [P, 2 F] fp32."""
    tiles = tl.cdiv(F, BN)
    program, programs = tl.program_id(0) // tiles, tl.num_programs(0) // tiles
    column = tl.program_id(0) % tiles * BN
    columns = column + tl.arange(0, BN)
    sums, up_sums = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    for block in range(program, tl.cdiv(M, BM), programs):
        row = block * BM
        exists = (row + tl.arange(0, BM) < M)[:, None] & (columns < F)[None, :]
        at = pointers(dout, row, column, dout_row, BM, BN)
        gradient = tl.load(at, mask=exists, other=0.0).to(tl.float32)
        dp, dup = store_gradients(
            gradient, preactivation, dpre, out, dropout, row, column, M, F, ACT, GATES, BM, BN
        )
        sums += dp
        if GATES:
            up_sums += dup
    if dbias is not None:
        at = dbias + program * (F * (1 + GATES)) + columns
        tl.store(at, tl.sum(sums, 0), mask=columns < F)
        if GATES:
            tl.store(at + F, tl.sum(up_sums, 0), mask=columns < F)


@triton.jit
def dropout_add_kernel(
    x, residual, out, dropout, x_row, residual_row, M, N, BM: tl.constexpr, BN: tl.constexpr
):
    """One [BM, BN] tile of out = drop(x) (+ residual)."""
    tiles = tl.cdiv(N, BN)
    rows = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    columns = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    exists = (rows < M)[:, None] & (columns < N)[None, :]
    i, j = rows.to(tl.int64)[:, None], columns[None, :]
    s = tl.load(x + i * x_row + j, mask=exists, other=0.0).to(tl.float32)
    s = dropped(s, dropout, OUTPUT, i, j)
    if residual is not None:
        s += tl.load(residual + i * residual_row + j, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + i * N + j, s.to(out.dtype.element_ty), mask=exists)


# ---- launchers -------------------------------------------------------------------------------------


def bias_activation(
    product: Tensor,
    bias: Tensor | None,
    activation: str,
    dropout_p: float = 0.0,
    dropout_key: Tensor | None = None,
) -> Tensor:
    """``drop(act(product + bias))``: product ``[M, F]`` (gated ``[M, 2 F]``), its activation ``[M, F]``.

    The sum with a bias takes the product's place in memory.
    """
    gated = activation in GATED
    M, F = product.shape[0], product.shape[1] // (1 + gated)
    out = product.new_empty(M, F)
    BM, BN, warps = element_tile(F)
    if out.numel() > 0:
        bias_activation_kernel[(triton.cdiv(M, BM) * triton.cdiv(F, BN),)](
            product, dense_rows(bias), None if bias is None else product, out,
            dropout_of(dropout_key, dropout_p), M, F,
            ACT=activation, GATES=gated, BM=BM, BN=BN, num_warps=warps, **launch.OPTIONS,
        )  # fmt: skip
    return out


def bias_activation_backward(
    dout: Tensor,
    preactivation: Tensor,
    activation: str,
    want_bias: bool,
    rebuild: bool,
    dropout_p: float = 0.0,
    dropout_key: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``dpre`` shaped like the preactivation; if asked, the output again, and dpre's sums ``dbias``."""
    dout, preactivation = dense_rows(dout), preactivation.contiguous()
    M, F = dout.shape
    width = preactivation.shape[1]
    dpre = torch.empty_like(preactivation)
    out = dout.new_empty(M, F) if rebuild else None
    (BM, BN, _), warps = element_tile(F), 8  # 4 have too few registers for a gelu's gradient and dropout
    tiles = triton.cdiv(F, BN)
    P = programs(dout, M, BM, tiles, warps)
    dbias = torch.empty(P, width, dtype=torch.float32, device=dout.device) if want_bias else None
    if F > 0:
        bias_activation_backward_kernel[(P * tiles,)](
            dout, preactivation, dpre, out, dbias, dropout_of(dropout_key, dropout_p), dout.stride(0), M, F,
            ACT=activation, GATES=activation in GATED, BM=BM, BN=BN, num_warps=warps, **launch.OPTIONS,
        )  # fmt: skip
    return dpre, out, column_sum(dbias, dout)


def dropout_add(x: Tensor, residual: Tensor | None, dropout_p: float, dropout_key: Tensor) -> Tensor:
    """``drop(x) (+ residual)``, all ``[M, N]``."""
    x, residual = dense_rows(x), dense_rows(residual)
    M, N = x.shape
    out = x.new_empty(M, N)
    BM, BN, warps = element_tile(N)
    if out.numel() > 0:
        dropout_add_kernel[(triton.cdiv(M, BM) * triton.cdiv(N, BN),)](
            x, residual, out, dropout_of(dropout_key, dropout_p), x.stride(0), row_stride(residual), M, N,
            BM=BM, BN=BN, num_warps=warps, **launch.OPTIONS,
        )  # fmt: skip
    return out


def element_tile(F: int) -> tuple[int, int, int]:
    """(BM, BN, warps) of an elementwise kernel: 2048 elements, rows of up to 256 of them."""
    BN = min(256, launch.padded(F))
    return 2048 // BN, BN, 4
