"""The norms of a Transformer block, and what stands between its two matrix products, in Triton.

    norm             s = x + residual      y = (s - mean) * rstd * weight + bias       rms: mean counts as 0
    bias_activation  p = product + bias    out = act(p), or act(gate) * up with p = [gate | up]

All of it is bound by memory: every kernel reads its inputs once and writes its outputs once. A row lives in
registers between its statistics and its use:

    norm            program = BM rows          [BM, BN] tile, BN >= N: load, reduce, reduce, store
    norm_backward   program = every P-th       dx is stored row block by row block; the sums for weight and
                    block of BM rows           bias stay in registers until the program's last row:
                                               partial [P, N] fp32, which `column_sum_kernel` then adds up
    bias_activation program = [BM, BN] tile; backward walks down the rows, with dbias summed the same way

Rows too long for registers are walked over in chunks of BN, once for each pass, out of the L2 cache.

Statistics are fp32 and shifted: with m0 = mean(s) as fp32 adds it up, d = s - m0 gives mean = m0 + mean(d) and
var = mean(d^2) - mean(d)^2, where mean(d) is a rounding error. A large mean does not cost the variance its
digits. Partial sums have one owner each: the result is the same in every run.

Ba, Kiros, Hinton, Layer Normalization (2016); Zhang, Sennrich, RMSNorm (2019); Shazeer, GLU variants (2020).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LAUNCH, multiprocessors, padded

LONGEST_FORWARD = 16384  # columns that a program keeps in registers
LONGEST_BACKWARD = 8192
CHUNK = 4096  # columns that a program looks at together in longer rows
GATED = ("swiglu", "geglu")


# ---- norm: forward ---------------------------------------------------------------------------------


@triton.jit
def load_sum(x, residual, at, residual_at, exists):
    """x + residual as it is stored, rounded, in fp32; 0 where nothing exists."""
    s = tl.load(x + at, mask=exists, other=0.0).to(tl.float32)
    if residual is not None:
        s += tl.load(residual + residual_at, mask=exists, other=0.0).to(tl.float32)
        s = s.to(x.dtype.element_ty).to(tl.float32)
    return s


@triton.jit
def affine(x, weight, bias, columns, exists):
    """x * weight + bias by columns."""
    if weight is not None:
        x = x * tl.load(weight + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        x = x + tl.load(bias + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def norm_kernel(
    x, residual, weight, bias, y, total, mean, rstd, x_row, residual_row, M, N, eps,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM whole rows in registers. Layer norm where `mean` is given."""
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN)
    row_exists, column_exists = rows < M, columns < N
    exists = row_exists[:, None] & column_exists[None, :]
    i = rows.to(tl.int64)[:, None]
    s = load_sum(x, residual, i * x_row + columns[None, :], i * residual_row + columns[None, :], exists)
    if total is not None:
        tl.store(total + i * N + columns[None, :], s.to(total.dtype.element_ty), mask=exists)
    if mean is not None:
        m0 = tl.sum(s, 1) / N
        s = tl.where(exists, s - m0[:, None], 0.0)
        shift = tl.sum(s, 1) / N
        variance = tl.sum(s * s, 1) / N - shift * shift
        s = s - shift[:, None]
        tl.store(mean + rows, m0 + shift, mask=row_exists)
    else:
        variance = tl.sum(s * s, 1) / N
    r = 1.0 / tl.sqrt_rn(variance + eps)
    tl.store(rstd + rows, r, mask=row_exists)
    out = affine(s * r[:, None], weight, bias, columns, column_exists)
    tl.store(y + i * N + columns[None, :], out.to(y.dtype.element_ty), mask=exists)


