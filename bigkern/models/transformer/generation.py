"""Text from a model: greedy, sampled, or by beam search, over anything that gives the next token's logits.

:class:`Sequences` are a batch and give the logits of each one's next token. They are called with the tokens
chosen, and, for beam search, with the rows that they continue.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bigkern.models.transformer.cache import Cache, aligned
from bigkern.models.transformer.trunk import check_tokens, checked_mask


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen.

    Args:
        temperature: divides the logits; 0 takes the most likely token each time.
        top_k: draw from the k most likely tokens only.
        top_p: draw from the fewest most likely tokens whose probabilities sum to at least p (nucleus
            sampling), after temperature and top_k.
        seed: makes the draw reproducible on the same device; None draws from torch's generator.
        beams: more than 1 keeps that many sequences of the greatest total log-probability; nothing is drawn.
        length_penalty: a finished beam's score is its log-probability / length^length_penalty.
        end: the token after which a sequence is over; None: none is.
        pad: fills what follows the end; default end.

    A batch's beam search ends when its ``beams`` finished sequences all score better than its best unfinished
    one would if it ended now.

    Raises:
        ValueError: a number is out of range; the message names it.

    Source: Holtzman et al., The Curious Case of Neural Text Degeneration (2020), for top_p; Wu et al.,
    Google's Neural Machine Translation System (2016), for the length penalty.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    beams: int = 1
    length_penalty: float = 1.0
    end: int | None = None
    pad: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and not negative, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.beams < 1:
            raise ValueError(f"beams must be at least 1, not {self.beams}")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be finite, not {self.length_penalty}")

    @property
    def filler(self) -> int:
        """What follows the end."""
        return self.pad if self.pad is not None else self.end if self.end is not None else 0


class Sequences(Protocol):
    """A batch of sequences that can go on."""

    @property
    def logits(self) -> Tensor:
        """``[B, vocabulary]`` of each one's first new token."""
        ...

    def __call__(self, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
        """The logits after one more token of each, ``[B]``; row i first goes on as ``rows[i]`` did so far."""
        ...


Hidden = Callable[..., Tensor]  # (tokens, mask, cache, *memory) -> hidden states [B, S, W]
Logits = Callable[[Tensor], Tensor]  # [B, W] -> [B, vocabulary]


class Cached:
    """Sequences that compute each token once."""

    def __init__(
        self,
        hidden: Hidden,
        logits: Logits,
        tokens: Tensor,
        mask: Tensor | None,
        count: int,
        *memory: Tensor | None,
    ):
        tokens, mask = aligned(tokens, mask, "left")
        self.hidden, self.to_logits = hidden, logits
        self.cache = Cache(tokens.shape[1] + count)
        states = hidden(tokens, None, self.cache, *memory)
        lengths = mask.sum(1)
        self.cache.advance(lengths.int())
        self.logits = logits(states[torch.arange(len(tokens), device=tokens.device), lengths - 1])

    def __call__(self, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
        if rows is not None:
            self.cache.reorder(rows)
        states = self.hidden(tokens.unsqueeze(1), None, self.cache)
        self.cache.advance(1)
        return self.to_logits(states[:, -1])


class Recomputed:
    """Sequences that compute everything anew for each token, over a window of the last ``context``."""

    def __init__(
        self,
        hidden: Hidden,
        logits: Logits,
        tokens: Tensor,
        mask: Tensor | None,
        context: int,
        *memory: Tensor | None,
    ):
        self.hidden, self.to_logits, self.context = hidden, logits, context
        self.padded, self.memory = mask is not None, memory
        self.tokens, self.mask = aligned(tokens, mask, "right")
        self.logits = self._logits()

    def _logits(self) -> Tensor:
        tokens, mask = self.tokens[:, -self.context :], self.mask[:, -self.context :]
        return self.to_logits(self.hidden(tokens, mask if self.padded else None, None, *self.memory)[:, -1])

    def __call__(self, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
        if rows is not None:
            self.tokens, self.mask = self.tokens[rows], self.mask[rows]
            self.memory = tuple(None if x is None else x[rows] for x in self.memory)
        self.tokens = torch.cat((self.tokens, tokens.unsqueeze(1)), dim=1)
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=True)
        return self._logits()


def sequences(
    model: Any,
    tokens: Tensor,
    mask: Tensor | None,
    count: int,
    cache: bool,
    memory: Callable[[], tuple[Tensor | None, ...]] = tuple,
    name: str = "tokens",
) -> Sequences:
    """Sequences that begin with ``tokens [B, S]``, of a model with ``config``, ``_states`` and ``logits``."""
    mask = checked_mask("mask", mask, name, tokens)
    if mask is not None and not bool(mask.any(1).all()):
        raise ValueError("mask must leave at least one token in each row")
    context, functions, read = model.config.context, (model._states, model.logits), memory()
    if cache and tokens.shape[1] + count <= context:
        return Cached(*functions, tokens, mask, count, *read)
    return Recomputed(*functions, tokens, mask, context, *read)


@torch.no_grad()
def generated(
    model: Any,
    tokens: Tensor,
    count: int,
    start: Callable[[], Sequences],
    how: dict[str, Any],
    name: str = "tokens",
) -> Tensor:
    """``tokens [B, S]`` and the new ones, by a model in eval mode; ``start()`` has read the tokens."""
    check_tokens(name, tokens, 2**62)
    if tokens.shape[1] == 0:
        raise ValueError(f"{name} must hold at least one token a row, not shape {tuple(tokens.shape)}")
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    decoding = Decoding(**{"end": model.config.end_token, "pad": model.config.pad_token, **how})
    training = model.training
    model.eval()
    try:
        return torch.cat((tokens, continued(start(), count, decoding).to(tokens.dtype)), dim=1)
    finally:
        model.train(training)


def continued(sequences: Sequences, count: int, how: Decoding) -> Tensor:
    """At most ``count`` new tokens of every sequence, int64 [B, n]; n < count if all have ended."""
    vocabulary = sequences.logits.shape[1]
    for name in ("end", "pad"):
        token = getattr(how, name)
        if token is not None and not 0 <= token < vocabulary:
            raise ValueError(f"{name} must be within the vocabulary of {vocabulary}, not {token}")
    if how.beams == 1:
        return _sampled(sequences, count, how)
    if 2 * how.beams > vocabulary:
        raise ValueError(f"beams must be at most half the vocabulary of {vocabulary}, not {how.beams}")
    return _searched(sequences, count, how)


# ---- one sequence each -----------------------------------------------------------------------------


def _sampled(sequences: Sequences, count: int, how: Decoding) -> Tensor:
    logits = sequences.logits
    generator = None if how.seed is None else torch.Generator(logits.device).manual_seed(how.seed)
    ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    chosen: list[Tensor] = []
    while True:
        token = draw(logits, how, generator).masked_fill(ended, how.filler)
        chosen.append(token)
        if how.end is not None:
            ended = ended | (token == how.end)
        if len(chosen) == count or (how.end is not None and bool(ended.all())):
            return torch.stack(chosen, dim=1)
        logits = sequences(token)


def draw(logits: Tensor, how: Decoding, generator: torch.Generator | None = None) -> Tensor:
    """One token of each row of ``logits [B, vocabulary]``: int64 [B]."""
    logits = logits.float()
    if how.temperature == 0:
        return logits.argmax(-1)
    if how.top_k is not None and how.top_k < logits.shape[-1]:
        smallest = logits.topk(how.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probabilities = torch.softmax(logits / how.temperature, -1)
    if how.top_p is not None:
        ranked, order = probabilities.sort(dim=-1, descending=True)
        before = ranked.cumsum(-1) - ranked  # the sum of all that are more likely
        kept = ranked.masked_fill(before >= how.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, kept)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


# ---- beam search -----------------------------------------------------------------------------------


def _searched(sequences: Sequences, count: int, how: Decoding) -> Tensor:
    """The best of ``K = how.beams`` finished sequences of every row."""
    (B, V), K = sequences.logits.shape, how.beams
    logits = sequences.logits
    first = torch.arange(B, device=logits.device)
    running = first.new_full((B, 1, count), how.filler)  # one beam at the start, then K
    scores = logits.new_zeros(B, 1, dtype=torch.float32)
    finished = Finished(first.new_full((B, K, count), how.filler), scores.new_full((B, K), -math.inf))
    for length in range(1, count + 1):
        beams = running.shape[1]
        totals = scores.unsqueeze(2) + logits.float().log_softmax(-1).view(B, beams, V)
        best, index = totals.flatten(1).topk(2 * K)  # enough: at most K of them end
        beam, token = index // V, index % V
        candidates = running.gather(1, beam.unsqueeze(2).expand(-1, -1, count)).clone()
        candidates[:, :, length - 1] = token
        over = torch.full_like(token, length == count, dtype=torch.bool)
        if how.end is not None:
            over = over | (token == how.end)
        finished.add(candidates[:, :K], (best / length**how.length_penalty)[:, :K], over[:, :K], length)
        if length == count:
            break
        scores, kept = best.masked_fill(over, -math.inf).topk(K)
        running = candidates.gather(1, kept.unsqueeze(2).expand(-1, -1, count))
        finished.close(scores[:, 0] / length**how.length_penalty)
        if not bool(finished.open.any()):
            break
        rows = first.unsqueeze(1) * beams + beam.gather(1, kept)
        logits = sequences(running[:, :, length - 1].flatten(), rows.flatten())
    return finished.tokens[:, 0, : int(finished.lengths[:, 0].max())]


class Finished:
    """The K best finished sequences of every row so far, best first.

    Args:
        tokens: int64 ``[B, K, count]``.
        scores: fp32 ``[B, K]``, -inf where there is none yet.
    """

    def __init__(self, tokens: Tensor, scores: Tensor):
        self.tokens, self.scores = tokens, scores
        self.lengths = torch.zeros_like(scores, dtype=torch.int64)
        self.open = torch.ones(len(scores), dtype=torch.bool, device=scores.device)  # may still get better

    def add(self, tokens: Tensor, scores: Tensor, over: Tensor, length: int) -> None:
        """Candidates ``[B, K, count]``: those that are over, in rows that are open."""
        scores = scores.masked_fill(~(over & self.open.unsqueeze(1)), -math.inf)
        lengths = torch.full_like(over, length, dtype=torch.int64)
        K = self.scores.shape[1]
        self.scores, best = torch.cat((self.scores, scores), 1).topk(K)
        self.lengths = torch.cat((self.lengths, lengths), 1).gather(1, best)
        all_tokens = torch.cat((self.tokens, tokens), 1)
        self.tokens = all_tokens.gather(1, best.unsqueeze(2).expand(-1, -1, all_tokens.shape[2]))

    def close(self, attainable: Tensor) -> None:
        """Close the rows whose K sequences all score at least ``attainable [B]``."""
        self.open = self.open & (attainable > self.scores.min(1).values)
