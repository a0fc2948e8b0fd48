"""What an op writes in place has memory for each of its elements: what is expanded is refused, untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bigkern
from bigkern.ops.adam import adam


def expanded(*shape: int) -> Tensor:
    """Of such a shape, with one element for all."""
    return torch.ones(1).reshape((1,) * len(shape)).expand(shape)


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_decode_attention_appends_to_no_expanded_cache(name: str) -> None:
    caches = {"k_cache": torch.ones(2, 2, 5, 8), "v_cache": torch.ones(2, 2, 5, 8)}
    caches[name] = expanded(2, 2, 5, 8)
    q = k = torch.zeros(2, 2, 1, 8)
    lengths = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"^{name} must have memory for each element"):
        bigkern.decode_attention(q, **caches, cache_seqlens=lengths, k=k, v=k)
    assert all((cache == 1).all() for cache in caches.values())
    bigkern.decode_attention(q, **caches, cache_seqlens=lengths)  # and reading it is right


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_batch_norm_moves_no_expanded_statistics(name: str) -> None:
    statistics = {"running_mean": torch.ones(4), "running_var": torch.ones(4)}
    statistics[name] = expanded(4)
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=f"^{name} must have memory for each element"):
        bigkern.batch_norm(x, **statistics, training=True)
    assert all((x == 1).all() for x in statistics.values())
    bigkern.batch_norm(x, **statistics)


@pytest.mark.parametrize("name", ["params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "grads"])
def test_adam_updates_nothing_expanded(name: str) -> None:
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
    lists: dict[str, Any] = {each: [torch.ones(3), torch.ones(2, 5)] for each in names}
    lists[name][1] = expanded(2, 5)
    steps = [torch.ones(()), torch.ones(())]
    with pytest.raises(ValueError, match=rf"^{name}\[1\] must have memory for each element"):
        adam(**lists, state_steps=steps, amsgrad=True, zero_grads=True)
    assert all((x == 1).all() for tensors in (*lists.values(), steps) for x in tensors)


def test_adam_reads_expanded_gradients() -> None:
    params, m, v = ([torch.zeros(2, 5)] for _ in range(3))
    adam(params, [expanded(2, 5)], m, v, [], [torch.zeros(())], lr=0.5)
    torch.testing.assert_close(params[0], torch.full((2, 5), -0.5))
