"""BatchNorm with the residual addition and the ReLU after it: schema, fake, autograd, backends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bigkern.core import registry
from bigkern.core.checks import (
    TORCHS,
    check_dense,
    check_eps,
    check_flag,
    check_number,
    check_tensor,
    check_written,
    misfit_dtype,
    named,
)
from bigkern.core.library import KERNEL_DTYPES, LIBRARY, plain, triton_kernel, unavailable, unproven
from bigkern.ops.batch_norm import reference

LIBRARY.define(
    "batch_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var,"
    " float eps, bool relu) -> (Tensor y, Tensor? mean, Tensor? var)"
)
LIBRARY.define(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor mean,"
    " Tensor var, float eps, bool relu, bool training, bool want_residual, bool want_weight, bool want_bias)"
    " -> (Tensor dx, Tensor? dresidual, Tensor? dweight, Tensor? dbias)"
)

Activation = Literal["relu"]
Result = tuple[Tensor, Tensor | None, Tensor | None]
Gradients = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # of x, residual, weight and bias


# ---- the public function ---------------------------------------------------------------------------


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: Activation | None = None,
) -> Tensor:
    r"""BatchNorm, and the residual addition and ReLU that follow it in a CNN, in the same pass.

    ``y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)``

    In training mean and biased variance are those of x over all dimensions but channels, and running
    statistics move towards mean and unbiased variance by ``momentum``; else they are the running ones.

    Args:
        x: ``[N, C, *]``, in any memory format; float32, bfloat16 or float16 (float64 runs on stock PyTorch).
        running_mean, running_var: ``[C]``, written in place in training, where both may be None.
        weight, bias: ``[C]``, x's dtype or float32; None for 1 and 0.
        training: whether the statistics are x's own.
        momentum: the part of the way that running statistics move.
        eps: added to the variance.
        residual: x's shape, added before the activation.
        activation: None or ``"relu"``.

    Returns:
        ``y`` of x's shape, dtype and memory format.

    Saved for backward: x, weight, fp32 mean and variance a channel; for a ReLU bias, from which its sign is
    computed again, or with a residual y, which the next layer keeps anyway. Stock saves y for every ReLU.

    Raises:
        TypeError: an argument is not a tensor, or a dtype does not fit.
        RuntimeError: shapes do not fit, or running statistics are missing, in torch's words.
        ValueError: one value per channel in training; devices, eps or activation do not fit.

    Source: Ioffe and Szegedy, Batch Normalization (2015); :func:`torch.nn.functional.batch_norm`.

    Example:
        >>> import torch
        >>> from bigkern.ops.batch_norm import batch_norm
        >>> x, shortcut = torch.randn(2, 4, 8, 16, 16).unbind(0)
        >>> batch_norm(x, None, None, training=True, residual=shortcut, activation="relu").shape
        torch.Size([4, 8, 16, 16])
    """
    arguments = bind(
        x, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation
    )
    backend = BATCH_NORM.resolve(*arguments)
    if backend.name == "torch":
        return stock(
            x, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation
        )
    tensors = arguments[:6]
    if not plain(*tensors):
        y, mean, var = torch.ops.bigkern.batch_norm(*arguments)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y, mean, var = _BatchNorm.apply(backend, *arguments)
    else:
        y, mean, var = backend.forward(*arguments)
    if running_mean is not None and running_var is not None and training:
        count = x.numel() // x.shape[1]
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    return cast(Tensor, y)


def stock(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: Activation | None,
) -> Tensor:
    """The same by torch's own functions, differentiable by torch's own autograd.

    Nobody but this function has seen BatchNorm's output, and its backward does not need it: what follows is
    done in place, but under transforms and subclasses.
    """
    channels = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    try:
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    except TORCHS as error:
        raise named(error, misfit_dtype(x, channels)) from error
    in_place = plain(x, residual, weight, bias)
    if residual is not None:
        y = y.add_(residual) if in_place and residual.dtype == y.dtype else y + residual
    if activation is None:
        return y
    return y.relu_() if in_place else y.relu()


# ---- checks ----------------------------------------------------------------------------------------


def bind(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: Activation | None = None,
) -> tuple[Any, ...]:
    """Check a public call and turn it into the op's arguments.

    They are ``(x, residual, weight, bias, mean, var, eps, relu)``; in training mean and var are None.
    """
    check_dense("x", x)
    check_flag("training", training)
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, not {x.dtype}")
    if x.dim() < 2:
        raise RuntimeError(f"x must be [N, C, *], not of shape {tuple(x.shape)}")
    if (running_mean is None) != (running_var is None) and training:
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    channels = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, tensor in channels.items():
        if tensor is not None:
            _check_channels(name, tensor, x)
            if training and name.startswith("running"):
                check_written(name, tensor)
        elif not training and name.startswith("running"):
            raise RuntimeError(f"{name} must be defined in evaluation mode")
    if residual is not None:
        check_tensor("residual", residual, x)
        if residual.dtype not in (*KERNEL_DTYPES, torch.float64):
            raise TypeError(f"residual must be floating point, not {residual.dtype}")
        if residual.shape != x.shape:
            raise RuntimeError(f"residual must have x's shape {tuple(x.shape)}, not {tuple(residual.shape)}")
    if training and x.shape[0] * math.prod(x.shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    check_number("momentum", momentum, "finite")
    eps = check_eps(eps)
    if activation is not None and activation != "relu":
        raise ValueError(f"activation must be None or 'relu', not {activation!r}")
    mean, var = (None, None) if training else (running_mean, running_var)
    return x, residual, weight, bias, mean, var, eps, activation == "relu"


def _check_channels(name: str, tensor: Any, x: Tensor) -> None:
    check_tensor(name, tensor, x)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, not {tensor.dtype}")
    if tensor.numel() != x.shape[1]:
        raise RuntimeError(
            f"{name} should contain {x.shape[1]} elements not {tensor.numel()}, as x has channels"
        )
    if tensor.dim() != 1:
        raise RuntimeError(f"{name} must have shape {(x.shape[1],)}, not {tuple(tensor.shape)}")


# ---- the op: fake, kernel, autograd ----------------------------------------------------------------


@torch.library.register_fake("bigkern::batch_norm", lib=LIBRARY)
def _fake(
    x: Tensor, _residual: Any, _weight: Any, _bias: Any, mean: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if mean is not None:
        return torch.empty_like(x), None, None
    dtype = torch.promote_types(x.dtype, torch.float32)
    found, found_var = (x.new_empty(x.shape[1], dtype=dtype) for _ in range(2))
    return torch.empty_like(x), found, found_var


@torch.library.register_fake("bigkern::batch_norm_backward", lib=LIBRARY)
def _fake_backward(
    dy: Tensor, x: Tensor, y: Any, weight: Tensor | None, bias: Tensor | None, mean: Any, var: Any, eps: Any,
    relu: bool, training: bool, want_residual: bool, want_weight: bool, want_bias: bool,
) -> Gradients:  # fmt: skip
    like = x if weight is None else weight
    like = like if bias is None or weight is not None else bias
    dweight, dbias = (like.new_empty(x.shape[1]) if want else None for want in (want_weight, want_bias))
    return torch.empty_like(x), torch.empty_like(x) if relu and want_residual else None, dweight, dbias


def _forward(*arguments: Any) -> Result:
    y, mean, var = BATCH_NORM.resolve(*arguments).forward(*arguments)
    return _strided_like(arguments[0], y), mean, var


def _backward(
    dy: Tensor, x: Tensor, y: Any, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any
) -> Gradients:
    backend = BATCH_NORM.resolve(x, None, weight, bias, mean, var, rest[0], rest[1])
    dx, dresidual, dweight, dbias = cast(Any, backend.backward)(dy, x, y, weight, bias, mean, var, *rest)
    return _strided_like(x, dx), None if dresidual is None else _strided_like(x, dresidual), dweight, dbias


def _strided_like(x: Tensor, result: Tensor) -> Tensor:
    """``result`` with the strides that the fake promised."""
    promised = torch.empty_like(x)
    return result if result.stride() == promised.stride() else promised.copy_(result)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("batch_norm", _forward, _key)
    LIBRARY.impl("batch_norm_backward", _backward, _key)


class _BatchNorm(torch.autograd.Function):
    """Eager autograd straight onto the chosen backend: a fifth of the cost of a Python custom op."""

    @staticmethod
    def forward(ctx: Any, backend: registry.Backend, *arguments: Any) -> Result:  # type: ignore[override]
        result = backend.forward(*arguments)
        ctx.backend = backend
        _setup_context(ctx, arguments, result)
        return cast(Result, result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: None) -> tuple[Any, ...]:  # type: ignore[override]
        return None, *_gradients(ctx.backend.backward, ctx, dy, ctx.needs_input_grad[1:5])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    x, residual, weight, bias, mean, var, ctx.eps, ctx.relu = inputs
    y, found_mean, found_var = output
    ctx.training = found_mean is not None
    if ctx.training:
        mean, var = found_mean, found_var
        ctx.mark_non_differentiable(mean, var)
    keep_y, keep_bias = ctx.relu and residual is not None, ctx.relu and residual is None
    ctx.save_for_backward(x, y if keep_y else None, weight, bias if keep_bias else None, mean, var)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Any, ...]:
    return _gradients(torch.ops.bigkern.batch_norm_backward, ctx, dy, ctx.needs_input_grad[:4])


def _gradients(
    backward: Callable[..., Gradients], ctx: Any, dy: Tensor | None, needed: Sequence[bool]
) -> tuple[Any, ...]:
    """Of x, residual, weight, bias, mean, var, eps and relu."""
    if dy is None:
        return (None,) * 8
    _, want_residual, want_weight, want_bias = needed
    dx, dresidual, dweight, dbias = backward(
        dy, *ctx.saved_tensors, ctx.eps, ctx.relu, ctx.training, want_residual, want_weight, want_bias
    )
    if want_residual and not ctx.relu:
        dresidual = dy
    return dx, dresidual, dweight, dbias, None, None, None, None


torch.library.register_autograd("bigkern::batch_norm", _autograd, setup_context=_setup_context, lib=LIBRARY)


# ---- backends --------------------------------------------------------------------------------------

BATCH_NORM = registry.declare("batch_norm", bind)


def rows(x: Tensor | None) -> Tensor | None:
    """``[N, C, *]`` as rows of channels ``[M, C]``; a view if x is channels_last."""
    return None if x is None else x.movedim(1, -1).reshape(-1, x.shape[1])


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel lie side by side, pixel after pixel; true of ``[N, C]`` too."""
    return x.movedim(1, -1).is_contiguous()


