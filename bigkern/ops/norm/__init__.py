"""LayerNorm and RMSNorm, with the residual addition before them: schema, fake, autograd, backends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bigkern.core import registry
from bigkern.core.checks import (
    TORCHS,
    check_dense_or_jagged,
    check_eps,
    check_tensor,
    misfit_dtype,
    named,
)
from bigkern.core.checks import kind as kind_of
from bigkern.core.dropout import check_dropout, drawn_key, dropout_key
from bigkern.core.dropout_reference import dropped
from bigkern.core.library import (
    KERNEL_DTYPES,
    LIBRARY,
    MAX_COLUMNS,
    autocast,
    define,
    foreign,
    plain,
    triton_kernel,
    unavailable,
    unproven,
)
from bigkern.ops.norm import reference
from bigkern.ops.norm.reference import OUTPUT

define(
    "norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, str kind,"
    " float dropout_p, Tensor? dropout_key)"
    " -> (Tensor y, Tensor? sum, Tensor? mean, Tensor rstd)"
)
define(
    "norm_backward(Tensor dy, Tensor? dsum, Tensor s, Tensor? weight, Tensor? mean, Tensor rstd, str kind,"
    " bool want_weight, bool want_bias, float dropout_p, Tensor? dropout_key)"
    " -> (Tensor ds, Tensor? dx, Tensor? dweight, Tensor? dbias)"
)

Result = tuple[Tensor, Tensor | None, Tensor | None, Tensor]
Gradients = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # of s, x, weight and bias


# ---- the public functions --------------------------------------------------------------------------


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""LayerNorm over the last dimensions, and the residual addition before it in the same pass.

    ``y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias``, ``s = drop(x) + residual``

    Args:
        x: ``[*, *normalized_shape]``; float32, bfloat16 or float16 (float64 runs on stock PyTorch).
        normalized_shape: the trailing dimensions that one mean and variance are taken over.
        weight: of shape ``normalized_shape``, or None for 1.
        bias: of shape ``normalized_shape``, or None for 0.
        eps: added to the variance.
        residual: x's shape and dtype, added to x first.
        dropout_p: probability in [0, 1) with which each element of x is dropped before the residual is
            added; the others are divided by ``1 - dropout_p``. Needs a residual; always active if positive.
        seed, offset: two non-negative ints that fix what is dropped, on every backend alike; without a
            seed torch's generator does.

    Returns:
        ``y`` of x's shape and dtype; with a residual ``(y, s)``, both differentiable.

    Saved for backward: s, weight, and one fp32 mean and one fp32 1 / deviation a row.

    Raises:
        TypeError: an argument is not a tensor, or a dtype does not fit.
        RuntimeError: shapes do not fit, as in :func:`torch.nn.functional.layer_norm`.
        ValueError: devices, eps, dropout_p, seed or offset do not fit.

    Source: Ba, Kiros and Hinton, Layer Normalization (2016).

    Example:
        >>> import torch, bigkern
        >>> x, r = torch.randn(2, 16, 64), torch.randn(2, 16, 64)
        >>> y, s = bigkern.layer_norm(x, (64,), torch.ones(64), torch.zeros(64), residual=r)
        >>> y.shape
        torch.Size([2, 16, 64])
    """
    if residual is None and dropout_p == 0.0 and _left_to_stock(x, eps):
        with suppress(RuntimeError, TypeError):  # torch refused: bind says why in the op's own words
            shape = [normalized_shape] if isinstance(normalized_shape, int) else normalized_shape
            return F.layer_norm(x, shape, weight, bias, eps)
    arguments = bind(
        x, normalized_shape, weight, bias, eps, residual, dropout_p=dropout_p, seed=seed, offset=offset
    )
    return _norm(x, arguments)


