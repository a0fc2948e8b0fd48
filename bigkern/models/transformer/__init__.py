"""The Transformer family: one config, and decoders, encoders, encoder-decoders and image models built on it.

config, presets     TransformerConfig, and the shapes of published models
positions           sinusoidal, learned, rotary, ALiBi
blocks, trunk       what every family is made of
decoder             GPT (GPT-2, Llama)
generation, cache   greedy, sampling, beam search; keys and values kept
stock               the same in plain PyTorch, to compare with
"""

from bigkern.models.transformer.blocks import OURS, Parts
from bigkern.models.transformer.config import RopeScaling, TransformerConfig
from bigkern.models.transformer.decoder import GPT
from bigkern.models.transformer.positions import alibi_slopes, rotary_positions, sinusoidal_positions
from bigkern.models.transformer.stock import STOCK, StockGPT
from bigkern.models.transformer.trunk import parameters_of

__all__ = [
    "GPT",
    "OURS",
    "STOCK",
    "Parts",
    "RopeScaling",
    "StockGPT",
    "TransformerConfig",
    "alibi_slopes",
    "parameters_of",
    "rotary_positions",
    "sinusoidal_positions",
]
