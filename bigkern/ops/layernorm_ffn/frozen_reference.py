"""The feed-forward block with weights frozen for inference, in plain torch: what every kernel must compute.

Weights of 8 bits have one fp32 scale for each of their rows, an output of the product: w = q * scale.

    int8    q = round(w / scale)     scale = max|row| / 127     p = (x q^T) * scale + b
    fp8     q = e4m3(w / scale)      scale = max|row| / 448     p = (xq q^T) * xscale * scale + b
            where the rows of x are rounded in the same way

Sums are fp32. Everything else is layernorm_ffn's block, without dropout and without a backward.
Dettmers et al., LLM.int8() (2022); Micikevicius et al., FP8 Formats for Deep Learning (2022).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.ops.layernorm_ffn.call import LayernormFfn
from bigkern.ops.layernorm_ffn.frozen_call import FP8, FrozenLayernormFfn
from bigkern.ops.layernorm_ffn.reference import PLAIN, Dropout, Pieces, activate, down_norm_by, layernorm_ffn

LARGEST = {torch.int8: 127.0, FP8: 448.0}


class Weight(NamedTuple):
    """q [N, K] and its scale [N]; or w in x's dtype and None."""

    values: Tensor
    scale: Tensor | None


def quantised(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``[N, K]`` in int8 or e4m3, and one fp32 scale a row; a row of zeros has the scale 1."""
    wide = w.to(torch.promote_types(w.dtype, torch.float32))
    largest = wide.abs().amax(-1)
    scale = torch.where(largest == 0, 1, largest / LARGEST[dtype])
    shares = wide / scale.unsqueeze(-1)
    return (shares.round() if dtype == torch.int8 else shares).to(dtype), scale.float()


def product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``x w^T + b`` in x's dtype."""
    w, scale = weight
    if scale is None:
        return F.linear(x, w, bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    if w.dtype == FP8:
        q, x_scale = quantised(x.detach(), FP8)
        rounded = q.to(wide) * x_scale.to(wide).unsqueeze(-1)
        p = F.linear(rounded + (x - x.detach()), w.to(wide))  # x's gradient passes the rounding
    else:
        p = F.linear(x, w.to(x.dtype)).to(wide)
    p = p * scale
    return (p if bias is None else p + bias).to(x.dtype)


def pieces_by(
    product: Callable[[Tensor, Weight, Tensor | None], Tensor],
    activate: Callable[[Tensor, str], Tensor] = activate,
    norm: Callable[..., Any] = PLAIN.norm,
) -> Pieces:
    """The pieces around a product with frozen weights: the plain ones, or a kernel's."""

    def up(
        x: Tensor, w1: Weight, b1: Tensor | None, activation: str, dropout: Dropout, save: bool
    ) -> tuple[None, Tensor]:
        return None, activate(product(x, w1, b1), activation)

    def down(a: Tensor, w2: Weight, b2: Tensor | None, residual: Tensor | None, dropout: Dropout) -> Tensor:
        y = product(a, w2, b2)
        return y if residual is None else residual + y

    return PLAIN._replace(norm=norm, up=up, down=down, down_norm=down_norm_by(down, norm))


PIECES = pieces_by(product)


def frozen_layernorm_ffn(call: FrozenLayernormFfn, pieces: Pieces = PIECES) -> Tensor:
    """``y`` like x. The packed weights are the CPU kernel's; here they are not looked at."""
    w1: Any = Weight(call.w1, call.w1_scale)
    w2: Any = Weight(call.w2, call.w2_scale)
    affine = (call.norm_weight, call.norm_bias)
    words = (call.norm, call.activation, call.placement)
    numbers = (call.eps, 0.0, 0.0)
    operands = (call.x, w1, call.b1, w2, call.b2, *affine)
    block = LayernormFfn(*operands, None, *words, call.residual, *numbers, "nothing")
    return layernorm_ffn(block, pieces).y
