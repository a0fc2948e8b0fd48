"""The linear layer: schema, fake, autograd, backends, the public function.

A product and nothing around it is what stock libraries do best, on a GPU above all. On a CPU there are
sizes and dtypes where they leave a third of the machine unused, and a kernel that reads its operands in
panels does not: :func:`_cpu_declines` says where.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.core import registry
from bigkern.core.checks import TORCHS, misfit_beside, named
from bigkern.core.library import KERNEL_DTYPES, LIBRARY, define, foreign, ordinary, plain, unavailable
from bigkern.ops.linear import reference
from bigkern.ops.norm import autocast

define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor y")
define(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, bool want_x, bool want_weight)"
    " -> (Tensor? dx, Tensor? dweight)"
)

Gradients = tuple[Tensor | None, Tensor | None]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""The linear layer, ``y = x @ weight.T + bias``.

    Args:
        x: ``[..., K]``; float32, bfloat16 or float16 (float64 runs on stock PyTorch).
        weight: ``[N, K]``; a transposed view, as of a ``[K, N]`` parameter, is read where it lies.
        bias: ``[N]`` or None.

    Returns:
        ``y`` ``[..., N]`` of x's dtype; sums are fp32.

    Saved for backward: x and the weight. Differentiable twice.

    Raises:
        torch's own errors, with the argument's name before them: what the kernels do not take goes to
            :func:`torch.nn.functional.linear`.

    Source: :func:`torch.nn.functional.linear`.

    Example:
        >>> import torch, bigkern
        >>> bigkern.linear(torch.randn(2, 16, 64), torch.randn(256, 64)).shape
        torch.Size([2, 16, 256])
    """
    if _left_to_stock(x, weight, bias):
        return stock(x, weight, bias)
    backend = LINEAR.resolve(x, weight, bias)
    if backend.name == "torch":
        return stock(x, weight, bias)
    if not plain(x, weight, bias):
        return cast(Tensor, torch.ops.bigkern.linear(x, weight, bias))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return cast(Tensor, _Linear.apply(backend, x, weight, bias))
    return cast(Tensor, backend.forward(x, weight, bias))


def stock(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    try:
        return F.linear(x, weight, bias)
    except TORCHS as error:
        raise named(error, _misfit(x, weight, bias)) from error


def _misfit(x: Any, weight: Any, bias: Any) -> str | None:
    """Which argument torch cannot mean, what it was and what it must be."""
    given = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in given.items():
        if (misfit := misfit_beside(name, tensor, x, "x")) is not None:
            return misfit
    if x.dim() == 0:
        return "x must be [..., K], not a scalar"
    if weight.dim() not in (1, 2) or weight.shape[-1] != x.shape[-1]:
        return f"weight must be [N, {x.shape[-1]}] to match x {tuple(x.shape)}, not {tuple(weight.shape)}"
    if bias is not None:
        return f"bias must be [{weight.shape[0]}] to match weight, not {tuple(bias.shape)}"
    return None


def bind(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
    """The public call's arguments as the op's; judging them is left to torch."""
    return x, weight, bias


def _left_to_stock(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether no backend but stock would be chosen whatever the weight's sizes are; asking costs too much."""
    if x is None or weight is None:
        return True  # to be refused in torch's words
    if registry.forced():
        return False
    if not ordinary(x, weight, bias) or x.is_nested or x.dim() == 0:
        return True
    return not x.is_cpu or x.dtype not in FASTER_IN or x.numel() < FASTER_FROM * x.shape[-1]


# ---- the op: fake, kernel, autograd ----------------------------------------------------------------


@torch.library.register_fake("bigkern::linear", lib=LIBRARY)
def _fake(x: Tensor, weight: Tensor, _bias: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("bigkern::linear_backward", lib=LIBRARY)
def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool) -> Gradients:
    N, K = weight.shape
    dweight = x.new_empty(N, K) if weight.stride(1) == 1 else x.new_empty(K, N).t()
    return x.new_empty(x.shape) if want_x else None, dweight if want_weight else None


def _forward(*arguments: Any) -> Tensor:
    return cast(Tensor, LINEAR.of_node(*arguments).forward(*arguments))


def _backward(dy: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool) -> Gradients:
    backward = cast(Any, LINEAR.of_node(x, weight, None).backward)
    return cast(Gradients, backward(dy, x, weight, want_x, want_weight))


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("linear", _forward, _key)
    LIBRARY.impl("linear_backward", _backward, _key)


class _Linear(torch.autograd.Function):
    """Eager autograd straight onto the chosen backend."""

    @staticmethod
    def forward(
        ctx: Any, backend: registry.Backend, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:  # type: ignore[override]
        ctx.backward_of = backend.backward
        ctx.save_for_backward(x, weight)
        return cast(Tensor, backend.forward(x, weight, bias))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return None, *_gradients(ctx.backward_of, ctx, dy, ctx.needs_input_grad[1:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return _gradients(torch.ops.bigkern.linear_backward, ctx, dy, ctx.needs_input_grad)


def _gradients(backward: Any, ctx: Any, dy: Tensor, needed: tuple[bool, ...]) -> tuple[Any, ...]:
    """Of x, weight and bias; where they are to be differentiated again, by torch's own products."""
    x, weight = ctx.saved_tensors
    if torch.is_grad_enabled():
        backward = reference.linear_backward
    dx, dweight = backward(dy, x, weight, *needed[:2]) if any(needed[:2]) else (None, None)
    return dx, dweight, dy.flatten(0, -2).sum(0) if needed[2] else None


torch.library.register_autograd("bigkern::linear", _autograd, setup_context=_setup_context, lib=LIBRARY)


# ---- backends --------------------------------------------------------------------------------------

LINEAR = registry.declare("linear", bind)

# Where our CPU kernels win on two Zen 4 cores. In bfloat16 torch's products are as fast, and on a GPU faster.
FASTER_IN = (torch.float32, torch.float16)
FASTER_FROM = 256  # rows
LEAST = 1 << 23  # multiply-adds: below, a call costs more than is gained


def _cpu_refuses(x: Tensor, weight: Tensor, bias: Tensor | None) -> registry.Reason:
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


def _cpu_declines(x: Tensor, weight: Tensor, bias: Tensor | None) -> registry.Reason:
    if x.dtype not in FASTER_IN:
        return f"stock is as fast in {x.dtype}"
    rows = math.prod(x.shape[:-1])
    if rows < FASTER_FROM:
        return f"stock is faster below {FASTER_FROM} rows"
    if rows * weight.numel() < LEAST:
        return f"stock is faster below {LEAST} multiply-adds"
    return None


_native = torch.ops.bigkern_native

LINEAR.register(
    registry.Backend(
        "cpu",
        lambda *arguments: _native.linear.default(*arguments),
        lambda *arguments: _native.linear_backward.default(*arguments),
        _cpu_refuses,
        _cpu_declines,
    )
)
LINEAR.register(registry.Backend("torch", reference.linear, reference.linear_backward))
