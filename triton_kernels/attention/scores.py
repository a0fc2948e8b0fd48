"""What attention does with single scores: from dot products to logits, weights and their gradients.

    x = q k^T                   x = tanh(scale / softcap x), if asked
    s = factor x + bias - slope |i + offset - j|, -inf where mask or window forbid
    p = exp(s - lse)            what v is multiplied by: p where dropout keeps it, / (1 - dropout_p)

s is kept times log2 e, because the hardware's exponential is exp2; of fp32 inputs it is not (`natural`), so
that the s of a row's only key is its lse to the last bit. i and j are the positions of queries and keys in
their sequence, [BR, 1] and [1, BC] or the other way round.

Every function takes ``terms``, what a score depends on besides its dot product and the window; of what is
None nothing is compiled. Only fields that hold no fields are compared with None: Triton 3.6 cannot compare a
tuple in which there is one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigkern.triton_kernels.attention.tiles import LN_2, LOG2_E, Shape
from bigkern.triton_kernels.common.dropout import Dropout
from bigkern.triton_kernels.common.dropout import dropout_of as dropout_of
from bigkern.triton_kernels.common.dropout import dropped as drop


class Broadcast(NamedTuple):
    """A [B, Hq, Sq, Sk] tensor, strides 0 where it is broadcast; rows are dense, padded to 16 elements."""

    data: Tensor | None = None  # None: there is none
    batch: int | None = None
    head: int | None = None
    row: int | None = None
    column: int | None = None  # None: one value a row


class Slopes(NamedTuple):
    """ALiBi's, [B, Hq] fp32; batch 0: the same for all batches."""

    data: Tensor
    batch: int


class Terms(NamedTuple):
    some: int | None = None  # 1, or None of plain attention
    softcap: float | None = None  # scale / softcap
    bias: Broadcast = Broadcast()
    mask: Broadcast = Broadcast()
    slopes: Slopes | None = None
    dropout: Dropout | None = None


def terms_of(
    softcap: float | None,
    bias: Tensor | None,
    mask: Tensor | None,
    slopes: Tensor | None,
    dropout: Dropout | None,
) -> Terms:
    absent = all(term is None for term in (softcap, bias, mask, slopes, dropout))
    some = None if absent else 1
    return Terms(some, softcap, broadcast(bias), broadcast(mask), slopes_of(slopes), dropout)


def broadcast(x: Tensor | None) -> Broadcast:
    """Of a [B or 1, Hq or 1, Sq or 1, Sk or 1]. Rows that vectors cannot read are copied into padded ones."""
    if x is None:
        return Broadcast()
    x = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())]
    per_key, strides = x.shape[3] > 1, outer_strides(x)
    if per_key and (x.stride(3) != 1 or any(n % 16 for n in (x.shape[3], *strides, x.data_ptr()))):
        rows = x.new_empty(*x.shape[:3], triton.cdiv(x.shape[3], 16) * 16)[..., : x.shape[3]]
        x = rows.copy_(x)
        strides = outer_strides(x)
    data = x.view(torch.uint8) if x.dtype == torch.bool else x
    return Broadcast(data, *strides, 1 if per_key else None)


def outer_strides(x: Tensor) -> list[int]:
    return [stride if size > 1 else 0 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]


def slopes_of(x: Tensor | None) -> Slopes | None:
    return None if x is None else Slopes(x, x.shape[1] if x.dim() == 2 else 0)


def factor_of(scale: float, softcap: float, shape: Shape) -> float:
    """What turns a (capped) dot product into a score."""
    return (softcap or scale) * (LOG2_E.value if shape.natural is None else 1.0)


# ---- the unit of scores ----------------------------------------------------------------------------


@triton.jit
def to_score(logit, shape):
    return logit * LOG2_E if shape.natural is None else logit


@triton.jit
def exponential(s, shape):
    return tl.exp2(s) if shape.natural is None else tl.exp(s)


@triton.jit
def log_sum_exp(m, l, shape):
    """The logit m + log l, from a score m and a sum l of exponentials relative to it."""
    return (m + tl.log2(l)) * LN_2 if shape.natural is None else m + tl.log(l)


