"""The feed-forward block with weights frozen for inference: the public functions, the op, its candidates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor

from bigkern.core.checks import check_choice, check_dense, check_flag, kind
from bigkern.core.library import (
    KERNEL_DTYPES,
    MAX_COLUMNS,
    autocast,
    define_native,
    triton_kernel,
    unavailable,
    unproven,
)
from bigkern.core.op import Measures, Op, native
from bigkern.core.registry import Backend, Reason
from bigkern.ops.layernorm_ffn import frozen_reference as reference
from bigkern.ops.layernorm_ffn import frozen_stock as stock
from bigkern.ops.layernorm_ffn import layernorm_ffn
from bigkern.ops.layernorm_ffn.call import Activation, Norm, Placement
from bigkern.ops.layernorm_ffn.frozen_call import (
    FP8,
    FrozenLayernormFfn,
    FrozenResult,
    FrozenWeight,
    bind,
    check_fp8,
    options,
    sizes,
)
from bigkern.ops.layernorm_ffn.frozen_reference import PIECES
from bigkern.ops.layernorm_ffn.reference import NO_DROPOUT, Pieces, down_norm_by

define_native("pack_ffn_weight(Tensor weight, bool gated) -> Tensor packed")

Weights = Literal["packed", "int8", "fp8"]
STORED = {"int8": torch.int8, "fp8": FP8}


# ---- the public functions --------------------------------------------------------------------------


def freeze_weight(weight: Tensor, weights: Weights, *, gated: bool = False) -> FrozenWeight:
    r"""A weight as :func:`frozen_layernorm_ffn` reads it.

    Args:
        weight: ``[N, K]`` as :class:`torch.nn.Linear` has it; float32, bfloat16 or float16.
        weights: ``"packed"``: the same numbers, and on a CPU beside them a copy in the order in which the
            kernel reads them: results are the same to the last bit. ``"int8"``: 1 byte a number and one
            scale a row, ``w = q * max|row| / 127``; each number moves by at most 1/254 of its row's largest,
            for normally distributed weights a block's output by about 1 % of its size. ``"fp8"`` (e4m3):
            the same bytes, and the products' other operands are rounded to e4m3, too, row by row, so that
            the GPU multiplies in 8 bits: about 5 %.
        gated: whether this is the first weight of a gated activation, ``[2F, K]``.

    Raises:
        TypeError: ``weight`` is not a floating-point tensor.
        ValueError: ``weights`` is not one of the above, ``weight`` is not a matrix, a gated one has an odd
            number of rows, or ``"fp8"`` is asked of a device that does not multiply in it.

    Example:
        >>> import torch
        >>> from bigkern.ops.layernorm_ffn.frozen import freeze_weight
        >>> freeze_weight(torch.randn(256, 64), "int8").values.dtype
        torch.int8
    """
    check_choice("weights", weights, ("packed", *STORED))
    check_dense("weight", weight)
    if weight.dtype not in (*KERNEL_DTYPES, torch.float64):
        raise TypeError(f"weight must be a floating-point Tensor, not {kind(weight)}")
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight must be [N, K] with K > 0, not of shape {tuple(weight.shape)}")
    if check_flag("gated", gated) and weight.shape[0] % 2 != 0:
        raise ValueError(f"weight must have an even number of rows to be gated, not {weight.shape[0]}")
    values, scale = weight.detach().resolve_neg(), None
    if weights in STORED:
        if weights == "fp8":
            check_fp8(weight.device, "weights")
        values, scale = reference.quantised(values, STORED[weights])
    return FrozenWeight(values, scale, packed(values, gated))


def packed(values: Tensor, gated: bool) -> Tensor | None:
    """The copy that the CPU kernel reads, if it runs here and takes this dtype."""
    if values.dtype not in (*KERNEL_DTYPES, torch.int8) or values.numel() == 0:
        return None
    if unavailable("cpu", values) is not None:
        return None
    return cast(Tensor, torch.ops.bigkern_native.pack_ffn_weight.default(values, gated))


def frozen_linear(x: Tensor, weight: FrozenWeight, bias: Tensor | None = None) -> Tensor:
    """One linear layer with a frozen weight, by torch's own product: ``x @ weight.T + bias`` in x's dtype."""
    return reference.product(x, reference.Weight(*weight[:2]), bias)


def frozen_layernorm_ffn(
    x: Tensor,
    w1: FrozenWeight,
    b1: Tensor | None,
    w2: FrozenWeight,
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
    r"""The second half of a Transformer block with weights frozen for inference.

    ``pre``:  ``y = x + act(norm(x) @ w1.T + b1) @ w2.T + b2``, and ``post``, and no norm, as
    :func:`bigkern.layernorm_ffn` has them, without dropout.

    Args:
        x: ``[..., D]``; float32, bfloat16 or float16 (float64 runs on stock PyTorch).
        w1, w2: of :func:`freeze_weight`, ``[F, D]`` (gated ``[2F, D]``) and ``[D, F]``. They must not be
            written to any more: a packed copy would not notice.
        b1, b2, norm_weight, norm_bias, norm, activation, placement, residual, eps: as
            :func:`bigkern.layernorm_ffn`'s.

    Returns:
        ``y`` of x's shape and dtype. Sums are fp32; 8-bit weights are multiplied by their scales there.

    Saved for backward: with a gradient to compute, stock PyTorch runs, and saves what it needs. x, the
    biases and the norm can have gradients; the weights have none.

    Raises:
        TypeError: an argument is not what it must be, or its dtype is not x's.
        ValueError: shapes, devices, norm, activation, placement or eps do not fit; fp8 on a GPU without it.

    Source: Dettmers et al., LLM.int8() (2022); Micikevicius et al., FP8 Formats for Deep Learning (2022).

    Example:
        >>> import torch
        >>> from bigkern.ops.layernorm_ffn.frozen import freeze_weight, frozen_layernorm_ffn
        >>> w1, w2 = (freeze_weight(torch.randn(shape), "int8") for shape in ((256, 64), (64, 256)))
        >>> frozen_layernorm_ffn(torch.randn(16, 64), w1, None, w2, None, torch.ones(64)).shape
        torch.Size([16, 64])
    """
    call = bind(
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
    tensors = (x, b1, b2, norm_weight, norm_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return reference.frozen_layernorm_ffn(call)
    if w1.scale is None and w2.scale is None and not x.is_cpu:  # only CPUs read packed weights
        options: dict[str, Any] = {"norm": norm, "activation": activation, "placement": placement}
        weights = (w1.values, b1, w2.values, b2, norm_weight, norm_bias)
        return layernorm_ffn(x, *weights, residual=residual, eps=eps, **options)
    return cast(Tensor, FROZEN(call))


# ---- the op and its candidates ---------------------------------------------------------------------

FROZEN = Op(
    "frozen_layernorm_ffn",
    FrozenLayernormFfn,
    FrozenResult,
    bind=bind,
    fake=lambda call: FrozenResult(call.x.new_empty(call.x.shape)),
    reference=Backend("reference", reference.frozen_layernorm_ffn),
    measures=Measures(sizes, options),
)


def _refuses(backend: str) -> Callable[[FrozenLayernormFfn], Reason]:
    def refuses(call: FrozenLayernormFfn) -> Reason:
        x, w1, w2 = call.x, call.w1, call.w2
        if (reason := unavailable(backend, x)) is not None:
            return reason
        if x.dtype not in KERNEL_DTYPES:
            return f"dtype {x.dtype} is not float32, bfloat16 or float16"
        if x.numel() == 0 or w1.numel() == 0:
            return "x or the weights are empty"
        if w1.dtype != w2.dtype:
            return f"the weights are {w1.dtype} and {w2.dtype}"
        if backend.startswith("cpu") and w1.dtype == FP8:
            return "CPUs do not multiply in fp8"
        if backend == "triton" and call.w1_scale is None:
            return "packed weights are the CPU's"
        if backend == "triton" and x.shape[-1] > MAX_COLUMNS:
            return f"rows of {x.shape[-1]} > {MAX_COLUMNS} elements"
        return autocast(x)

    return refuses


def triton_pieces() -> Pieces:
    """Each product in one kernel with what follows it; fp8 rounds the other operand in a pass of its own."""
    quantize_rows, frozen_up, frozen_down = (
        triton_kernel("layernorm_ffn.frozen", name) for name in ("quantize_rows", "frozen_up", "frozen_down")
    )

    def operand(x: Tensor, w: reference.Weight) -> tuple[Tensor, Tensor | None]:
        return quantize_rows(x) if w.values.dtype == FP8 else (x, None)

    def up(x: Tensor, w1: Any, b1: Any, activation: str, dropout: Any, save: bool) -> tuple[None, Tensor]:
        return None, frozen_up(*operand(x, w1), *w1, b1, activation, x.dtype)

    def down(a: Tensor, w2: Any, b2: Any, residual: Tensor | None, dropout: Any) -> Tensor:
        return cast(Tensor, frozen_down(*operand(a, w2), *w2, b2, residual, a.dtype))

    norm = triton_kernel("layernorm_ffn", "norm")
    return PIECES._replace(norm=norm, up=up, down=down, down_norm=down_norm_by(down, norm))


def library_pieces() -> Pieces:
    """torch's own products, and the CPU's kernels around them."""
    kernels = torch.ops.bigkern_native

    def activate(preactivation: Tensor, activation: str) -> Tensor:
        return cast(Tensor, kernels.bias_activation(preactivation, None, activation, *NO_DROPOUT))

    return reference.pieces_by(reference.product, activate, kernels.norm)


FROZEN.register(
    Backend(
        "triton",
        partial(reference.frozen_layernorm_ffn, pieces=triton_pieces()),
        None,
        _refuses("triton"),
        unproven("frozen_layernorm_ffn", "triton"),
    )
)
FROZEN.register(Backend("cpu", native("frozen_layernorm_ffn"), None, _refuses("cpu")))
FROZEN.register(
    Backend(
        "cpu_library",
        partial(reference.frozen_layernorm_ffn, pieces=library_pieces()),
        None,
        _refuses("cpu_library"),
        declines=lambda call: "not measured here: packed weights are read faster",
    )
)
FROZEN.register(Backend("torch", stock.frozen_layernorm_ffn, by_torch=True))
