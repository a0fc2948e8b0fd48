"""Attention without the score matrix: forward and backward in Triton.

    x = scale * q k^T            x = softcap tanh(x / softcap), if asked
    s = x + bias - slope |i + offset - j|, -inf where mask or window forbid
    lse = log (sum exp s + exp sink)          p = exp(s - lse)          o = dropout(p) v

A program of the forward owns BR rows of one head and walks over the keys in tiles of BC, keeping the
row's maximum m, its sum l and the unnormalised output:

         q [BR, D]        k, v [BC, D]             stays in registers:  acc [BR, DV], m [BR], l [BR]
      +-----------+   +--+--+--+--+--+--+--+       loaded once:         q
      |  program  | x |  |  |  |  |  |  |  |       streamed:            k, v, one tile ahead of the product
      +-----------+   +--+--+--+--+--+--+--+
                        edge | plain  | edge       masks are built only in edge tiles: where the window's
                                                   edges, the causal one among them, or the end of the
                                                   keys run through the tile; what is outside is not visited

The backward recomputes p = exp(s - lse). ``statistics`` (delta = rowsum(do * o) - dlse) runs first. In
``key_value_gradient`` a program owns BC keys and walks over the queries of all heads that share them; dq it
adds to fp32 sums by atomics, which a last pass scales and casts:

    5 products a tile   q k^T   p^T do   do v^T   dx^T q   dx k      + dq_sums [B, Hq, Sq, D] fp32

The order of such sums differs from run to run. Where torch.are_deterministic_algorithms_enabled(), and where
tiles of three gradients do not fit into registers (16-bit types of head dim 256, "tf32x3"), dq is left to
``query_gradient``, in which a program owns BR queries and walks over the keys: 7 products, no atomics, and
the same bits in every run. The bias's gradient has a kernel and owners of its own, in `attention_bias.py`.

A row with nothing to attend to gives o = 0, lse = -inf (its sink, if it has one) and zero gradients. Packed
sequences lie behind each other in the rows of one batch; a program whose tile is beyond its sequence's end
leaves at once.

Dao, FlashAttention-2 (2023); Milakov and Gimelshein, Online normalizer calculation for softmax (2018).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bigkern.triton_kernels.attention.backward import (
    key_value_gradient_kernel,
    query_gradient_kernel,
    statistics_kernel,
)
from bigkern.triton_kernels.attention.bias import Owned, bias_gradient_kernel
from bigkern.triton_kernels.attention.configurations import CONFIGURATIONS, DESCRIBED, GENERAL, Tile, Tiles
from bigkern.triton_kernels.attention.forward import attention_kernel
from bigkern.triton_kernels.attention.scores import Terms, dropout_of, factor_of, terms_of
from bigkern.triton_kernels.attention.tiles import (
    Shape,
    Statistic,
    View,
    describable,
    descriptor,
    empty_bshd,
    side,
    statistic,
    view,
)
from bigkern.triton_kernels.common import launch

# ---- launchers -------------------------------------------------------------------------------------


class Rules(NamedTuple):
    """The op's arguments after q, k and v."""

    mask: Tensor | None  # bool, [B, Hq, Sq, Sk] or 1 where it is broadcast, True where the query may look
    bias: Tensor | None  # the same, in q's dtype
    alibi_slopes: Tensor | None  # [Hq] or [B, Hq] fp32
    sinks: Tensor | None  # [Hq] fp32
    dropout_key: Tensor | None  # two numbers below 2^32, int64 on the CPU
    cu_seqlens_q: Tensor | None  # [sequences + 1] int32
    cu_seqlens_k: Tensor | None
    scale: float
    causal: str  # "none", "top_left" or "bottom_right"
    window_left: int  # -1: unlimited
    window_right: int
    softcap: float  # 0: none
    dropout_p: float
    max_seqlen_q: int
    max_seqlen_k: int


def attention(q: Tensor, k: Tensor, v: Tensor, *rules: object) -> tuple[Tensor, Tensor]:
    """``o [B, Hq, Sq, Dv]`` stored as ``[B, Sq, Hq, Dv]``, and ``lse [B, Hq, Sq]`` fp32.

    q ``[B, Hq, Sq, D]``, k ``[B, Hkv, Sk, D]``, v ``[B, Hkv, Sk, Dv]``; then what :class:`Rules` lists.
    """
    call = Rules(*rules)  # type: ignore[arg-type]
    if call.scale < 0:
        q, call = -q, call._replace(scale=-call.scale)
    B, Hq, packed = batches(q, call), q.shape[1], call.cu_seqlens_q is not None
    o = empty_bshd(q, Hq, q.shape[2], v.shape[3])
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    shape, terms = shape_of(q, k, call), terms_in(call)
    tiles, stream = tiles_of(shape, terms, q, k, v)
    BC, factor = tiles.forward.BC, factor_of(call.scale, call.softcap, shape)
    programs = triton.cdiv(shape.Sq, tiles.forward.BR) * B * Hq
    if programs > 0:
        attention_kernel[(programs,)](
            view(q, packed), stream(k, BC), stream(v, BC), terms, call.sinks, view(o, packed),
            statistic(lse, packed), factor, shape, **sizes(q, v), **options(tiles.forward),
        )  # fmt: skip
    return o, lse


