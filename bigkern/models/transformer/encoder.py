"""The encoder: BERT, its pooler, and its heads.

x = drop(norm(token[t] + position + segment[s]))               [B, S, W]
x = block(... block(x))                                        every token sees every token
pooled = tanh(pooler(x[:, 0]))                                 [B, W]

masked LM:        norm(act(dense(x))) token^T + bias           [B, S, vocabulary]
next sentence:    linear(pooled)                               [B, 2]
classification:   linear(drop(pooled))                         [B, classes]
tokens:           linear(drop(x))                              [B, S, classes]
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigkern.models.transformer.blocks import OURS, Look, Parts
from bigkern.models.transformer.config import TransformerConfig
from bigkern.models.transformer.trunk import (
    Trunk,
    check_tokens,
    checked_mask,
    initialise,
    keys_mask,
    places_of,
)


class Encoder(Trunk):
    """A trunk whose tokens all see each other."""

    def forward(self, tokens: Tensor, segments: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Hidden states ``[B, S, W]`` of ``tokens``.

        Args:
            tokens: int64 or int32 ``[B, S]``, S <= context.
            segments: int64 or int32 ``[B, S]``, which segment a token belongs to; default the first.
            mask: bool (or 0 and 1) ``[B, S]``, True where a token stands; padding is not looked at and does
                not count in positions.
        """
        check_tokens("tokens", tokens, self.config.context)
        mask = checked_mask("mask", mask, "tokens", tokens)
        if segments is not None:
            check_tokens("segments", segments, self.config.context)
            if not self.config.segments:
                raise ValueError("segments cannot be given: the config has none")
            if segments.shape != tokens.shape:
                shapes = f"{tuple(tokens.shape)}, not {tuple(segments.shape)}"
                raise ValueError(f"segments must have tokens' shape {shapes}")
        places = places_of(mask)
        x = self.embed(self.token(tokens), places, segments, self.scale)
        return self.run(x, places, Look(mask=keys_mask(mask)))


class BERT(Encoder):
    """An encoder on bigkern's kernels.

    Args:
        config: the model's shape; ``config.seed`` fixes the initial weights.
        parts: what the blocks are made of.
        pooler: whether :meth:`pool` exists.

    Shapes: tokens int64 ``[B, S]``, S <= config.context, to hidden states ``[B, S, W]``.

    Raises:
        TypeError, ValueError: tokens, segments or mask do not fit; the message names the argument.

    Source: Devlin et al., BERT (2019).

    Example:
        >>> import torch
        >>> from bigkern.models import BERT, TransformerConfig
        >>> model = BERT(TransformerConfig.bert_base(layers=1, heads=2, width=32))
        >>> model.pool(model(torch.zeros(2, 16, dtype=torch.long))).shape
        torch.Size([2, 32])
    """

    def __init__(self, config: TransformerConfig, parts: Parts = OURS, pooler: bool = True):
        super().__init__(config, parts)
        self.pooler = nn.Linear(config.width, config.width) if pooler else None
        self.reset_parameters()

    def pool(self, x: Tensor) -> Tensor:
        """Hidden states ``[B, S, W]`` to ``[B, W]``, from the first column: padding belongs on the right."""
        if self.pooler is None:
            raise RuntimeError("this BERT was built without a pooler: pass pooler=True")
        return torch.tanh(self.pooler(x[:, 0]))


class _Headed(nn.Module):
    """A BERT with something on top."""

    pooled = True  # whether the head reads the pooler

    def __init__(self, config: TransformerConfig, parts: Parts = OURS):
        super().__init__()
        self.config = config
        self.bert = BERT(config, parts, self.pooled)
        self.drop = nn.Dropout(config.dropout)
        self._add_head(parts)
        self._reset_head()

    def _add_head(self, parts: Parts) -> None:
        raise NotImplementedError

    def _reset_head(self) -> None:
        for name, part in self.named_children():
            if name != "bert":
                initialise(part, self.config, self.config.seed + 1)

    def reset_parameters(self) -> None:
        """The initial weights of the config's seed."""
        self.bert.reset_parameters()
        self._reset_head()


