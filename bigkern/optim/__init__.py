"""Optimizers in the place of ``torch.optim``'s: the same arguments, the same state, other kernels."""

from bigkern.optim.adam import Adam, AdamW

__all__ = ["Adam", "AdamW"]
