"""``decode_attention``: a few new queries of each sequence against its cache of keys and values."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from bigkern.core import registry
from bigkern.core.checks import check_dense, check_written, kind
from bigkern.core.library import LIBRARY, define, in_functorch, plain, triton_kernel, unavailable, unproven
from bigkern.ops.attention import decode_reference as reference
from bigkern.ops.attention import stock
from bigkern.ops.attention.backends import kernel_refuses
from bigkern.ops.attention.call import (
    Window,
    check_scale,
    check_slopes,
    check_softcap,
    check_tensors,
    corner_and_window,
    may_look,
    per_head,
)

define(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? page_table,"
    " Tensor? alibi_slopes, Tensor? sinks, float scale, str causal, int window_left, int window_right,"
    " float softcap) -> (Tensor o, Tensor lse)"
)


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
    arguments = bind(
        q, k_cache, v_cache, cache_seqlens, k=k, v=v, page_table=page_table, causal=causal, scale=scale,
        window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
    )  # fmt: skip
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k_cache, v_cache, k, v, sinks)
    ):
        raise RuntimeError("decode_attention has no backward: call it under torch.no_grad()")
    if k is not None and v is not None:
        _append(k, v, k_cache, v_cache, cache_seqlens, page_table)
    backend = DECODE.resolve(*arguments)
    if backend.name == "torch" and not return_lse:
        return _stock(*arguments)
    forward = backend.forward if plain(q, k_cache, v_cache) else torch.ops.bigkern.decode_attention
    o, lse = forward(*arguments)
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


# ---- checks ----------------------------------------------------------------------------------------


def bind(
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
) -> tuple[Any, ...]:
    """Check a public call and turn it into the op's arguments."""
    check_tensors(q, k_cache, v_cache, names=("q", "k_cache", "v_cache"))
    B, Hq, Sq, D = q.shape
    first, Hkv, S, Dv = *k_cache.shape[:3], v_cache.shape[3]
    if k_cache.shape[3] != D or (page_table is None and first != B):
        rows = f"[{B}, Hkv, S, {D}]" if page_table is None else f"[pages, Hkv, page_size, {D}]"
        paged = "without" if page_table is None else "with"
        found = f"to match q {tuple(q.shape)} {paged} a page_table, not {tuple(k_cache.shape)}"
        raise ValueError(f"k_cache must be {rows} {found}")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(
            f"v_cache must be {[first, Hkv, S]} + [Dv] to match k_cache, not {tuple(v_cache.shape)}"
        )
    if Hkv == 0 or Hq % Hkv != 0:
        raise ValueError(f"q's head count {Hq} must be a multiple of k_cache's and v_cache's, {Hkv}")
    if (k is None) != (v is None):
        raise ValueError(f"{'k' if k is None else 'v'} must be given with {'v' if k is None else 'k'}")
    if k is not None and v is not None:
        _check_new("k", k, (B, Hkv, Sq, D), q)
        _check_new("v", v, (B, Hkv, Sq, Dv), q)
        check_written("k_cache", k_cache)
        check_written("v_cache", v_cache)
    _check_int32("cache_seqlens", cache_seqlens, (B,), "[B]", q)
    capacity = S
    if page_table is not None:
        check_dense("page_table", page_table)
        width = page_table.shape[-1] if page_table.dim() == 2 else 0
        _check_int32("page_table", page_table, (B, width), "[B, pages of a sequence]", q)
        capacity = S * width
    added = 0 if k is None else Sq
    _check_values(cache_seqlens, added, capacity, page_table, first, S)
    if alibi_slopes is not None:
        alibi_slopes = check_slopes(alibi_slopes, B, q)
    if sinks is not None:
        sinks = per_head("sinks", sinks, [(Hq,)], q)
    if not isinstance(causal, bool):
        raise ValueError(f"causal must be True or False, not {causal!r}: queries are the last of a sequence")
    rule, left, right = corner_and_window("bottom_right" if causal else False, window)
    lengths = cache_seqlens + added if added else cache_seqlens.contiguous()
    page_table = None if page_table is None else page_table.contiguous()
    return (
        q, k_cache, v_cache, lengths, page_table, alibi_slopes, sinks, check_scale(scale, D), rule, left,
        right, check_softcap(softcap),
    )  # fmt: skip