@triton.jit
def norm_long_kernel(
    x, residual, weight, bias, y, total, mean, rstd, x_row, residual_row, M, N, eps,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One row in chunks of BN: add it up, then its squares, then normalize it."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_row
    if residual is not None:
        residual += row * residual_row
    sums = tl.zeros([BN], tl.float32)
    for start in range(0, N, BN):
        columns = start + tl.arange(0, BN)
        exists = columns < N
        s = load_sum(x, residual, columns, columns, exists)
        if total is not None:
            tl.store(total + row * N + columns, s.to(total.dtype.element_ty), mask=exists)
        sums += s
    m0 = tl.sum(sums, 0) / N
    if mean is None:
        m0 = 0.0
    shifts, squares = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32)
    for start in range(0, N, BN):
        columns = start + tl.arange(0, BN)
        exists = columns < N
        d = tl.where(exists, load_sum(x, residual, columns, columns, exists) - m0, 0.0)
        shifts += d
        squares += d * d
    variance, shift = tl.sum(squares, 0) / N, 0.0
    if mean is not None:
        shift = tl.sum(shifts, 0) / N
        variance -= shift * shift
        tl.store(mean + row, m0 + shift)
    r = 1.0 / tl.sqrt_rn(variance + eps)
    tl.store(rstd + row, r)
    for start in range(0, N, BN):
        columns = start + tl.arange(0, BN)
        exists = columns < N
        d = load_sum(x, residual, columns, columns, exists) - m0 - shift
        out = affine((d * r)[None, :], weight, bias, columns, exists)
        tl.store(y + row * N + columns[None, :], out.to(y.dtype.element_ty), mask=exists[None, :])


# ---- norm: backward --------------------------------------------------------------------------------


@triton.jit
def load_normalized(dy, s, weight, mean, rstd, dy_row, s_row, rows, columns, M, N):
    """dy, xhat = (s - mean) * rstd and g = dy * weight as [rows, columns] fp32, 0 where nothing exists."""
    row_exists, column_exists = rows < M, columns < N
    exists = row_exists[:, None] & column_exists[None, :]
    i, j = rows.to(tl.int64)[:, None], columns[None, :]
    dy_tile = tl.load(dy + i * dy_row + j, mask=exists, other=0.0).to(tl.float32)
    xhat = tl.load(s + i * s_row + j, mask=exists, other=0.0).to(tl.float32)
    if mean is not None:
        xhat -= tl.load(mean + rows, mask=row_exists, other=0.0)[:, None]
    r = tl.load(rstd + rows, mask=row_exists, other=0.0)[:, None]
    xhat = tl.where(exists, xhat * r, 0.0)
    return dy_tile, xhat, affine(dy_tile, weight, None, columns, column_exists), r, exists


@triton.jit
def store_dx(dx, dsum, g, xhat, r, mean_g, mean_gx, dsum_row, rows, columns, N, exists):
    """dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum."""
    i, j = rows.to(tl.int64)[:, None], columns[None, :]
    out = r * (g - mean_g - xhat * mean_gx)
    if dsum is not None:
        out += tl.load(dsum + i * dsum_row + j, mask=exists, other=0.0).to(tl.float32)
    tl.store(dx + i * N + j, out.to(dx.dtype.element_ty), mask=exists)


