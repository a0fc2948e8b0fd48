"""Scaled dot product attention: schema, fake, autograd, backends and the public function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.core import registry
from bigkern.core.library import (
    KERNEL_DTYPES,
    LIBRARY,
    define,
    in_functorch,
    plain,
    traced,
    triton_kernel,
    unavailable,
    unproven,
)
from bigkern.ops.attention import reference, transforms
from bigkern.ops.attention.call import Causal, Window, bind, with_drawn_key
from bigkern.ops.attention.reference import Rules

MAX_HEAD_DIM = 256

# Packed sequences lie behind each other in q [1, Hq, total, D]; then cu_seqlens are given, and max_seqlen
# counts; of dense ones max_seqlen is Sq and Sk. dbias is empty unless bias_grad.
_RULES = (
    "Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? dropout_key,"
    " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float scale, str causal, int window_left, int window_right,"
    " float softcap, float dropout_p, SymInt max_seqlen_q, SymInt max_seqlen_k"
)
define(f"attention(Tensor q, Tensor k, Tensor v, {_RULES}) -> (Tensor o, Tensor lse)")
define(
    "attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse,"
    f" bool bias_grad, {_RULES}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)"
)


# ---- the public function ---------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: Causal = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
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
    r"""Softmax attention, computed tile by tile without ever storing the score matrix.

    ``o = dropout(softmax(s)) @ v`` with ``s = softcap(scale * q @ k^T) + bias + alibi``, masked

    Args:
        q: ``[B, Hq, Sq, D]``; float32, bfloat16 or float16 (float64 runs on stock PyTorch). Any
            strides: views of ``[B, S, H, D]`` tensors cost no copy.
        k: ``[B, Hkv, Sk, D]``, Hq a multiple of Hkv; query head h reads key head ``h // (Hq // Hkv)``.
        v: ``[B, Hkv, Sk, Dv]``.
        causal: ``False``; ``"top_left"`` (the same as ``True``, as in torch): query i stands at key i and
            sees the keys ``j <= i``; ``"bottom_right"``: the last query stands at the last key, query i at
            ``i + Sk - Sq``. Without a causal rule, windows and ALiBi count from the bottom right too.
        mask: bool, broadcastable to ``[B, Hq, Sq, Sk]``, True where the query may look.
        bias: added to the scores, q's dtype, broadcastable to ``[B, Hq, Sq, Sk]``; its gradient is summed
            where it was broadcast.
        scale: default ``1 / sqrt(D)``.
        window: ``(left, right)``, how many keys before and after its own place a query sees; None is
            unlimited. Under a causal rule right is 0.
        softcap: c > 0 bounds the products, ``c * tanh(x / c)`` (Gemma 2); 0 does not.
        alibi_slopes: ``[Hq]`` or ``[B, Hq]``; adds ``-slope * |place - j|`` (Press et al., 2022). Constant.
        sinks: ``[Hq]``, a logit for each head that takes part in the softmax's sum and has no value
            (gpt-oss); differentiable.
        dropout_p: probability in [0, 1) with which each weight is dropped; the others are divided by
            ``1 - dropout_p``. Always active if positive.
        seed, offset: what is dropped, a function of (seed, offset, head, query, key) alone and the same on
            every backend. Without a seed one is drawn from torch's default generator (the CPU's, so that
            nothing waits for a GPU; a captured CUDA graph drops the same in every replay).
        return_lse: also return the log-sum-exp of each row's scores.

    Returns:
        ``o [B, Hq, Sq, Dv]`` in q's dtype, stored as ``[B, Sq, Hq, Dv]``; with ``return_lse`` also
        ``lse [B, Hq, Sq]`` in fp32, differentiable. A row with nothing to attend to gives o = 0, lse = -inf
        (its sink, if it has one) and zero gradients. A NaN in a row of q, or in a key, makes NaN of the rows
        that see it and of no other, an infinity can; for a NaN in q torch's own kernel on a CPU gives 0.

    Saved for backward: the arguments, o and lse: nothing of size Sq x Sk. A kernel's backward can itself
    be differentiated, by way of plain torch operations and with all scores in memory. It is deterministic:
    each gradient has one owner, nothing is summed by atomics. Only Triton's sums dq by atomics, in another
    ``4 * B * Hq * Sq * D`` bytes, unless ``torch.use_deterministic_algorithms`` is on.

    Raises:
        TypeError: an argument is not a tensor, or its dtype does not fit.
        ValueError: shapes, devices, head counts, or any number do not fit; the message names the argument.

    Source: Dao et al., FlashAttention (2022); Milakov and Gimelshein, online softmax (2018).

    Example:
        >>> import torch, bigkern
        >>> q, k = torch.randn(2, 8, 16, 64), torch.randn(2, 2, 32, 64)
        >>> bigkern.attention(q, k, k, causal="bottom_right", window=(8, 0)).shape
        torch.Size([2, 8, 16, 64])
    """
    arguments = bind(
        q, k, v, causal=causal, mask=mask, bias=bias, scale=scale, window=window, softcap=softcap,
        alibi_slopes=alibi_slopes, sinks=sinks, dropout_p=dropout_p, seed=seed, offset=offset,
    )  # fmt: skip
    return run(arguments, return_lse)


def run(arguments: tuple[Any, ...], return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of arguments that :func:`bind` has made, by the backend that they resolve to."""
    backend = ATTENTION.resolve(*arguments)
    untraceable = arguments[8] is not None and torch.compiler.is_compiling()  # lengths that only data know
    if backend.name == "torch" and not return_lse and not untraceable:
        return stock(*arguments)
    arguments = with_drawn_key(arguments)
    q, k, v, mask, bias, slopes, sinks = arguments[:7]
    if in_functorch() or traced():
        call = reference.attention if backend.name == "torch" else _Transformed.apply
        o, lse = call(*arguments)
    elif not plain(q, k, v, mask, bias, slopes, sinks):
        o, lse = torch.ops.bigkern.attention(*arguments)
    elif torch.is_grad_enabled() and _any_requires_grad(q, k, v, bias, sinks):
        o, lse = _Attention.apply(backend, arguments, q, k, v, bias, sinks)
    else:
        o, lse = backend.forward(*arguments)
    return (o, lse) if return_lse else o


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


