"""Models built from bigkern's layers, each beside its twin in plain PyTorch."""

from bigkern.models.cnn import VGG, CNNConfig, ConvNeXt, InceptionV3, ResNet, SmallCNN
from bigkern.models.recurrent import (
    RecurrentClassifier,
    RecurrentConfig,
    RecurrentEncoderDecoder,
    RecurrentLM,
)
from bigkern.models.transformer import (
    BERT,
    GPT,
    BERTForMaskedLM,
    BERTForPreTraining,
    BERTForSequenceClassification,
    BERTForTokenClassification,
    EncoderDecoder,
    StockGPT,
    TransformerConfig,
    ViT,
)

__all__ = [
    "BERT",
    "GPT",
    "VGG",
    "BERTForMaskedLM",
    "BERTForPreTraining",
    "BERTForSequenceClassification",
    "BERTForTokenClassification",
    "CNNConfig",
    "ConvNeXt",
    "EncoderDecoder",
    "InceptionV3",
    "RecurrentClassifier",
    "RecurrentConfig",
    "RecurrentEncoderDecoder",
    "RecurrentLM",
    "ResNet",
    "SmallCNN",
    "StockGPT",
    "TransformerConfig",
    "ViT",
]
