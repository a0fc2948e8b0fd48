"""The encoder-decoder: the first Transformer, BART.

    memory = encoder(source)                                       [B, Ss, W]
    logits = decoder(target, memory) token^T                       [B, St, vocabulary]

One token embedding serves both halves, and the output if ``config.tied``. Training shifts the labels right
behind ``config.start_token``; generation begins with it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigkern.models.transformer.blocks import OURS, Parts
from bigkern.models.transformer.cache import Cache
from bigkern.models.transformer.config import TransformerConfig
from bigkern.models.transformer.encoder import Encoder
from bigkern.models.transformer.generation import Sequences, generated, sequences
from bigkern.models.transformer.trunk import Decoder, check_tokens, checked_mask, initialise


class CrossDecoder(Decoder):
    """The half that reads a memory: embedded tokens in, hidden states out, see :meth:`Decoder.hidden`."""

    def __init__(self, config: TransformerConfig, parts: Parts = OURS):
        super().__init__(config, parts, tokens=False, cross=True, layers=config.decoder_layers)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        return self.hidden(x, mask, memory, memory_mask, cache)


class EncoderDecoder(nn.Module):
    """An encoder-decoder on bigkern's kernels.

    Args:
        config: the shape of both halves; ``config.seed`` fixes the initial weights.
        parts: what the blocks are made of.

    Shapes: source ``[B, Ss]`` and target ``[B, St]`` int64, at most ``config.context`` long, to logits
    ``[B, St, vocabulary]``.

    Raises:
        TypeError, ValueError: source, target, labels or a mask do not fit; the message names the argument.

    Source: Vaswani et al., Attention Is All You Need (2017); Lewis et al., BART (2020).

    Example:
        >>> import torch
        >>> from bigkern.models import EncoderDecoder, TransformerConfig
        >>> model = EncoderDecoder(TransformerConfig.transformer_base(layers=1, heads=2, width=32))
        >>> source, target = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)
        >>> model(source, target).shape
        torch.Size([2, 5, 37000])
    """

    def __init__(self, config: TransformerConfig, parts: Parts = OURS):
        super().__init__()
        if config.segments:
            raise ValueError(f"segments must be 0 for an encoder-decoder, not {config.segments}")
        self.config, self.product = config, parts.product
        self.encoder = Encoder(config, parts)
        self.decoder = CrossDecoder(config, parts)
        if not config.tied:
            self.head = parts.linear(config.width, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial weights of the config's seed."""
        initialise(self, self.config, self.config.seed)

    def forward(
        self, source: Tensor, target: Tensor, mask: Tensor | None = None, target_mask: Tensor | None = None
    ) -> Tensor:
        """Logits ``[B, St, vocabulary]`` of the token after each of ``target``.

        Args:
            source: int64 or int32 ``[B, Ss]``.
            target: int64 or int32 ``[B, St]``, what the output is so far: its first token is the start.
            mask, target_mask: bool (or 0 and 1), True where a token of source and target stands.
        """
        check_tokens("target", target, self.config.context)
        target_mask = checked_mask("target_mask", target_mask, "target", target)
        memory, mask = self.encode(source, mask)
        if len(target) != len(source):
            raise ValueError(f"target must have source's batch size {len(source)}, not {len(target)}")
        return self.logits(self._states(target, target_mask, None, memory, mask))

    def encode(self, source: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The encoder's output ``[B, Ss, W]``, and the mask as bool."""
        check_tokens("source", source, self.config.context)
        mask = checked_mask("mask", mask, "source", source)
        return self.encoder(source, mask=mask), mask

    def logits(self, x: Tensor) -> Tensor:
        """``[..., W]`` to ``[..., vocabulary]``."""
        if self.config.tied:
            return self.product(x, self.encoder.token.weight)
        return cast(Tensor, self.head(x))

    def loss(
        self, source: Tensor, labels: Tensor, mask: Tensor | None = None, ignore_index: int = -100
    ) -> Tensor:
        """Mean cross-entropy of ``labels [B, St]`` int64 by teacher forcing, without those of ignore_index.

        The decoder reads the labels before each one, see :meth:`shifted`.
        """
        logits = self(source, self.shifted(labels, ignore_index), mask)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=ignore_index)

    def shifted(self, labels: Tensor, ignore_index: int = -100) -> Tensor:
        """``labels [B, St]`` one place to the right, behind the start token; those ignored become padding."""
        check_tokens("labels", labels, self.config.context)
        pad = self.config.pad_token if self.config.pad_token is not None else 0
        before = labels[:, :-1].masked_fill(labels[:, :-1] == ignore_index, pad)
        return torch.cat((labels.new_full((len(labels), 1), self._start()), before), dim=1)

    def _start(self) -> int:
        if self.config.start_token is None:
            raise ValueError("start_token must be set in the config of an encoder-decoder")
        return self.config.start_token

    def _states(self, tokens: Tensor, mask: Tensor | None, cache: Cache | None, *memory: Any) -> Tensor:
        x = F.embedding(tokens, self.encoder.token.weight)
        return cast(Tensor, self.decoder(x, mask, *memory, cache=cache))

    def generate(
        self,
        source: Tensor,
        count: int,
        *,
        mask: Tensor | None = None,
        target: Tensor | None = None,
        cache: bool = True,
        **how: Any,
    ) -> Tensor:
        """The output for ``source [B, Ss]``: the start and at most ``count`` tokens, int64 ``[B, 1 + n]``.

        Args:
            mask: bool ``[B, Ss]``, True where a token of source stands.
            target: int64 ``[B, St]``, what the output begins with, instead of the start token.
            cache: keep keys and values, the memory's too; see :meth:`bigkern.models.GPT.generate`.
            how: as there.

        Example:
            >>> import torch
            >>> from bigkern.models import EncoderDecoder, TransformerConfig
            >>> model = EncoderDecoder(TransformerConfig.transformer_base(layers=1, heads=2, width=32))
            >>> model.generate(torch.zeros(2, 7, dtype=torch.long), 5, beams=3, end=None).shape
            torch.Size([2, 6])
        """
        if target is None:
            target = torch.full((len(source), 1), self._start(), device=source.device)

        begun = target

        def start() -> Sequences:
            return sequences(self, begun, None, count, cache, lambda: self.encode(source, mask))

        return generated(self, target, count, start, how, "target")
