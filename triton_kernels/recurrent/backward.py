"""A step of a recurrent layer's scan backward in one kernel: the product with dgates, and the gates' own.

    dh       = dy + dgates_next W_hh + what passed the next step's gates by, or dhn after the last step
    zoneout  dh~ = (1 - m) dh                                                          m dh passes by
    LSTM     dc += dh~ o (1 - tanh(c)^2)   di = dc g   df = dc c'   dg = dc i   do = dh~ tanh(c)   dc' = dc f
    GRU      dn = dh~ (1 - z) (1 - n^2)    dhidden_n = dn r   dr = dn hidden_n  dz = dh~ (h' - n)
                                                                                       z dh~ passes by
    RNN      dh~ (1 - h~^2), or dh~ where h~ > 0
    and through the activations: sigmoid's s (1 - s), tanh's 1 - g^2

A program owns BN hidden units of BM sequences, as in the forward:

    dgates_next [BM, BK]  .  W_hh [BK, BN], all gates' rows  ->  dh [BM, BN]  ->  dgates, BN of each gate
    of a launch ago                                              + dy, state  ->  dh, dc fp32 in place

GRU's n rows of W_hh meet dhidden_n in the place of dgates. Once a sequence's first step is behind, dh is dh0:
in the reverse direction some have come to that while others still walk. One launch more, and all have.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bigkern.triton_kernels.common.rows import pointers
from bigkern.triton_kernels.recurrent.forward import STEPS, load, of_direction, store, tanh

# ---- the gates of a tile: gates, dgates, dc and the like are the tile's pointers -----------------------


@triton.jit
def lstm_backward(dh, last_c, gates, c, dgates, dc, H, exists):
    """Stores dgates and dc."""
    i = load(gates, exists)
    f = load(gates + H, exists)
    g = load(gates + 2 * H, exists)
    o = load(gates + 3 * H, exists)
    tanh_c = tanh(load(c, exists))
    dcell = load(dc, exists) + dh * o * (1.0 - tanh_c * tanh_c)
    store(dc, dcell * f, exists)
    store(dgates, dcell * g * i * (1.0 - i), exists)
    store(dgates + H, dcell * last_c * f * (1.0 - f), exists)
    store(dgates + 2 * H, dcell * i * (1.0 - g * g), exists)
    store(dgates + 3 * H, dh * tanh_c * o * (1.0 - o), exists)


@triton.jit
def gru_backward(dh, last_h, gates, hidden_n, dgates, dhidden_n, H, exists):
    """What of dh passes the gates by; stores dgates and dhidden_n."""
    r = load(gates, exists)
    z = load(gates + H, exists)
    n = load(gates + 2 * H, exists)
    dn = dh * (1.0 - z) * (1.0 - n * n)
    store(dgates, dn * load(hidden_n, exists) * r * (1.0 - r), exists)
    store(dgates + H, dh * (last_h - n) * z * (1.0 - z), exists)
    store(dgates + 2 * H, dn, exists)
    store(dhidden_n, dn * r, exists)
    return dh * z


@triton.jit
def rnn_backward(dh, gates, dgates, exists, MODE: tl.constexpr):
    """Stores dgates."""
    h = load(gates, exists)
    store(dgates, dh * (1.0 - h * h) if MODE == "RNN_TANH" else tl.where(h > 0.0, dh, 0.0), exists)


# ---- a tile of a step --------------------------------------------------------------------------------


@triton.jit
def add_product(
    dh, d, w, after, followed, row, unit, line, H, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dh + d w for the sequences that had a step after: K columns of d, K rows of w, some of its columns."""
    rows, units = row + tl.arange(0, BM), unit + tl.arange(0, BN)
    left = d + (after + rows).to(tl.int64) * line
    row_exists, unit_exists = (rows < followed)[:, None], (units < H)[None, :]
    for k in range(0, tl.where(row < followed, K, 0), BK):
        ks = k + tl.arange(0, BK)
        left_tile = tl.load(left[:, None] + ks[None, :], mask=row_exists & (ks < K)[None, :], other=0.0)
        right = w + ks.to(tl.int64)[:, None] * H + units[None, :]
        right_tile = tl.load(right, mask=(ks < K)[:, None] & unit_exists, other=0.0)
        dh = tl.dot(left_tile, right_tile, dh, input_precision=PRECISION)
    return dh


