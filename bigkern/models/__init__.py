"""Models built from bigkern's layers, each beside its twin in plain PyTorch."""

from bigkern.models.transformer import (
    BERT,
    GPT,
    BERTForMaskedLM,
    BERTForPreTraining,
    BERTForSequenceClassification,
    BERTForTokenClassification,
    StockGPT,
    TransformerConfig,
)

__all__ = [
    "BERT",
    "GPT",
    "BERTForMaskedLM",
    "BERTForPreTraining",
    "BERTForSequenceClassification",
    "BERTForTokenClassification",
    "StockGPT",
    "TransformerConfig",
]
