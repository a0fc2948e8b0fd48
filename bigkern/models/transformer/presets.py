"""Shapes of published Transformers, by their usual names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

GPT2: dict[str, Any] = {
    "vocab_size": 50257,
    "context": 1024,
    "activation": "gelu_tanh",
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "end_token": 50256,
}
BERT: dict[str, Any] = {
    "vocab_size": 30522,
    "context": 512,
    "placement": "post",
    "eps": 1e-12,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "segments": 2,
    "embedding_norm": True,
    "pad_token": 0,
    "classes": 2,
}
LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "context": 4096,
    "positions": "rotary",
    "activation": "swiglu",
    "norm": "rms",
    "bias": False,
    "tied": False,
    "end_token": 2,
}
LLAMA3: dict[str, Any] = {
    **LLAMA,
    "vocab_size": 128256,
    "context": 8192,
    "kv_heads": 8,
    "rope_theta": 500000.0,
    "end_token": 128001,
}
VIT: dict[str, Any] = {"eps": 1e-6}
# Which ids the start, the end and padding have is not in the paper.
VASWANI: dict[str, Any] = {
    "vocab_size": 37000,
    "context": 512,
    "layers": 6,
    "positions": "sinusoidal",
    "activation": "relu",
    "placement": "post",
    "dropout": 0.1,
    "start_token": 0,
    "end_token": 1,
    "pad_token": 2,
}
BART: dict[str, Any] = {
    "vocab_size": 50265,
    "context": 1024,
    "placement": "post",
    "dropout": 0.1,
    "embedding_norm": True,
    "start_token": 2,
    "end_token": 2,
    "pad_token": 1,
}

BASE: dict[str, Any] = {"layers": 12, "heads": 12, "width": 768}
LARGE: dict[str, Any] = {"layers": 24, "heads": 16, "width": 1024}


class Presets:
    """One constructor a published model; each takes fields to change, ``gpt2(context=2048)``.

    Dropout is the publication's.

    Example:
        >>> from bigkern.models import TransformerConfig
        >>> TransformerConfig.llama3_8b().kv_heads
        8
    """

    __slots__ = ()

    @classmethod
    def _of(cls, changes: dict[str, Any], *shared: dict[str, Any], **own: Any) -> Self:
        fields: dict[str, Any] = {}
        for part in (*shared, own, changes):
            fields |= part
        return cls(**fields)

    # ---- decoders: Radford et al. (2019); Touvron et al., Llama 2 (2023); Grattafiori et al., Llama 3 (2024)

    @classmethod
    def gpt2(cls, **changes: Any) -> Self:
        """GPT-2, 124 M parameters."""
        return cls._of(changes, GPT2, BASE)

    @classmethod
    def gpt2_medium(cls, **changes: Any) -> Self:
        """GPT-2, 355 M parameters."""
        return cls._of(changes, GPT2, LARGE)

    @classmethod
    def gpt2_large(cls, **changes: Any) -> Self:
        """GPT-2, 774 M parameters."""
        return cls._of(changes, GPT2, layers=36, heads=20, width=1280)

    @classmethod
    def gpt2_xl(cls, **changes: Any) -> Self:
        """GPT-2, 1.6 G parameters."""
        return cls._of(changes, GPT2, layers=48, heads=25, width=1600)

    @classmethod
    def llama_7b(cls, **changes: Any) -> Self:
        """Llama 2, 6.7 G parameters."""
        return cls._of(changes, LLAMA, layers=32, heads=32, width=4096, hidden=11008)

    @classmethod
    def llama_13b(cls, **changes: Any) -> Self:
        """Llama 2, 13 G parameters."""
        return cls._of(changes, LLAMA, layers=40, heads=40, width=5120, hidden=13824)

    @classmethod
    def llama_70b(cls, **changes: Any) -> Self:
        """Llama 2, 69 G parameters."""
        return cls._of(changes, LLAMA, layers=80, heads=64, kv_heads=8, width=8192, hidden=28672)

    @classmethod
    def llama3_8b(cls, **changes: Any) -> Self:
        """Llama 3, 8 G parameters."""
        return cls._of(changes, LLAMA3, layers=32, heads=32, width=4096, hidden=14336)

    @classmethod
    def llama3_70b(cls, **changes: Any) -> Self:
        """Llama 3, 71 G parameters."""
        return cls._of(changes, LLAMA3, layers=80, heads=64, width=8192, hidden=28672)

    # ---- encoders: Devlin et al. (2019)

    @classmethod
    def bert_base(cls, **changes: Any) -> Self:
        """BERT, 109 M parameters."""
        return cls._of(changes, BERT, BASE)

    @classmethod
    def bert_large(cls, **changes: Any) -> Self:
        """BERT, 335 M parameters."""
        return cls._of(changes, BERT, LARGE)

    # ---- encoder-decoders: Vaswani et al. (2017); Lewis et al., BART (2020)

    @classmethod
    def transformer_base(cls, **changes: Any) -> Self:
        """The first Transformer, 63 M parameters with a vocabulary of 37000."""
        return cls._of(changes, VASWANI, heads=8, width=512)

    @classmethod
    def transformer_big(cls, **changes: Any) -> Self:
        """The first Transformer's big one, 214 M parameters with a vocabulary of 37000."""
        return cls._of(changes, VASWANI, heads=16, width=1024, dropout=0.3)

    @classmethod
    def bart_base(cls, **changes: Any) -> Self:
        """BART, 139 M parameters."""
        return cls._of(changes, BART, layers=6, heads=12, width=768)

    @classmethod
    def bart_large(cls, **changes: Any) -> Self:
        """BART, 406 M parameters."""
        return cls._of(changes, BART, layers=12, heads=16, width=1024)

    # ---- images: Dosovitskiy et al. (2021)

    @classmethod
    def vit_b16(cls, **changes: Any) -> Self:
        """ViT-B/16, 87 M parameters."""
        return cls._of(changes, VIT, BASE)

    @classmethod
    def vit_b32(cls, **changes: Any) -> Self:
        """ViT-B/32, 88 M parameters."""
        return cls._of(changes, VIT, BASE, patch_size=32)

    @classmethod
    def vit_l16(cls, **changes: Any) -> Self:
        """ViT-L/16, 304 M parameters."""
        return cls._of(changes, VIT, LARGE)

    @classmethod
    def vit_l32(cls, **changes: Any) -> Self:
        """ViT-L/32, 307 M parameters."""
        return cls._of(changes, VIT, LARGE, patch_size=32)

    @classmethod
    def vit_h14(cls, **changes: Any) -> Self:
        """ViT-H/14, 632 M parameters."""
        return cls._of(changes, VIT, layers=32, heads=16, width=1280, patch_size=14)
