"""What is remembered of calls: that calls like others skip checks and choice, and that no others do."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import bigkern
from bigkern.core import memory, registry, wisdom
from bigkern.ops.attention.backends import ATTENTION
from bigkern.ops.linear.backends import LINEAR
from bigkern.ops.norm.backends import NORM

OPS = (ATTENTION, NORM)


@pytest.fixture(autouse=True)
def _forget() -> None:
    for op in OPS:
        op.memory._decisions.clear()


def q(**options: Any) -> Tensor:
    """Of so many tokens that our kernel runs: of fewer stock does, which is known by a rough likeness."""
    return torch.randn(1, 2, 40, 8, **options)


def checked(monkeypatch: pytest.MonkeyPatch, op: Any) -> list[str]:
    """A name for each time that the op's arguments are checked."""
    calls: list[str] = []
    bind = op.bind

    def watched(*arguments: Any, **options: Any) -> Any:
        calls.append("checked")
        return bind(*arguments, **options)

    monkeypatch.setattr(op, "bind", watched)
    return calls


def test_a_call_like_another_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = checked(monkeypatch, ATTENTION)
    first, second = q(), q()
    bigkern.attention(first, first, first, causal=True)
    ours = bigkern.attention(second, second, second, causal=True)
    assert len(calls) == 1
    with bigkern.use("torch"):
        torch.testing.assert_close(ours, bigkern.attention(second, second, second, causal=True))


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window": (2, 2)},
        {"scale": 0.3},
        {"softcap": 2.0},
        {"dropout_p": 0.5},
        {"return_lse": True},
    ],
    ids=str,
)
def test_every_number_counts(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    x = q()
    bigkern.attention(x, x, x)
    calls = checked(monkeypatch, ATTENTION)
    bigkern.attention(x, x, x, **options)
    bigkern.attention(x, x, x, **options)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda x: torch.randn(1, 2, 6, 8),
        lambda x: x.bfloat16(),
        lambda x: x.detach().requires_grad_(),
        lambda x: torch.nn.Parameter(x),
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
    ],
)
def test_everything_of_a_tensor_counts(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    x = q()
    bigkern.attention(x, x, x, causal=True)
    calls = checked(monkeypatch, ATTENTION)
    changed = change(x)
    try:
        bigkern.attention(changed, changed, changed, causal=True)
    except (TypeError, NotImplementedError):
        assert changed.is_sparse or changed.is_meta
    assert calls == ["checked"]


def test_what_is_in_force_decides_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    x = q()
    bigkern.attention(x, x, x, causal=True)
    calls = checked(monkeypatch, ATTENTION)
    with bigkern.use("torch"):
        bigkern.attention(x, x, x, causal=True)
    with torch.autocast("cpu"):
        assert bigkern.attention(x, x, x, causal=True).dtype == torch.bfloat16
    torch.func.vmap(lambda t: bigkern.attention(t, t, t, causal=True))(x[None])
    assert len(calls) == 3
    bigkern.attention(x, x, x, causal=True)
    assert len(calls) == 3


def test_an_error_is_no_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    x = q()
    bigkern.attention(x, x, x, causal=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="k must be"):
            bigkern.attention(x, x[..., :4], x, causal=True)
        with pytest.raises(TypeError, match="v must be a Tensor"):
            bigkern.attention(x, x, [1.0], causal=True)  # type: ignore[arg-type]


def test_new_backends_and_new_evidence_decide_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    x = q()
    bigkern.attention(x, x, x, causal=True)
    calls = checked(monkeypatch, ATTENTION)
    ATTENTION.register(ATTENTION.backends["cpu"])
    bigkern.attention(x, x, x, causal=True)
    assert len(calls) == 1
    monkeypatch.setattr("bigkern.core.evidence.proven", frozenset())
    bigkern.attention(x, x, x, causal=True)
    assert len(calls) == 2


def test_deterministic_algorithms_decide_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, x = checked(monkeypatch, ATTENTION), q()
    try:
        for asked in (False, True, True, False):
            torch.use_deterministic_algorithms(asked)
            bigkern.attention(x, x, x, causal=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(calls) == 3


def test_masks_and_lengths_are_looked_at_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, mask = q(), torch.ones(40, 40, dtype=torch.bool)
    bigkern.attention(x, x, x, mask=mask)
    calls = checked(monkeypatch, ATTENTION)
    bigkern.attention(x, x, x, mask=mask)
    assert len(calls) == 1


def test_several_normalized_dimensions_are_checked_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op's call holds other tensors than those that were given."""
    x, weight = torch.randn(3, 4, 8, requires_grad=True), torch.randn(4, 8)
    first = bigkern.rms_norm(x, (4, 8), weight)
    calls = checked(monkeypatch, NORM)
    torch.testing.assert_close(bigkern.rms_norm(x, (4, 8), weight), first)
    assert len(calls) == 1
    bigkern.rms_norm(x, [8], weight[0])  # a list has no hash
    bigkern.rms_norm(x, [8], weight[0])
    assert len(calls) == 3


def test_no_tensor_is_kept() -> None:
    x = q()
    bigkern.attention(x, x, x, causal=True)
    assert len(ATTENTION.memory._decisions) == 1
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


def test_the_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST", 3)
    for S in range(2, 9):
        x = torch.randn(1, 1, S, 8)
        bigkern.attention(x, x, x, causal=True)
    assert len(ATTENTION.memory._decisions) <= 3


def test_gradients_are_those_of_a_call_that_was_checked() -> None:
    grads = []
    for _ in range(2):
        torch.manual_seed(0)
        x = q(requires_grad=True)
        (dx,) = torch.autograd.grad(bigkern.attention(x, x, x, causal=True).sum(), x)
        with torch.no_grad():
            assert not bigkern.attention(x, x, x, causal=True).requires_grad
        grads.append(dx)
    assert torch.equal(*grads)
    assert registry.get("attention").memory is ATTENTION.memory


def test_what_stock_ran_is_known_by_a_rough_likeness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until calls of one likeness differ, a backend is forced, or there is new wisdom."""
    stocks = memory.Stocks()
    assert stocks.have("a", 64) is None
    stocks.learn(True, "a", 64)
    stocks.learn(False, "b", 64)
    assert (stocks.have("a", 64), stocks.have("b", 64)) == (True, False)
    with torch.no_grad():
        assert stocks.have("a", 64) is None
    with bigkern.use("cpu"):
        assert stocks.have("a", 64) is None
        stocks.learn(True, "c")
    assert stocks.have("c") is None
    for ran in (False, True):
        stocks.learn(ran, "a", 64)
        assert stocks.have("a", 64) is False
    monkeypatch.setattr(wisdom, "state", wisdom.State({}, {}))
    assert stocks.have("b", 64) is None


def test_small_products_and_norms_ask_nobody_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(3, 8), torch.randn(8, 8)
    first = bigkern.linear(x, w), bigkern.layer_norm(x, 8), bigkern.layer_norm(x, 8, residual=x)
    for op in (NORM, LINEAR):
        monkeypatch.setattr(op, "resolve", None)
        op.memory._decisions.clear()
    again = bigkern.linear(x, w), bigkern.layer_norm(x, 8), bigkern.layer_norm(x, 8, residual=x)
    torch.testing.assert_close(again, first)
    for wrong in (x[:2], x.double()):
        with pytest.raises((RuntimeError, TypeError), match="residual"):
            bigkern.layer_norm(x, 8, residual=wrong)


def test_what_stock_refuses_of_a_call_like_its_own_is_refused_by_name() -> None:
    x = q()
    for _ in range(2):
        bigkern.attention(x, x, x)
    with pytest.raises(TypeError, match="q must be"):
        bigkern.attention(x.to_sparse(), x, x)
