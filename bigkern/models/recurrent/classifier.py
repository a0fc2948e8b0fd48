"""The sequence classifier.

x = token[t]   or   features                                   [B, T, I]
y, h = layers(x)                                               over each row's own length
logits = head(h of the last layer)   or   head(mean(y))   or   head(max(y))      [B, classes]
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from bigkern.models.recurrent.config import RecurrentConfig
from bigkern.models.recurrent.stack import (
    OURS,
    Parts,
    Stack,
    checked_lengths,
    embedded,
    hidden_of,
    initialise,
    mask_of,
)
from bigkern.models.transformer.trunk import check_tokens


class RecurrentClassifier(nn.Module):
    """A recurrent network that sorts sequences, of tokens or of vectors, on bigkern's kernels.

    Args:
        config: the model's shape; it reads tokens, or with ``config.features`` vectors of that width.
        parts: what the layers are made of.

    Shapes: tokens int64 ``[B, T]``, or features ``[B, T, features]``, to logits ``[B, classes]``. Rows of
    different length are packed by ``lengths``: what stands behind a row's length is not looked at.

    Raises:
        TypeError, ValueError: input or lengths do not fit; the message names the argument.

    Source: Hochreiter and Schmidhuber, Long Short-Term Memory (1997); Graves and Schmidhuber, Framewise
    Phoneme Classification with Bidirectional LSTM (2005).

    Example:
        >>> import torch
        >>> from bigkern.models import RecurrentClassifier, RecurrentConfig
        >>> config = RecurrentConfig(features=8, width=32, bidirectional=True, classes=10)
        >>> model = RecurrentClassifier(config)
        >>> model(torch.randn(4, 20, 8), torch.tensor([20, 3, 1, 7])).shape
        torch.Size([4, 10])
    """

    def __init__(self, config: RecurrentConfig, parts: Parts = OURS):
        super().__init__()
        self.config = config
        if config.features is None:
            self.token = nn.Embedding(config.vocab_size, config.words)
        self.stack = Stack(config, parts, config.features or config.words, config.bidirectional)
        self.head = parts.linear(config.outputs, config.classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial weights of the config's seed."""
        initialise(self, self.config)

    def forward(self, input: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits ``[B, classes]``.

        Args:
            input: int64 or int32 tokens ``[B, T]``, or features ``[B, T, features]``.
            lengths: int64 or int32 ``[B]``, of each row, from 1 to T; None: all are T long.
        """
        x = self._read(input)
        lengths = checked_lengths(lengths, "input", input)
        y, state = self.stack(x, None, lengths)
        return cast(Tensor, self.head(self._pooled(y, hidden_of(state), lengths)))

    def _read(self, input: Tensor) -> Tensor:
        """What the layers read, ``[T, B, I]``."""
        c = self.config
        if c.features is None:
            check_tokens("input", input, 2**62)
            return embedded(input.t(), self.token.weight, c.embedding_dropout if self.training else 0.0)
        if not isinstance(input, Tensor) or not input.is_floating_point():
            kind = input.dtype if isinstance(input, Tensor) else type(input).__name__
            raise TypeError(f"input must be a floating point Tensor [B, T, {c.features}], not {kind}")
        if input.dim() != 3 or input.shape[2] != c.features:
            raise ValueError(f"input must be [B, T, {c.features}], not {list(input.shape)}")
        return input.transpose(0, 1)

    def _pooled(self, y: Tensor, h: Tensor, lengths: Tensor | None) -> Tensor:
        """``[B, P]`` of the outputs ``y [T, B, P]``, or of the last layer's last states in h."""
        if self.config.pooling == "last":
            return torch.cat(tuple(h[-self.stack.directions :]), dim=-1)
        if lengths is None:
            return y.mean(0) if self.config.pooling == "mean" else y.amax(0)
        if self.config.pooling == "mean":
            return y.sum(0) / lengths.to(y.device).unsqueeze(1)  # zero behind the length
        mask = cast(Tensor, mask_of(lengths, len(y), y.device))
        return y.masked_fill(~mask.t().unsqueeze(2), float("-inf")).amax(0)