def _refuses_triton(
    x: Tensor, residual: Any, weight: Any, bias: Any, mean: Any, var: Any, *_: Any
) -> registry.Reason:
    if (reason := unavailable("triton", x)) is not None:
        return reason
    if x.dtype not in KERNEL_DTYPES:
        return f"dtype {x.dtype} is not float32, bfloat16 or float16"
    for name, tensor in (("weight", weight), ("bias", bias), ("running_mean", mean), ("running_var", var)):
        if tensor is not None and tensor.dtype not in (x.dtype, torch.float32):
            return f"{name} has dtype {tensor.dtype}, x has {x.dtype}"
    if residual is not None and residual.dtype != x.dtype:
        return f"residual has dtype {residual.dtype}, x has {x.dtype}"
    if x.numel() == 0:
        return "x is empty"
    return None if is_channels_last(x) else "x is not channels_last"


def _refuses_cpu(x: Tensor, *_: Any) -> registry.Reason:
    return unavailable("cpu", x) or "no CPU kernel: BatchNorm on a CPU is stock's"


BATCH_NORM.register(
    registry.Backend(
        "triton",
        triton_kernel("batch_norm", "batch_norm"),
        triton_kernel("batch_norm", "batch_norm_backward"),
        _refuses_triton,
        unproven("batch_norm", "triton"),
    )
)
BATCH_NORM.register(registry.Backend("cpu", reference.batch_norm, None, _refuses_cpu))
BATCH_NORM.register(registry.Backend("torch", reference.batch_norm, reference.batch_norm_backward))