@triton.jit
def add_products(
    dh, dgates, dhidden_n, w_hh, after, followed, d, row, unit, width, H,
    G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dh + the gradient of W_hh h' times W_hh."""
    dgates += d * G * H
    K = G * H if dhidden_n is None else 2 * H
    dh = add_product(dh, dgates, w_hh, after, followed, row, unit, G * width, H, K, BM, BN, BK, PRECISION)
    if dhidden_n is not None:
        w_hn = w_hh + tl.cast(K, tl.int64) * H
        dhidden_n += d * H
        dh = add_product(dh, dhidden_n, w_hn, after, followed, row, unit, width, H, H, BM, BN, BK, PRECISION)
    return dh


@triton.jit
def scan_tile_backward(
    dy, gates, h0, c0, w_hh, zoneout, y, reserve, dgates, dhidden_n, dh, dc,
    now, count, before, preceded, after, followed, d, row, unit, width, B, H,
    MODE: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A step of direction d for sequences [row, + BM) and hidden units [unit, + BN).

    ``count`` sequences have the step, in the data's rows from ``now`` on. In the forward ``preceded`` had one
    before it, in rows from ``before`` on, and ``followed`` one after it, in rows from ``after`` on.
    """
    rows, unit_exists = (row + tl.arange(0, BM))[:, None], (unit + tl.arange(0, BN) < H)[None, :]
    exists, known = (rows < count) & unit_exists, (rows < tl.maximum(count, followed)) & unit_exists
    first, later = exists & (rows >= preceded), exists & (rows < preceded)
    at, earlier, column, sequence = now + row, before + row, d * H + unit, d * B + row
    dh = pointers(dh, sequence, unit, H, BM, BN)
    gradient = add_products(
        load(dh, known), dgates, dhidden_n, w_hh, after, followed, d, row, unit, width, H,
        G, BM, BN, BK, PRECISION,
    )  # fmt: skip
    if dy is not None:
        gradient += load(pointers(dy, at, column, width, BM, BN), exists)
    passed, inner = tl.zeros_like(gradient), gradient
    if zoneout is not None:
        passed = gradient * load(pointers(zoneout, at, column, width, BM, BN), exists)
        inner = gradient - passed
    gates = pointers(gates, at, d * G * H + unit, G * width, BM, BN)
    dgates = pointers(dgates, at, d * G * H + unit, G * width, BM, BN)
    if MODE == "LSTM":
        last_c = load(pointers(reserve, earlier, column, width, BM, BN), later)
        last_c += load(pointers(c0, sequence, unit, H, BM, BN), first)
        c = pointers(reserve, at, column, width, BM, BN)
        dc = pointers(dc, sequence, unit, H, BM, BN)
        lstm_backward(inner, last_c, gates, c, dgates, dc, H, exists)
    elif MODE == "GRU":
        last_h = load(pointers(y, earlier, column, width, BM, BN), later)
        last_h += load(pointers(h0, sequence, unit, H, BM, BN), first)
        hidden_n = pointers(reserve, at, column, width, BM, BN)
        dhidden_n = pointers(dhidden_n, at, column, width, BM, BN)
        passed += gru_backward(inner, last_h, gates, hidden_n, dgates, dhidden_n, H, exists)
    else:
        rnn_backward(inner, gates, dgates, exists, MODE)
    store(dh, tl.where(exists, passed, gradient), known)


# ---- kernel ------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*STEPS, "after", "followed", "after_1", "followed_1"])
def scan_step_backward_kernel(
    dy, gates, h0, c0, w_hh, w_hh_reverse, zoneout, y, reserve, dgates, dhidden_n, dh, dc,
    now, count, now_1, count_1, before, preceded, before_1, preceded_1, after, followed, after_1, followed_1,
    B, H, MODE: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A step of each direction; _1 is the reverse one's. A program: hidden units, sequences, a direction."""
    unit, row, d = tl.program_id(0) * BN, tl.program_id(1) * BM, tl.program_id(2)
    if d == 1:
        now, count, before, preceded = now_1, count_1, before_1, preceded_1
        after, followed = after_1, followed_1
    if row < tl.maximum(count, followed):
        scan_tile_backward(
            dy, gates, h0, c0, of_direction(d, w_hh, w_hh_reverse), zoneout, y, reserve, dgates, dhidden_n,
            dh, dc, now, count, before, preceded, after, followed, d, row, unit, tl.num_programs(2) * H, B, H,
            MODE, G, BM, BN, BK, PRECISION,
        )  # fmt: skip
