"""Drop-in layers: torch's constructors, parameters, keys and errors on bigkern's ops."""

from bigkern.nn.attention import MultiheadAttention
from bigkern.nn.batch_norm import BatchNorm2d
from bigkern.nn.frozen import FrozenLinear
from bigkern.nn.layer_norm import LayerNorm, RMSNorm
from bigkern.nn.layernorm_ffn import FeedForward, LayerNormFFN
from bigkern.nn.linear import Linear
from bigkern.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "BatchNorm2d",
    "FeedForward",
    "FrozenLinear",
    "LayerNorm",
    "LayerNormFFN",
    "Linear",
    "MultiheadAttention",
    "RMSNorm",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
