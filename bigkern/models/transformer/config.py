"""``TransformerConfig``: the shape of a Transformer of any of the four families."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from bigkern.models.config_checks import check_fields
from bigkern.models.transformer.presets import Presets
from bigkern.ops.layernorm_ffn.call import GATED, Activation, Placement, Save

Positions = Literal["learned", "sinusoidal", "rotary", "alibi"]
Norm = Literal["layer", "rms"]
Pooling = Literal["class", "mean"]

CHOICES: dict[str, Any] = {
    "positions": Positions,
    "activation": Activation,
    "norm": Norm,
    "placement": Placement,
    "pooling": Pooling,
    "save": Save,
}
SIZES = (
    "vocab_size",
    "context",
    "layers",
    "heads",
    "width",
    "image_size",
    "patch_size",
    "channels",
    "classes",
)
OPTIONAL_SIZES = ("hidden", "kv_heads", "decoder_layers")
DROPOUTS = ("dropout", "attention_dropout", "hidden_dropout")
TOKENS = ("start_token", "end_token", "pad_token")


class RopeScaling(NamedTuple):
    """How Llama 3.1 stretches rotary positions over more than the context that it was trained on.

    Turns slower than ``low`` a trained context become ``factor`` times slower; those faster than ``high``
    stay; between the two it blends.
    """

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    trained_context: int = 8192


@dataclass(frozen=True, slots=True)
class TransformerConfig(Presets):
    """The shape of a Transformer; each family reads the fields that concern it.

    ``TransformerConfig.gpt2()``, ``.bert_base()``, ``.llama3_8b()`` and the like are the shapes of published
    models, see :class:`bigkern.models.transformer.presets.Presets`; each takes fields to change.

    Raises:
        ValueError: a size is below 1, sizes do not divide, a choice is not one of those named, a
            probability is not in [0, 1).

    Example:
        >>> from bigkern.models import TransformerConfig
        >>> TransformerConfig(width=512, heads=8).head_dim
        64
        >>> TransformerConfig.gpt2(dropout=0.0).layers
        12
    """

    vocab_size: int = 256
    context: int = 256  # tokens of the longest sequence
    layers: int = 4
    heads: int = 4
    width: int = 256
    hidden: int | None = None  # of the FFN; default 4 * width
    kv_heads: int | None = None  # heads of keys and values; default heads
    positions: Positions = "learned"
    activation: Activation = "gelu"
    norm: Norm = "layer"
    placement: Placement = "pre"  # of the norms: before each branch, or after the residual
    eps: float = 1e-5  # of the norms
    bias: bool = True  # of linear layers and LayerNorms
    dropout: float = 0.0  # of the embedding and of every branch
    attention_dropout: float = 0.0  # of attention weights
    hidden_dropout: float = 0.0  # of the FFN's activation
    seed: int = 0  # of the initial weights
    tied: bool = True  # whether the output's weights are the token embedding
    segments: int = 0  # kinds of segments with an embedding each (BERT: 2)
    embedding_norm: bool = False  # a norm behind the embedding (BERT, BART)
    rope_theta: float = 10000.0
    rope_fraction: float = 1.0  # of each head's dimensions that turn
    rope_scaling: RopeScaling | None = None
    decoder_layers: int | None = None  # of an encoder-decoder; default layers
    start_token: int | None = None  # what an encoder-decoder's output begins with
    end_token: int | None = None  # after which generation stops
    pad_token: int | None = None  # behind the end; default end_token
    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    classes: int = 1000
    pooling: Pooling = "class"  # what an image's classes are read from: a class token, or all patches' mean
    save: Save = "preactivation"  # what an FFN keeps for backward; "input": less memory, one more forward
    checkpointing: bool = False  # keep only the blocks' inputs for backward, and compute the rest again

    def __post_init__(self) -> None:
        check_fields(self, SIZES, OPTIONAL_SIZES, CHOICES, DROPOUTS, TOKENS)
        if self.segments < 0:
            raise ValueError(f"segments must not be negative, not {self.segments}")
        if not 0.0 <= self.eps < math.inf:
            raise ValueError(f"eps must be finite and not negative, not {self.eps}")
        self._check_divisions()

    def _check_divisions(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if self.heads % self.key_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.key_heads}")
        if self.positions == "sinusoidal" and self.width % 2:
            raise ValueError(f"width must be even for sinusoidal positions, not {self.width}")
        if self.positions == "rotary":
            if not 0.0 < self.rope_fraction <= 1.0:
                raise ValueError(f"rope_fraction must be in (0, 1], not {self.rope_fraction}")
            if not 0.0 < self.rope_theta < math.inf:
                raise ValueError(f"rope_theta must be positive and finite, not {self.rope_theta}")
            if self.rotary_dim < 2 or self.rotary_dim % 2:
                raise ValueError(f"an even number of head dimensions must turn, not {self.rotary_dim}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}"
            )

    @property
    def ffn_width(self) -> int:
        """Inner width of the FFN."""
        return self.hidden or 4 * self.width

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that turn with its position."""
        return int(self.head_dim * self.rope_fraction)

    @property
    def gated(self) -> bool:
        """Whether the FFN's first product has a gate."""
        return self.activation in GATED

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return int((self.image_size // self.patch_size) ** 2)
