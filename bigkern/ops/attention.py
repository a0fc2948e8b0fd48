"""Scaled dot product attention: schema, fake, autograd, backends and the public functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern import registry
from bigkern.ops._library import (
    KERNEL_DTYPES,
    LIBRARY,
    define,
    in_functorch,
    plain,
    triton_kernel,
    unavailable,
    unproven,
)
from bigkern.reference import attention as reference

MAX_HEAD_DIM = 256

define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, float scale, str causal)"
    " -> (Tensor o, Tensor lse)"
)
define(
    "attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? mask,"
    " Tensor? bias, float scale, str causal) -> (Tensor dq, Tensor dk, Tensor dv)"
)

Causal = Literal[False, True, "none", "top_left", "bottom_right"]
_CAUSAL = {
    False: "none",
    True: "top_left",
    "none": "none",
    "top_left": "top_left",
    "bottom_right": "bottom_right",
}


# ---- the public functions --------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: Causal = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention, computed tile by tile without ever storing the score matrix.

    ``o = softmax(scale * q @ k^T + bias, masked) @ v``

    Args:
        q: ``[B, Hq, Sq, D]``; float32, bfloat16 or float16 (float64 runs on stock PyTorch). Any
            strides: views of ``[B, S, H, D]`` tensors cost no copy.
        k: ``[B, Hkv, Sk, D]``, Hq a multiple of Hkv; query head h reads key head ``h // (Hq // Hkv)``.
        v: ``[B, Hkv, Sk, Dv]``.
        causal: ``False``; ``"top_left"`` (the same as ``True``, as in torch): query i sees keys
            ``j <= i``; ``"bottom_right"``: query i sees keys ``j <= i + Sk - Sq``.
        mask: bool, broadcastable to ``[B, Hq, Sq, Sk]``, True where the query may look.
        bias: added to the scaled scores, q's dtype, broadcastable to ``[B, Hq, Sq, Sk]``.
        scale: default ``1 / sqrt(D)``.
        return_lse: also return the log-sum-exp of each row's scores.

    Returns:
        ``o [B, Hq, Sq, Dv]`` in q's dtype, stored as ``[B, Sq, Hq, Dv]``; with ``return_lse`` also
        ``lse [B, Hq, Sq]`` in fp32, not differentiable. A row with nothing to attend to gives o = 0,
        lse = -inf and zero gradients.

    Saved for backward: q, k, v, mask, bias, o and lse: nothing of size Sq x Sk.

    Raises:
        TypeError: an argument is not a tensor, or its dtype does not fit.
        ValueError: shapes, devices, head counts, mask, bias, scale or causal do not fit.

    Source: Dao et al., FlashAttention (2022); Milakov and Gimelshein, online softmax (2018).

    Example:
        >>> import torch, bigkern
        >>> q, k = torch.randn(2, 8, 16, 64), torch.randn(2, 2, 32, 64)
        >>> bigkern.attention(q, k, k, causal="bottom_right").shape
        torch.Size([2, 8, 16, 64])
    """
    arguments = bind(q, k, v, causal=causal, mask=mask, bias=bias, scale=scale)
    backend = ATTENTION.resolve(*arguments)
    if backend.name == "torch" and not return_lse:
        return stock(*arguments)
    if not plain(q, k, v, mask, bias):
        o, lse = torch.ops.bigkern.attention(*arguments)
    elif torch.is_grad_enabled() and _any_requires_grad(q, k, v, bias):
        o, lse = _Attention.apply(backend, *arguments)
    else:
        o, lse = backend.forward(*arguments)
    return (o, lse) if return_lse else o


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention` with bigkern's kernels behind it.

    The same signature and meaning. What the kernels do not cover goes to torch's own function:
    dropout, and tensors that are not four-dimensional ``[B, H, S, D]``.

    Raises:
        TypeError, ValueError: as :func:`bigkern.attention`; RuntimeError: as torch's function.

    Source: :func:`torch.nn.functional.scaled_dot_product_attention`.

    Example:
        >>> import torch, bigkern
        >>> q = torch.randn(1, 8, 128, 64)
        >>> bigkern.scaled_dot_product_attention(q, q, q, is_causal=True).shape
        torch.Size([1, 8, 128, 64])
    """
    grouped = enable_gqa or (query.dim() == 4 and key.dim() == 4 and query.shape[1] == key.shape[1])
    both_masks = attn_mask is not None and is_causal
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        query, key, value, attn_mask = _autocast(torch.get_autocast_dtype(kind), query, key, value, attn_mask)
    if dropout_p != 0.0 or query.dim() != 4 or not grouped or both_masks:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    boolean = attn_mask is not None and attn_mask.dtype == torch.bool
    mask, bias = (attn_mask, None) if boolean else (None, attn_mask)
    return cast(Tensor, attention(query, key, value, causal=is_causal, mask=mask, bias=bias, scale=scale))


def _autocast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Any, ...]:
    """As torch's autocast does for its own attention: floating point, but not float64, becomes ``dtype``."""
    narrowed = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(t.to(dtype) if t is not None and t.dtype in narrowed else t for t in tensors)


# ---- checks ----------------------------------------------------------------------------------------


def bind(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: Causal = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> tuple[Any, ...]:
    """Check a public call and turn it into the op's arguments ``(q, k, v, mask, bias, scale, causal)``."""
    _check_tensors(q, k, v)
    B, Hq, _Sq, D = q.shape
    Bk, Hkv, Sk, Dk = k.shape
    Bv, Hv, Sv, _Dv = v.shape
    if Bk != B or Dk != D:
        raise ValueError(f"k must be [{B}, Hkv, Sk, {D}] to match q {tuple(q.shape)}, not {tuple(k.shape)}")
    if Bv != Bk or Hv != Hkv or Sv != Sk:
        raise ValueError(f"v must be [{Bk}, {Hkv}, {Sk}, Dv] to match k, not {tuple(v.shape)}")
    if Hkv == 0 or Hq % Hkv != 0:
        raise ValueError(f"q's head count {Hq} must be a multiple of k's and v's, {Hkv}")
    if D == 0:
        raise ValueError("q's head dimension must not be 0")
    if scale is None:
        scale = 1.0 / math.sqrt(D)
    elif not math.isfinite(scale):
        raise ValueError(f"scale must be finite, not {scale}")
    if not isinstance(causal, bool | str) or causal not in _CAUSAL:
        raise ValueError(f'causal must be False, True, "top_left" or "bottom_right", not {causal!r}')
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool Tensor, not {kind}; an additive mask goes into bias")
        mask = _expand("mask", mask, q, Sk)
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.dtype != q.dtype:
            kind = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
            raise TypeError(f"bias must be a Tensor of q's dtype {q.dtype}, not {kind}")
        bias = _expand("bias", bias, q, Sk)
    return q, k, v, mask, bias, float(scale), _CAUSAL[causal]


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, not {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions [B, H, S, D], not shape {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, not {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, not {tensor.device}")
    if not q.is_floating_point():
        raise TypeError(f"q must be floating point, not {q.dtype}")


def _expand(name: str, tensor: Tensor, q: Tensor, Sk: int) -> Tensor:
    shape = (*q.shape[:3], Sk)
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, not {tensor.device}")
    matches = all(
        have in (1, want) for have, want in zip(reversed(tensor.shape), reversed(shape), strict=False)
    )
    if tensor.dim() > 4 or not matches:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} does not broadcast to [B, Hq, Sq, Sk] = {list(shape)}"
        )
    return tensor.expand(shape)


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


# ---- the op: fake, kernel, autograd ----------------------------------------------------------------


@torch.library.register_fake("bigkern::attention", lib=LIBRARY)
def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, Hq, Sq, _D = q.shape
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return _like_bshd(q, Hq, Sq, v.shape[3]), q.new_empty(B, Hq, Sq, dtype=lse_dtype)


@torch.library.register_fake("bigkern::attention_backward", lib=LIBRARY)
def _fake_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (_like_bshd(x, *x.shape[1:]) for x in (q, k, v))
    return dq, dk, dv


def _like_bshd(x: Tensor, H: int, S: int, D: int) -> Tensor:
    """An uninitialised ``[B, H, S, D]`` stored as ``[B, S, H, D]``: merging heads needs no copy."""
    return x.new_empty(x.shape[0], S, H, D).transpose(1, 2)


def _stored_bshd(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return cast(tuple[Tensor, Tensor], ATTENTION.resolve(*arguments).forward(*arguments))


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    backward = cast(Any, ATTENTION.resolve(q, k, v, *options).backward)
    return cast(tuple[Tensor, ...], backward(do, q, k, v, o, lse, *options))


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("attention", _forward, _key)
    LIBRARY.impl("attention_backward", _backward, _key)


class _Attention(torch.autograd.Function):
    """Eager autograd straight onto the chosen backend: a fifth of the cost of a Python custom op."""

    @staticmethod
    def forward(ctx: Any, backend: registry.Backend, *arguments: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        o, lse = backend.forward(*arguments)
        q, k, v, mask, bias, ctx.scale, ctx.causal = arguments
        ctx.backend = backend
        ctx.save_for_backward(q, k, v, o, lse, mask, bias)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, _dlse: None) -> tuple[Any, ...]:  # type: ignore[override]
        if do is None:
            return (None,) * 8
        q, k, v, o, lse, mask, bias = ctx.saved_tensors
        options = (mask, bias, ctx.scale, ctx.causal)
        twice = torch.is_grad_enabled()
        with torch.no_grad():
            if ctx.needs_input_grad[5]:
                grads = reference.attention_backward(do, q, k, v, o, lse, *options, bias_grad=True)
            else:
                grads = (*ctx.backend.backward(do, q, k, v, o, lse, *options), None)
        dq, dk, dv, dbias = _not_again(*grads) if twice else grads
        return None, dq, dk, dv, None, dbias, None, None


def _not_again(*grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients asked for with ``create_graph``: differentiating them once more raises, it is not ignored."""
    message = b"bigkern.attention has no second derivative; run it with bigkern.use('torch')"
    refuse = cast(Any, torch._C._functions.DelayedError(message, len(grads)))
    return tuple(refuse(*(None if x is None else x.detach().requires_grad_() for x in grads)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, bias, ctx.scale, ctx.causal = inputs
    o, lse = output
    ctx.save_for_backward(q, k, v, o, lse, mask, bias)
    ctx.mark_non_differentiable(lse)


def _autograd(ctx: Any, do: Tensor, _dlse: Tensor) -> tuple[Any, ...]:
    q, k, v, o, lse, mask, bias = ctx.saved_tensors
    options = (mask, bias, ctx.scale, ctx.causal)
    if ctx.needs_input_grad[4]:
        dq, dk, dv, dbias = reference.attention_backward(do, q, k, v, o, lse, *options, bias_grad=True)
        return dq, dk, dv, None, dbias, None, None
    return *torch.ops.bigkern.attention_backward(do, q, k, v, o, lse, *options), None, None, None, None


torch.library.register_autograd("bigkern::attention", _autograd, setup_context=_setup_context, lib=LIBRARY)


# ---- backends --------------------------------------------------------------------------------------

ATTENTION = registry.declare("attention", bind)


def stock(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, causal: str
) -> Tensor:
    """The same attention by torch's own function, differentiable by torch's own autograd."""
    square = causal == "top_left" or (causal == "bottom_right" and q.shape[2] == k.shape[2])
    if mask is None and bias is None and (causal == "none" or square):
        allowed, is_causal = None, causal != "none"
    else:
        allowed, is_causal = _additive(q, k, mask, bias, causal), False
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}  # a branch: a bool, never a SymBool
    return F.scaled_dot_product_attention(q, k, v, allowed, is_causal=is_causal, scale=scale, **grouped)


def _additive(q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, causal: str) -> Tensor:
    """Mask, bias and causal rule as the one ``attn_mask`` that torch's function takes."""
    if causal != "none":
        triangle = reference.causal_mask(q.shape[2], k.shape[2], causal, q.device)
        mask = triangle if mask is None else mask & triangle
    if bias is None:
        return cast(Tensor, mask)
    return bias if mask is None else bias.masked_fill(~mask, float("-inf"))


def _stock_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    o, lse = reference.attention(*arguments)
    return _stored_bshd(o), lse


def _stock_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_stored_bshd(grad) for grad in reference.attention_backward(*arguments)[:3])


def kernel_refuses(q: Tensor, v: Tensor, bias: Tensor | None) -> registry.Reason:
    """What no kernel of ours does yet, in whatever language and wherever the tensors are."""
    if q.dtype not in KERNEL_DTYPES:
        return f"dtype {q.dtype} is not float32, bfloat16 or float16"
    if q.shape[3] > MAX_HEAD_DIM or v.shape[3] > MAX_HEAD_DIM:
        return f"head_dim {max(q.shape[3], v.shape[3])} > {MAX_HEAD_DIM}"
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return "bias requires a gradient, which no kernel computes yet"
    if in_functorch():
        return "inside a torch.func transform, which cannot look into a kernel"
    return None


def _refuses(backend: str) -> Callable[..., registry.Reason]:
    def refuses(q: Tensor, k: Tensor, v: Tensor, mask: Any, bias: Any, *_: Any) -> registry.Reason:
        return unavailable(backend, q) or kernel_refuses(q, v, bias)

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