@triton.jit
def norm_backward_kernel(
    dy, dsum, s, weight, mean, rstd, dx, dweight, dbias, dy_row, dsum_row, s_row, M, N,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Every P-th block of BM rows; dweight and dbias are partial sums, [P, N] fp32."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BN)
    sum_weight, sum_bias = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    for block in range(program, tl.cdiv(M, BM), programs):
        rows = block * BM + tl.arange(0, BM)
        dy_tile, xhat, g, r, exists = load_normalized(
            dy, s, weight, mean, rstd, dy_row, s_row, rows, columns, M, N
        )
        mean_gx = (tl.sum(g * xhat, 1) / N)[:, None]
        mean_g = 0.0
        if mean is not None:
            mean_g = (tl.sum(g, 1) / N)[:, None]
        store_dx(dx, dsum, g, xhat, r, mean_g, mean_gx, dsum_row, rows, columns, N, exists)
        if dweight is not None:
            sum_weight += dy_tile * xhat
        if dbias is not None:
            sum_bias += dy_tile
    at = program.to(tl.int64) * N + columns
    if dweight is not None:
        tl.store(dweight + at, tl.sum(sum_weight, 0), mask=columns < N)
    if dbias is not None:
        tl.store(dbias + at, tl.sum(sum_bias, 0), mask=columns < N)


@triton.jit
def norm_backward_long_kernel(
    dy, dsum, s, weight, mean, rstd, dx, dy_row, dsum_row, s_row, M, N, BN: tl.constexpr
):
    """dx of one row in chunks of BN: its two means, then the gradient."""
    rows = tl.program_id(0) + tl.arange(0, 1)
    products, gradients = tl.zeros([1, BN], tl.float32), tl.zeros([1, BN], tl.float32)
    for start in range(0, N, BN):
        columns = start + tl.arange(0, BN)
        _, xhat, g, _, _ = load_normalized(dy, s, weight, mean, rstd, dy_row, s_row, rows, columns, M, N)
        products += g * xhat
        gradients += g
    mean_gx = (tl.sum(products, 1) / N)[:, None]
    mean_g = 0.0
    if mean is not None:
        mean_g = (tl.sum(gradients, 1) / N)[:, None]
    for start in range(0, N, BN):
        columns = start + tl.arange(0, BN)
        _, xhat, g, r, exists = load_normalized(dy, s, weight, mean, rstd, dy_row, s_row, rows, columns, M, N)
        store_dx(dx, dsum, g, xhat, r, mean_g, mean_gx, dsum_row, rows, columns, N, exists)


@triton.jit
def norm_parameters_kernel(
    dy, s, mean, rstd, dweight, dbias, dy_row, s_row, M, N, BM: tl.constexpr, BN: tl.constexpr
):
    """The partial sums for long rows: a program owns BN columns of every P-th block of BM rows."""
    tiles = tl.cdiv(N, BN)
    program, programs = tl.program_id(0) // tiles, tl.num_programs(0) // tiles
    columns = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    sum_weight, sum_bias = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    for block in range(program, tl.cdiv(M, BM), programs):
        rows = block * BM + tl.arange(0, BM)
        dy_tile, xhat, _, _, _ = load_normalized(dy, s, None, mean, rstd, dy_row, s_row, rows, columns, M, N)
        sum_weight += dy_tile * xhat
        sum_bias += dy_tile
    at = program.to(tl.int64) * N + columns
    if dweight is not None:
        tl.store(dweight + at, tl.sum(sum_weight, 0), mask=columns < N)
    if dbias is not None:
        tl.store(dbias + at, tl.sum(sum_bias, 0), mask=columns < N)


@triton.jit
def column_sum_kernel(partial, out, P, N, BP: tl.constexpr, BN: tl.constexpr):
    """out [N] = the sum of partial [P, N] fp32 over P, always in the same order."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros([BP, BN], tl.float32)
    for start in range(0, P, BP):
        rows = start + tl.arange(0, BP)
        exists = (rows < P)[:, None] & (columns < N)[None, :]
        total += tl.load(partial + rows.to(tl.int64)[:, None] * N + columns[None, :], mask=exists, other=0.0)
    tl.store(out + columns, tl.sum(total, 0).to(out.dtype.element_ty), mask=columns < N)


# ---- bias and activation ---------------------------------------------------------------------------


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
        v = tl.minimum(tl.maximum(u, -20.0), 20.0)  # the derivative is 0 or 1 long before; v^3 stays finite
        f = tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
        out = f + v * f * (1.0 - f) * (1.5957691216057308 + 0.2140644488178007 * v * v)
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
    product,
    bias,
    preactivation,
    out,
    M,
    F,
    ACT: tl.constexpr,
    GATES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
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
    tl.store(out + i * F + j, result.to(out.dtype.element_ty), mask=exists)


@triton.jit
def bias_activation_backward_kernel(
    dout, preactivation, dpre, out, dbias, dout_row, M, F,
    ACT: tl.constexpr, GATES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN columns of every P-th block of BM rows; dbias is a partial sum, [P, F] or gated [P, 2 F] fp32."""
    tiles = tl.cdiv(F, BN)
    program, programs = tl.program_id(0) // tiles, tl.num_programs(0) // tiles
    columns = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    width = F * (1 + GATES)
    sums, up_sums = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    for block in range(program, tl.cdiv(M, BM), programs):
        rows = block * BM + tl.arange(0, BM)
        exists = (rows < M)[:, None] & (columns < F)[None, :]
        i, j = rows.to(tl.int64)[:, None], columns[None, :]
        at = i * width + j
        gradient = tl.load(dout + i * dout_row + j, mask=exists, other=0.0).to(tl.float32)
        p = tl.load(preactivation + at, mask=exists, other=0.0).to(tl.float32)
        dp = gradient * derivative(p, ACT)
        if GATES or out is not None:
            result = activate(p, ACT)
        if GATES:
            up = tl.load(preactivation + at + F, mask=exists, other=0.0).to(tl.float32)
            dp = dp * up
            dup = gradient * result
            result = result * up
            up_sums += dup
            tl.store(dpre + at + F, dup.to(dpre.dtype.element_ty), mask=exists)
        sums += dp
        tl.store(dpre + at, dp.to(dpre.dtype.element_ty), mask=exists)
        if out is not None:
            tl.store(out + i * F + j, result.to(out.dtype.element_ty), mask=exists)
    if dbias is not None:
        tl.store(dbias + program * width + columns, tl.sum(sums, 0), mask=columns < F)
        if GATES:
            tl.store(dbias + program * width + F + columns, tl.sum(up_sums, 0), mask=columns < F)


# ---- launchers -------------------------------------------------------------------------------------


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """``y [M, N]``, ``sum [M, N]`` with a residual, ``mean [M]`` for kind ``"layer"``, ``rstd [M]``; fp32 statistics.

    x and residual ``[M, N]``, weight and bias ``[N]``; kind is ``"layer"`` or ``"rms"``.
    """
    M, N = x.shape
    x, residual, weight, bias = dense_rows(x), dense_rows(residual), dense_rows(weight), dense_rows(bias)
    y, total = x.new_empty(M, N), None if residual is None else x.new_empty(M, N)
    rstd = torch.empty(M, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if kind == "layer" else None
    long = N > LONGEST_FORWARD
    BM, BN, warps = (1, CHUNK, 8) if long else row_tile(N, 4096)
    if M > 0:
        (norm_long_kernel if long else norm_kernel)[(triton.cdiv(M, BM),)](
            x, residual, weight, bias, y, total, mean, rstd, x.stride(0), row_stride(residual), M, N, eps,
            BM=BM, BN=BN, num_warps=warps, **LAUNCH,
        )  # fmt: skip
    return y, total, mean, rstd


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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``dx [M, N]``, and ``dweight`` and ``dbias [N]`` where wanted; ``dsum`` is the gradient of the sum itself."""
    M, N = s.shape
    dy, dsum, s, weight = dense_rows(dy), dense_rows(dsum), dense_rows(s), dense_rows(weight)
    mean = mean if kind == "layer" else None
    dx = s.new_empty(M, N)
    long = N > LONGEST_BACKWARD
    BM, BN, warps = (16, 64, 4) if long else row_tile(N, 2048)
    tiles = triton.cdiv(N, BN) if long else 1
    P = programs(s, M, BM, tiles, warps)
    dweight, dbias = (
        torch.empty(P, N, dtype=torch.float32, device=s.device) if want else None
        for want in (want_weight, want_bias)
    )
    strides = (dy.stride(0), row_stride(dsum), s.stride(0))
    if not long:
        norm_backward_kernel[(P,)](
            dy,
            dsum,
            s,
            weight,
            mean,
            rstd,
            dx,
            dweight,
            dbias,
            *strides,
            M,
            N,
            BM=BM,
            BN=BN,
            num_warps=warps,
            **LAUNCH,
        )
    elif M > 0:
        norm_backward_long_kernel[(M,)](
            dy, dsum, s, weight, mean, rstd, dx, *strides, M, N, BN=CHUNK, num_warps=8, **LAUNCH
        )
    if long and (want_weight or want_bias):
        norm_parameters_kernel[(P * tiles,)](
            dy,
            s,
            mean,
            rstd,
            dweight,
            dbias,
            strides[0],
            strides[2],
            M,
            N,
            BM=BM,
            BN=BN,
            num_warps=warps,
            **LAUNCH,
        )
    like = s if weight is None else weight
    return dx, column_sum(dweight, like), column_sum(dbias, like)


def bias_activation(
    product: Tensor, bias: Tensor | None, activation: str, save: bool = True
) -> tuple[Tensor, Tensor]:
    """``(preactivation, out)``: product ``[M, F]`` (``[M, 2 F]`` gated) plus bias, and its activation ``[M, F]``.

    The preactivation takes the product's place in memory, and is only written if ``save``.
    """
    product = product.contiguous()
    gated = activation in GATED
    M, F = product.shape[0], product.shape[1] // (1 + gated)
    out = product.new_empty(M, F)
    preactivation = product if save and bias is not None else None
    BM, BN, warps = element_tile(F)
    if out.numel() > 0:
        bias_activation_kernel[(triton.cdiv(M, BM) * triton.cdiv(F, BN),)](
            product, dense_rows(bias), preactivation, out, M, F,
            ACT=activation, GATES=gated, BM=BM, BN=BN, num_warps=warps, **LAUNCH,
        )  # fmt: skip
    return product, out


def bias_activation_backward(
    dout: Tensor, preactivation: Tensor, activation: str, want_bias: bool, rebuild: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``dpre`` shaped like the preactivation; if asked, the activation rebuilt, and ``dbias``, dpre's column sums."""
    dout, preactivation = dense_rows(dout), preactivation.contiguous()
    M, F = dout.shape
    width = preactivation.shape[1]
    dpre = torch.empty_like(preactivation)
    out = dout.new_empty(M, F) if rebuild else None
    BM, BN, warps = element_tile(F)
    tiles = triton.cdiv(F, BN)
    P = programs(dout, M, BM, tiles, warps)
    dbias = torch.empty(P, width, dtype=torch.float32, device=dout.device) if want_bias else None
    if F > 0:
        bias_activation_backward_kernel[(P * tiles,)](
            dout, preactivation, dpre, out, dbias, dout.stride(0), M, F,
            ACT=activation, GATES=activation in GATED, BM=BM, BN=BN, num_warps=warps, **LAUNCH,
        )  # fmt: skip
    return dpre, out, column_sum(dbias, dout)


def row_tile(N: int, elements: int) -> tuple[int, int, int]:
    """(BM, BN, warps): whole rows, about ``elements`` of them in a tile, 16 or fewer a thread."""
    BN = padded(N)
    BM = max(1, elements // BN)
    return BM, BN, min(16, max(4, BM * BN // 512))


def element_tile(F: int) -> tuple[int, int, int]:
    """(BM, BN, warps) of an elementwise kernel: 2048 elements, rows of up to 256 of them."""
    BN = min(256, padded(F))
    return 2048 // BN, BN, 4


def programs(x: Tensor, M: int, BM: int, tiles: int, warps: int) -> int:
    """How many programs share the rows of a column tile: enough to fill the device with 16 warps a processor."""
    return max(1, min(triton.cdiv(M, BM), multiprocessors(x.device) * (16 // warps) // tiles))


def column_sum(partial: Tensor | None, like: Tensor) -> Tensor | None:
    """[P, N] fp32 -> [N] in like's dtype."""
    if partial is None:
        return None
    P, N = partial.shape
    out = like.new_empty(N)
    if N > 0:
        column_sum_kernel[(triton.cdiv(N, 64),)](partial, out, P, N, BP=32, BN=64, num_warps=4, **LAUNCH)
    return out


def dense_rows(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)
