"""Declaring, resolving, explaining and forcing, on an op made for the purpose."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import bigkern
from bigkern.core import registry
from bigkern.core.registry import Backend, BackendRefused


@pytest.fixture
def op() -> Iterator[registry.Op]:
    """``double``: cuda refuses, triton declines, cpu runs numbers under 100, torch runs everything."""
    declared = registry.Op("double", bind=lambda x: x)
    declared.register(Backend("torch", lambda x: ("torch", 2 * x)))
    declared.register(
        Backend("cpu", lambda x: ("cpu", 2 * x), declines=lambda x: "x >= 100" if x >= 100 else None)
    )
    declared.register(
        Backend("triton", lambda x: ("triton", 2 * x), declines=lambda x: "not verified on sm_89")
    )
    declared.register(Backend("cuda", lambda x: ("cuda", 2 * x), refuses=lambda x: "tensors are on cpu"))
    yield declared
    del registry._ops["double"]


def test_order_does_not_depend_on_registration(op: registry.Op) -> None:
    assert tuple(op.backends) == ("cuda", "triton", "cpu", "torch")


def test_resolve_takes_the_first_willing(op: registry.Op) -> None:
    assert op.resolve(1).name == "cpu"
    assert op.resolve(100).name == "torch"


def test_explain_names_every_reason(op: registry.Op) -> None:
    explanation = bigkern.explain("double", 1)
    assert explanation.chosen == "cpu"
    reasons = {choice.backend: choice.reason for choice in explanation}
    assert reasons["cuda"] == "tensors are on cpu"
    assert reasons["triton"] == "not verified on sm_89"
    assert "earlier backend" in reasons["torch"]
    assert str(explanation).splitlines()[0] == "double"
    assert "-> cpu" in str(explanation)


def test_use_overrides_a_decline_but_not_a_refusal(op: registry.Op) -> None:
    with bigkern.use("triton"):
        assert op.resolve(1).name == "triton"
        assert bigkern.explain("double", 1).chosen == "triton"
    with (
        bigkern.use(double="cuda"),
        pytest.raises(BackendRefused, match=r"cuda backend refuses.*tensors are on cpu"),
    ):
        op.resolve(1)
    assert op.resolve(1).name == "cpu"


def test_use_nests_and_unwinds_on_error(op: registry.Op) -> None:
    with bigkern.use("torch"):
        with bigkern.use(double="cpu"):
            assert op.resolve(1).name == "cpu"
        with pytest.raises(ZeroDivisionError), bigkern.use(double="triton"):
            raise ZeroDivisionError
        assert op.resolve(1).name == "torch"
    assert not registry.forced()


def test_forcing_an_absent_backend_says_what_was_built(op: registry.Op) -> None:
    del op.backends["triton"]
    with bigkern.use("triton"), pytest.raises(BackendRefused, match="there is no triton backend"):
        op.resolve(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bigkern.explain("nonsense"), "no op named 'nonsense'; there are .*attention"),
        (lambda: bigkern.use("opencl").__enter__(), "'opencl' is not one of cuda, triton, .*torch"),
        (lambda: bigkern.use(nonsense="cpu").__enter__(), "no op named 'nonsense'"),
        (lambda: registry.Op("attention", bind=lambda: None), "already declared"),
    ],
)
def test_bad_input(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


LEFT_OUT = {  # of the four that every op has
    "frozen_layernorm_ffn": {"cuda"},  # what multiplies in 8 bits is Triton's
    "batch_norm": {"cuda"},  # Triton's too
    "linear": {"cuda", "triton"},  # on a GPU stock is cuBLAS
}


def test_every_op_has_the_same_backends() -> None:
    for name, declared in registry.ops().items():
        left_out = LEFT_OUT.get(name, set())
        wanted = {"cuda", "triton", "cpu", "torch"} - left_out
        assert wanted == {b for b in declared.backends if "_" not in b}, name


def test_forced_backend_reaches_a_real_op() -> None:
    q = torch.randn(1, 2, 8, 16)
    with bigkern.use("torch"):
        assert bigkern.explain("attention", q, q, q).chosen == "torch"
