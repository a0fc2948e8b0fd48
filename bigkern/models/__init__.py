"""Models built from bigkern's layers, each beside its twin in plain PyTorch."""

from bigkern.models.transformer import GPT, StockGPT, TransformerConfig

__all__ = ["GPT", "StockGPT", "TransformerConfig"]
