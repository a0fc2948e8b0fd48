"""The adam op: its declaration and its candidates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from bigkern.core.library import KERNEL_DTYPES, lazily_negated, triton_kernel, unavailable, unproven
from bigkern.core.op import Measures, Op, native, of_fields
from bigkern.core.registry import Backend, Reason
from bigkern.ops.adam import stock
from bigkern.ops.adam.call import Adam, Lists, bind, options, sizes
from bigkern.ops.adam.layout import dense, same_layout

ADAM = Op("adam", Adam, None, bind=bind, fake=lambda call: None, measures=Measures(sizes, options))


def kernel_refuses(backend: str, call: Adam) -> Reason:
    """What no kernel of ours does, in whatever language."""
    if not call.params:
        return None
    first = call.params[0]
    if (reason := unavailable(backend, first)) is not None:
        return reason
    if first.dtype not in KERNEL_DTYPES:
        return f"dtype {first.dtype} is not float32, bfloat16 or float16"
    for name in Lists.names:
        tensors, like_params = getattr(call, name), not name.endswith(("steps", "scales"))
        for p, x in zip(call.params, tensors, strict=False):
            if type(x) is not Tensor and type(x) is not Parameter:
                return f"a tensor is a {type(x).__name__}"
            if x.device != first.device:
                return f"tensors are on {first.device} and on {x.device}"
            if x.dtype != (first.dtype if name == "grads" else tensors[0].dtype):
                return f"{name} are {tensors[0].dtype} and {x.dtype}"
            if x.layout != torch.strided:
                return f"a tensor's layout is {x.layout}"
            if like_params and not (dense(x) if x is p else same_layout(p, x)):
                return f"strides {x.stride()} are not dense, or not the parameter's {p.stride()}"
            if lazily_negated(x):
                return f"{name} are lazily negated"
    for step in call.state_steps:
        if step.dtype != torch.float32:
            return f"a step is {step.dtype}, not float32"
    return None


def _in_place(update: Callable[[Adam], Any]) -> Callable[[Adam], None]:
    """``update``, after which autograd knows that the parameters changed, as after any in-place op."""

    def forward(call: Adam) -> None:
        if call.params:  # no kernel is found for none: it has no device
            update(call)
            torch.autograd.graph.increment_version(call.params)

    return forward


def cuda_backend(kernels: Any, *, emulated: bool = False) -> Backend:
    """The CUDA kernels in ``kernels``: the compiled ones, or, in the tests, those that the emulator runs."""
    refuses = partial(kernel_refuses, "cpu" if emulated else "cuda")
    return Backend("cuda", _in_place(native("adam", kernels)), None, refuses, unproven("adam", "cuda"))


_by_triton = _in_place(of_fields(triton_kernel("adam", "adam")))

ADAM.register(cuda_backend(torch.ops.bigkern_native))
ADAM.register(
    Backend("triton", _by_triton, None, partial(kernel_refuses, "triton"), unproven("adam", "triton"))
)
ADAM.register(Backend("cpu", _in_place(native("adam")), refuses=partial(kernel_refuses, "cpu")))
ADAM.register(Backend("torch", _in_place(stock.adam)))
