"""Dispatch of CUDA tensors while torch.compile traces, without a GPU: fake tensors, and a fake card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bigkern.core import evidence, registry, wisdom
from bigkern.core.problem import Problem
from bigkern.core.wisdom_file import Point
from bigkern.ops import problems

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a fake card beside a real one"),
    pytest.mark.usefixtures("fake_card"),
]

OPS = ("attention", "norm", "layernorm_ffn", "recurrent")


def proven(monkeypatch: pytest.MonkeyPatch, problem: Problem) -> None:
    """By Triton's kernels, for all that the problem's call is."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        call = bound(problem)
    variants = registry.get(problem.op).variants(call)
    kernels = {evidence.kernel(problem.op, "triton"): dict.fromkeys(variants, "pass")}
    monkeypatch.setattr(evidence, "proven", {evidence.place(0): kernels})


def bound(problem: Problem) -> Any:
    arguments, options = problem.arguments(fakes(problem))
    return registry.get(problem.op).bind(*arguments, **options, **problem.explain_options)


def fakes(problem: Problem) -> dict[str, Tensor]:
    made = problem.make(torch.float32, torch.device("cpu"))
    return {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
        for name, x in made.items()
    }


def traced(problem: Problem) -> bool:
    """Whether the op's node is in the graph of the whole call; any break in it raises."""

    class Model(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> object:
            return problem.ours(dict(zip(names, tensors, strict=True)))

    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = fakes(problem)
        names = list(inputs)
        graph = torch.export.export(Model(), tuple(inputs.values()), strict=True).graph
    return any(str(node.target) == f"bigkern.{problem.op}.default" for node in graph.nodes)


@pytest.mark.parametrize("op", OPS)
def test_evidence_and_wisdom_decide_in_a_trace(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems.small(op)[0]
    assert not traced(problem)
    proven(monkeypatch, problem)
    assert traced(problem)
    with FakeTensorMode(allow_non_fake_inputs=True):
        place = registry.get(op).place(bound(problem))  # type: ignore[attr-defined]
    for ours, chosen in ((1.0, True), (3.0, False)):
        point = Point(place.sizes, {"triton": ours, "torch": 2.0}, {"triton": 2.0 / ours})
        wisdom.remember(wisdom.machine(place.device), {(op, place.kind): {point.sizes: point}})
        torch._dynamo.reset()
        assert traced(problem) == chosen


def test_decode_and_batch_norm_are_one_node_where_they_are_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ("decode_attention", "batch_norm"):
        problem = problems.small(op)[0]
        proven(monkeypatch, problem)
        assert traced(problem)


def test_a_cards_wisdom_is_its_own() -> None:
    assert wisdom.machine(torch.device("cuda", 0)) == ("fake-gpu-sm90-132-227k", 0)
