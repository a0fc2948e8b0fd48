"""A Transformer's feed-forward block in Triton: its norm, its products, and what stands around them.

    norm             s = drop(x) + residual      y = (s - mean) * rstd * weight + bias   rms: mean counts as 0
    bias_activation  p = product + bias          out = drop(act(p)), or drop(act(gate) * up), p = [gate | up]
    dropout_add      out = drop(x) + residual
    up, down, ...    the products, each in one kernel with what follows it: `ffn_products.py`

All but the products is bound by memory: a kernel reads its inputs once and writes its outputs once. A row
lives in registers between its statistics and its use:

    norm            program = BM rows          [BM, BN] tile, BN >= N: load, reduce, reduce, store
    norm_backward   program = every P-th       ds is stored row block by row block; the sums for weight and
                    block of BM rows           bias stay in registers until the program's last row:
                                               partial [P, N] fp32, which `column_sum_kernel` then adds up
    bias_activation program = [BM, BN] tile; backward walks down the rows, with dbias summed the same way

Rows too long for registers are walked over in chunks of BN, once for each pass, out of the L2 cache.

Statistics are fp32 and shifted: with m0 = mean(s) as fp32 adds it up, d = s - m0 gives mean = m0 + mean(d)
and var = mean(d^2) - mean(d)^2, where mean(d) is a rounding error. A large mean does not cost the variance
its digits. Partial sums have one owner each: the result is the same in every run.

    norm.py norm_backward.py     the norms           activation.py     what stands between the products
    rows.py dropout.py           what they share     ffn_products.py   the products, from products.py's tiles

Ba, Kiros, Hinton, Layer Normalization (2016); Zhang, Sennrich, RMSNorm (2019); Shazeer, GLU variants (2020).
"""

from __future__ import annotations

from bigkern.triton_kernels.layernorm_ffn.activation import (
    GATED,
    bias_activation,
    bias_activation_backward,
    dropout_add,
)
from bigkern.triton_kernels.layernorm_ffn.products import down, down_norm, up, up_backward, weight_gradient
from bigkern.triton_kernels.norm import norm, norm_backward

__all__ = [
    "GATED",
    "bias_activation",
    "bias_activation_backward",
    "down",
    "down_norm",
    "dropout_add",
    "norm",
    "norm_backward",
    "up",
    "up_backward",
    "weight_gradient",
]
