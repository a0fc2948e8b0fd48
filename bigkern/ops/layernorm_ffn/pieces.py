"""The feed-forward block of GPU backends: the reference's, with kernels for its pieces."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from bigkern.core.library import define_native, triton_kernel
from bigkern.ops.layernorm_ffn import reference
from bigkern.ops.layernorm_ffn.call import Gradients, LayernormFfn, LayernormFfnBackward, Result
from bigkern.ops.layernorm_ffn.reference import Pieces

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


def block_of(
    pieces: Pieces,
) -> tuple[Callable[[LayernormFfn], Result], Callable[[LayernormFfnBackward], Gradients]]:
    """The op's two functions."""
    forward, backward = reference.layernorm_ffn, reference.layernorm_ffn_backward
    return partial(forward, pieces=pieces), partial(backward, pieces=pieces)


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
    ) -> Any:
        if residual is None:
            return reference.down_norm_by(down, norm)(a, w2, b2, None, dropout, *affine)
        y, s, mean, rstd = norm(F.linear(a, w2, b2), residual, *affine, *dropout)
        return y, s, mean, rstd

    def up_backward(
        dz: Tensor, w2: Tensor, preactivation: Tensor, activation: str, dropout: Any, *wanted: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        result = bias_activation_backward(dz @ w2, preactivation, activation, *wanted, *dropout)
        return cast(tuple[Tensor, Tensor | None, Tensor | None], result)

    down_backward, weight_gradient = down_backward_by(dropout_add), reference.weight_gradient
    return Pieces(norm, norm_backward, up, down, down_norm, down_backward, up_backward, weight_gradient)


def down_backward_by(dropout_add: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The piece in which nothing but what dropout lets through is to be computed."""

    def down_backward(dy: Tensor, dropout: Any, want_bias: bool) -> tuple[Tensor, Tensor | None]:
        dz = dropout_add(dy, None, *dropout) if dropout[0] > 0.0 else dy
        return dz, dz.sum(0) if want_bias else None

    return down_backward


PASSES = ("norm", "norm_backward", "bias_activation", "bias_activation_backward", "dropout_add")


def native_pieces(native: Any) -> Pieces:
    return composed_pieces(*(getattr(native, name) for name in PASSES))


def triton_library_pieces() -> Pieces:
    return composed_pieces(*(triton_kernel("layernorm_ffn", name) for name in PASSES))


def triton_pieces() -> Pieces:
    """Each product in one kernel with what follows it."""
    kernels = {
        name: triton_kernel("layernorm_ffn", name) for name in Pieces._fields if name != "down_backward"
    }
    return Pieces(**kernels, down_backward=down_backward_by(triton_kernel("layernorm_ffn", "dropout_add")))
