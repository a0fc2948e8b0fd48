"""The linear op: its declaration and its candidates.

A product and nothing around it is what stock libraries do best, on a GPU above all. On some CPUs there are
sizes and dtypes where they leave a third of the machine unused, and a kernel that reads its operands in
panels does not. Where that is so is measured. Nothing surrounds the product, so torch's with our passes
around it (``cpu_library`` of other ops) would be stock itself.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bigkern.core import registry
from bigkern.core.library import KERNEL_DTYPES, autocast, declines_products, foreign, ordinary, unavailable
from bigkern.core.op import Autograd, Measures, Op, native, of_fields
from bigkern.core.registry import Backend, Reason
from bigkern.ops.linear import reference, stock
from bigkern.ops.linear.call import Gradients, Linear, LinearBackward, Result, bind, options, sizes

# ---- gradients ---------------------------------------------------------------------------


def _gradients(run: Any, call: LinearBackward, needed: Any) -> tuple[Tensor | None, ...]:
    """Of x, weight and bias."""
    dx, dweight = run(call) if call.want_x or call.want_weight else (None, None)
    return dx, dweight, call.dy.flatten(0, -2).sum(0) if needed[2] else None


def _fake_backward(call: LinearBackward) -> Gradients:
    N, K = call.weight.shape
    dweight = call.x.new_empty(N, K) if call.weight.stride(1) == 1 else call.x.new_empty(K, N).t()
    return Gradients(
        call.x.new_empty(call.x.shape) if call.want_x else None, dweight if call.want_weight else None
    )


LINEAR = Op(
    "linear",
    Linear,
    Result,
    bind=bind,
    reference=Backend("reference", reference.linear, reference.linear_backward),
    remembers=("x", "weight", "bias"),
    measures=Measures(sizes, options),
    autograd=Autograd(
        LinearBackward,
        Gradients,
        gradients=_gradients,
        of=("x", "weight", "bias"),
        twice=partial(_gradients, reference.linear_backward),
        fake=_fake_backward,
    ),
)


# ---- candidates ------------------------------------------------------------------------------------


def of_torch_alone(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether nobody but torch knows what these arguments are, or why they are none."""
    if x is None or weight is None:
        return True
    return not registry.watched() and (not ordinary(x, weight, bias) or x.is_nested or weight.is_nested)


def _cpu_refuses(call: Linear) -> Reason:
    x, weight, bias = call.flat()
    if (reason := foreign(x, weight, bias) or unavailable("cpu", x)) is not None:
        return reason
    if x.dtype not in KERNEL_DTYPES:
        return f"dtype {x.dtype} is not float32, bfloat16 or float16"
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != x.dtype or not tensor.is_cpu):
            return f"{name} is {tensor.dtype} on {tensor.device}, x is {x.dtype}"
    if any(t is not None and (t.layout != torch.strided or t.is_nested) for t in (x, weight, bias)):
        return "a tensor is sparse or nested"
    if weight.dim() != 2 or x.dim() < 2 or x.shape[-1] != weight.shape[1]:
        return "the shapes are torch's to judge"
    if bias is not None and bias.shape != weight.shape[:1]:
        return "the shapes are torch's to judge"
    if x.numel() == 0 or weight.numel() == 0:
        return "x or weight is empty"
    return autocast(x)


LINEAR.register(
    Backend("cpu", native("linear"), native("linear_backward"), _cpu_refuses, declines=declines_products)
)
LINEAR.register(Backend("torch", of_fields(stock.linear), by_torch=True))
