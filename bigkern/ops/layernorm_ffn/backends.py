"""The feed-forward block's op: its declaration and its candidates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bigkern.core.library import (
    KERNEL_DTYPES,
    MAX_COLUMNS,
    UNMEASURED_PRODUCTS,
    autocast,
    declines_products,
    foreign,
    unavailable,
    unproven,
)
from bigkern.core.op import Autograd, Measures, Op, native
from bigkern.core.registry import Backend, Reason
from bigkern.ops.layernorm_ffn import reference, stock
from bigkern.ops.layernorm_ffn.call import (
    OPERANDS,
    Gradients,
    LayernormFfn,
    LayernormFfnBackward,
    Result,
    bind,
    draw,
    options,
    sizes,
)
from bigkern.ops.layernorm_ffn.pieces import block_of, native_pieces, triton_library_pieces, triton_pieces

LAYERNORM_FFN = Op(
    "layernorm_ffn",
    LayernormFfn,
    Result,
    bind=bind,
    reference=Backend("reference", reference.layernorm_ffn, reference.layernorm_ffn_backward),
    draw=draw,
    remembers=OPERANDS,
    measures=Measures(sizes, options),
    autograd=Autograd(
        LayernormFfnBackward,
        Gradients,
        forward_of=LayernormFfnBackward.forward,
        contiguous=True,  # transposed weights have transposed gradients
    ),
)


# ---- candidates ------------------------------------------------------------------------------------


def summing(candidate: Backend, w1_sum: Tensor, w2_sum: Tensor) -> Backend:
    """The candidate, whose backward adds the weights' gradients to sums."""
    if candidate.by_torch:
        return Backend(candidate.name, partial(stock.layernorm_ffn, sums=(w1_sum, w2_sum)), by_torch=True)

    def backward(call: LayernormFfnBackward) -> Any:
        call.w1_sum, call.w2_sum = w1_sum, w2_sum
        return candidate.backward(call)  # type: ignore[misc]

    return Backend(candidate.name, candidate.forward, backward)


def _refuses(backend: str) -> Callable[[LayernormFfn], Reason]:
    def refuses(call: LayernormFfn) -> Reason:
        x, w1 = call.x, call.w1
        if (reason := foreign(x, w1) or unavailable(backend, x)) is not None:
            return reason
        if x.dtype not in KERNEL_DTYPES:
            return f"dtype {x.dtype} is not float32, bfloat16 or float16"
        if x.numel() == 0 or w1.numel() == 0:
            return "x or the weights are empty"
        if not backend.startswith("cpu") and x.shape[-1] > MAX_COLUMNS:
            return f"rows of {x.shape[-1]} > {MAX_COLUMNS} elements"
        return autocast(x)

    return refuses


def cuda_backend(native: Any, *, emulated: bool = False) -> Backend:
    """The CUDA kernels in ``native``: the compiled ones, or, in the tests, those that the emulator runs."""
    refuses = _refuses("cpu" if emulated else "cuda")
    return Backend("cuda", *block_of(native_pieces(native)), refuses, unproven("layernorm_ffn", "cuda"))


LAYERNORM_FFN.register(cuda_backend(torch.ops.bigkern_native))
for name, pieces in (("triton", triton_pieces()), ("triton_library", triton_library_pieces())):
    LAYERNORM_FFN.register(
        Backend(name, *block_of(pieces), _refuses("triton"), unproven("layernorm_ffn", name))
    )
LAYERNORM_FFN.register(
    Backend(
        "cpu",
        native("layernorm_ffn"),
        native("layernorm_ffn_backward"),
        _refuses("cpu"),
        declines=declines_products,
    )
)
LAYERNORM_FFN.register(
    Backend(
        "cpu_library",
        *block_of(native_pieces(torch.ops.bigkern_native)),
        _refuses("cpu_library"),
        declines=lambda call: UNMEASURED_PRODUCTS,
    )
)
LAYERNORM_FFN.register(Backend("torch", stock.layernorm_ffn, by_torch=True))