def _left_to_stock(x: Tensor, eps: float) -> bool:
    """Whether no backend but stock would be chosen, whatever else a LayerNorm is given: then asking costs
    more than the norm of a small tensor."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.numel() < LAYER_FASTER_FROM
        and isinstance(eps, float)
        and 0.0 <= eps < math.inf
        and not registry.forced()
        and not torch.compiler.is_compiling()
    )


def rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""RMSNorm over the last dimensions, and the residual addition before it in the same pass.

    ``y = s / sqrt(mean(s^2) + eps) * weight``, ``s = drop(x) + residual``

    Args:
        x: ``[*, *normalized_shape]``; float32, bfloat16 or float16 (float64 runs on stock PyTorch).
        normalized_shape: the trailing dimensions that one mean square is taken over.
        weight: of shape ``normalized_shape``, or None for 1.
        eps: default as in torch: the machine epsilon of float32 (of float64 for float64).
        residual: x's shape and dtype, added to x first.
        dropout_p: probability in [0, 1) with which each element of x is dropped before the residual is
            added; the others are divided by ``1 - dropout_p``. Needs a residual; always active if positive.
        seed, offset: two non-negative ints that fix what is dropped, on every backend alike; without a
            seed torch's generator does.

    Returns:
        ``y`` of x's shape and dtype; with a residual ``(y, s)``, both differentiable.

    Saved for backward: s, weight, and one fp32 1 / root-mean-square a row.

    Raises:
        TypeError, RuntimeError, ValueError: as :func:`layer_norm`.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019).

    Example:
        >>> import torch, bigkern
        >>> bigkern.rms_norm(torch.randn(2, 16, 64), (64,), torch.ones(64)).shape
        torch.Size([2, 16, 64])
    """
    drop: dict[str, Any] = {"dropout_p": dropout_p, "seed": seed, "offset": offset}
    return _norm(x, bind(x, normalized_shape, weight, None, eps, residual, kind="rms", **drop))


def _norm(x: Tensor, arguments: tuple[Any, ...]) -> Tensor | tuple[Tensor, Tensor]:
    backend = NORM.resolve(*arguments)
    tensors, dropout_p, key = arguments[:4], *arguments[6:]
    if dropout_p > 0.0 and key is None and backend.name != "torch":
        arguments = *arguments[:7], drawn_key()
    if backend.name == "torch":
        y, total = stock(*arguments)
    elif not plain(*tensors):
        y, total, _, _ = torch.ops.bigkern.norm(*arguments)
    elif _wants_gradient(*tensors):
        y, total = _Norm.apply(backend, *arguments)
    else:
        y, total, _, _ = backend.forward(*arguments)
    if y.dim() != x.dim():
        y, total = y.view(x.shape), None if total is None else total.view(x.shape)
    return y if total is None else (y, total)


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# ---- checks ----------------------------------------------------------------------------------------


def bind(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-5,
    residual: Tensor | None = None,
    *,
    kind: str = "layer",
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
) -> tuple[Any, ...]:
    """Check a public call and turn it into the op's arguments.

    They are ``(x, residual, weight, bias, eps, kind, dropout_p, key)``; the key is None without a seed.
    Several normalized dimensions become one. ``kind="rms"`` is :func:`rms_norm`.
    """
    check_dense_or_jagged("x", x)
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, not {x.dtype}")
    shape = _checked_shape(normalized_shape)
    if not shape:
        raise RuntimeError("normalized_shape must have at least one dimension, not ()")
    if x.shape[-len(shape) :] != shape:
        raise RuntimeError(f"normalized_shape {shape} must end the shape of x, {tuple(x.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        check_tensor(name, tensor, x)
        if tensor.shape != shape:
            raise RuntimeError(f"{name} must have normalized_shape {shape}, not {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, not {tensor.dtype}")
    if residual is not None:
        check_tensor("residual", residual, x)
        if residual.dtype != x.dtype:
            raise TypeError(f"residual must have x's dtype {x.dtype}, not {residual.dtype}")
        if residual.shape != x.shape:
            raise RuntimeError(f"residual must have x's shape {tuple(x.shape)}, not {tuple(residual.shape)}")
    default = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if eps is None else eps
    eps = check_eps(default)
    dropout_p = check_dropout(dropout_p)
    if dropout_p > 0.0 and residual is None:
        raise ValueError("dropout_p needs a residual: it is what dropout(x) is added to")
    key = None if seed is None else dropout_key(dropout_p, seed, offset)
    if len(shape) > 1:
        x, residual = (None if t is None else t.flatten(-len(shape)) for t in (x, residual))  # type: ignore[assignment]
        weight, bias = (None if t is None else t.flatten() for t in (weight, bias))
    return x, residual, weight, bias, eps, kind, dropout_p, key


def _checked_shape(normalized_shape: Any) -> tuple[int, ...]:
    if isinstance(normalized_shape, int | torch.SymInt):
        return (normalized_shape,)  # type: ignore[return-value]
    if not isinstance(normalized_shape, Sequence) or isinstance(normalized_shape, str | bytes):
        raise TypeError(
            f"normalized_shape must be an int or a sequence of ints, not {kind_of(normalized_shape)}"
        )
    for size in normalized_shape:
        if not isinstance(size, int | torch.SymInt):
            raise TypeError(f"normalized_shape must hold ints, not {kind_of(size)}")
    return tuple(normalized_shape)


# ---- the op: fake, kernel, autograd ----------------------------------------------------------------


@torch.library.register_fake("bigkern::norm", lib=LIBRARY)
def _fake(
    x: Tensor, residual: Tensor | None, _weight: Any, _bias: Any, _eps: float, kind: str, *_dropout: Any
) -> Result:
    statistics = x.new_empty(math.prod(x.shape[:-1]), dtype=torch.promote_types(x.dtype, torch.float32))
    total = None if residual is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), total, statistics if kind == "layer" else None, torch.empty_like(statistics)


