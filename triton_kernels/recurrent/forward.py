"""A step of a recurrent layer's scan in one kernel: the product with h', the gates and the new state.

    s        = h' W_hh^T                             [B, G H] fp32, never in memory
    LSTM     i f o = sigmoid(x + s)   g = tanh(x + s)   c = f c' + i g    h = o tanh(c)
    GRU      r z = sigmoid(x + s)     n = tanh(x + r (s + b_hn))          h = (1 - z) n + z h'
    RNN      h = tanh(x + s) or relu(x + s)
    zoneout  h + m (h' - h) in h's place

A program owns BN hidden units of BM sequences, with all their gates:

    h' [BM, BK]  .  W_hh [G BN, BK], BN rows of each gate  ->  sums [BM, G BN]  ->  i | f | g | o  [BM, BN]
    y of a launch ago, or h0                                   + x, state  ->  y, gates; h, c fp32 in place

h' is what all programs of a step read and none writes: y as it was stored a step ago. The fp32 state is read
and written by its owner alone. So neither needs a second buffer. h0 lies behind y's rows, so that a row's
number is all that tells h0 from y: a choice of pointers would hide that rows are whole vectors, and the loads
would be of single elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bigkern.triton_kernels.common.products import halves
from bigkern.triton_kernels.common.rows import affine, pointers


@triton.jit
def tanh(x):
    """To a few ulp near 0 too, where 2 sigmoid(2 x) - 1 cancels. Source: Cephes' tanhf."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = (p * z - 5.37397155531e-2) * z + 1.33314422036e-1
    near = x + x * z * (p * z - 3.33332819422e-1)
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def load(at, exists):
    return tl.load(at, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def store(at, tile, exists):
    tl.store(at, tile.to(at.dtype.element_ty), mask=exists)


@triton.jit
def of_direction(d, forward, reverse):
    """The argument of the direction that a program works for; a layer of one direction has one."""
    return forward if reverse is None else tl.where(d == 0, forward, reverse)


# ---- the gates of a tile: gates, c and reserve are the tile's pointers -------------------------------


@triton.jit
def lstm(s, gates, c, reserve, H, exists, SAVE: tl.constexpr):
    """h; stores c, and activated gates and c once more if SAVE."""
    left, right = halves(s)
    i, f = halves(left)
    g, o = halves(right)
    i = tl.sigmoid(i + load(gates, exists))
    f = tl.sigmoid(f + load(gates + H, exists))
    g = tanh(g + load(gates + 2 * H, exists))
    o = tl.sigmoid(o + load(gates + 3 * H, exists))
    cell = f * load(c, exists) + i * g
    store(c, cell, exists)
    if SAVE:
        store(gates, i, exists)
        store(gates + H, f, exists)
        store(gates + 2 * H, g, exists)
        store(gates + 3 * H, o, exists)
        store(reserve, cell, exists)
    return o * tanh(cell)


@triton.jit
def gru(s, last_h, gates, bias_n, reserve, columns, unit_exists, H, exists, SAVE: tl.constexpr):
    """h; stores activated gates and W_hn h' + b_hn if SAVE."""
    left, right = halves(s)
    r, z = halves(left)
    hidden_n, _ = halves(right)
    hidden_n = affine(hidden_n, None, bias_n, columns, unit_exists)
    r = tl.sigmoid(r + load(gates, exists))
    z = tl.sigmoid(z + load(gates + H, exists))
    n = tanh(r * hidden_n + load(gates + 2 * H, exists))
    if SAVE:
        store(gates, r, exists)
        store(gates + H, z, exists)
        store(gates + 2 * H, n, exists)
        store(reserve, hidden_n, exists)
    return n + z * (last_h - n)


@triton.jit
def rnn(s, gates, exists, MODE: tl.constexpr, SAVE: tl.constexpr):
    """h; stores it as its gate if SAVE. A NaN stays one."""
    h = s + load(gates, exists)
    h = tanh(h) if MODE == "RNN_TANH" else tl.where(h < 0.0, 0.0, h)
    if SAVE:
        store(gates, h, exists)
    return h


# ---- a tile of a step --------------------------------------------------------------------------------


@triton.jit
def hidden_product(
    y, w_hh, count, before, preceded, row, unit, width, N, H,
    G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 [BM, BLOCKS BN] of h' W_hh^T, a block a gate; y is the direction's, with h0 behind its N rows."""
    BLOCKS: tl.constexpr = 4 if G == 3 else G  # tiles are powers of two
    rows, j = row + tl.arange(0, BM), tl.arange(0, BLOCKS * BN)
    gates, units = j // BN, unit + j % BN
    left = y + (tl.where(rows < preceded, before, N) + rows).to(tl.int64) * width
    right = w_hh + (gates * H + units).to(tl.int64) * H
    row_exists, unit_exists = (rows < count)[:, None], ((gates < G) & (units < H))[:, None]
    s = tl.zeros([BM, BLOCKS * BN], tl.float32)
    for k in range(0, H, BK):
        ks = k + tl.arange(0, BK)[None, :]
        hidden = tl.load(left[:, None] + ks, mask=row_exists & (ks < H), other=0.0)
        w = tl.load(right[:, None] + ks, mask=unit_exists & (ks < H), other=0.0)
        s = tl.dot(hidden, tl.trans(w), s, input_precision=PRECISION)
    return s


@triton.jit
def scan_tile(
    gates, w_hh, bias_n, zoneout, y, h, c, reserve, now, count, before, preceded, d, row, unit,
    width, N, B, H, MODE: tl.constexpr, G: tl.constexpr, SAVE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A step of direction d for sequences [row, + BM) and hidden units [unit, + BN).

    ``count`` sequences have the step, in the data's rows from ``now`` on. ``preceded`` had one before it, in
    rows from ``before`` on.
    """
    s = hidden_product(
        y + d * H, w_hh, count, before, preceded, row, unit, width, N, H, G, BM, BN, BK, PRECISION
    )
    unit_exists = unit + tl.arange(0, BN) < H
    exists = (row + tl.arange(0, BM) < count)[:, None] & unit_exists[None, :]
    at, column = now + row, d * H + unit
    gates = pointers(gates, at, d * G * H + unit, G * width, BM, BN)
    h = pointers(h, d * B + row, unit, H, BM, BN)
    if c is not None:
        c = pointers(c, d * B + row, unit, H, BM, BN)
    if reserve is not None:
        reserve = pointers(reserve, at, column, width, BM, BN)
    last_h = load(h, exists)
    if MODE == "LSTM":
        new_h = lstm(s, gates, c, reserve, H, exists, SAVE)
    elif MODE == "GRU":
        columns = column + tl.arange(0, BN)
        new_h = gru(s, last_h, gates, bias_n, reserve, columns, unit_exists, H, exists, SAVE)
    else:
        new_h = rnn(s, gates, exists, MODE, SAVE)
    if zoneout is not None:
        new_h += load(pointers(zoneout, at, column, width, BM, BN), exists) * (last_h - new_h)
    store(h, new_h, exists)
    store(pointers(y, at, column, width, BM, BN), new_h, exists)


# ---- kernel ------------------------------------------------------------------------------------------

STEPS = ["now", "count", "now_1", "count_1", "before", "preceded", "before_1", "preceded_1"]


@triton.jit(do_not_specialize=[*STEPS, "N"])
def scan_step_kernel(
    gates, w_hh, w_hh_reverse, bias_n, zoneout, y, h, c, reserve,
    now, count, now_1, count_1, before, preceded, before_1, preceded_1, N, B, H,
    MODE: tl.constexpr, G: tl.constexpr, SAVE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A step of each direction; _1 is the reverse one's. A program: hidden units, sequences, a direction."""
    unit, row, d = tl.program_id(0) * BN, tl.program_id(1) * BM, tl.program_id(2)
    if d == 1:
        now, count, before, preceded = now_1, count_1, before_1, preceded_1
    if row < count:
        scan_tile(
            gates, of_direction(d, w_hh, w_hh_reverse), bias_n, zoneout, y, h, c, reserve,
            now, count, before, preceded, d, row, unit, tl.num_programs(2) * H, N, B, H,
            MODE, G, SAVE, BM, BN, BK, PRECISION,
        )  # fmt: skip
