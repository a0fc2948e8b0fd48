"""bigkern: fused attention, LayerNorm + FFN and Adam for PyTorch, on CPUs and GPUs.

    bigkern.attention, bigkern.scaled_dot_product_attention     softmax attention
    bigkern.varlen_attention, bigkern.decode_attention          of packed sequences, and from a cache
    bigkern.layer_norm, bigkern.rms_norm                        norms, fused with a residual
    bigkern.layernorm_ffn                                       the second half of a Transformer block
    bigkern.linear, bigkern.batch_norm                          a linear layer; BatchNorm, addition and ReLU
    bigkern.recurrent                                           a layer of LSTM, GRU or RNN over a sequence
    bigkern.nn, bigkern.optim                                   drop-in layers and optimizers
    bigkern.freeze, bigkern.frozen_layernorm_ffn                weights packed or in 8 bits, for inference
    bigkern.patch, bigkern.unpatch                              the same for a model you already have
    bigkern.explain, bigkern.use                                see and force which backend runs
    bigkern.tune, bigkern.wisdom                                measure here what is fastest, and keep it

Every op falls back to stock PyTorch where that is faster, or where a kernel is unproven.
"""

from bigkern import nn, optim, wisdom
from bigkern.core.registry import BackendRefused, explain, use
from bigkern.core.tune import tune
from bigkern.freeze import freeze
from bigkern.ops.attention import attention
from bigkern.ops.attention.decode import decode_attention
from bigkern.ops.attention.merge import merge_attention
from bigkern.ops.attention.sdpa import scaled_dot_product_attention
from bigkern.ops.attention.varlen import varlen_attention
from bigkern.ops.batch_norm import batch_norm
from bigkern.ops.layernorm_ffn import layernorm_ffn
from bigkern.ops.layernorm_ffn.frozen import freeze_weight, frozen_layernorm_ffn
from bigkern.ops.layernorm_ffn.frozen_call import FrozenWeight
from bigkern.ops.linear import linear
from bigkern.ops.norm import layer_norm, rms_norm
from bigkern.ops.recurrent import recurrent
from bigkern.patch import patch, unpatch

__version__ = "0.1.0"

__all__ = [
    "BackendRefused",
    "FrozenWeight",
    "attention",
    "batch_norm",
    "decode_attention",
    "explain",
    "freeze",
    "freeze_weight",
    "frozen_layernorm_ffn",
    "layer_norm",
    "layernorm_ffn",
    "linear",
    "merge_attention",
    "nn",
    "optim",
    "patch",
    "recurrent",
    "rms_norm",
    "scaled_dot_product_attention",
    "tune",
    "unpatch",
    "use",
    "varlen_attention",
    "wisdom",
]