@torch.library.register_fake("bigkern::norm_backward", lib=LIBRARY)
def _fake_backward(
    dy: Tensor, dsum: Any, s: Tensor, weight: Tensor | None, mean: Any, rstd: Any, kind: str,
    want_weight: bool, want_bias: bool, dropout_p: float, _key: Any,
) -> Gradients:  # fmt: skip
    like = s if weight is None else weight
    dweight, dbias = (like.new_empty(s.shape[-1:]) if want else None for want in (want_weight, want_bias))
    return s.new_empty(s.shape), s.new_empty(s.shape) if dropout_p > 0.0 else None, dweight, dbias


def _forward(*arguments: Any) -> Result:
    return cast(Result, NORM.of_node(*arguments).forward(*arguments))


def _backward(dy: Tensor, dsum: Tensor | None, s: Tensor, weight: Tensor | None, *rest: Any) -> Gradients:
    kind = rest[2]
    backend = NORM.of_node(s, None, weight, None, 0.0, kind, 0.0, None)
    return cast(Gradients, cast(Any, backend.backward)(dy, dsum, s, weight, *rest))


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("norm", _forward, _key)
    LIBRARY.impl("norm_backward", _backward, _key)


class _Norm(torch.autograd.Function):
    """Eager autograd straight onto the chosen backend: a fifth of the cost of a Python custom op."""

    @staticmethod
    def forward(ctx: Any, backend: registry.Backend, *arguments: Any) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        y, total, mean, rstd = backend.forward(*arguments)
        ctx.backend = backend
        _save(ctx, arguments, total, mean, rstd)
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        return None, *_gradients(ctx.backend.backward, ctx, dy, dsum, ctx.needs_input_grad[1:5])


def _save(
    ctx: Any, arguments: tuple[Any, ...], total: Tensor | None, mean: Tensor | None, rstd: Tensor
) -> None:
    x, _residual, weight, _bias, _eps, ctx.kind, ctx.dropout_p, key = arguments
    ctx.save_for_backward(x if total is None else total, weight, mean, rstd, key)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    _y, total, mean, rstd = output
    _save(ctx, inputs, total, mean, rstd)
    ctx.mark_non_differentiable(*(t for t in (mean, rstd) if t is not None))
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: None) -> tuple[Any, ...]:
    return _gradients(torch.ops.bigkern.norm_backward, ctx, dy, dsum, ctx.needs_input_grad[:4])


def _gradients(
    backward: Callable[..., Gradients],
    ctx: Any,
    dy: Tensor | None,
    dsum: Tensor | None,
    needed: Sequence[bool],
) -> tuple[Any, ...]:
    """Of x, residual, weight, bias, eps, kind, dropout_p and the key."""
    s, weight, mean, rstd, key = ctx.saved_tensors
    if dy is None:  # only the sum was used
        if dsum is None:
            return (None,) * 8
        return dropped(dsum, key, ctx.dropout_p, OUTPUT), dsum, None, None, None, None, None, None
    ds, dx, dweight, dbias = backward(
        dy, dsum, s, weight, mean, rstd, ctx.kind, needed[2], needed[3], ctx.dropout_p, key
    )
    return ds if dx is None else dx, ds if needed[1] else None, dweight, dbias, None, None, None, None


torch.library.register_autograd("bigkern::norm", _autograd, setup_context=_setup_context, lib=LIBRARY)


