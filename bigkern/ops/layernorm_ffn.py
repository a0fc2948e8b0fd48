"""A Transformer's feed-forward block with its norm: schema, fake, autograd, backends, the public function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bigkern import registry
from bigkern.ops._library import (
    KERNEL_DTYPES,
    LIBRARY,
    define,
    define_native,
    plain,
    triton_kernel,
    unavailable,
    unproven,
)
from bigkern.ops.norm import MAX_COLUMNS, autocast
from bigkern.ops.norm import stock as stock_norm
from bigkern.reference import layernorm_ffn as reference
from bigkern.reference.layernorm_ffn import Pieces

define(
    "layernorm_ffn(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? norm_weight,"
    " Tensor? norm_bias, str norm, str activation, str placement, bool residual, float eps, bool save)"
    " -> (Tensor y, Tensor? s, Tensor? mean, Tensor? rstd, Tensor? preactivation)"
)
define(
    "layernorm_ffn_backward(Tensor dy, Tensor x, Tensor w1, Tensor w2, Tensor? norm_weight,"
    " Tensor? norm_bias, Tensor? s, Tensor? mean, Tensor rstd, Tensor preactivation, str norm,"
    " str activation, str placement, bool residual, float eps, bool[] wanted)"
    " -> (Tensor? dx, Tensor? dw1, Tensor? db1, Tensor? dw2, Tensor? db2, Tensor? dnorm_weight,"
    " Tensor? dnorm_bias)"
)
define_native("bias_activation(Tensor(a!) product, Tensor? bias, str activation) -> Tensor out")
define_native(
    "bias_activation_backward(Tensor dout, Tensor preactivation, str activation, bool want_bias,"
    " bool rebuild) -> (Tensor dpre, Tensor? out, Tensor? dbias)"
)

GATED = reference.GATED

Norm = Literal["layer", "rms"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu"]
Placement = Literal["pre", "post"]

Result = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Gradients = tuple[Tensor | None, ...]


# ---- the public function ---------------------------------------------------------------------------


def layernorm_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    norm: Norm = "layer",
    activation: Activation = "gelu",
    placement: Placement = "pre",
    residual: bool = True,
    eps: float = 1e-5,
) -> Tensor:
    r"""The second half of a Transformer block: norm, two linear layers, activation and residual.

    ``pre``:  ``y = x + act(norm(x) @ w1.T + b1) @ w2.T + b2``
    ``post``: ``y = norm(x + act(x @ w1.T + b1) @ w2.T + b2)``

    Args:
        x: ``[..., D]``; float32, bfloat16 or float16 (float64 runs on stock PyTorch).
        w1: ``[F, D]``; for a gated activation ``[2F, D]``, the gate's rows first, then the others.
        b1: ``[F]``, gated ``[2F]``, or None.
        w2: ``[D, F]``.
        b2: ``[D]`` or None.
        norm_weight: ``[D]`` or None for 1.
        norm_bias: ``[D]`` or None for 0; must be None for ``norm="rms"``.
        norm: ``"layer"`` for LayerNorm, ``"rms"`` for RMSNorm.
        activation: ``"gelu"`` (exact), ``"gelu_tanh"``, ``"relu"``, ``"silu"``, or gated:
            ``"swiglu"`` = silu(gate) * up, ``"geglu"`` = gelu(gate) * up.
        placement: where the norm is: before the first product, or after the residual.
        residual: whether x is added.
        eps: added to the norm's variance or mean square.

    Returns:
        ``y`` of x's shape and dtype.

    Saved for backward: x, the weights, the preactivation (``[..., F]``, gated ``[..., 2F]``), the fp32
    statistics of each row, and for post the norm's input. Without a gradient to compute, nothing.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is not x's.
        ValueError: shapes, devices, norm, activation, placement or eps do not fit.

    Source: Vaswani et al. (2017); Xiong et al., On Layer Normalization in the Transformer
    Architecture (2020); Shazeer, GLU Variants Improve Transformer (2020).

    Example:
        >>> import torch, bigkern
        >>> x, w1, w2 = torch.randn(2, 16, 64), torch.randn(256, 64), torch.randn(64, 256)
        >>> bigkern.layernorm_ffn(x, w1, None, w2, None, torch.ones(64), activation="silu").shape
        torch.Size([2, 16, 64])
    """
    arguments = bind(
        x,
        w1,
        b1,
        w2,
        b2,
        norm_weight,
        norm_bias,
        norm=norm,
        activation=activation,
        placement=placement,
        residual=residual,
        eps=eps,
    )
    backend = LAYERNORM_FFN.resolve(*arguments)
    if backend.name == "torch":
        return stock(*arguments)
    if not plain(*arguments[:7]):
        return cast(Tensor, torch.ops.bigkern.layernorm_ffn(*arguments)[0])
    save = arguments[-1]
    return cast(Tensor, _LayernormFfn.apply(backend, *arguments) if save else backend.forward(*arguments)[0])


# ---- checks ----------------------------------------------------------------------------------------

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu")


def bind(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    norm: str = "layer",
    activation: str = "gelu",
    placement: str = "pre",
    residual: bool = True,
    eps: float = 1e-5,
) -> tuple[Any, ...]:
    """Check a public call and turn it into the op's arguments; the last: whether a backward may follow."""
    if norm not in ("layer", "rms"):
        raise ValueError(f'norm must be "layer" or "rms", not {norm!r}')
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    if placement not in ("pre", "post"):
        raise ValueError(f'placement must be "pre" or "post", not {placement!r}')
    if not math.isfinite(eps):
        raise ValueError(f"eps must be finite, not {eps}")
    if norm == "rms" and norm_bias is not None:
        raise ValueError('norm_bias must be None for norm="rms"')
    tensors = (x, w1, b1, w2, b2, norm_weight, norm_bias)
    for name, tensor in zip(_NAMES, tensors, strict=True):
        if tensor is not None or name in ("x", "w1", "w2"):
            _check_tensor(name, tensor, x)
    if x.dim() == 0 or w2.dim() == 0:
        raise ValueError(f"x must be [..., D] and w2 [D, F], not {tuple(x.shape)} and {tuple(w2.shape)}")
    D, F_ = x.shape[-1], w2.shape[-1]
    rows = 2 * F_ if activation in GATED else F_
    for name, tensor, shape in (
        ("w2", w2, (D, F_)),
        ("w1", w1, (rows, D)),
        ("b1", b1, (rows,)),
        ("b2", b2, (D,)),
        ("norm_weight", norm_weight, (D,)),
        ("norm_bias", norm_bias, (D,)),
    ):
        if tensor is not None and tensor.shape != shape:
            given = f"x {tuple(x.shape)}, w2 {tuple(w2.shape)} and activation {activation}"
            raise ValueError(f"{name} must be {shape} to match {given}, not {tuple(tensor.shape)}")
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return *tensors, norm, activation, placement, residual, eps, save


