"""The encoder-decoder with attention.

    memory, state = encoder(token[source])                         [Ss, B, P]
    y, state = decoder(token[target], state)                       [St, B, P]
    c = softmax((Q y) memory^T / sqrt(P / heads)) memory           over each source's own length
    a = tanh(C (c, y))                                             [St, B, E]
    logits = a token^T + bias                                      [B, St, vocabulary]

With ``config.input_feeding`` the decoder reads (token[t], a of the step before), and goes step by step. An
encoder of two directions has half of the width in each: its last states, joined, are what the decoder
begins with.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigkern.models.recurrent.config import RecurrentConfig
from bigkern.models.recurrent.generation import Stepped
from bigkern.models.recurrent.stack import (
    OURS,
    Parts,
    Stack,
    State,
    checked_lengths,
    embedded,
    initialise,
    mapped,
    mask_of,
    reordered,
)
from bigkern.models.transformer.generation import generated
from bigkern.models.transformer.trunk import check_tokens


class Carried(NamedTuple):
    """What a decoder carries from step to step."""

    state: State
    attended: Tensor  # a of the last step, [B, E]
    memory: Tensor  # [B, heads, Ss, P / heads]
    mask: Tensor | None  # bool [B, 1, 1, Ss]

    def reordered(self, rows: Tensor) -> Carried:
        """Sequence i goes on as sequence ``rows[i]`` did so far."""
        mask = None if self.mask is None else self.mask[rows]
        return Carried(reordered(self.state, rows), self.attended[rows], self.memory[rows], mask)


class Attention(nn.Module):
    """``tanh(C (softmax((Q y) memory^T / sqrt(D)) memory, y))``, Luong's "general" scores and his output."""

    def __init__(self, config: RecurrentConfig, parts: Parts):
        super().__init__()
        P = config.outputs
        self.heads, self.attend = config.heads, parts.attend
        self.query = parts.linear(P, P, bias=False)
        self.combine = parts.linear(2 * P, config.words, bias=False)

    def split(self, x: Tensor) -> Tensor:
        """``[S, B, P]`` to ``[B, heads, S, P / heads]``, a view."""
        return cast(Tensor, x.unflatten(-1, (self.heads, -1))).permute(1, 2, 0, 3)

    def forward(self, y: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        q = self.split(self.query(y))
        c = self.attend(q, memory, memory, False, mask, None, 0.0).permute(2, 0, 1, 3).flatten(2)
        return torch.tanh(self.combine(torch.cat((c, y), dim=-1)))


class RecurrentEncoderDecoder(nn.Module):
    """A recurrent encoder-decoder with attention, on bigkern's kernels.

    Args:
        config: the shape of both halves; ``bidirectional`` is the encoder's, one token embedding serves both
            and, if ``tied``, the output.
        parts: what the layers are made of.

    Shapes: source ``[B, Ss]`` and target ``[B, St]`` int64 to logits ``[B, St, vocabulary]``.

    Raises:
        TypeError, ValueError: source, target, labels or lengths do not fit; the message names the argument.

    Source: Sutskever, Vinyals and Le, Sequence to Sequence Learning with Neural Networks (2014); Luong, Pham
    and Manning, Effective Approaches to Attention-based Neural Machine Translation (2015), whose scores are
    not scaled.

    Example:
        >>> import torch
        >>> from bigkern.models import RecurrentConfig, RecurrentEncoderDecoder
        >>> model = RecurrentEncoderDecoder(RecurrentConfig(width=32, bidirectional=True, start_token=0))
        >>> source, target = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)
        >>> model(source, target, torch.tensor([7, 4])).shape
        torch.Size([2, 5, 256])
    """

    def __init__(self, config: RecurrentConfig, parts: Parts = OURS):
        super().__init__()
        if config.features is not None:
            raise ValueError("features goes with a classifier, not with an encoder-decoder")
        self.config, self.product = config, parts.product
        self.token = nn.Embedding(config.vocab_size, config.words)
        self.encoder = Stack(config, parts, config.words, config.bidirectional)
        self.decoder = Stack(config, parts, config.words * (2 if config.input_feeding else 1))
        self.attention = Attention(config, parts)
        if not config.tied:
            self.head = parts.linear(config.words, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial weights of the config's seed."""
        initialise(self, self.config)

    def forward(self, source: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits ``[B, St, vocabulary]`` of the token after each of ``target``.

        Args:
            source: int64 or int32 ``[B, Ss]``.
            target: int64 or int32 ``[B, St]``, what the output is so far: its first token is the start.
            lengths: int64 or int32 ``[B]``, of the rows of source, from 1 to Ss; None: all are Ss long.
        """
        check_tokens("target", target, 2**62)
        carried = self.encode(source, lengths)
        if len(target) != len(source):
            raise ValueError(f"target must have source's batch size {len(source)}, not {len(target)}")
        return self.logits(self._decode(target, carried)[0]).transpose(0, 1)

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> Carried:
        """What the decoder begins with."""
        check_tokens("source", source, 2**62)
        lengths = checked_lengths(lengths, "source", source)
        y, state = self.encoder(self._embed(source), None, lengths)
        mask = mask_of(lengths, source.shape[1], source.device)
        return Carried(
            mapped(self._joined, state),
            y.new_zeros(len(source), self.config.words),
            self.attention.split(y),
            None if mask is None else mask[:, None, None, :],
        )

    def logits(self, attended: Tensor) -> Tensor:
        """``[..., E]`` to ``[..., vocabulary]``."""
        weight = self.token.weight if self.config.tied else self.head.weight
        return self.product(attended, weight, self.bias)

    def loss(
        self, source: Tensor, labels: Tensor, lengths: Tensor | None = None, ignore_index: int = -100
    ) -> Tensor:
        """Mean cross-entropy of ``labels [B, St]`` int64 by teacher forcing, without those of ignore_index.

        The decoder reads the labels before each one, behind the start token.
        """
        check_tokens("labels", labels, 2**62)
        pad = self.config.pad_token if self.config.pad_token is not None else 0
        start = labels.new_full((len(labels), 1), self._start())
        before = labels[:, :-1].masked_fill(labels[:, :-1] == ignore_index, pad)
        logits = self(source, torch.cat((start, before), dim=1), lengths).flatten(0, 1).float()
        return F.cross_entropy(logits, labels.flatten(), ignore_index=ignore_index)

    def _start(self) -> int:
        if self.config.start_token is None:
            raise ValueError("start_token must be set in the config of an encoder-decoder")
        return self.config.start_token

    def _embed(self, tokens: Tensor) -> Tensor:
        p = self.config.embedding_dropout if self.training else 0.0
        return embedded(tokens.t(), self.token.weight, p)

    def _joined(self, x: Tensor) -> Tensor:
        """A state ``[L * D, B, H / D]`` of D directions as one of one direction, ``[L, B, H]``."""
        D = self.encoder.directions
        return x if D == 1 else torch.cat((x[::D], x[1::D]), dim=-1)

    def _decode(self, target: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """What is attended to behind each of ``target [B, St]``, ``[St, B, E]``."""
        x, (state, attended, memory, mask) = self._embed(target), carried
        if not self.config.input_feeding:
            y, state = self.decoder(x, state)
            a = self.attention(y, memory, mask)
            return a, Carried(state, a[-1], memory, mask)
        steps = []
        for x_t in x:
            y, state = self.decoder(torch.cat((x_t, attended), dim=-1).unsqueeze(0), state)
            attended = self.attention(y, memory, mask)[0]
            steps.append(attended)
        return torch.stack(steps), Carried(state, attended, memory, mask)

    def _step(self, tokens: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """The logits after one more token of each row, ``tokens [B]``."""
        a, carried = self._decode(tokens.unsqueeze(1), carried)
        return self.logits(a[-1]), carried

    def generate(
        self,
        source: Tensor,
        count: int,
        *,
        lengths: Tensor | None = None,
        target: Tensor | None = None,
        **how: Any,
    ) -> Tensor:
        """The output for ``source [B, Ss]``: the start and at most ``count`` tokens, int64 ``[B, 1 + n]``.

        Args:
            lengths: int64 ``[B]``, of the rows of source.
            target: int64 ``[B, St]``, what the output begins with, instead of the start token.
            how: as of :meth:`bigkern.models.RecurrentLM.generate`: ``beams=4`` searches, ``temperature=0`` is
                greedy.

        Example:
            >>> import torch
            >>> from bigkern.models import RecurrentConfig, RecurrentEncoderDecoder
            >>> model = RecurrentEncoderDecoder(RecurrentConfig(width=32, start_token=0))
            >>> model.generate(torch.zeros(2, 7, dtype=torch.long), 5, beams=3).shape
            torch.Size([2, 6])
        """
        if target is None:
            target = torch.full((len(source), 1), self._start(), device=source.device)
        begun = target

        def start() -> Stepped[Carried]:
            a, carried = self._decode(begun, self.encode(source, lengths))
            return Stepped(self._step, Carried.reordered, carried, self.logits(a[-1]))

        return generated(self, target, count, start, how, "target")