# ---- scores ----------------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """To 2e-7 of it: Cephes' polynomial near zero, where 1 - 2 / (e^2x + 1) would cancel."""
    z = x * x
    small = -5.70498872745e-3 * z + 2.06390887954e-2
    small = small * z - 5.37397155531e-2
    small = small * z + 1.33314422036e-1
    small = small * z - 3.33332819422e-1
    large = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, x + x * z * small, large)


@triton.jit
def capped(x, terms):
    """tanh(scale / softcap x); without a softcap x."""
    if terms.softcap is not None:
        x = tanh(x * terms.softcap)
    return x


@triton.jit
def score_tile(x, b, h, i, j, seq):
    """mask or bias at queries i and keys j, which broadcast to a tile; undefined where these do not exist."""
    at = x.data + b * x.batch + h * x.head + tl.cast(i, tl.int64) * x.row
    exists = i < seq.Sq
    if x.column is not None:
        at += j
        exists = exists & (j < tl.cdiv(seq.Sk, 16) * 16)  # rows are padded: whole vectors exist or not
    return tl.load(at, mask=exists, other=0)


@triton.jit
def logits(x, factor, terms, b, h, i, j, seq, shape, EDGE: tl.constexpr):
    """factor x + bias - slope |i + offset - j|, -inf where query i may not see key j."""
    s = x * factor
    if terms.bias.data is not None:
        s += to_score(score_tile(terms.bias, b, h, i, j, seq).to(tl.float32), shape)
    if terms.slopes is not None:
        slope = to_score(tl.load(terms.slopes.data + b * terms.slopes.batch + h), shape)
        s -= slope * tl.abs(i + seq.offset - j).to(tl.float32)
    if terms.mask.data is not None:
        s = tl.where(score_tile(terms.mask, b, h, i, j, seq) != 0, s, float("-inf"))
    if EDGE:
        seen = j < seq.Sk
        if shape.right is not None:
            seen = seen & (j <= i + (seq.offset + shape.right))
        if shape.left is not None:
            seen = seen & (j >= i + (seq.offset - shape.left))
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def online_softmax(x, m, l, factor, terms, b, h, i, j, seq, shape, EDGE: tl.constexpr):
    """Fold dot products into the running maximum m and sum l of their rows: (p, rescale, m, l).

    p is relative to the new maximum; what was summed before is to be multiplied by rescale.
    """
    if EDGE or terms.some is not None:
        s = logits(capped(x, terms), factor, terms, b, h, i, j, seq, shape, EDGE)
        new_m = tl.maximum(m, tl.max(s, 1))
        finite_m = tl.where(new_m == float("-inf"), 0.0, new_m)  # no NaN while a row has seen nothing
        p = exponential(s - finite_m[:, None], shape)
        rescale = exponential(m - finite_m, shape)
    else:  # factor is not negative, so it commutes with the maximum and fuses into the subtraction
        new_m = tl.maximum(m, tl.max(x, 1) * factor)
        p = exponential(x * factor - new_m[:, None], shape)
        rescale = exponential(m - new_m, shape)
    return p, rescale, new_m, l * rescale + tl.sum(p, 1)


# ---- dropout ---------------------------------------------------------------------------------------


@triton.jit
def dropped(p, terms, b, h, i, j, shape):
    """The weights that v is multiplied by."""
    if terms.dropout is not None:
        p = drop(p, terms.dropout, b * shape.Hq + h, i, j)
    return p


# ---- backward --------------------------------------------------------------------------------------


@triton.jit
def weights(x, lse, factor, terms, b, h, i, j, seq, shape, EDGE: tl.constexpr):
    """p = exp(s - lse), recomputed from capped dot products; lse broadcasts to x."""
    return exponential(logits(x, factor, terms, b, h, i, j, seq, shape, EDGE) - lse, shape)


@triton.jit
def score_gradient(p, dp, delta, terms, b, h, i, j, shape):
    """ds, from dp = do v^T."""
    return p * (dropped(dp, terms, b, h, i, j, shape) - delta)


@triton.jit
def product_gradient(ds, x, terms):
    """What dq and dk are made of: ds, through the softcap if there is one."""
    if terms.softcap is not None:
        ds = ds * (1.0 - x * x)
    return ds
