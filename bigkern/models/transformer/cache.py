"""``Cache``: keys and values of what a decoder has read, for generation."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from bigkern.ops.attention import attention
from bigkern.ops.attention.decode import decode_attention


class Cache:
    """Keys and values of every layer, allocated once, filled sequence by sequence from the front.

        keys[layer], values[layer]   [B, Hkv, capacity, D]     rows below lengths[b] are in use
        memory[layer]                k, v [B, Hkv, Sm, D]      cross attention's, computed once

    The first pass reads whole prompts, padded on the right: padding fills rows that the next tokens write
    over. Later passes append in place, see :func:`bigkern.decode_attention`.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.lengths: Tensor | None = None  # int32 [B]; None before the first pass
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}
        self.memory_mask: Tensor | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None) -> Tensor:
        """Causal attention of the newest ``q [B, Hq, S, D]`` to all keys, ``k, v [B, Hkv, S, D]`` added."""
        if self.lengths is not None:
            caches = self.keys[layer], self.values[layer]
            return cast(Tensor, decode_attention(q, *caches, self.lengths, k=k, v=v, alibi_slopes=slopes))
        self.keys[layer], self.values[layer] = self._with_capacity(k), self._with_capacity(v)
        return cast(Tensor, attention(q, k, v, causal=True, alibi_slopes=slopes))

    def _with_capacity(self, x: Tensor) -> Tensor:
        B, H, S, D = x.shape
        cached = x.new_zeros(B, H, self.capacity, D)
        cached[:, :, :S] = x
        return cached

    def advance(self, by: Tensor | int) -> None:
        """Count tokens that every layer has now read."""
        self.lengths = cast(Tensor, by if self.lengths is None else self.lengths + by)

    def reorder(self, rows: Tensor) -> None:
        """Sequence i goes on as sequence ``rows[i]`` did so far: int64 ``[B']``."""
        for part in (self.keys, self.values):
            for layer, x in part.items():
                part[layer] = x.index_select(0, rows)
        for layer, (k, v) in self.memory.items():
            self.memory[layer] = k.index_select(0, rows), v.index_select(0, rows)
        if self.memory_mask is not None:
            self.memory_mask = self.memory_mask.index_select(0, rows)
        assert self.lengths is not None
        self.lengths = self.lengths.index_select(0, rows)


def aligned(tokens: Tensor, mask: Tensor | None, side: str) -> tuple[Tensor, Tensor]:
    """Every row's tokens moved to one side, ``"left"`` or ``"right"``, and the mask that they then have."""
    if mask is None:
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
    order = mask.int().argsort(dim=1, stable=True, descending=side == "left")
    return tokens.gather(1, order), mask.gather(1, order)