# ---- the op: fake, kernel, autograd ----------------------------------------------------------------


@torch.library.register_fake("bigkern::attention", lib=LIBRARY)
def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, Hq, Sq, _D = q.shape
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return _like_bshd(q, Hq, Sq, v.shape[3]), q.new_empty(B, Hq, Sq, dtype=lse_dtype)


@torch.library.register_fake("bigkern::attention_backward", lib=LIBRARY)
def _fake_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    bias_grad: bool,
    mask: Tensor | None,
    bias: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (_like_bshd(x, *x.shape[1:]) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(bias.shape if bias_grad and bias is not None else 0)


def _like_bshd(x: Tensor, H: int, S: int, D: int) -> Tensor:
    """An uninitialised ``[B, H, S, D]`` stored as ``[B, S, H, D]``: merging heads needs no copy."""
    return x.new_empty(x.shape[0], S, H, D).transpose(1, 2)


def _stored_bshd(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return cast(tuple[Tensor, Tensor], ATTENTION.resolve(*arguments).forward(*arguments))


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    _do, _dlse, q, k, v, _o, _lse, _bias_grad, *rules = arguments
    backward = cast(Any, ATTENTION.resolve(q, k, v, *rules).backward)
    return cast(tuple[Tensor, ...], backward(*arguments))


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("attention", _forward, _key)
    LIBRARY.impl("attention_backward", _backward, _key)

_TENSORS = 10  # the op's arguments begin with as many tensors ...
_DIFFERENTIABLE = (0, 1, 2, 4, 6)  # ... of which q, k, v, bias and sinks have gradients


def _save(ctx: Any, arguments: tuple[Any, ...], o: Tensor, lse: Tensor) -> None:
    ctx.save_for_backward(*arguments[:_TENSORS], o, lse)
    ctx.numbers = arguments[_TENSORS:]
    ctx.set_materialize_grads(False)


def _gradients(
    backward: Callable[..., tuple[Tensor, ...]],
    do: Tensor | None,
    dlse: Tensor | None,
    saved: tuple[Any, ...],
    numbers: tuple[Any, ...],
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Those of q, k, v, bias and sinks."""
    if do is None and dlse is None:
        return (None,) * len(_DIFFERENTIABLE)
    q, k, v, mask, bias, slopes, sinks, dropout, cu_q, cu_k, o, lse = saved
    do = torch.zeros_like(o) if do is None else do
    bias_grad, sinks_grad = needed[3:]
    rules = (mask, bias, slopes, sinks, dropout, cu_q, cu_k, *numbers)
    dq, dk, dv, dbias = backward(do, dlse, q, k, v, o, lse, bias_grad, *rules)
    dsinks = reference.sinks_gradient(do, dlse, o, lse, sinks) if sinks_grad else None
    return dq, dk, dv, dbias if bias_grad else None, dsinks


class _Attention(torch.autograd.Function):
    """Eager autograd straight onto the chosen backend: a fifth of the cost of a Python custom op.

    Autograd takes time for each argument, so it is given those that have gradients, and the others as one.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, backend: registry.Backend, arguments: tuple[Any, ...], *differentiable: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        o, lse = backend.forward(*arguments)
        ctx.backend = backend
        _save(ctx, arguments, o, lse)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return None, None, *_differentiable_gradients(do, dlse, saved[:_TENSORS], ctx.numbers, needed)
        return None, None, *_gradients(ctx.backend.backward, do, dlse, saved, ctx.numbers, needed)


def _differentiable_gradients(
    do: Tensor | None,
    dlse: Tensor | None,
    tensors: tuple[Any, ...],
    numbers: tuple[Any, ...],
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients asked for with ``create_graph``, by autograd through the reference."""
    results = reference.attention(*tensors, *numbers)
    asked = [(result, grad) for result, grad in zip(results, (do, dlse), strict=True) if grad is not None]
    if not asked:
        return (None,) * len(needed)
    inputs = [tensors[place] for place, need in zip(_DIFFERENTIABLE, needed, strict=True) if need]
    outputs, upstream = zip(*asked, strict=True)
    grads = iter(torch.autograd.grad(outputs, inputs, upstream, create_graph=True))
    return tuple(next(grads) if need else None for need in needed)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, *output)


def _autograd(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    needed = tuple(ctx.needs_input_grad[place] for place in _DIFFERENTIABLE)
    backward = torch.ops.bigkern.attention_backward
    grads = _gradients(backward, do, dlse, ctx.saved_tensors, ctx.numbers, needed)
    by_place = dict(zip(_DIFFERENTIABLE, grads, strict=True))
    return tuple(by_place.get(place) for place in range(len(ctx.needs_input_grad)))


torch.library.register_autograd("bigkern::attention", _autograd, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_vmap("bigkern::attention_backward", transforms.vmapped_backward, lib=LIBRARY)


class _Transformed(torch.autograd.Function):
    """The op as torch.func wants it."""

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_autograd)

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        o, lse = torch.ops.bigkern.attention(*arguments)
        return o, lse

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, ...]:
        return transforms.vmapped(_Transformed.apply, info, in_dims, *arguments)


# ---- backends --------------------------------------------------------------------------------------

ATTENTION = registry.declare("attention", bind)


def stock(q: Tensor, k: Tensor, v: Tensor, *rules: Any) -> Tensor:
    """The same attention by torch's own function, differentiable by torch's own autograd.

    Torch has no softcap and no sinks, and its dropout has no seed: those run on the reference.
    """
    parsed = Rules(*rules)
    if parsed.softcap or parsed.sinks is not None or parsed.dropout_key is not None:
        return reference.attention(*with_drawn_key((q, k, v, *rules)))[0]
    if parsed.cu_seqlens_q is None:
        return _stock(q, k, v, parsed)
    parts = [q[..., :0, :] @ v.new_empty(q.shape[3], v.shape[3])]
    for rows, keys, own in reference.sequences(parsed):
        parts.append(_stock(q[..., rows, :], k[..., keys, :], v[..., keys, :], own))
    return torch.cat(parts, dim=2)


def _stock(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> Tensor:
    corner = rules.causal == "top_left" or q.shape[2] == k.shape[2]
    is_causal = rules.causal != "none" and corner and rules.window_left < 0
    is_causal = is_causal and rules.mask is None and rules.bias is None and rules.alibi_slopes is None
    allowed = None if is_causal else _attn_mask(q, k, rules)
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}  # a branch: a bool, never a SymBool
    return F.scaled_dot_product_attention(
        q, k, v, allowed, rules.dropout_p, is_causal, scale=rules.scale, **grouped
    )


def _attn_mask(q: Tensor, k: Tensor, rules: Rules) -> Tensor | None:
    """Mask, window, bias and slopes as the one ``attn_mask`` that torch's function takes."""
    Sq, Sk = q.shape[2], k.shape[2]
    mask, bias = rules.mask, rules.bias
    seen = reference.visible(Sq, Sk, rules, q.device)
    if seen is not None:
        mask = seen if mask is None else mask & seen
    if rules.alibi_slopes is not None:
        slopes = reference.alibi(rules.alibi_slopes, Sq, Sk, rules.causal).to(q.dtype)
        bias = slopes if bias is None else bias + slopes
    if bias is None:
        return mask
    return bias if mask is None else bias.masked_fill(~mask, float("-inf"))


def _stock_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    o, lse = reference.attention(*arguments)
    return _stored_bshd(o), lse


def _stock_backward(*arguments: Any) -> tuple[Tensor, ...]:
    *grads, dbias = reference.attention_backward(*arguments)
    return *(_stored_bshd(grad) for grad in grads), dbias


def kernel_refuses(q: Tensor, v: Tensor) -> registry.Reason:
    """What no kernel of ours does to tensors, in whatever language and wherever they are."""
    if q.dtype not in KERNEL_DTYPES:
        return f"dtype {q.dtype} is not float32, bfloat16 or float16"
    if q.shape[3] > MAX_HEAD_DIM or v.shape[3] > MAX_HEAD_DIM:
        return f"head_dim {max(q.shape[3], v.shape[3])} > {MAX_HEAD_DIM}"
    return None


def _refuses(backend: str) -> Callable[..., registry.Reason]:
    def refuses(q: Tensor, k: Tensor, v: Tensor, *rules: Any) -> registry.Reason:
        return unavailable(backend, q) or kernel_refuses(q, v) or transforms.refuses(*rules)

    return refuses


def cuda_backend(native: Any, *, emulated: bool = False) -> registry.Backend:
    """The CUDA kernels in ``native``: the compiled ones, or, in the tests, those that the emulator runs."""
    refuses = _refuses("cpu" if emulated else "cuda")
    return registry.Backend(
        "cuda", native.attention, native.attention_backward, refuses, unproven("attention", "cuda")
    )


_native = torch.ops.bigkern_native

ATTENTION.register(cuda_backend(_native))
ATTENTION.register(
    registry.Backend(
        "triton",
        triton_kernel("attention", "attention"),
        triton_kernel("attention", "attention_backward"),
        _refuses("triton"),
        unproven("attention", "triton"),
    )
)
ATTENTION.register(registry.Backend("cpu", _native.attention, _native.attention_backward, _refuses("cpu")))
ATTENTION.register(registry.Backend("torch", _stock_forward, _stock_backward))
