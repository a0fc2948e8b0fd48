"""Torch's single kernels as candidates: what they refuse, and that a trace holds the one that was chosen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import bigkern
from bigkern.core import evidence, wisdom
from bigkern.core.wisdom_file import Point
from bigkern.ops.attention import stock_kernels
from bigkern.ops.attention.backends import ATTENTION, bind

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="fake tensors on a fake card")
NAMES = tuple(stock_kernels.KERNELS)


@pytest.fixture(autouse=True)
def _registered(fake_card: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where torch is built with CUDA, on a GPU on which torch's own rules allow everything."""
    monkeypatch.setattr(ATTENTION, "backends", ATTENTION.backends)
    for name, kernel in stock_kernels.KERNELS.items():
        monkeypatch.setitem(stock_kernels.KERNELS, name, kernel._replace(can_use=lambda asked: True))
        ATTENTION.register(stock_kernels.backend(name))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def fake(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda", **options: Any) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device, **options)


def drawn(heads: int = 4, S: int = 32, D: int = 64, **options: Any) -> Tensor:
    return fake(2, heads, S, D, **options)


def reasons(q: Tensor, k: Tensor | None = None, v: Tensor | None = None, **options: Any) -> dict[str, Any]:
    call = bind(q, q if k is None else k, q if v is None else v, **options)
    return {name.removeprefix("torch_"): ATTENTION.backends[name].refuses(call) for name in NAMES}


def test_plain_calls_run_on_all() -> None:
    for options in ({}, {"causal": True}, {"causal": "bottom_right"}, {"scale": 0.3}):
        assert not any(reasons(drawn(), **options).values())
    assert not any(reasons(drawn(), drawn(S=40), drawn(S=40)).values())


def test_what_no_kernel_runs_by_itself() -> None:
    q = drawn()
    for options in ({"softcap": 2.0}, {"sinks": fake(4)}, {"dropout_p": 0.5, "seed": 1}):
        said = set(reasons(q, **options).values())
        assert said == {"softcap, sinks and seeded dropout run on the reference"}
    mask, bias = fake(1, 1, 32, 32, dtype=torch.bool), fake(1, 1, 32, 32)
    slopes = fake(4, dtype=torch.float32)
    for options in (
        {"window": (4, None)}, {"window": (None, 4)}, {"window": (4, 4), "causal": True}, {"mask": mask},
        {"bias": bias}, {"alibi_slopes": slopes},
    ):  # fmt: skip
        said = set(reasons(q, **options).values())
        assert said == {"masks, windows, biases and slopes are for torch's whole function"}
    ends = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), fake(3, dtype=torch.int32))
    said = set(reasons(fake(64, 4, 64), **ends, max_seqlen_q=40, max_seqlen_k=40).values())
    assert said == {"packed sequences go to torch's whole function, one by one"}


def test_what_single_kernels_do_not_take() -> None:
    on_cpu = drawn(device="cpu")
    assert set(reasons(on_cpu).values()) == {"tensors are on cpu"}
    assert "16 bytes" in reasons(drawn(D=60))["flash"]
    assert "strided" in reasons(drawn(D=32).transpose(2, 3))["flash"]
    assert set(reasons(drawn(), drawn(S=40), drawn(S=40), causal=True).values()) == {
        "causal with more queries or keys: kernels differ in the corner"
    }
    narrow = {"cudnn": None, "flash": "v's head_dim 32 is not q's 64", "efficient": None}
    assert reasons(drawn(), drawn(), drawn(D=32)) == narrow
    shared = {"cudnn": None, "flash": None, "efficient": "it knows no heads that share keys"}
    assert reasons(drawn(), drawn(heads=2), drawn(heads=2)) == shared
    wide = {"cudnn": "dtype torch.float32", "flash": "dtype torch.float32", "efficient": None}
    assert reasons(drawn(dtype=torch.float32)) == wide
    assert reasons(drawn(), drawn(S=1), drawn(S=1))["cudnn"] == "it does not take a single key"
    assert "version" in reasons(drawn(), dropout_p=0.1)["cudnn"]