_NAMES = ("x", "w1", "b1", "w2", "b2", "norm_weight", "norm_bias")


def _check_tensor(name: str, tensor: Any, x: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, not {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, not {tensor.dtype}")
    if tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name} must have x's dtype {x.dtype}, not {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, not {tensor.device}")


# ---- the op: fake, kernel, autograd ----------------------------------------------------------------


@torch.library.register_fake("bigkern::layernorm_ffn", lib=LIBRARY)
def _fake(x: Tensor, w1: Tensor, *rest: Any) -> Result:
    *_, norm, _activation, placement, _residual, _eps, save = rest
    y = x.new_empty(x.shape)
    if not save:
        return y, None, None, None, None
    M = math.prod(x.shape[:-1])
    rstd = x.new_empty(M, dtype=torch.promote_types(x.dtype, torch.float32))
    mean = torch.empty_like(rstd) if norm == "layer" else None
    s = x.new_empty(M, x.shape[-1]) if placement == "post" else None
    return y, s, mean, rstd, x.new_empty(M, w1.shape[0])


@torch.library.register_fake("bigkern::layernorm_ffn_backward", lib=LIBRARY)
def _fake_backward(dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, *rest: Any) -> Gradients:
    D, rows = x.shape[-1], w1.shape[0]
    shapes = (x.shape, w1.shape, (rows,), w2.shape, (D,), (D,), (D,))
    return tuple(x.new_empty(shape) if want else None for shape, want in zip(shapes, rest[-1], strict=True))


def _forward(*arguments: Any) -> Result:
    return cast(Result, LAYERNORM_FFN.resolve(*arguments).forward(*arguments))


def _backward(dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, *rest: Any) -> Gradients:
    norm_weight, norm_bias, _s, _mean, _rstd, _preactivation, *options, _wanted = rest
    backend = LAYERNORM_FFN.resolve(x, w1, None, w2, None, norm_weight, norm_bias, *options, True)
    return cast(Gradients, cast(Any, backend.backward)(dy, x, w1, w2, *rest))


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("layernorm_ffn", _forward, _key)
    LIBRARY.impl("layernorm_ffn_backward", _backward, _key)


class _LayernormFfn(torch.autograd.Function):
    """Eager autograd straight onto the chosen backend: a fifth of the cost of a Python custom op."""

    @staticmethod
    def forward(ctx: Any, backend: registry.Backend, *arguments: Any) -> Tensor:  # type: ignore[override]
        result = backend.forward(*arguments)
        _save(ctx, arguments, result)
        ctx.backend = backend
        return cast(Tensor, result[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return None, *_gradients(ctx.backend.backward, ctx, dy, ctx.needs_input_grad[1:8])


def _save(ctx: Any, arguments: tuple[Any, ...], result: Result) -> None:
    x, w1, _b1, w2, _b2, norm_weight, norm_bias, *options, _save = arguments
    ctx.save_for_backward(x, w1, w2, norm_weight, norm_bias, *result[1:])
    ctx.options = options


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 13
    return _gradients(torch.ops.bigkern.layernorm_ffn_backward, ctx, dy, ctx.needs_input_grad[:7])


def _gradients(
    backward: Callable[..., Gradients], ctx: Any, dy: Tensor, needed: Sequence[bool]
) -> tuple[Any, ...]:
    """Of x, w1, b1, w2, b2, norm_weight and norm_bias, then the six options."""
    return *backward(dy, *ctx.saved_tensors, *ctx.options, list(needed)), *(None,) * 6


torch.library.register_autograd(
    "bigkern::layernorm_ffn", _autograd, setup_context=_setup_context, lib=LIBRARY
)


# ---- backends --------------------------------------------------------------------------------------

LAYERNORM_FFN = registry.declare("layernorm_ffn", bind)


def stock(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm: str,
    activation: str,
    placement: str,
    residual: bool,
    eps: float,
    save: bool,
) -> Tensor:
    """The same block by torch's own functions, differentiable by torch's own autograd."""
    affine = (norm_weight, norm_bias, eps, norm)
    n = stock_norm(x, None, *affine)[0] if placement == "pre" else x
    y = F.linear(stock_activation(F.linear(n, w1, b1), activation), w2, b2)
    y = x + y if residual else y
    return y if placement == "pre" else stock_norm(y, None, *affine)[0]


def stock_activation(p: Tensor, activation: str) -> Tensor:
    if activation in GATED:
        gate, up = p.chunk(2, dim=-1)
        return stock_activation(gate, GATED[activation]) * up
    if activation == "gelu_tanh":
        return F.gelu(p, approximate="tanh")
    return cast(Tensor, getattr(F, activation)(p))


def _refuses(backend: str) -> Callable[..., registry.Reason]:
    def refuses(x: Tensor, w1: Tensor, *_: Any) -> registry.Reason:
        if (reason := unavailable(backend, x)) is not None:
            return reason
        if x.dtype not in KERNEL_DTYPES:
            return f"dtype {x.dtype} is not float32, bfloat16 or float16"
        if x.numel() == 0 or w1.numel() == 0:
            return "x or the weights are empty"
        if backend != "cpu" and x.shape[-1] > MAX_COLUMNS:
            return f"rows of {x.shape[-1]} > {MAX_COLUMNS} elements"
        return autocast(x)

    return refuses


FASTER_FROM = 512  # rows: below, repacking the weights costs our CPU kernels more than fusing saves


def _cpu_declines(x: Tensor, *_: Any) -> registry.Reason:
    rows = math.prod(x.shape[:-1])
    return f"stock is faster below {FASTER_FROM} rows" if rows < FASTER_FROM else None


def block_of(pieces: Pieces) -> tuple[Callable[..., Result], Callable[..., Gradients]]:
    """The op's two functions: the reference's block with kernels for pieces."""
    return (
        partial(reference.layernorm_ffn, pieces=pieces),
        partial(reference.layernorm_ffn_backward, pieces=pieces),
    )


def native_pieces(native: Any) -> Pieces:
    def bias_activation(product: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return product, native.bias_activation(product, *rest)  # the bias is added in place

    return Pieces(
        lambda *arguments: native.norm(*arguments),
        lambda *arguments: native.norm_backward(*arguments),
        bias_activation,
        lambda *arguments: native.bias_activation_backward(*arguments),
    )


TRITON_PIECES = Pieces(*(triton_kernel("layernorm_ffn", name) for name in Pieces._fields))


def cuda_backend(native: Any, *, emulated: bool = False) -> registry.Backend:
    """The CUDA kernels in ``native``: the compiled ones, or, in the tests, those that the emulator runs."""
    refuses = _refuses("cpu" if emulated else "cuda")
    return registry.Backend(
        "cuda", *block_of(native_pieces(native)), refuses, unproven("layernorm_ffn", "cuda")
    )


_native = torch.ops.bigkern_native

LAYERNORM_FFN.register(cuda_backend(_native))
LAYERNORM_FFN.register(
    registry.Backend(
        "triton", *block_of(TRITON_PIECES), _refuses("triton"), unproven("layernorm_ffn", "triton")
    )
)
LAYERNORM_FFN.register(
    registry.Backend(
        "cpu",
        lambda *arguments: _native.layernorm_ffn.default(*arguments),
        lambda *arguments: _native.layernorm_ffn_backward.default(*arguments),
        _refuses("cpu"),
        _cpu_declines,
    )
)
LAYERNORM_FFN.register(registry.Backend("torch", reference.layernorm_ffn, reference.layernorm_ffn_backward))
