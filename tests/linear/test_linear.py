"""The linear layer on every backend against float64, and what surrounds the op."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import BACKENDS, FUZZ_FROM, assert_parity, poisoned_empty_memory, run_backend
from torch import Tensor
from torch.autograd.gradcheck import gradgradcheck

import bigkern
from bigkern.core import info
from bigkern.core.parity import Yardstick

RUN_HERE = [name for name in BACKENDS if name in ("cpu", "torch")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1), (3, 7, 5), (14, 32, 16), (33, 129, 63), (64, 100, 1023), (513, 65, 400)]  # M, N, K

needs_cpu_kernels = pytest.mark.skipif(info.import_error is not None, reason="no compiled kernels")


def results(inputs: dict[str, Tensor], dy: Tensor, function: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """y and the gradients of all inputs."""
    leaves = {name: t.to(dtype).detach().requires_grad_() for name, t in inputs.items()}
    y = function(leaves["x"], leaves["weight"], leaves.get("bias"))
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(dtype))
    return {"y": y} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def judge(backend: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    inputs = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    dy = torch.randn(*x.shape[:-1], weight.shape[0]).to(x.dtype)
    by_stock = partial(results, inputs, dy, F.linear)
    yardstick = Yardstick(by_stock(torch.float64), partial(by_stock, x.dtype))
    poisoned_empty_memory()
    with run_backend("linear", backend):
        assert_parity("linear", backend, results(inputs, dy, bigkern.linear, x.dtype), yardstick)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", RUN_HERE)
def test_parity(backend: str, dtype: torch.dtype) -> None:
    for (M, N, K), bias, transposed in itertools.product(SIZES, (True, False), (True, False)):
        weight = torch.randn(K, N).to(dtype).t() if transposed else torch.randn(N, K).to(dtype)
        judge(backend, torch.randn(M, K).to(dtype), weight, torch.randn(N).to(dtype) if bias else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_vocabulary_of_outputs(dtype: torch.dtype) -> None:
    """More outputs than the gradient of x sums at a time."""
    for transposed in (False, True):
        weight = torch.randn(24, 20011).to(dtype).t() if transposed else torch.randn(20011, 24).to(dtype)
        judge(RUN_HERE[-1], torch.randn(17, 24).to(dtype), weight, None)


@pytest.mark.parametrize("backend", RUN_HERE)
def test_any_strides(backend: str) -> None:
    x = torch.randn(9, 2, 40, 5)[..., 2].transpose(0, 1)  # [2, 9, 40]
    judge(backend, x, torch.randn(24, 80)[:, ::2], torch.randn(48)[::2])
    judge(backend, x, torch.randn(48, 40)[::2], None)
    judge(backend, x, torch.randn(40, 1).t(), torch.randn(1))
    judge(backend, torch.randn(7, 1), torch.randn(24, 1), None)


@needs_cpu_kernels
def test_fuzz() -> None:
    for seed in range(FUZZ_FROM, FUZZ_FROM + 40):
        generator = torch.Generator().manual_seed(seed)
        M, N, K = (int(torch.randint(1, top, (), generator=generator)) for top in (200, 300, 900))
        flags = torch.randint(0, 2, (2,), generator=generator).tolist()
        torch.manual_seed(seed)
        weight = torch.randn(K, N).t() if flags[0] else torch.randn(N, K)
        judge("cpu", torch.randn(M, K), weight, torch.randn(N) if flags[1] else None)


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
    assert bigkern.explain("linear", x, weight).chosen == "cpu"
    assert "rows" in str(bigkern.explain("linear", x[:8], weight))
    assert "multiply-adds" in str(bigkern.explain("linear", x[:, :64], weight[:64, :64]))
    assert "as fast in torch.bfloat16" in str(bigkern.explain("linear", x.bfloat16(), weight.bfloat16()))
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
