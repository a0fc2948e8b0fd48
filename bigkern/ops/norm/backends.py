"""The norm op: its declaration and its candidates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bigkern.core.dropout import OUTPUT, drawn_key, dropped
from bigkern.core.library import (
    KERNEL_DTYPES,
    MAX_COLUMNS,
    autocast,
    foreign,
    triton_kernel,
    unavailable,
    unproven,
)
from bigkern.core.op import Autograd, Measures, Op, native
from bigkern.core.registry import Backend, Reason
from bigkern.ops.norm import reference, stock
from bigkern.ops.norm.call import Gradients, Norm, NormBackward, Result, bind, options, sizes

# ---- gradients ---------------------------------------------------------------------------


def _kept(call: Norm, result: Result) -> tuple[Tensor | None, ...]:
    s = call.x if result.sum is None else result.sum
    return s, call.weight, result.mean, result.rstd, call.dropout_key


def _gradients(run: Any, call: NormBackward, needed: Any) -> tuple[Tensor | None, ...]:
    """Of x, residual, weight and bias."""
    if call.dy is None:  # only the sum was used
        return dropped(call.dsum, call.dropout_key, call.dropout_p, OUTPUT), call.dsum, None, None
    ds, dx, dweight, dbias = run(call)
    return ds if dx is None else dx, ds if needed[1] else None, dweight, dbias


def _draw(call: Norm) -> None:
    if call.dropout_p > 0.0 and call.dropout_key is None:
        call.dropout_key = drawn_key()


def _on_rows(norm: Callable[..., Any], norm_backward: Callable[..., Any]) -> tuple[Any, Any]:
    """The op's two functions from kernels that know only ``[M, N]``."""

    def rows(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])

    def forward(call: Norm) -> Result:
        x, residual = rows(call.x), rows(call.residual)
        drop = call.dropout_p, call.dropout_key
        result = Result(*norm(x, residual, call.weight, call.bias, call.eps, call.kind, *drop))
        total = None if result.sum is None else result.sum.view(call.x.shape)
        return result._replace(y=result.y.view(call.x.shape), sum=total)

    def backward(call: NormBackward) -> Gradients:
        dy, dsum, s = rows(call.dy), rows(call.dsum), rows(call.s)
        wanted, drop = (call.want_weight, call.want_bias), (call.dropout_p, call.dropout_key)
        statistics = call.mean, call.rstd
        found = Gradients(*norm_backward(dy, dsum, s, call.weight, *statistics, call.kind, *wanted, *drop))
        dx = None if found.dx is None else found.dx.view(call.s.shape)
        return found._replace(ds=found.ds.view(call.s.shape), dx=dx)

    return forward, backward


NORM = Op(
    "norm",
    Norm,
    Result,
    bind=bind,
    reference=Backend("reference", *_on_rows(reference.norm, reference.norm_backward)),
    outputs=2,
    measures=Measures(sizes, options),
    autograd=Autograd(
        NormBackward,
        Gradients,
        gradients=_gradients,
        of=("x", "residual", "weight", "bias"),
        kept=_kept,
        forward_of=lambda call: Norm(call.s, None, call.weight, None, 0.0, call.kind, 0.0, None),
    ),
    draw=_draw,
    remembers=("x", "weight", "bias", "residual"),
)


# ---- candidates ------------------------------------------------------------------------------------

# Elements of RMSNorm without a gradient from which ours was faster on all machines; with one it always was.
FASTER_FROM = 1 << 15


def _refuses(backend: str) -> Callable[[Norm], Reason]:
    def refuses(call: Norm) -> Reason:
        x, weight, bias = call.x, call.weight, call.bias
        reason = foreign(x, call.residual, weight, bias) or unavailable(backend, x)
        if reason is not None:
            return reason
        if x.dtype not in KERNEL_DTYPES:
            return f"dtype {x.dtype} is not float32, bfloat16 or float16"
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.dtype != x.dtype:
                return f"{name} has dtype {tensor.dtype}, x has {x.dtype}"
        if x.shape[-1] == 0:
            return "rows are empty"
        if backend != "cpu" and x.shape[-1] > MAX_COLUMNS:
            return f"rows of {x.shape[-1]} > {MAX_COLUMNS} elements"
        return autocast(x)

    return refuses


def _cpu_declines(call: Norm) -> Reason:
    if call.kind == "layer":
        return "not measured here: stock's LayerNorm is one pass as well"
    if NORM.needs_grad(NORM.tensors(call)) or call.x.numel() >= FASTER_FROM:
        return None
    return f"not measured here: stock is faster below {FASTER_FROM} elements where no gradient is wanted"


def cuda_backend(namespace: Any, *, emulated: bool = False) -> Backend:
    """The CUDA kernels in a namespace: the compiled ones, or, in the tests, those that the emulator runs."""
    kernels = native("norm", namespace), native("norm_backward", namespace)
    return Backend("cuda", *kernels, _refuses("cpu" if emulated else "cuda"), unproven("norm", "cuda"))


NORM.register(cuda_backend(torch.ops.bigkern_native))
NORM.register(
    Backend(
        "triton",
        *_on_rows(triton_kernel("norm", "norm"), triton_kernel("layernorm_ffn", "norm_backward")),
        _refuses("triton"),
        unproven("norm", "triton"),
    )
)
NORM.register(
    Backend("cpu", native("norm"), native("norm_backward"), _refuses("cpu"), declines=_cpu_declines)
)
NORM.register(Backend("torch", stock.norm, by_torch=True))
