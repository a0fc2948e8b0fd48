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
from torch.utils.checkpoint import checkpoint

from bigkern.core import registry
from bigkern.core.checks import check_choice, check_dense, check_eps, check_flag, kind
from bigkern.core.dropout import check_dropout, drawn_key, dropout_key
from bigkern.core.dropout_reference import dropped
from bigkern.core.library import (
    KERNEL_DTYPES,
    LIBRARY,
    MAX_COLUMNS,
    autocast,
    define,
    define_native,
    foreign,
    plain,
    triton_kernel,
    unavailable,
    unproven,
)
from bigkern.ops.layernorm_ffn import reference
from bigkern.ops.layernorm_ffn.reference import Pieces
from bigkern.ops.norm.reference import HIDDEN, OUTPUT
from bigkern.ops.norm.stock import norm as stock_norm

define(
    "layernorm_ffn(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? norm_weight,"
    " Tensor? norm_bias, Tensor? dropout_key, str norm, str activation, str placement, bool residual,"
    " float eps, float dropout_p, float hidden_dropout_p, str save)"
    " -> (Tensor y, Tensor? s, Tensor? mean, Tensor? rstd, Tensor? preactivation)"
)
_BACKWARD = (
    "layernorm_ffn_backward(Tensor dy, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2,"
    " Tensor? norm_weight, Tensor? norm_bias, Tensor? dropout_key, Tensor? s, Tensor? mean, Tensor? rstd,"
    " Tensor? preactivation, str norm, str activation, str placement, bool residual, float eps,"
    " float dropout_p, float hidden_dropout_p, bool[] wanted{sums})"
    " -> (Tensor? dx, Tensor? dw1, Tensor? db1, Tensor? dw2, Tensor? db2, Tensor? dnorm_weight,"
    " Tensor? dnorm_bias)"
)
LIBRARY.define(_BACKWARD.format(sums=""))  # torch.compile knows no op that returns and also adds to
define_native(_BACKWARD.format(sums=", Tensor(a!)? w1_sum, Tensor(b!)? w2_sum"))
define_native(
    "bias_activation(Tensor(a!) product, Tensor? bias, str activation, float dropout_p,"
    " Tensor? dropout_key) -> Tensor out"
)
define_native(
    "bias_activation_backward(Tensor dout, Tensor preactivation, str activation, bool want_bias,"
    " bool rebuild, float dropout_p, Tensor? dropout_key)"
    " -> (Tensor dpre, Tensor? out, Tensor? dbias)"
)
define_native("dropout_add(Tensor x, Tensor? residual, float dropout_p, Tensor dropout_key) -> Tensor")

GATED = reference.GATED

