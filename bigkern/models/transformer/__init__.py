"""The Transformer family: one config, and decoders, encoders, encoder-decoders and image models built on it.

config, presets     TransformerConfig, and the shapes of published models
positions           sinusoidal, learned, rotary, ALiBi
blocks, trunk       what every family is made of
decoder             GPT (GPT-2, Llama)
encoder             BERT and its heads
encoder_decoder     the first Transformer, BART
vision              ViT
generation, cache   greedy, sampling, beam search; keys and values kept
pretrained          weights of Hugging Face models in ours
stock               the same in plain PyTorch, to compare with
"""

from bigkern.models.transformer.blocks import OURS, Parts
from bigkern.models.transformer.config import RopeScaling, TransformerConfig
from bigkern.models.transformer.decoder import GPT
from bigkern.models.transformer.encoder import (
    BERT,
    BERTForMaskedLM,
    BERTForPreTraining,
    BERTForSequenceClassification,
    BERTForTokenClassification,
)
from bigkern.models.transformer.encoder_decoder import EncoderDecoder
from bigkern.models.transformer.positions import alibi_slopes, rotary_positions, sinusoidal_positions
from bigkern.models.transformer.pretrained import convert_state_dict, from_transformers
from bigkern.models.transformer.stock import STOCK, StockGPT
from bigkern.models.transformer.trunk import parameters_of
from bigkern.models.transformer.vision import ViT

__all__ = [
    "BERT",
    "GPT",
    "OURS",
    "STOCK",
    "BERTForMaskedLM",
    "BERTForPreTraining",
    "BERTForSequenceClassification",
    "BERTForTokenClassification",
    "EncoderDecoder",
    "Parts",
    "RopeScaling",
    "StockGPT",
    "TransformerConfig",
    "ViT",
    "alibi_slopes",
    "convert_state_dict",
    "from_transformers",
    "parameters_of",
    "rotary_positions",
    "sinusoidal_positions",
]