def _check_new(name: str, x: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype != q.dtype:
        raise TypeError(f"{name} must be a Tensor of q's dtype {q.dtype}, not {kind(x)}")
    check_dense(name, x)
    if tuple(x.shape) != shape or x.device != q.device:
        wanted = f"{list(shape)} on {q.device}, as q and {name}_cache are"
        raise ValueError(f"{name} must be {wanted}, not {list(x.shape)} on {x.device}")


def _check_int32(name: str, x: Tensor, shape: tuple[int, ...], wanted: str, q: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype != torch.int32:
        raise TypeError(f"{name} must be an int32 Tensor {wanted}, not {kind(x)}")
    check_dense(name, x)
    if tuple(x.shape) != shape or x.device != q.device:
        found = f"{list(x.shape)} on {x.device}"
        raise ValueError(f"{name} must have shape {wanted} = {list(shape)} on {q.device}, not {found}")


def _check_values(
    lengths: Tensor, added: int, capacity: int, page_table: Tensor | None, pages: int, page_size: int
) -> None:
    """Lengths within the cache, and page numbers within the pages, where looking costs nothing."""
    if not may_look(lengths) or lengths.numel() == 0:
        return
    least, most = int(lengths.min()), int(lengths.max()) + added
    if least < 0 or most > capacity:
        new = f" with the {added} new keys" if added else ""
        raise ValueError(
            f"cache_seqlens must be within 0 and the {capacity} keys{new} that k_cache and page_table hold,"
            f" not {least}..{most}"
        )
    if page_table is None:
        return
    used = torch.arange(page_table.shape[1], device=lengths.device) * page_size < lengths[:, None] + added
    numbers = page_table[used]
    if numbers.numel() > 0 and (int(numbers.min()) < 0 or int(numbers.max()) >= pages):
        found = f"{int(numbers.min())}..{int(numbers.max())}"
        raise ValueError(f"page_table must hold page numbers below {pages}, not {found}")


# ---- the op and its backends -----------------------------------------------------------------------


@torch.library.register_fake("bigkern::decode_attention", lib=LIBRARY)
def _fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, Hq, Sq, _D = q.shape
    o = q.new_empty(B, Sq, Hq, v_cache.shape[3]).transpose(1, 2)
    return o, q.new_empty(B, Hq, Sq, dtype=torch.promote_types(q.dtype, torch.float32))


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return cast(tuple[Tensor, Tensor], DECODE.resolve(*arguments).forward(*arguments))


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("decode_attention", _forward, _key)

DECODE = registry.declare("decode_attention", bind)


def _stock(*arguments: Any) -> Tensor:
    call = reference.as_attention(*arguments)
    call.bias = None if call.bias is None else call.bias.to(call.q.dtype)
    return stock.attention(call)


def _stock_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    o, lse = reference.decode_attention(*arguments)
    return o.transpose(1, 2).contiguous().transpose(1, 2), lse


def _refuses(backend: str) -> Any:
    def refuses(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> registry.Reason:
        transformed = "inside a torch.func transform" if in_functorch() else None
        return unavailable(backend, q) or kernel_refuses(q, v_cache) or transformed

    return refuses


def cuda_backend(native: Any, *, emulated: bool = False) -> registry.Backend:
    """The CUDA kernels in ``native``: the compiled ones, or, in the tests, those that the emulator runs."""
    refuses = _refuses("cpu" if emulated else "cuda")
    return registry.Backend(
        "cuda", native.decode_attention, None, refuses, unproven("decode_attention", "cuda")
    )


_native = torch.ops.bigkern_native

DECODE.register(cuda_backend(_native))
DECODE.register(
    registry.Backend(
        "triton",
        triton_kernel("attention.decode", "decode_attention"),
        None,
        _refuses("triton"),
        unproven("decode_attention", "triton"),
    )
)
DECODE.register(registry.Backend("cpu", _native.decode_attention, None, _refuses("cpu")))
DECODE.register(registry.Backend("torch", _stock_forward))