Norm = Literal["layer", "rms", "none"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu"]
Placement = Literal["pre", "post"]
Save = Literal["preactivation", "input"]

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
    dropout_p: float = 0.0,
    hidden_dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    save: Save = "preactivation",
    weight_grads: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    r"""The second half of a Transformer block: norm, two linear layers, activation and residual.

    ``pre``:  ``y = x + drop(drop(act(norm(x) @ w1.T + b1)) @ w2.T + b2)``
    ``post``: ``y = norm(x + drop(drop(act(x @ w1.T + b1)) @ w2.T + b2))``
    no norm:  ``y = x + drop(drop(act(x @ w1.T + b1)) @ w2.T + b2)``

    Args:
        x: ``[..., D]``; float32, bfloat16 or float16 (float64 runs on stock PyTorch).
        w1: ``[F, D]``; for a gated activation ``[2F, D]``, the gate's rows first, then the others.
        b1: ``[F]``, gated ``[2F]``, or None.
        w2: ``[D, F]``.
        b2: ``[D]`` or None.
        norm_weight: ``[D]`` or None for 1.
        norm_bias: ``[D]`` or None for 0; must be None for ``norm="rms"``.
        norm: ``"layer"`` for LayerNorm, ``"rms"`` for RMSNorm, ``"none"``.
        activation: ``"gelu"`` (exact), ``"gelu_tanh"``, ``"relu"``, ``"silu"``, or gated:
            ``"swiglu"`` = silu(gate) * up, ``"geglu"`` = gelu(gate) * up.
        placement: where the norm is: before the first product, or after the residual.
        residual: whether x is added.
        eps: added to the norm's variance or mean square; not negative.
        dropout_p: probability in [0, 1) with which each element is dropped before the residual is added;
            the others are divided by ``1 - dropout_p``. Always active if positive.
        hidden_dropout_p: the same for the activation, before the second product.
        seed, offset: two non-negative ints that fix what is dropped, on every backend alike; without a
            seed torch's generator does.
        save: what the backward finds: ``"preactivation"``, or ``"input"``, x alone, with the rest of the
            block computed again: less memory for one more forward, the same gradients.
        weight_grads: two fp32 tensors of w1's and w2's shapes, to which the backward adds the gradients
            of w1 and w2; ``w1.grad`` and ``w2.grad`` are left alone. Eager mode only.

    Returns:
        ``y`` of x's shape and dtype.

    Saved for backward: x, the parameters, and with ``save="preactivation"`` the preactivation (``[..., F]``,
    gated ``[..., 2F]``), the fp32 statistics of each row, and for post the norm's input. What is dropped is
    drawn again. Without a gradient to compute, nothing.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is not x's.
        ValueError: shapes, devices, norm, activation, placement, eps, a probability, seed, offset, save or
            weight_grads do not fit.
        RuntimeError: weight_grads under torch.compile or a transform of torch.func.

    Source: Vaswani et al. (2017); Xiong et al., On Layer Normalization in the Transformer
    Architecture (2020); Shazeer, GLU Variants Improve Transformer (2020).

    Example:
        >>> import torch, bigkern
        >>> x, w1, w2 = torch.randn(2, 16, 64), torch.randn(256, 64), torch.randn(64, 256)
        >>> bigkern.layernorm_ffn(x, w1, None, w2, None, torch.ones(64), activation="silu").shape
        torch.Size([2, 16, 64])
    """
    arguments: tuple[Any, ...] = bind(
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
        dropout_p=dropout_p,
        hidden_dropout_p=hidden_dropout_p,
        seed=seed,
        offset=offset,
        save=save,
    )
    eager = plain(*arguments[:7])
    if weight_grads is not None:
        _check_sums(weight_grads, w1, w2, eager)
    backend = LAYERNORM_FFN.resolve(*arguments)
    if backend.name == "torch":
        return stock(*arguments, weight_grads=weight_grads)
    arguments = _with_drawn_key(arguments)
    if not eager:
        return cast(Tensor, torch.ops.bigkern.layernorm_ffn(*arguments)[0])
    if arguments[-1] == "nothing":
        return cast(Tensor, backend.forward(*arguments)[0])
    return cast(Tensor, _LayernormFfn.apply(backend, weight_grads, *arguments))


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
    dropout_p: float = 0.0,
    hidden_dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    save: str = "preactivation",
) -> tuple[Any, ...]:
    """Check a public call and turn it into the op's arguments.

    Save is ``"nothing"`` where no backward can follow. The key is None without a seed.
    """
    tensors = (x, w1, b1, w2, b2, norm_weight, norm_bias)
    eps = check_block(tensors, norm, activation, placement, residual, eps)
    check_choice("save", save, ("preactivation", "input"))
    dropout_p = check_dropout(dropout_p)
    hidden_dropout_p = check_dropout(hidden_dropout_p, "hidden_dropout_p")
    key = None if seed is None else dropout_key(max(dropout_p, hidden_dropout_p), seed, offset)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        save = "nothing"
    numbers = (eps, dropout_p, hidden_dropout_p)
    return *tensors, key, norm, activation, placement, residual, *numbers, save


