"""The language model, with a state that is carried from one stretch of a text to the next.

x = token[t]                                                   [T, B, E]
y, state = layers(x, state)                                    [T, B, P]
logits = (W y) token^T + bias                                  W only where P is not E; head y if not tied
"""

from __future__ import annotations

from typing import Any, cast

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
    detached,
    embedded,
    hidden_of,
    initialise,
    reordered,
)
from bigkern.models.transformer.generation import generated
from bigkern.models.transformer.trunk import check_tokens


class RecurrentLM(nn.Module):
    """A recurrent language model on bigkern's kernels.

    Args:
        config: the model's shape; ``RecurrentConfig.awd_lstm()`` and the like are those of publications.
        parts: what the layers are made of; with ``STOCK`` of plain PyTorch: same parameters, same start.

    Shapes: tokens int64 ``[B, T]`` to logits ``[B, T, vocabulary]``; state as torch's, ``h [L, B, P]`` or
    ``(h, c)``.

    Raises:
        TypeError, ValueError: tokens, targets or lengths do not fit, or the config is of no language model.
        RuntimeError: torch's, for a state of another shape.

    Source: Mikolov et al., Recurrent neural network based language model (2010); Inan, Khosravi and Socher,
    Tying Word Vectors and Word Classifiers (2017); Merity, Keskar and Socher (2018).

    Example:
        >>> import torch
        >>> from bigkern.models import RecurrentConfig, RecurrentLM
        >>> model = RecurrentLM(RecurrentConfig(width=32))
        >>> text, state = torch.randint(256, (2, 33)), None
        >>> for start in (0, 16):  # truncated back-propagation through time
        ...     part = text[:, start : start + 17]
        ...     loss, state = model(part[:, :-1], state, part[:, 1:])
        ...     loss.backward()
    """

    def __init__(self, config: RecurrentConfig, parts: Parts = OURS):
        super().__init__()
        if config.bidirectional or config.features is not None:
            name = "bidirectional" if config.bidirectional else "features"
            raise ValueError(f"{name} goes with a classifier or an encoder, not with a language model")
        self.config, self.product = config, parts.product
        self.token = nn.Embedding(config.vocab_size, config.words)
        self.stack = Stack(config, parts, config.words)
        self.project: nn.Module = nn.Identity()
        if not config.tied:
            self.head = parts.linear(config.outputs, config.vocab_size, bias=False)
        elif config.outputs != config.words:
            self.project = parts.linear(config.outputs, config.words, bias=False)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial weights of the config's seed."""
        initialise(self, self.config)

    def forward(
        self, tokens: Tensor, state: State | None = None, targets: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Logits ``[B, T, vocabulary]`` of the token after each of ``tokens``, or their loss; and the state.

        The state is detached: gradients go back to the first of ``tokens``, and no further.

        Args:
            tokens: int64 or int32 ``[B, T]``.
            state: what the last stretch of the same texts gave; None: they begin here.
            targets: int64 ``[B, T]``: instead of logits give their mean cross-entropy, without those of -100.
        """
        check_tokens("tokens", tokens, 2**62)
        y, state = self._run(tokens, state)
        logits = self.logits(y)  # [T, B, vocabulary]
        if targets is None:
            return logits.transpose(0, 1), detached(state)
        if targets.shape != tokens.shape:
            raise ValueError(
                f"targets must have tokens's shape {tuple(tokens.shape)}, not {tuple(targets.shape)}"
            )
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.t().flatten())
        return loss, detached(state)

    def logits(self, y: Tensor) -> Tensor:
        """``[..., P]`` to ``[..., vocabulary]``."""
        weight = self.token.weight if self.config.tied else self.head.weight
        return self.product(self.project(y), weight, self.bias)

    def _run(
        self, tokens: Tensor, state: State | None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        x = embedded(tokens.t(), self.token.weight, self.config.embedding_dropout if self.training else 0.0)
        return cast("tuple[Tensor, State]", self.stack(x, state, lengths))

    def _step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """The logits after one more token of each row, ``tokens [B]``."""
        y, state = self._run(tokens.unsqueeze(1), state)
        return self.logits(y[-1]), state

    def generate(
        self,
        tokens: Tensor,
        count: int,
        *,
        lengths: Tensor | None = None,
        state: State | None = None,
        **how: Any,
    ) -> Tensor:
        """``tokens [B, T]`` continued by at most ``count`` tokens: int64 ``[B, T + n]``.

        Each token is computed once, from the state that those before it left; prompts and what follows may
        be of any length. n < count if every sequence ends before, see ``end``. The model is in eval mode
        meanwhile.

        Args:
            lengths: int64 ``[B]``, of each prompt: those that are shorter than T are padded behind.
            state: what was read before ``tokens``.
            how: temperature, top_k, top_p, seed, beams, length_penalty, end (default config.end_token) and
                pad (default config.pad_token), see :class:`bigkern.models.transformer.generation.Decoding`.

        Example:
            >>> import torch
            >>> from bigkern.models import RecurrentConfig, RecurrentLM
            >>> model = RecurrentLM(RecurrentConfig(width=32))
            >>> model.generate(torch.zeros(2, 4, dtype=torch.long), 8, temperature=0.8, top_p=0.9).shape
            torch.Size([2, 12])
        """

        def start() -> Stepped[State]:
            """All prompts read; the last layer's h is its output behind a row's last token."""
            read = self._run(tokens, state, checked_lengths(lengths, "tokens", tokens))[1]
            return Stepped(self._step, reordered, read, self.logits(hidden_of(read)[-1]))

        return generated(self, tokens, count, start, how)