class MaskedHead(nn.Module):
    """``norm(act(dense(x))) token^T + bias``; a gated activation's own act."""

    def __init__(self, config: TransformerConfig, parts: Parts):
        super().__init__()
        self.activation = {"swiglu": "silu", "geglu": "gelu"}.get(config.activation, config.activation)
        self.product, self.dense = parts.product, parts.linear(config.width, config.width)
        self.norm = parts.norm(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        h = self.dense(x)
        if self.activation == "gelu_tanh":
            h = F.gelu(h, approximate="tanh")
        else:
            h = getattr(F, self.activation)(h)
        return self.product(self.norm(h), token, self.bias)


class BERTForMaskedLM(_Headed):
    """:class:`BERT` that guesses hidden tokens: logits ``[B, S, vocabulary]``. Arguments as BERT's.

    Raises:
        TypeError, ValueError: as :class:`BERT`.

    Source: Devlin et al., BERT (2019), task 1.

    Example:
        >>> import torch
        >>> from bigkern.models import BERTForMaskedLM, TransformerConfig
        >>> model = BERTForMaskedLM(TransformerConfig.bert_base(layers=1, heads=2, width=32))
        >>> model(torch.zeros(2, 16, dtype=torch.long)).shape
        torch.Size([2, 16, 30522])
    """

    pooled = False

    def _add_head(self, parts: Parts) -> None:
        self.masked = MaskedHead(self.config, parts)

    def forward(self, tokens: Tensor, segments: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return cast(Tensor, self.masked(self.bert(tokens, segments, mask), self.bert.token.weight))


class BERTForPreTraining(_Headed):
    """:class:`BERT` with both of its first tasks. Arguments as BERT's.

    Returns:
        logits of hidden tokens ``[B, S, vocabulary]``; of the second segment following the first ``[B, 2]``.

    Raises:
        TypeError, ValueError: as :class:`BERT`.

    Source: Devlin et al., BERT (2019), tasks 1 and 2.

    Example:
        >>> import torch
        >>> from bigkern.models import BERTForPreTraining, TransformerConfig
        >>> model = BERTForPreTraining(TransformerConfig.bert_base(layers=1, heads=2, width=32))
        >>> model(torch.zeros(2, 16, dtype=torch.long))[1].shape
        torch.Size([2, 2])
    """

    def _add_head(self, parts: Parts) -> None:
        self.masked = MaskedHead(self.config, parts)
        self.follows = nn.Linear(self.config.width, 2)

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = self.bert(tokens, segments, mask)
        return self.masked(x, self.bert.token.weight), self.follows(self.bert.pool(x))


class BERTForSequenceClassification(_Headed):
    """:class:`BERT` that sorts whole texts: logits ``[B, config.classes]``. Arguments as BERT's.

    Raises:
        TypeError, ValueError: as :class:`BERT`.

    Example:
        >>> import torch
        >>> from bigkern.models import BERTForSequenceClassification, TransformerConfig
        >>> config = TransformerConfig.bert_base(layers=1, heads=2, width=32, classes=5)
        >>> BERTForSequenceClassification(config)(torch.zeros(2, 16, dtype=torch.long)).shape
        torch.Size([2, 5])
    """

    def _add_head(self, parts: Parts) -> None:
        self.head = nn.Linear(self.config.width, self.config.classes)

    def forward(self, tokens: Tensor, segments: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = self.bert(tokens, segments, mask)
        return cast(Tensor, self.head(self.drop(self.bert.pool(x))))


class BERTForTokenClassification(_Headed):
    """:class:`BERT` that sorts tokens: logits ``[B, S, config.classes]``. Arguments as BERT's.

    Raises:
        TypeError, ValueError: as :class:`BERT`.

    Example:
        >>> import torch
        >>> from bigkern.models import BERTForTokenClassification, TransformerConfig
        >>> config = TransformerConfig.bert_base(layers=1, heads=2, width=32, classes=9)
        >>> BERTForTokenClassification(config)(torch.zeros(2, 16, dtype=torch.long)).shape
        torch.Size([2, 16, 9])
    """

    pooled = False

    def _add_head(self, parts: Parts) -> None:
        self.head = nn.Linear(self.config.width, self.config.classes)

    def forward(self, tokens: Tensor, segments: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return cast(Tensor, self.head(self.drop(self.bert(tokens, segments, mask))))
