"""bigkern behind torch's own ``scaled_dot_product_attention``, by torch's registry of flash implementations.

    >>> import torch.nn.attention, bigkern.integrations.sdpa
    >>> bigkern.integrations.sdpa.register()
    >>> torch.nn.attention.activate_flash_attention_impl("bigkern")
    >>> torch.nn.attention.restore_flash_attention_impl()

While it is active, the calls that torch gives to its flash backend, on the CPU and on CUDA devices, run on
the backend that :func:`bigkern.explain` names. What that leaves to stock, whichever of torch's kernels it
names, runs the flash kernel that torch had: torch has made its choice by then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bigkern.ops.attention.backends import ATTENTION
from bigkern.ops.attention.call import Attention, AttentionBackward, bind

NAME = "bigkern"

_CPU = "_scaled_dot_product_flash_attention_for_cpu"
_CUDA = "_scaled_dot_product_flash_attention"


def register() -> None:
    """Make "bigkern" known to :func:`torch.nn.attention.activate_flash_attention_impl`. Activates nothing.

    Raises:
        RuntimeError: this torch has no such registry; it came with torch 2.13.

    Source: :func:`torch.nn.attention.register_flash_attention_impl`.

    Example:
        >>> import torch.nn.attention, bigkern.integrations.sdpa
        >>> bigkern.integrations.sdpa.register()
        >>> "bigkern" in torch.nn.attention.list_flash_attention_impls()
        True
    """
    try:
        from torch.nn.attention import register_flash_attention_impl
    except ImportError:
        raise RuntimeError(
            f"torch {torch.__version__} has no register_flash_attention_impl; torch 2.13 and later have"
        ) from None
    register_flash_attention_impl(NAME, register_fn=_Active)


class _Active:
    """The handle that torch keeps while "bigkern" is active: our kernels in the place of torch's."""

    def __init__(self) -> None:
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        self._replace(_CPU, "CPU", _forward_cpu)
        self._replace(f"{_CPU}_backward", "CPU", _backward_cpu)
        if torch.backends.cuda.is_built():
            self._replace(_CUDA, "CUDA", _forward_cuda)
            self._replace(f"{_CUDA}_backward", "CUDA", _backward_cuda)

    def _replace(self, op: str, key: str, ours: Callable[..., Any]) -> None:
        before = torch.library.get_kernel(f"aten::{op}", key)

        def kernel(keys: Any, *args: Any, **options: Any) -> Any:
            results = ours(*args, **options)
            return before.call_boxed(keys, *args, **options) if results is None else results

        assert self._library is not None
        self._library.impl(op, kernel, key, with_keyset=True, allow_override=True)

    def remove(self) -> None:
        if self._library is not None:
            self._library._destroy()
        self._library = None


# Each of these returns None for a call that is left to torch's kernel. Statistics are natural logarithms on
# both sides, so a backward may run on the other side than its forward.


def _bound(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, causal: bool, mask: Tensor | None, scale: float | None
) -> Attention | None:
    """The op's call, if a kernel of ours runs it."""
    if dropout_p > 0.0:
        return None
    boolean = mask is not None and mask.dtype == torch.bool
    which = {"mask" if boolean else "bias": mask}
    call = bind(q, k, v, causal=causal, scale=scale, **which)  # type: ignore[arg-type]
    return None if ATTENTION.resolve(call).by_torch else call


def _forward_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    call = _bound(q, k, v, dropout_p, is_causal, attn_mask, scale)
    if call is None:
        return None
    o, lse = _forward(call)
    return o, lse.transpose(1, 2).contiguous().transpose(1, 2)


def _backward_cpu(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    call = _bound(q, k, v, dropout_p, is_causal, attn_mask, scale)
    return None if call is None else _gradients(do, o, lse, call)


def _forward(call: Attention) -> tuple[Tensor, Tensor]:
    """o laid out as q, which a compiled graph relies on, and lse."""
    o, lse = ATTENTION.resolve(call).forward(call)
    like_q = torch.empty_like(call.q) if call.v.shape[3] == call.q.shape[3] else o
    return (o if o.stride() == like_q.stride() else like_q.copy_(o)), lse


def _gradients(do: Tensor, o: Tensor, lse: Tensor, call: Attention) -> tuple[Tensor, ...]:
    backward: Any = ATTENTION.resolve(call).backward
    dq, dk, dv, _dbias = backward(AttentionBackward.of(call, do, None, o, lse, False))
    return dq, dk, dv


def _forward_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    call = _bound(q, k, v, dropout_p, is_causal, None, scale)
    if call is None or return_debug_mask:
        return None
    o, lse = _forward(call)
    random = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
    nothing = q.new_empty(0)
    return o, lse, None, None, q.shape[2], k.shape[2], random, nothing.to(torch.uint64), nothing


def _backward_cuda(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> Any:
    call = _bound(q, k, v, dropout_p, is_causal, None, scale)
    return None if call is None or cum_seq_q is not None else _gradients(do, o, lse, call)
