"""The linear layer beyond test_parity.py: strides, extremes, and what surrounds the op."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import check
from torch import Tensor
from torch.autograd.gradcheck import gradgradcheck

import bigkern
from bigkern.core import info
from bigkern.ops.linear.problems import linear

needs_cpu_kernels = pytest.mark.skipif(info.import_error is not None, reason="no compiled kernels")


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_vocabulary_of_outputs(dtype: torch.dtype, transposed: bool) -> None:
    """More outputs than the gradient of x sums at a time."""
    check(linear(17, 20011, 24, transposed, bias=False), "cpu", dtype)


@needs_cpu_kernels
def test_any_strides() -> None:
    x = {"x": lambda t: t[..., 2].transpose(0, 1)}  # [2, 9, 40]
    for w1, bias, views in (
        ((24, 80), (48,), {"w1": lambda t: t[:, ::2], "bias": lambda t: t[::2]}),
        ((48, 40), None, {"w1": lambda t: t[::2]}),
        ((40, 1), (1,), {"w1": Tensor.t}),
    ):
        shapes = {"x": (9, 2, 40, 5), "w1": w1} | ({"bias": bias} if bias else {})
        check(replace(linear(18, 24, 40), shapes=shapes, views=x | views), "cpu", torch.float32)
    check(linear(7, 24, 1, bias=False), "cpu", torch.float32)


@needs_cpu_kernels
def test_extreme_values() -> None:
    x, weight = torch.randn(40, 64), torch.randn(8, 64)
    x[3], x[5, 7], weight[2, 9] = 1e30, float("inf"), float("nan")
    with bigkern.use(linear="cpu"):
        ours = bigkern.linear(x, weight)
    stock = F.linear(x, weight)
    torch.testing.assert_close(ours, stock, equal_nan=True, rtol=1e-4, atol=1e-5)


@needs_cpu_kernels
def test_gradient_of_the_weight_lies_as_the_weight_does() -> None:
    parameter = torch.nn.Parameter(torch.randn(64, 96))  # [K, N], as a Conv1D has it
    with bigkern.use(linear="cpu"):
        bigkern.linear(torch.randn(50, 64), parameter.t()).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.is_contiguous()


@needs_cpu_kernels
def test_only_what_is_asked_for() -> None:
    x, weight, bias = torch.randn(40, 16), torch.randn(8, 16), torch.randn(8, requires_grad=True)
    with bigkern.use(linear="cpu"):
        (dbias,) = torch.autograd.grad(bigkern.linear(x, weight, bias).sum(), bias)
        assert torch.equal(dbias, torch.full((8,), 40.0))
        x.requires_grad_()
        (dx,) = torch.autograd.grad(bigkern.linear(x, weight, bias).sum(), x)
    torch.testing.assert_close(dx, weight.sum(0).expand(40, 16))


@needs_cpu_kernels
def test_gradients_of_gradients() -> None:
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((40, 16), (8, 16), (8,)))
    with bigkern.use(linear="cpu"):
        y = bigkern.linear(x, weight, bias).square().sum()
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
        ours = torch.autograd.grad(dx.square().sum(), (x, weight))
    y = F.linear(x, weight, bias).square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    theirs = torch.autograd.grad(dx.square().sum(), (x, weight))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)
    wide = [torch.randn(s, requires_grad=True, dtype=torch.double) for s in ((3, 4), (2, 4), (2,))]
    assert gradgradcheck(bigkern.linear, wide)


@needs_cpu_kernels
def test_opcheck_and_compile() -> None:
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((2, 40, 64), (96, 64), (96,)))
    with bigkern.use(linear="cpu"):
        torch.library.opcheck(torch.ops.bigkern.linear, (x, weight, bias))
        transposed = torch.randn(64, 96).t().requires_grad_()
        torch.library.opcheck(torch.ops.bigkern.linear, (x, transposed, None))
        compiled = torch.compile(lambda *t: bigkern.linear(*t).relu(), fullgraph=True, backend="aot_eager")
        ours = torch.autograd.grad(compiled(x, weight, bias).sum(), (x, weight, bias))
    theirs = torch.autograd.grad(F.linear(x, weight, bias).relu().sum(), (x, weight, bias))
    torch.testing.assert_close(ours, theirs)


@needs_cpu_kernels
def test_which_calls_stock_runs() -> None:
    x, weight = torch.randn(512, 768), torch.randn(768, 768)
    assert "not measured here" in str(bigkern.explain("linear", x, weight))
    assert "float64" in str(bigkern.explain("linear", x.double(), weight.double()))
    with torch.autocast("cpu"):
        assert "autocast" in str(bigkern.explain("linear", x, weight))
        assert bigkern.linear(x, weight).dtype == torch.bfloat16


def test_transforms_of_torch_func() -> None:
    x, weight = torch.randn(3, 128, 512), torch.randn(256, 512)
    ours = torch.func.vmap(torch.func.grad(lambda w, x: bigkern.linear(x, w).sum()), (None, 0))(weight, x)
    torch.testing.assert_close(ours, x.sum(1, keepdim=True).expand(-1, 256, -1), rtol=1e-4, atol=1e-3)


class Quantised(Tensor):
    """A weight that computes its own products, as torchao's do."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            return "its own"
        return super().__torch_function__(function, types, args, kwargs or {})


def test_what_takes_over_torchs_functions_is_asked() -> None:
    x, weight = torch.randn(128, 512), torch.randn(256, 512)
    assert bigkern.linear(x, weight.as_subclass(Quantised)) == "its own"
    assert "subclasses" in str(bigkern.explain("linear", x, weight.as_subclass(Quantised)))
    expected = F.linear(x, weight)
    torch.testing.assert_close(bigkern.linear(x, weight.to_sparse()), expected, rtol=1e-4, atol=1e-3)
    graph = torch.fx.symbolic_trace(torch.nn.Sequential(bigkern.nn.Linear(512, 256)))
    assert graph(x).shape == (128, 256)


def test_exported_and_traced_programs_are_of_any_size() -> None:
    layer, x = torch.nn.Sequential(bigkern.nn.Linear(512, 256)), torch.randn(128, 512)
    sizes = ({0: torch.export.Dim("rows", min=2, max=4096)},)
    for program in (
        torch.export.export(layer, (x,), dynamic_shapes=sizes).module(),
        torch.jit.trace(layer, x),
    ):
        torch.testing.assert_close(program(x[:7]), layer(x[:7]))
        torch.testing.assert_close(program(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shapes", [((64, 8), (9, 7)), ((64, 8), (9, 8), (7,)), ((64, 8), (2, 9, 8))])
def test_errors_are_torchs_behind_the_arguments_name(shapes: tuple[Any, ...]) -> None:
    tensors = [torch.randn(shape) for shape in shapes]
    with pytest.raises(RuntimeError) as theirs:
        F.linear(*tensors)
    with pytest.raises(RuntimeError) as ours:
        bigkern.linear(*tensors)
    assert str(ours.value).endswith(f": {theirs.value}")


def test_layer_is_torchs() -> None:
    torch.manual_seed(0)
    ours = bigkern.nn.Linear(64, 96)
    torch.manual_seed(0)
    stock = torch.nn.Linear(64, 96)
    assert torch.equal(ours.weight, stock.weight)
    assert repr(ours) == repr(stock)
    x = torch.randn(2, 700, 64)
    torch.testing.assert_close(ours(x), stock(x))
    assert ours(x[0, 0]).shape == (96,)
