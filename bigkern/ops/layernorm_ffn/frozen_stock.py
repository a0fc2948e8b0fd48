"""The feed-forward block with frozen weights by torch's own functions: fp8 is multiplied in fp8.

``torch._scaled_mm`` sums e4m3 products in fp32 and applies the scales of both factors' rows, as the reference
does with widened factors. On GPUs its results with a scale for each row are bfloat16, of sizes that are whole
16 bytes; all else is the reference's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigkern.ops.layernorm_ffn import frozen_reference as reference
from bigkern.ops.layernorm_ffn.frozen_call import FP8, FrozenLayernormFfn
from bigkern.ops.layernorm_ffn.frozen_reference import Weight


def frozen_layernorm_ffn(call: FrozenLayernormFfn) -> Tensor:
    """y, without a gradient."""
    return reference.frozen_layernorm_ffn(call, PIECES)


def product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``x w^T + b`` in x's dtype."""
    w = weight.values
    whole = w.shape[0] % 16 == 0 and w.shape[1] % 16 == 0
    if x.is_cuda and w.dtype == FP8 and x.dtype == torch.bfloat16 and whole and x.shape[0] > 0:
        return scaled_product(x, weight, bias)
    return reference.product(x, weight, bias)


def scaled_product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """The same in one product of e4m3."""
    q, x_scale = reference.quantised(x, FP8)
    w, w_scale = weight
    assert w_scale is not None
    bias = None if bias is None else bias.to(x.dtype)  # under autocast it may be float32
    return torch._scaled_mm(q, w.t(), x_scale.unsqueeze(1), w_scale.unsqueeze(0), bias, out_dtype=x.dtype)


PIECES = reference.pieces_by(product)
