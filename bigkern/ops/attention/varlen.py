"""``varlen_attention``: the attention op over sequences of different lengths, packed or nested."""

from __future__ import annotations

import torch
from torch import Tensor

from bigkern.ops.attention.backends import ATTENTION, run
from bigkern.ops.attention.call import Causal, Window, bind


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: Causal = False,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention within each of many sequences that lie packed behind each other, without padding.

    ``o[a:b] = attention(q[a:b], k[c:d], v[c:d])`` for ``a, b = cu_seqlens_q[i : i + 2]`` and
    ``c, d = cu_seqlens_k[i : i + 2]``; a sequence may be empty on either side.

    Args:
        q: ``[total_q, Hq, D]``, or a jagged nested tensor ``[B, j, Hq, D]``, which knows its lengths.
        k: ``[total_k, Hkv, D]``, or nested as q.
        v: ``[total_k, Hkv, Dv]``, or nested as q.
        cu_seqlens_q, cu_seqlens_k: cumulative lengths, int32 ``[B + 1]``, from 0 to the total, on q's
            device. There they are trusted if that is a GPU, unless BIGKERN_DEBUG=1 is set.
        max_seqlen_q, max_seqlen_k: lengths of the longest sequences. Without them they are read from the
            device, which waits for it.
        alibi_slopes: ``[Hq]`` or ``[B, Hq]``.
        causal, scale, window, softcap, sinks, dropout_p, seed, offset: as in :func:`bigkern.attention`,
            for each sequence; mask and bias have no packed form.
        return_lse: also return the log-sum-exp.

    Returns:
        ``o [total_q, Hq, Dv]`` in q's dtype, or nested as q; with ``return_lse`` also ``lse [Hq, total_q]``
        in fp32, packed.

    Saved for backward: the arguments, o and lse.

    Raises:
        TypeError, ValueError: as :func:`bigkern.attention`; and cumulative lengths that do not begin at 0,
            fall or overrun.

    Source: the packed form is that of FlashAttention's ``flash_attn_varlen_func``.

    Example:
        >>> import torch, bigkern
        >>> q, ends = torch.randn(7, 4, 32), torch.tensor([0, 3, 3, 7], dtype=torch.int32)
        >>> bigkern.varlen_attention(q, q, q, ends, ends, causal=True).shape
        torch.Size([7, 4, 32])
    """
    offsets = None
    if isinstance(q, Tensor) and q.is_nested:
        _check_nested(q, k, v)
        offsets, k_offsets = (x.offsets() for x in (q, k))  # type: ignore[attr-defined]
        cu_seqlens_q, cu_seqlens_k = offsets.to(torch.int32), k_offsets.to(torch.int32)
        q, k, v, max_seqlen_q, max_seqlen_k = q.values(), k.values(), v.values(), None, None
    for name, ends in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if ends is None:
            raise TypeError(f"{name} must be an int32 Tensor [sequences + 1] unless q, k and v are nested")
    call = bind(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal, scale=scale,
        window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, dropout_p=dropout_p,
        seed=seed, offset=offset,
    )  # fmt: skip
    results = run(ATTENTION.resolve(call), call, None, return_lse)
    o, lse = (results, None) if isinstance(results, Tensor) else results
    o = o.squeeze(0).transpose(0, 1)
    o = o if offsets is None else torch.nested.nested_tensor_from_jagged(o, offsets)
    return o if lse is None else (o, lse.squeeze(0))


def _check_nested(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or not x.is_nested or x.layout != torch.jagged:
            raise TypeError(f"{name} must be a nested Tensor of layout torch.jagged, as q")
        if x.dim() != 4 or not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous [B, j, H, D] with jagged j, not {tuple(x.shape)}")