def check_block(
    tensors: tuple[Tensor | None, ...],
    norm: str,
    activation: str,
    placement: str,
    residual: bool,
    eps: float,
    weights_like_x: bool = True,
) -> float:
    """x, w1, b1, w2, b2, norm_weight and norm_bias fit each other and the block; returns eps."""
    check_choice("norm", norm, ("layer", "rms", "none"))
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("placement", placement, ("pre", "post"))
    check_flag("residual", residual)
    eps = check_eps(eps)
    named = dict(zip(_NAMES, tensors, strict=True))
    if norm != "layer" and named["norm_bias"] is not None:
        raise ValueError(f"norm_bias must be None for norm={norm!r}")
    if norm == "none" and named["norm_weight"] is not None:
        raise ValueError("norm_weight must be None for norm='none'")
    for name, tensor in named.items():
        if tensor is not None or name in ("x", "w1", "w2"):
            _check_tensor(name, tensor, tensors[0], weights_like_x or name not in ("w1", "w2"))
    x, w2 = cast(Tensor, named["x"]), cast(Tensor, named["w2"])
    if x.dim() == 0 or w2.dim() == 0:
        raise ValueError(f"x must be [..., D] and w2 [D, F], not {tuple(x.shape)} and {tuple(w2.shape)}")
    D, F_ = x.shape[-1], w2.shape[-1]
    rows = 2 * F_ if activation in GATED else F_
    shapes = {"w2": (D, F_), "w1": (rows, D), "b1": (rows,), "b2": (D,)}
    for name, shape in {**shapes, "norm_weight": (D,), "norm_bias": (D,)}.items():
        tensor = named[name]
        if tensor is not None and tensor.shape != shape:
            given = f"x {tuple(x.shape)}, w2 {tuple(w2.shape)} and activation {activation}"
            raise ValueError(f"{name} must be {shape} to match {given}, not {tuple(tensor.shape)}")
    return eps


