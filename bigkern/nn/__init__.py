"""Drop-in layers: torch's constructors, parameters, keys and errors on bigkern's ops."""

from bigkern.nn.attention import MultiheadAttention
from bigkern.nn.batch_norm import BatchNorm2d
from bigkern.nn.frozen import FrozenLinear
from bigkern.nn.layer_norm import LayerNorm, RMSNorm
from bigkern.nn.layernorm_ffn import FeedForward, LayerNormFFN
from bigkern.nn.linear import Linear
from bigkern.nn.recurrent import GRU, LSTM, RNN
from bigkern.nn.recurrent_cells import GRUCell, LSTMCell, RNNCell
from bigkern.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "BatchNorm2d",
    "FeedForward",
    "FrozenLinear",
    "GRUCell",
    "LSTMCell",
    "LayerNorm",
    "LayerNormFFN",
    "Linear",
    "MultiheadAttention",
    "RMSNorm",
    "RNNCell",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
