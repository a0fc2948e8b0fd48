"""``decode_attention``: a few new queries of each sequence against its cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bigkern.core.library import in_functorch, triton_kernel, unavailable, unproven
from bigkern.core.op import Measures, Op, native, of_fields
from bigkern.core.registry import Backend, Reason
from bigkern.ops.attention import decode_reference as reference
from bigkern.ops.attention import stock
from bigkern.ops.attention.backends import fake, kernel_refuses
from bigkern.ops.attention.call import Result, Window
from bigkern.ops.attention.decode_call import Decode, bind, options, sizes

# ---- the public function ---------------------------------------------------------------------------


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    page_table: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention of the last queries of each sequence over its cached keys and values, for generation.

    With ``n = cache_seqlens[b]`` (plus Sq, if new keys are given) query i of sequence b stands at key
    ``n - Sq + i``: ``o[b] = attention(q[b], k_cache[b, :, :n], v_cache[b, :, :n], causal="bottom_right")``.
    The keys of one head are cut into spans that run side by side and are joined by their log-sum-exp.

    Args:
        q: ``[B, Hq, Sq, D]``, the newest queries; Sq is usually 1.
        k_cache: ``[B, Hkv, S, D]``, or in pages ``[pages, Hkv, page_size, D]``. Any strides with unit last
            one: a cache of ``[B, S, Hkv, D]`` is given transposed, without a copy.
        v_cache: as k_cache, with Dv columns.
        cache_seqlens: int32 ``[B]`` on q's device, how many keys of each sequence are in the cache.
        k, v: ``[B, Hkv, Sq, D]`` and ``[B, Hkv, Sq, Dv]``, the newest keys and values: written into the cache
            behind ``cache_seqlens``, in place, before anything is read. ``cache_seqlens`` is left as it is.
        page_table: int32 ``[B, pages of a sequence]``: the page that holds keys ``i * page_size`` on.
        causal: whether a query sees only keys up to its own place.
        window, softcap, alibi_slopes, sinks, scale: as in :func:`bigkern.attention`.
        return_lse: also return the log-sum-exp.

    Returns:
        ``o [B, Hq, Sq, Dv]`` in q's dtype; with ``return_lse`` also ``lse [B, Hq, Sq]`` in fp32. A sequence
        of length 0 gives o = 0 and lse = -inf (its sink, if it has one).

    There is no backward: nothing is saved.

    Raises:
        TypeError, ValueError: as :func:`bigkern.attention`. Lengths and page numbers that overrun the cache
            are found where looking at them is free, on the CPU, and on a GPU with BIGKERN_DEBUG=1.
        RuntimeError: a gradient is asked for.

    Source: Dao et al., Flash-Decoding (2023); Kwon et al., PagedAttention (2023).

    Example:
        >>> import torch, bigkern
        >>> k_cache, v_cache = torch.zeros(2, 4, 100, 64), torch.zeros(2, 4, 100, 64)
        >>> lengths = torch.tensor([17, 3], dtype=torch.int32)
        >>> q, k, v = (torch.randn(2, 4, 1, 64) for _ in range(3))
        >>> bigkern.decode_attention(q, k_cache, v_cache, lengths, k=k, v=v).shape
        torch.Size([2, 4, 1, 64])
    """
    call = bind(
        q, k_cache, v_cache, cache_seqlens, k=k, v=v, page_table=page_table, causal=causal, scale=scale,
        window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
    )  # fmt: skip
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k_cache, v_cache, k, v, sinks)
    ):
        raise RuntimeError("decode_attention has no backward: call it under torch.no_grad()")
    if k is not None and v is not None:
        _append(k, v, k_cache, v_cache, cache_seqlens, page_table)
    candidate = DECODE.resolve(call)
    if candidate.by_torch and not return_lse:
        return candidate.forward(call)  # type: ignore[no-any-return]
    o, lse = DECODE.run(DECODE.reference if candidate.by_torch else candidate, call)
    return (o, lse) if return_lse else o


def _append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, page_table: Tensor | None
) -> None:
    """Write the new keys and values behind the cached ones."""
    batch = torch.arange(k.shape[0], device=k.device)[:, None]
    at = lengths[:, None].long() + torch.arange(k.shape[2], device=k.device)  # [B, Sq]
    if page_table is not None:
        page_size = k_cache.shape[2]
        batch, at = page_table[batch, at // page_size].long(), at % page_size
    k_cache[batch, :, at] = k.transpose(1, 2)
    v_cache[batch, :, at] = v.transpose(1, 2)


# ---- the op and its candidates ---------------------------------------------------------------------

DECODE = Op(
    "decode_attention",
    Decode,
    Result,
    bind=bind,
    fake=lambda call: fake(call.q, call.v_cache),
    reference=Backend("reference", reference.decode_attention),
    outputs=2,
    measures=Measures(sizes, options),
)


def _refuses(backend: str) -> Callable[[Decode], Reason]:
    def refuses(call: Decode) -> Reason:
        transformed = "inside a torch.func transform" if in_functorch() else None
        return unavailable(backend, call.q) or kernel_refuses(call.q, call.v_cache) or transformed

    return refuses


def cuda_backend(kernels: Any, *, emulated: bool = False) -> Backend:
    """The CUDA kernels in ``kernels``: the compiled ones, or, in the tests, those that the emulator runs."""
    refuses, is_unproven = _refuses("cpu" if emulated else "cuda"), unproven("decode_attention", "cuda")
    return Backend("cuda", native("decode_attention", kernels), None, refuses, is_unproven)


_by_triton = of_fields(triton_kernel("attention.decode", "decode_attention"))

DECODE.register(cuda_backend(torch.ops.bigkern_native))
DECODE.register(
    Backend("triton", _by_triton, None, _refuses("triton"), unproven("decode_attention", "triton"))
)
DECODE.register(Backend("cpu", native("decode_attention"), None, _refuses("cpu")))
DECODE.register(Backend("torch", stock.decode_attention, by_torch=True))