def test_deterministic_algorithms_are_not_cudnns() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        found = reasons(drawn())
    finally:
        torch.use_deterministic_algorithms(False)
    assert "deterministic" in found.pop("cudnn")
    assert not any(found.values())


def test_torchs_own_rule_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    never = stock_kernels.KERNELS["torch_flash"]._replace(can_use=asked.append)
    monkeypatch.setitem(stock_kernels.KERNELS, "torch_flash", never)
    call = bind(drawn(), drawn(heads=2), drawn(heads=2), causal=True)
    assert "torch's own rule" in str(stock_kernels.backend("torch_flash").refuses(call))
    assert (asked[0].is_causal, asked[0].enable_gqa, asked[0].dropout) == (True, True, 0.0)


# ---- the one that was chosen runs ------------------------------------------------------------------


def remember(fastest: str, q: Tensor) -> None:
    """As if all had been measured here, this one fastest."""
    place = ATTENTION.place(bind(q, q, q))
    us = {name: 1.0 if name == fastest else 2.0 for name in ("torch", *NAMES)}
    point = Point(place.sizes, us, {})  # type: ignore[union-attr]
    wisdom.remember(wisdom.machine(q.device), {("attention", place.kind): {point.sizes: point}})  # type: ignore[union-attr]


def targets(graph: torch.fx.Graph) -> str:
    return " ".join(str(node.target) for node in graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("name", NAMES)
def test_unmeasured_they_wait_and_measured_they_run(name: str) -> None:
    q = drawn()
    assert bigkern.explain("attention", q, q, q).chosen == "torch"
    assert "not measured here" in str(bigkern.explain("attention", q, q, q))
    remember(name, q)
    assert bigkern.explain("attention", q, q, q).chosen == name


class Called(TorchDispatchMode):
    """Notes which of torch's attention ops run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in str(op):
            self.names.append(str(op.overloadpacket))
        return op(*args, **(kwargs or {}))


class Causal(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return bigkern.attention(q, k, k, causal=True)  # type: ignore[return-value]


class Model(torch.nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return bigkern.attention(q, q, q)  # type: ignore[return-value]


@pytest.mark.parametrize("name", NAMES)
def test_the_fastest_is_in_the_trace(name: str) -> None:
    q = drawn()
    remember(name, q)
    op = str(stock_kernels.KERNELS[name].op)
    assert op in targets(torch.export.export(Model(), (q,), strict=True).graph)
    assert op in targets(make_fx(Model())(q).graph)


@pytest.mark.parametrize("name", NAMES)
def test_its_backward_is_its_own(name: str) -> None:
    """On meta tensors: autograd on a fake card asks for its streams."""
    q, k, v = (drawn(S=S, device="meta", requires_grad=True) for S in (32, 48, 48))
    o = ATTENTION.backends[name].forward(bind(q, k, v))
    with Called() as called:
        grads = torch.autograd.grad(o, (q, k, v), torch.empty_like(o))
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    assert called.names == [f"{stock_kernels.KERNELS[name].op.overloadpacket}_backward"]


def test_heads_too_long_for_some_gpus_are_not_traced() -> None:
    q = drawn(D=256)
    remember("torch_flash", q)
    assert bigkern.explain("attention", q, q, q).chosen == "torch_flash"
    assert "flash" not in targets(torch.export.export(Model(), (q,), strict=True).graph)


def test_sizes_left_open_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each graph would be bound to having as many keys as queries, or not."""
    kernel = {evidence.kernel("attention", "triton"): {"bfloat16 causal": "pass"}}
    monkeypatch.setattr(evidence, "proven", {evidence.place(0): kernel})
    guards: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        context = torch._guards.TracingContext.get()
        guards.extend(str(guard.expr) for guard in context.fake_mode.shape_env.guards)
        return graph

    q, k = drawn(S=32), drawn(S=48)
    for x in (q, k):
        torch._dynamo.mark_dynamic(x, 2)
    torch.compile(Causal(), backend=backend, fullgraph=True)(q, k)
    assert not [guard for guard in guards if guard.startswith(("Eq", "Ne"))]
