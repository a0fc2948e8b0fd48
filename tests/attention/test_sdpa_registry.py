"""bigkern behind torch's own scaled_dot_product_attention: the same numbers, our kernels, and back again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bigkern
from bigkern.core import info, registry
from bigkern.integrations import sdpa

pytest.importorskip("torch.nn.attention", reason="torch is too old")
if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
    pytest.skip("torch has no registry of flash implementations", allow_module_level=True)


class Calls(list[str]):
    """The calls of the CPU backend: "forward" and "backward"."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    found = Calls()
    op = registry.get("attention")
    cpu = op.backends["cpu"]

    def counted(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            found.append(name)
            return getattr(cpu, name)(*arguments)

        return call

    backends = dict(op.backends)
    backends["cpu"] = registry.Backend("cpu", counted("forward"), counted("backward"), cpu.refuses)
    monkeypatch.setattr(op, "backends", backends)
    sdpa.register()
    torch.nn.attention.activate_flash_attention_impl(sdpa.NAME)
    yield found
    if torch.nn.attention.current_flash_attention_impl() is not None:
        torch.nn.attention.restore_flash_attention_impl()


def gradients(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, ...]:
    o = F.scaled_dot_product_attention(q, k, v, **options)
    return o, *torch.autograd.grad(o.sin().sum(), (q, k, v))


@pytest.mark.skipif(info.import_error is not None, reason="the extension is not built")
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.randn(33, 40)}], ids=" ".join
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchs_function_runs_our_kernels(dtype: torch.dtype, options: dict[str, Any], calls: Calls) -> None:
    if "attn_mask" in options:
        options = {"attn_mask": options["attn_mask"].to(dtype)}
    q, k, v = (torch.randn(2, 4, S, 64, dtype=dtype, requires_grad=True) for S in (33, 40, 40))
    mine = gradients(q, k, v, **options)
    assert calls == ["forward", "backward"]
    torch.nn.attention.restore_flash_attention_impl()
    theirs = gradients(q, k, v, **options)
    assert len(calls) == 2
    rounding = 1e-5 if dtype == torch.float32 else 3e-2
    for a, b in zip(mine, theirs, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, atol=rounding, rtol=rounding)


def test_what_is_left_to_stock_runs_torchs_kernel(calls: Calls) -> None:
    q = torch.randn(2, 4, 33, 64, requires_grad=True)
    with bigkern.use("torch"):
        mine = gradients(q, q, q)
    double = gradients(*[q.detach().double().requires_grad_()] * 3)
    assert not calls
    torch.testing.assert_close(mine[0], double[0].float(), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(info.import_error is not None, reason="the extension is not built")
def test_compiled(calls: Calls) -> None:
    torch.compiler.reset()
    q = torch.randn(2, 4, 33, 64)
    compiled = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q) * 2, fullgraph=True)
    with torch.no_grad():
        o = compiled(q)
    torch.testing.assert_close(o, bigkern.attention(q, q, q) * 2, atol=1e-5, rtol=1e-5)  # type: ignore[operator]
    assert "forward" in calls


def test_register_activates_nothing() -> None:
    sdpa.register()
    sdpa.register()
    assert sdpa.NAME in torch.nn.attention.list_flash_attention_impls()
    assert torch.nn.attention.current_flash_attention_impl() is None