def attention_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    want_bias: bool,
    *rules: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk and dv, each stored as ``[B, S, H, D]``, and dbias, empty unless ``want_bias``."""
    call = Rules(*rules)  # type: ignore[arg-type]
    B, Hq, packed = batches(q, call), q.shape[1], call.cu_seqlens_q is not None
    dq, dk, dv = (empty_bshd(x, *x.shape[1:]) for x in (q, k, v))
    dbias = q.new_empty(call.bias.shape if want_bias and call.bias is not None else 0)
    shape, terms = shape_of(q, k, call), terms_in(call)
    statistics = statistics_of(do, dlse, o, lse, shape, packed)
    factor, constants = factor_of(call.scale, call.softcap, shape), sizes(q, v)
    tiles, stream = tiles_of(shape, terms, q, k, v, do)
    fused = None if torch.are_deterministic_algorithms_enabled() else tiles.fused
    dq_sums = None if fused is None else torch.zeros_like(dq, dtype=torch.float32)
    programs = triton.cdiv(shape.Sq, tiles.query.BR) * B * Hq
    if dq_sums is None and programs > 0:
        BC = tiles.query.BC
        query_gradient_kernel[(programs,)](
            view(do, packed), view(q, packed), stream(k, BC), stream(v, BC), terms, *statistics,
            view(dq, packed), call.scale, factor, shape, **constants, **options(tiles.query),
        )  # fmt: skip
    tile = fused or tiles.key_value
    programs = triton.cdiv(shape.Sk, tile.BC) * B * shape.Hkv
    if programs > 0:
        key_value_gradient_kernel[(programs,)](
            stream(do, tile.BR), stream(q, tile.BR), view(k, packed), view(v, packed), terms, *statistics,
            None if dq_sums is None else stream(dq_sums, tile.BR), view(dk, packed), view(dv, packed),
            call.scale, factor, shape, **constants, **options(tile),
        )  # fmt: skip
    if dq_sums is not None:
        torch.mul(dq_sums, call.scale, out=dq)
    if dbias.numel() > 0:
        b, h, i, j = dbias.shape
        programs = b * h * triton.cdiv(i, tiles.bias.BR) * triton.cdiv(j, tiles.bias.BC)
        bias_gradient_kernel[(programs,)](
            *(view(x) for x in (do, q, k, v)), terms, *statistics, Owned(dbias, h, B // b, Hq // h), factor,
            shape, **constants, PER_QUERY=i > 1, PER_KEY=j > 1, **options(tiles.bias),
        )  # fmt: skip
    return dq, dk, dv, dbias


def statistics_of(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, shape: Shape, packed: bool
) -> tuple[Statistic, Statistic]:
    """lse as a score, and delta."""
    (B, H, S), DV = lse.shape, o.shape[3]
    score_lse, delta = torch.empty(2, B, H, S, dtype=torch.float32, device=o.device)
    if lse.numel() > 0:
        statistics_kernel[(triton.cdiv(S, 32) * B * H,)](
            view(do), view(o), lse.contiguous(), None if dlse is None else dlse.contiguous(), score_lse,
            delta, H, S, shape, DV=DV, BDV=launch.padded(DV), BR=32, num_warps=4, **launch.OPTIONS,
        )  # fmt: skip
    return statistic(score_lse, packed), statistic(delta, packed)


def batches(q: Tensor, call: Rules) -> int:
    return q.shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1


def shape_of(q: Tensor, k: Tensor, call: Rules) -> Shape:
    Hq, Hkv = q.shape[1], k.shape[1]
    return Shape(
        Hq,
        Hkv,
        Hq // Hkv,
        call.max_seqlen_q,
        call.max_seqlen_k,
        0 if call.causal == "top_left" else None,
        side(call.window_left, call.max_seqlen_q, call.max_seqlen_k),
        side(call.window_right, call.max_seqlen_q, call.max_seqlen_k),
        1 if q.dtype == torch.float32 else None,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
    )


def terms_in(call: Rules) -> Terms:
    softcap = call.scale / call.softcap if call.softcap else None
    dropout = dropout_of(call.dropout_key, call.dropout_p)
    return terms_of(softcap, call.bias, call.mask, call.alibi_slopes, dropout)


def tiles_of(
    shape: Shape, terms: Terms, q: Tensor, k: Tensor, v: Tensor, *do: Tensor
) -> tuple[Tiles, Callable[[Tensor, int], View | TensorDescriptor]]:
    """The tiles of a call, and how its kernels see a tensor that they walk through in so many rows a tile."""
    D = max(64, launch.padded(max(q.shape[3], v.shape[3])))
    key = launch.architecture(q.device), q.element_size(), D
    packed = shape.q_begins is not None
    if terms.some is None and not packed and key in DESCRIBED and all(describable(x) for x in (q, k, v, *do)):
        return DESCRIBED[key], descriptor
    tiles = CONFIGURATIONS[key]
    if terms.some is not None or shape.left is not None:
        tiles = GENERAL.get(key, tiles)
    return tiles, lambda x, rows: view(x, packed)


def options(tile: Tile) -> dict[str, int | str]:
    return {
        "BR": tile.BR,
        "BC": tile.BC,
        "PRECISION": tile.precision,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **launch.OPTIONS,
    }


def sizes(q: Tensor, v: Tensor) -> dict[str, int]:
    D, DV = q.shape[3], v.shape[3]
    return {"D": D, "DV": DV, "BD": launch.padded(D), "BDV": launch.padded(DV)}
