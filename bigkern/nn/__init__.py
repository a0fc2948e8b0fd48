"""Drop-in layers: torch's constructors, parameters, keys and errors on bigkern's ops."""

from bigkern.nn.attention import MultiheadAttention
from bigkern.nn.frozen import FrozenLinear
from bigkern.nn.layer_norm import LayerNorm, RMSNorm
from bigkern.nn.layernorm_ffn import FeedForward, LayerNormFFN
from bigkern.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "FeedForward",
    "FrozenLinear",
    "LayerNorm",
    "LayerNormFFN",
    "MultiheadAttention",
    "RMSNorm",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]
