"""The recurrent family: one config, and a classifier, a language model and an encoder-decoder built on it.

config              RecurrentConfig, and the shapes of published models
stack               what every model is made of: layers, dropouts, state, initial weights
classifier          sequences of tokens or vectors sorted
language_model      tied embeddings, carried state
encoder_decoder     with attention
generation          a state kept; greedy, sampling and beam search are the Transformer's
"""

from bigkern.models.recurrent.classifier import RecurrentClassifier
from bigkern.models.recurrent.config import RecurrentConfig
from bigkern.models.recurrent.encoder_decoder import RecurrentEncoderDecoder
from bigkern.models.recurrent.language_model import RecurrentLM
from bigkern.models.recurrent.stack import OURS, STOCK, Parts

__all__ = [
    "OURS",
    "STOCK",
    "Parts",
    "RecurrentClassifier",
    "RecurrentConfig",
    "RecurrentEncoderDecoder",
    "RecurrentLM",
]