def _with_drawn_key(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The op's arguments; if there is dropout and no seed was given, with a key from torch's generator."""
    *_, dropout_p, hidden_dropout_p, _save = arguments
    if arguments[7] is not None or dropout_p == hidden_dropout_p == 0.0:
        return arguments
    return *arguments[:7], drawn_key(), *arguments[8:]


def _check_sums(weight_grads: Any, w1: Tensor, w2: Tensor, eager: bool) -> None:
    if not isinstance(weight_grads, tuple | list) or len(weight_grads) != 2:
        raise ValueError(f"weight_grads must be two tensors, for w1 and w2, not {weight_grads!r}")
    for i, (total, weight) in enumerate(zip(weight_grads, (w1, w2), strict=True)):
        name = f"weight_grads[{i}]"
        if not isinstance(total, Tensor) or total.dtype != torch.float32:
            raise ValueError(f"{name} must be a float32 tensor, not {kind(total)}")
        check_dense(name, total)
        if total.shape != weight.shape or total.device != weight.device or not total.is_contiguous():
            raise ValueError(f"{name} must be contiguous, {tuple(weight.shape)} and on {weight.device}")
    if not eager:
        raise RuntimeError("weight_grads needs eager mode: no torch.compile, no transform of torch.func")


_NAMES = ("x", "w1", "b1", "w2", "b2", "norm_weight", "norm_bias")


def _check_tensor(name: str, tensor: Any, x: Any, like_x: bool) -> None:
    check_dense(name, tensor)
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, not {tensor.device}")
    if not like_x:
        return
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, not {tensor.dtype}")
    if tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name} must have x's dtype {x.dtype}, not {tensor.dtype}")


# ---- the op: fake, kernel, autograd ----------------------------------------------------------------


@torch.library.register_fake("bigkern::layernorm_ffn", lib=LIBRARY)
def _fake(x: Tensor, w1: Tensor, *rest: Any) -> Result:
    *_, norm, _activation, placement, _residual, _eps, _p, _hidden_p, save = rest
    y = x.new_empty(x.shape)
    if save != "preactivation":
        return y, None, None, None, None
    M = math.prod(x.shape[:-1])
    statistics = x.new_empty(M, dtype=torch.promote_types(x.dtype, torch.float32))
    mean = torch.empty_like(statistics) if norm == "layer" else None
    rstd = None if norm == "none" else statistics
    s = x.new_empty(M, x.shape[-1]) if placement == "post" and norm != "none" else None
    return y, s, mean, rstd, x.new_empty(M, w1.shape[0])


@torch.library.register_fake("bigkern::layernorm_ffn_backward", lib=LIBRARY)
def _fake_backward(dy: Tensor, x: Tensor, w1: Tensor, b1: Any, w2: Tensor, *rest: Any) -> Gradients:
    D, rows = x.shape[-1], w1.shape[0]
    shapes = (x.shape, w1.shape, (rows,), w2.shape, (D,), (D,), (D,))
    return tuple(x.new_empty(shape) if want else None for shape, want in zip(shapes, rest[-1], strict=True))


def _forward(*arguments: Any) -> Result:
    return cast(Result, LAYERNORM_FFN.resolve(*arguments).forward(*arguments))


def _backward(dy: Tensor, *rest: Any) -> Gradients:
    tensors, options = rest[:8], rest[12:-1]  # without what was saved and what is wanted
    backend = LAYERNORM_FFN.resolve(*tensors, *options, "preactivation")
    gradients = cast(Gradients, cast(Any, backend.backward)(dy, *rest, None, None))
    return tuple(g if g is None else g.contiguous() for g in gradients)  # of transposed weights, too


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("layernorm_ffn", _forward, _key)
    LIBRARY.impl("layernorm_ffn_backward", _backward, _key)


class _LayernormFfn(torch.autograd.Function):
    """Eager autograd straight onto the chosen backend: a fifth of the cost of a Python custom op."""

    @staticmethod
    def forward(ctx: Any, backend: registry.Backend, weight_grads: Any, *arguments: Any) -> Tensor:  # type: ignore[override]
        result = backend.forward(*arguments)
        _save(ctx, arguments, result)
        ctx.backend, ctx.weight_grads = backend, weight_grads
        return cast(Tensor, result[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        wanted = ctx.needs_input_grad[2:9]
        sums = ctx.weight_grads or (None, None)
        return None, None, *_gradients(ctx.backend.backward, ctx, dy, wanted, *sums)


def _save(ctx: Any, arguments: tuple[Any, ...], result: Result) -> None:
    *ctx.options, _save = arguments[8:]
    ctx.save_for_backward(*arguments[:8], *result[1:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 16
    return _gradients(torch.ops.bigkern.layernorm_ffn_backward, ctx, dy, ctx.needs_input_grad[:7])


def _gradients(
    backward: Callable[..., Gradients], ctx: Any, dy: Tensor, needed: Sequence[bool], *sums: Tensor | None
) -> tuple[Any, ...]:
    """Of x, w1, b1, w2, b2, norm_weight and norm_bias, then the key and the eight options."""
    return *backward(dy, *ctx.saved_tensors, *ctx.options, list(needed), *sums), *(None,) * 9


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
    key: Tensor | None,
    norm: str,
    activation: str,
    placement: str,
    residual: bool,
    eps: float,
    dropout_p: float,
    hidden_dropout_p: float,
    save: str,
    *,
    weight_grads: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The same block by torch's own functions, differentiable by torch's own autograd."""
    affine = (norm_weight, norm_bias, eps, norm)

    def drop(t: Tensor, p: float, head: int) -> Tensor:
        if p == 0.0:
            return t
        return F.dropout(t, p) if key is None else dropped(t, key, p, head)

    def block(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        pre, post = (norm != "none" and placement == at for at in ("pre", "post"))
        n = stock_norm(x, None, *affine)[0] if pre else x
        a = drop(stock_activation(F.linear(n, w1, b1), activation), hidden_dropout_p, HIDDEN)
        y = drop(F.linear(a, w2, b2), dropout_p, OUTPUT)
        y = x + y if residual else y
        return stock_norm(y, None, *affine)[0] if post else y

    if weight_grads is not None:
        w1, w2 = (_AddGradient.apply(w, into) for w, into in zip((w1, w2), weight_grads, strict=True))
    if save == "input":
        return cast(Tensor, checkpoint(block, x, w1, w2, use_reentrant=False))
    return block(x, w1, w2)


class _AddGradient(torch.autograd.Function):
    """A weight as it is; its gradient goes to an fp32 sum."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, into: Tensor) -> Tensor:  # type: ignore[override]
        ctx.into = into
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:  # type: ignore[override]
        ctx.into += gradient
        return None, None


def stock_activation(p: Tensor, activation: str) -> Tensor:
    if activation in GATED:
        gate, up = p.chunk(2, dim=-1)
        return stock_activation(gate, GATED[activation]) * up
    if activation == "gelu_tanh":
        return F.gelu(p, approximate="tanh")
    return cast(Tensor, getattr(F, activation)(p))


def _refuses(backend: str) -> Callable[..., registry.Reason]:
    def refuses(x: Tensor, w1: Tensor, *_: Any) -> registry.Reason:
        if (reason := foreign(x, w1) or unavailable(backend, x)) is not None:
            return reason
        if x.dtype not in KERNEL_DTYPES:
            return f"dtype {x.dtype} is not float32, bfloat16 or float16"
        if x.numel() == 0 or w1.numel() == 0:
            return "x or the weights are empty"
        if backend != "cpu" and x.shape[-1] > MAX_COLUMNS:
            return f"rows of {x.shape[-1]} > {MAX_COLUMNS} elements"
        return autocast(x)

    return refuses


# Rows from which our CPU kernels win on two Zen 4 cores: fewer do not pay for packing the weights.
FASTER_FROM = 32
BF16_INFERENCE_FASTER_FROM = 512  # stock packs bf16 weights as well as we do; to 512 rows it is ahead
BF16_FASTER_BELOW = 1024  # elements a row: beyond them stock's bf16 products are 2 to 16 % ahead


def _cpu_declines(x: Tensor, *rest: Any) -> registry.Reason:
    rows, save = math.prod(x.shape[:-1]), rest[-1]
    least = FASTER_FROM
    if x.dtype == torch.bfloat16:
        if x.shape[-1] >= BF16_FASTER_BELOW:
            return f"stock is faster in bfloat16 from rows of {BF16_FASTER_BELOW} elements on"
        if save == "input":
            return "stock's checkpoint is faster in bfloat16"
        if save == "nothing":
            least = BF16_INFERENCE_FASTER_FROM
    return f"stock is faster below {least} rows" if rows < least else None


def block_of(pieces: Pieces) -> tuple[Callable[..., Result], Callable[..., Gradients]]:
    """The op's two functions: the reference's block with kernels for pieces."""
    return (
        partial(reference.layernorm_ffn, pieces=pieces),
        partial(reference.layernorm_ffn_backward, pieces=pieces),
    )


def composed_pieces(
    norm: Callable[..., Any],
    norm_backward: Callable[..., Any],
    bias_activation: Callable[..., Any],
    bias_activation_backward: Callable[..., Any],
    dropout_add: Callable[..., Any],
) -> Pieces:
    """Products by torch, and each of the kernels around them as a pass of its own."""

    def up(
        x: Tensor, w1: Tensor, b1: Tensor | None, activation: str, dropout: Any, save: bool
    ) -> tuple[Tensor | None, Tensor]:
        product = F.linear(x, w1, b1)  # b1 costs no pass there, and rounding once keeps relu's gradient
        return product if save else None, bias_activation(product, None, activation, *dropout)

    def down(a: Tensor, w2: Tensor, b2: Tensor | None, residual: Tensor | None, dropout: Any) -> Tensor:
        y = F.linear(a, w2, b2)
        if dropout[0] > 0.0:
            return cast(Tensor, dropout_add(y, residual, *dropout))
        return y if residual is None else y.add_(residual)

    def down_norm(
        a: Tensor, w2: Tensor, b2: Tensor | None, residual: Tensor | None, dropout: Any, *affine: Any
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        if residual is None:
            s = down(a, w2, b2, None, dropout)
            y, _, mean, rstd = norm(s, None, *affine, *reference.NO_DROPOUT)
        else:
            y, s, mean, rstd = norm(F.linear(a, w2, b2), residual, *affine, *dropout)
        return y, s, mean, rstd

    def up_backward(
        dz: Tensor, w2: Tensor, preactivation: Tensor, activation: str, dropout: Any, *wanted: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        result = bias_activation_backward(dz @ w2, preactivation, activation, *wanted, *dropout)
        return cast(tuple[Tensor, Tensor | None, Tensor | None], result)

    return Pieces(
        norm,
        norm_backward,
        up,
        down,
        down_norm,
        down_backward_by(dropout_add),
        up_backward,
        reference.weight_gradient,
    )


def down_backward_by(dropout_add: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The piece in which nothing but what dropout lets through is to be computed."""

    def down_backward(dy: Tensor, dropout: Any, want_bias: bool) -> tuple[Tensor, Tensor | None]:
        dz = dropout_add(dy, None, *dropout) if dropout[0] > 0.0 else dy
        return dz, dz.sum(0) if want_bias else None

    return down_backward


def native_pieces(native: Any) -> Pieces:
    names = ("norm", "norm_backward", "bias_activation", "bias_activation_backward", "dropout_add")
    return composed_pieces(*(getattr(native, name) for name in names))


def fused_pieces() -> Pieces:
    """Triton's: each product in one kernel with what follows it."""
    kernels = {
        name: triton_kernel("layernorm_ffn", name) for name in Pieces._fields if name != "down_backward"
    }
    return Pieces(**kernels, down_backward=down_backward_by(triton_kernel("layernorm_ffn", "dropout_add")))


TRITON_PIECES = fused_pieces()


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
