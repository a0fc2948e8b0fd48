"""``RecurrentConfig``: the shape of a recurrent network of any of the three kinds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bigkern.models.config_checks import check_fields

if TYPE_CHECKING:
    from typing_extensions import Self

Cell = Literal["lstm", "gru", "rnn_tanh", "rnn_relu"]
Pooling = Literal["last", "mean", "max"]

CHOICES: dict[str, Any] = {"cell": Cell, "pooling": Pooling}
SIZES = ("vocab_size", "layers", "width", "classes", "heads")
OPTIONAL_SIZES = ("features", "embedding", "proj_size")
PROBABILITIES = (
    "embedding_dropout",
    "input_dropout",
    "dropout",
    "output_dropout",
    "recurrent_dropout",
    "zoneout",
)
TOKENS = ("start_token", "end_token", "pad_token")


@dataclass(frozen=True, slots=True)
class RecurrentConfig:
    """The shape of a recurrent network; each model reads the fields that concern it.

    Initial weights are torch's (uniform, by the square root of what a sum runs over) but for embeddings,
    uniform in [-0.1, 0.1] as Zaremba's and Merity's, and for what ``forget_bias`` and ``orthogonal`` ask.

    Raises:
        ValueError: a size is below 1, sizes do not divide, a choice is not one of those named, a
            probability is not in [0, 1), a field does not go with another; the message names the field.

    Source: Zaremba, Sutskever and Vinyals, Recurrent Neural Network Regularization (2014), for dropout
    between layers; Gal and Ghahramani, A Theoretically Grounded Application of Dropout in Recurrent Neural
    Networks (2016), for one mask for all steps; Merity, Keskar and Socher, Regularizing and Optimizing LSTM
    Language Models (2018), for the places of dropout; Jozefowicz, Zaremba and Sutskever, An Empirical
    Exploration of Recurrent Network Architectures (2015), for the forget gate; Saxe, McClelland and Ganguli,
    Exact Solutions to the Nonlinear Dynamics of Learning in Deep Linear Neural Networks (2014), for
    orthogonal matrices.

    Example:
        >>> from bigkern.models import RecurrentConfig
        >>> RecurrentConfig(cell="gru", width=512, embedding=256).outputs
        512
        >>> RecurrentConfig.awd_lstm(vocab_size=256).recurrent_dropout
        0.5
    """

    cell: Cell = "lstm"
    vocab_size: int = 256
    features: int | None = None  # of a classifier's continuous input; None: it reads tokens
    layers: int = 2
    width: int = 256  # of a hidden state; of two directions each has half of it
    embedding: int | None = None  # width of token embeddings; default width
    proj_size: int | None = None  # width that an LSTM's outputs are projected to, as torch's
    bidirectional: bool = False  # a classifier, or an encoder
    layer_norm: bool = False  # of the gates; bigkern's layers alone know it, and the next two
    zoneout: float = 0.0  # share of hidden units that keep their last state
    recurrent_dropout: float = 0.0  # of recurrent weights (weight drop)
    embedding_dropout: float = 0.0  # of whole words, wherever they occur
    input_dropout: float = 0.0  # of what the first layer reads
    dropout: float = 0.0  # between layers
    output_dropout: float = 0.0  # of the last layer's outputs
    locked: bool = False  # input, dropout and output: one mask for all steps; each layer its own module
    tied: bool = True  # whether the output's weights are the token embedding
    pooling: Pooling = "last"  # what a sequence's class is read from: last state, or all outputs' mean or max
    classes: int = 2
    heads: int = 1  # of a decoder's attention
    input_feeding: bool = False  # whether a decoder also reads what it attended to a step before
    forget_bias: float | None = None  # of an LSTM's forget gate at the start; default torch's
    orthogonal: bool = False  # orthogonal recurrent weights at the start, gate by gate
    start_token: int | None = None  # what an encoder-decoder's output begins with
    end_token: int | None = None  # after which generation stops
    pad_token: int | None = None  # behind the end; default end_token
    seed: int = 0  # of the initial weights

    def __post_init__(self) -> None:
        check_fields(self, SIZES, OPTIONAL_SIZES, CHOICES, PROBABILITIES, TOKENS)
        self._check_together()

    def _check_together(self) -> None:
        for name in ("proj_size", "forget_bias"):
            if getattr(self, name) is not None and self.cell != "lstm":
                raise ValueError(f"{name} goes with cell 'lstm', not {self.cell!r}")
        if self.proj_size is not None and self.proj_size >= self.width:
            raise ValueError(f"proj_size must be smaller than width {self.width}, not {self.proj_size}")
        if self.proj_size is not None and (self.layer_norm or self.zoneout):
            name = "layer_norm" if self.layer_norm else "zoneout"
            raise ValueError(f"{name} goes without proj_size, not with {self.proj_size}")
        if self.bidirectional and (self.width % 2 or self.outputs % 2):
            name = "width" if self.width % 2 else "proj_size"
            raise ValueError(f"{name} must be even for two directions, not {getattr(self, name)}")
        if self.outputs % self.heads:
            raise ValueError(f"heads must divide the {self.outputs} outputs of a step, not {self.heads}")
        if self.forget_bias is not None and not math.isfinite(self.forget_bias):
            raise ValueError(f"forget_bias must be finite, not {self.forget_bias}")

    @property
    def words(self) -> int:
        """Width of a token's embedding."""
        return self.embedding or self.width

    @property
    def outputs(self) -> int:
        """Width of the last layer's output at one step, of both directions together."""
        return self.proj_size or self.width

    @classmethod
    def zaremba_medium(cls, **fields: Any) -> Self:
        """The medium language model of Zaremba et al. (2014), of Penn Treebank's 10,000 words."""
        usual = {"vocab_size": 10000, "layers": 2, "width": 650, "tied": False}
        dropouts = dict.fromkeys(("input_dropout", "dropout", "output_dropout"), 0.5)
        return cls(**{**usual, **dropouts, **fields})

    @classmethod
    def zaremba_large(cls, **fields: Any) -> Self:
        """The large language model of Zaremba et al. (2014)."""
        dropouts = dict.fromkeys(("input_dropout", "dropout", "output_dropout"), 0.65)
        return cls.zaremba_medium(**{"width": 1500, **dropouts, **fields})

    @classmethod
    def awd_lstm(cls, **fields: Any) -> Self:
        """AWD-LSTM of Merity et al. (2018), for Penn Treebank.

        Its last layer is as narrow as the embedding there; here it is as wide as the others, and a
        projection follows.
        """
        usual = {"vocab_size": 10000, "layers": 3, "width": 1150, "embedding": 400, "locked": True}
        dropouts = {
            "embedding_dropout": 0.1,
            "input_dropout": 0.4,
            "dropout": 0.3,
            "output_dropout": 0.4,
            "recurrent_dropout": 0.5,
        }
        return cls(**{**usual, **dropouts, **fields})
