"""The attention op: its declaration, the ways a call runs, and its candidates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bigkern.core.library import (
    KERNEL_DTYPES,
    LIBRARY,
    SLOW_PRODUCTS,
    in_functorch,
    traced,
    triton_kernel,
    unavailable,
    unproven,
)
from bigkern.core.op import Autograd, Measures, Op, native, of_fields
from bigkern.core.registry import Backend, Reason
from bigkern.ops.attention import reference, stock, stock_kernels, transforms
from bigkern.ops.attention.call import (
    Attention,
    AttentionBackward,
    Gradients,
    Result,
    bind,
    draw,
    options,
    sizes,
)

MAX_HEAD_DIM = 256
FASTER_FROM = 32  # tokens, on a CPU


# ---- gradients and fakes ---------------------------------------------------------------------------


def _gradients(run: Any, call: AttentionBackward, needed: Any) -> tuple[Tensor | None, ...]:
    """Of q, k, v, bias and sinks."""
    call.do = torch.zeros_like(call.o) if call.do is None else call.do
    dq, dk, dv, dbias = run(call)
    *_, bias, sinks = needed
    return dq, dk, dv, dbias if bias else None, reference.sinks_gradient(call) if sinks else None


def _twice(call: AttentionBackward, needed: Any) -> tuple[Tensor | None, ...]:
    """The same by autograd through the reference."""
    results = zip(reference.attention(Attention(*Attention.flat(call))), (call.do, call.dlse), strict=True)
    outputs, upstream = zip(*((result, grad) for result, grad in results if grad is not None), strict=True)
    inputs = [getattr(call, name) for name, need in zip(DIFFERENTIABLE, needed, strict=True) if need]
    found = iter(torch.autograd.grad(outputs, inputs, upstream, create_graph=True))
    return tuple(next(found) if need else None for need in needed)


def fake(q: Tensor, v: Tensor) -> Result:
    """o and lse, uninitialised, for these queries and values."""
    B, Hq, Sq, _D = q.shape
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return Result(_like_bshd(q, Hq, Sq, v.shape[3]), q.new_empty(B, Hq, Sq, dtype=lse_dtype))


def _fake_backward(call: AttentionBackward) -> Gradients:
    dq, dk, dv = (_like_bshd(x, *x.shape[1:]) for x in (call.q, call.k, call.v))
    bias = call.bias if call.want_bias else None
    return Gradients(dq, dk, dv, call.q.new_empty(0 if bias is None else bias.shape))


def _like_bshd(x: Tensor, H: int, S: int, D: int) -> Tensor:
    """An uninitialised ``[B, H, S, D]`` stored as ``[B, S, H, D]``: merging heads needs no copy."""
    return x.new_empty(x.shape[0], S, H, D).transpose(1, 2)


DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")

ATTENTION = Op(
    "attention",
    Attention,
    Result,
    bind=bind,
    fake=lambda call: fake(call.q, call.v),
    reference=Backend("reference", reference.attention, reference.attention_backward),
    outputs=2,
    draw=draw,
    remembers=("q", "k", "v"),
    measures=Measures(sizes, options),
    autograd=Autograd(
        AttentionBackward,
        Gradients,
        gradients=_gradients,
        of=DIFFERENTIABLE,
        twice=_twice,
        fake=_fake_backward,
    ),
)


# ---- the ways a call runs --------------------------------------------------------------------------


def run(
    candidate: Backend, call: Attention, needs_grad: bool | None, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by the candidate; by the reference where torch's has no way."""
    untraceable = call.cu_seqlens_q is not None and torch.compiler.is_compiling()  # only data know lengths
    if candidate.by_torch and not return_lse and not untraceable:
        return candidate.forward(call)  # type: ignore[no-any-return]
    if needs_grad is None and (in_functorch() or traced()):
        draw(call)
        o, lse = reference.attention(call) if candidate.by_torch else _Transformed.apply(*call.flat())
    else:
        o, lse = ATTENTION.run(ATTENTION.reference if candidate.by_torch else candidate, call, needs_grad)
    return (o, lse) if return_lse else o


class _Transformed(torch.autograd.Function):
    """The op as torch.func wants it."""

    setup_context = staticmethod(ATTENTION.gradient.set_up_graph)
    backward = staticmethod(ATTENTION.gradient.in_a_graph)

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return ATTENTION.node(*arguments)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, ...]:
        return transforms.vmapped(_Transformed.apply, info, in_dims, *arguments)


torch.library.register_vmap("bigkern::attention_backward", transforms.vmapped_backward, lib=LIBRARY)


# ---- candidates ------------------------------------------------------------------------------------


def kernel_refuses(q: Tensor, v: Tensor) -> Reason:
    """What no kernel of ours does to tensors, in whatever language and wherever they are."""
    if q.dtype not in KERNEL_DTYPES:
        return f"dtype {q.dtype} is not float32, bfloat16 or float16"
    if q.shape[3] > MAX_HEAD_DIM or v.shape[3] > MAX_HEAD_DIM:
        return f"head_dim {max(q.shape[3], v.shape[3])} > {MAX_HEAD_DIM}"
    return None


def _refuses(backend: str) -> Callable[[Attention], Reason]:
    def refuses(call: Attention) -> Reason:
        return unavailable(backend, call.q) or kernel_refuses(call.q, call.v) or transforms.refuses(call)

    return refuses


def _cpu_declines(call: Attention) -> Reason:
    """Stock loses where it computes what no query sees, or is not one kernel; and wins where the call itself
    takes the time, of a few tokens."""
    words = set(options(call))
    slow_backward = call.q.dtype in SLOW_PRODUCTS and ATTENTION.needs_grad(ATTENTION.tensors(call))
    if words <= {"masked", "bias", "wide"} and ("bias" in words or not slow_backward):
        return "not measured here: stock is as fast where every query sees all keys, or a mask says which"
    if torch.compiler.is_compiling() or not words <= {"causal", "grouped", "wide"}:
        return None  # no graph is bound to few tokens
    if max(call.q.shape[2], call.k.shape[2]) >= FASTER_FROM:
        return None
    return f"not measured here: stock is faster below {FASTER_FROM} tokens"


def cuda_backend(namespace: Any, *, emulated: bool = False) -> Backend:
    """The CUDA kernels in ``namespace``: the compiled ones, or, in tests, those that the emulator runs."""
    kernels = native("attention", namespace), native("attention_backward", namespace)
    return Backend("cuda", *kernels, _refuses("cpu" if emulated else "cuda"), unproven("attention", "cuda"))


ATTENTION.register(cuda_backend(torch.ops.bigkern_native))
ATTENTION.register(
    Backend(
        "triton",
        of_fields(triton_kernel("attention", "attention")),
        of_fields(triton_kernel("attention", "attention_backward")),
        _refuses("triton"),
        unproven("attention", "triton"),
    )
)
ATTENTION.register(
    Backend(
        "cpu",
        native("attention"),
        native("attention_backward"),
        _refuses("cpu"),
        declines=_cpu_declines,
    )
)
ATTENTION.register(Backend("torch", stock.attention, by_torch=True))
if torch.backends.cuda.is_built():
    for name in stock_kernels.KERNELS:
        ATTENTION.register(stock_kernels.backend(name))