# ---- backends --------------------------------------------------------------------------------------

NORM = registry.declare("norm", bind)


def stock(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    dropout_p: float = 0.0,
    key: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``(y, sum)`` by torch's own functions, differentiable by torch's own autograd."""
    if dropout_p > 0.0:
        x = F.dropout(x, dropout_p) if key is None else dropped(x, key, dropout_p, OUTPUT)
    total = None if residual is None else x + residual
    s = x if total is None else total
    try:
        if kind == "layer":
            return F.layer_norm(s, s.shape[-1:], weight, bias, eps), total
        return F.rms_norm(s, s.shape[-1:], weight, eps), total
    except TORCHS as error:
        raise named(error, misfit_dtype(s, {"weight": weight, "bias": bias})) from error


def on_rows(x: Tensor | None) -> Tensor | None:
    """``[..., N]`` as ``[M, N]``."""
    return x if x is None or x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def rows_backend(forward: Callable[..., Result], backward: Callable[..., Gradients]) -> tuple[Any, Any]:
    """The op's two functions from kernels that know only ``[M, N]``."""

    def norm(x: Tensor, residual: Tensor | None, *rest: Any) -> Result:
        y, total, mean, rstd = forward(on_rows(x), on_rows(residual), *rest)
        return y.view(x.shape), None if total is None else total.view(x.shape), mean, rstd

    def norm_backward(dy: Tensor, dsum: Tensor | None, s: Tensor, *rest: Any) -> Gradients:
        ds, dx, dweight, dbias = backward(on_rows(dy), on_rows(dsum), on_rows(s), *rest)
        return ds.view(s.shape), None if dx is None else dx.view(s.shape), dweight, dbias

    return norm, norm_backward


def _refuses(backend: str) -> Callable[..., registry.Reason]:
    def refuses(x: Tensor, residual: Any, weight: Any, bias: Any, *_: Any) -> registry.Reason:
        if (reason := foreign(x, residual, weight, bias) or unavailable(backend, x)) is not None:
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


# Where our CPU kernels start to win on two Zen 4 cores, in elements, measured with 768 columns.
LAYER_FASTER_FROM = 1 << 20  # with a gradient
LAYER_FORWARD_FASTER_FROM = 1 << 21  # float32 alone: 16-bit forwards are as fast as torch's own
RMS_FORWARD_FASTER_FROM = 1 << 15  # with a gradient: at every size


def _cpu_declines(
    x: Tensor, residual: Any, weight: Any, bias: Any, eps: float, kind: str, *_dropout: Any
) -> registry.Reason:
    gradient = _wants_gradient(x, residual, weight, bias)
    if kind == "layer" and not gradient and x.dtype != torch.float32:
        return "stock LayerNorm of 16 bits is as fast where no gradient is wanted"
    if kind == "layer":
        least = LAYER_FASTER_FROM if gradient else LAYER_FORWARD_FASTER_FROM
    else:
        least = 0 if gradient else RMS_FORWARD_FASTER_FROM
    where = "" if gradient else " where no gradient is wanted"
    return f"stock is faster below {least} elements{where}" if x.numel() < least else None


def cuda_backend(native: Any, *, emulated: bool = False) -> registry.Backend:
    """The CUDA kernels in ``native``: the compiled ones, or, in the tests, those that the emulator runs."""
    return registry.Backend(
        "cuda",
        lambda *arguments: native.norm.default(*arguments),
        lambda *arguments: native.norm_backward.default(*arguments),
        _refuses("cpu" if emulated else "cuda"),
        unproven("norm", "cuda"),
    )


_native = torch.ops.bigkern_native

NORM.register(cuda_backend(_native))
NORM.register(
    registry.Backend(
        "triton",
        *rows_backend(
            triton_kernel("layernorm_ffn", "norm"), triton_kernel("layernorm_ffn", "norm_backward")
        ),
        _refuses("triton"),
        unproven("norm", "triton"),
    )
)
NORM.register(
    registry.Backend(
        "cpu",
        lambda *arguments: _native.norm.default(*arguments),
        lambda *arguments: _native.norm_backward.default(*arguments),
        _refuses("cpu"),
        _cpu_declines,
    )
)
NORM.register(registry.Backend("torch", *rows_backend(reference.norm, reference.norm_backward)))
