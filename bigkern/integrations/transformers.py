"""Hugging Face transformers models on our attention, by the name that ``attn_implementation=`` takes."""

from bigkern.patch.transformers.attention import NAME, disable, enable, register

__all__ = ["NAME", "disable", "enable", "register"]
