"""The batch_norm op: its declaration and its candidates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigkern.core.library import KERNEL_DTYPES, triton_kernel, unavailable, unproven
from bigkern.core.op import Autograd, Call, Measures, Op
from bigkern.core.registry import Backend, Reason
from bigkern.ops.batch_norm import reference, stock
from bigkern.ops.batch_norm.call import BatchNorm, BatchNormBackward, Gradients, Result, bind, options, sizes

# ---- gradients and fakes ---------------------------------------------------------------------------


def _kept(call: BatchNorm, result: Result) -> tuple[Tensor | None, ...]:
    """For a ReLU bias, from which its sign is computed again, or with a residual y."""
    y, bias = (None, call.bias) if call.residual is None else (result.y, None)
    if not call.relu:
        y, bias = None, None
    mean, var = (result.mean, result.var) if call.training else (call.mean, call.var)
    return call.x, y, call.weight, bias, mean, var


def _gradients(run: Any, call: BatchNormBackward, needed: Any) -> tuple[Tensor | None, ...]:
    """Of x, residual, weight and bias."""
    dx, dresidual, dweight, dbias = run(call)
    return dx, dresidual if call.relu or not needed[1] else call.dy, dweight, dbias


def _fake(call: BatchNorm) -> Result:
    x = call.x
    if call.mean is not None:
        return Result(torch.empty_like(x), None, None)
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, var = (x.new_empty(x.shape[1], dtype=dtype) for _ in range(2))
    return Result(torch.empty_like(x), mean, var)


def _fake_backward(call: BatchNormBackward) -> Gradients:
    x = call.x
    like = next((t for t in (call.weight, call.bias) if t is not None), x)
    return Gradients(
        torch.empty_like(x),
        torch.empty_like(x) if call.relu and call.want_residual else None,
        like.new_empty(x.shape[1]) if call.want_weight else None,
        like.new_empty(x.shape[1]) if call.want_bias else None,
    )


BATCH_NORM = Op(
    "batch_norm",
    BatchNorm,
    Result,
    bind=bind,
    fake=_fake,
    reference=Backend("reference", reference.batch_norm, reference.batch_norm_backward),
    outputs=3,
    autograd=Autograd(
        BatchNormBackward,
        Gradients,
        gradients=_gradients,
        kept=_kept,
        fake=_fake_backward,
        differentiable=1,
    ),
    compiled=False,
    measures=Measures(sizes, options),
)


# ---- candidates ------------------------------------------------------------------------------------


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel lie side by side, pixel after pixel; true of ``[N, C]`` too."""
    return x.movedim(1, -1).is_contiguous()


def _triton_refuses(call: BatchNorm) -> Reason:
    x, residual = call.x, call.residual
    if (reason := unavailable("triton", x)) is not None:
        return reason
    if x.dtype not in KERNEL_DTYPES:
        return f"dtype {x.dtype} is not float32, bfloat16 or float16"
    channels = {"weight": call.weight, "bias": call.bias, "running_mean": call.mean, "running_var": call.var}
    for name, tensor in channels.items():
        if tensor is not None and tensor.dtype not in (x.dtype, torch.float32):
            return f"{name} has dtype {tensor.dtype}, x has {x.dtype}"
    if residual is not None and residual.dtype != x.dtype:
        return f"residual has dtype {residual.dtype}, x has {x.dtype}"
    if x.numel() == 0:
        return "x is empty"
    return None if is_channels_last(x) else "x is not channels_last"


def _cpu_refuses(call: BatchNorm) -> Reason:
    return unavailable("cpu", call.x) or "no CPU kernel: BatchNorm on a CPU is stock's"


def _triton(name: str, fields: type[Call]) -> Any:
    """By the op's own fields: a public call has more."""
    kernel = triton_kernel("batch_norm", name)
    return lambda call: kernel(*fields.flat(call))


BATCH_NORM.register(
    Backend(
        "triton",
        _triton("batch_norm", BatchNorm),
        _triton("batch_norm_backward", BatchNormBackward),
        _triton_refuses,
        unproven("batch_norm", "triton"),
    )
)
BATCH_NORM.register(Backend("cpu", reference.batch_norm, None, _cpu_refuses))
BATCH_NORM.register(Backend("torch", stock.batch_norm, by_torch=True))
