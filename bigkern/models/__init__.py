"""Models built from bigkern's layers, each beside its twin in plain PyTorch."""

from bigkern.models.transformer import GPT, GPTConfig, StockGPT

__all__ = ["GPT", "GPTConfig", "StockGPT"]
