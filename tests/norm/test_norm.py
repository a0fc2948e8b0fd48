"""LayerNorm and RMSNorm beyond test_parity.py: rows of any kind, layouts, and what surrounds the op."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import BACKENDS, DTYPES, KERNEL_BACKENDS, check, device_of, run_backend
from torch import Tensor

import bigkern
from bigkern.core.problem import Problem, results
from bigkern.ops.norm import reference
from bigkern.ops.norm.call import bind
from bigkern.ops.norm.problems import KINDS, norm


def call(kind: str, x: Tensor, weight: Any, bias: Any, residual: Any) -> Sequence[Tensor]:
    """``(y,)`` or ``(y, sum)`` by the public functions."""
    if kind == "layer":
        out = bigkern.layer_norm(x, x.shape[-1:], weight, bias, residual=residual)
    else:
        out = bigkern.rms_norm(x, x.shape[-1:], weight, 1e-5, residual)
    return out if isinstance(out, tuple) else (out,)


def tensors(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], weight: bool, bias: bool, residual: bool
) -> list[Tensor | None]:
    device = device_of(backend)

    def make(wanted: bool, *size: int) -> Tensor | None:
        return torch.randn(*size, device=device).to(dtype) if wanted else None

    return [make(True, *shape), make(weight, shape[-1]), make(bias, shape[-1]), make(residual, *shape)]


# ---- parity beyond test_parity.py ------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_sum_alone(backend: str) -> None:
    x, weight, bias, residual = tensors(backend, torch.float32, (4, 24), True, True, True)
    leaves = [t.requires_grad_() for t in (x, residual) if t is not None]
    with run_backend("norm", backend):
        _, s = bigkern.layer_norm(leaves[0], (24,), weight, bias, residual=leaves[1], dropout_p=0.5, seed=1)
        dx, dresidual = torch.autograd.grad(s.sum(), leaves)
    assert bool((dresidual == 1).all())
    assert set(dx.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_many_rows(backend: str, kind: str) -> None:
    """More rows than one pass of persistent blocks takes."""
    check(norm(201, 36, kind), backend, torch.float32)
    check(norm(75, 1032, kind), backend, torch.bfloat16)


@pytest.mark.parametrize(
    ("N", "dtype", "kind"),
    [(8200, torch.float32, "rms"), (8200, torch.bfloat16, "layer"), (65536, torch.float32, "layer")],
)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_long_rows(backend: str, N: int, dtype: torch.dtype, kind: str) -> None:
    if backend == "triton" and device_of(backend).type == "cpu":
        N = min(N, 20000)  # the interpreter's time; still too long for one tile
    check(norm(1, N, kind, residual=N < 16384, both=N < 16384), backend, dtype)


def of_rows(N: int, kind: str, change: Callable[[Tensor], Tensor]) -> Problem:
    """Four rows, changed before they are rounded."""
    return replace(norm(4, N, kind), values=lambda drawn: drawn | {"x": change(drawn["x"])})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_large_mean_and_tiny_variance(backend: str, kind: str) -> None:
    for mean, deviation, N in ((1e4, 1e-1, 768), (1e4, 1e-1, 1023), (-3e3, 1e-2, 4100), (1e-20, 1e-22, 64)):
        check(of_rows(N, kind, lambda x, m=mean, d=deviation: m + d * x), backend, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_extreme_values(backend: str, kind: str) -> None:
    large, zero, three = (lambda x: (x * 1e4).clamp(-6e4, 6e4), torch.zeros_like, lambda x: 3 + 0 * x)
    for change in (large, zero, three):
        check(of_rows(256, kind, change), backend, torch.float16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_stays_in_its_row(backend: str) -> None:
    x = torch.randn(3, 64, device=device_of(backend))
    x[1, 5] = float("nan")
    with run_backend("norm", backend):
        y = bigkern.layer_norm(x, 64)
    assert y[1].isnan().all()
    assert y[::2].isfinite().all()


# ---- layouts ---------------------------------------------------------------------------------------


LAYOUTS: dict[tuple[int, ...], Callable[[Tensor], Tensor]] = {
    (6, 80): lambda t: t.t()[:64],
    (6, 81): lambda t: t[:, 3:67],
    (6, 82): lambda t: t[:, ::2],
    (1, 80): lambda t: t.expand(6, 80),
    (2, 5, 4): lambda t: t.transpose(0, 1),
    (7,): lambda t: t[:],
}


@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_strided_inputs(backend: str, shape: tuple[int, ...]) -> None:
    lies = LAYOUTS[shape]
    x = lies(torch.empty(shape)).shape
    shapes = {"x": shape, "weight": (x[-1] + 1,), "bias": (2 * x[-1],), "residual": x}
    views = {
        "x": lies,
        "weight": lambda t: t[1:],
        "bias": lambda t: t[::2],
        "residual": lambda t: t.mT.contiguous().mT,
    }
    if len(x) == 1:
        del views["residual"]
    problem = norm(1, x[-1], residual=True, both=True)
    check(replace(problem, shapes=shapes, views=views), backend, torch.float32)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_gradient_of_a_sum_is_a_broadcast(backend: str) -> None:
    problem = norm(4, 32)
    summed = {
        "public": lambda *a, **o: problem.public(*a, **o).sum(),
        "stock": lambda i: problem.stock(i).sum(),
    }
    check(replace(problem, **summed), backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_sum_is_used(backend: str) -> None:
    x, weight, _, residual = tensors(backend, torch.float32, (3, 16), True, False, True)
    assert x is not None
    x.requires_grad_()
    with run_backend("norm", backend):
        _, s = bigkern.rms_norm(x, 16, weight, residual=residual)
        (dx,) = torch.autograd.grad(s.sum(), x)
    assert torch.equal(dx, torch.ones_like(x))


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_several_normalized_dimensions(backend: str) -> None:
    problem = norm(12, 30, residual=True, both=True)

    def unflattened(x: Tensor, _shape: Any, residual: Tensor, **affine: Any) -> Any:
        images, residual = x.view(3, 4, 5, 6), residual.view(3, 4, 5, 6)
        affine |= {name: affine[name].view(5, 6) for name in ("weight", "bias")}
        y, s = bigkern.layer_norm(images, (5, 6), residual=residual, **affine)
        assert y.shape == s.shape == images.shape
        return y.view(x.shape), s.view(x.shape)

    check(replace(problem, public=unflattened), backend, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str, shape: tuple[int, ...], kind: str) -> None:
    problem = norm(0, 8, kind, residual=True, both=True)
    problem = replace(problem, shapes=problem.shapes | {"x": shape, "residual": shape})
    with run_backend("norm", backend):
        found = results(problem.ours, problem.make(torch.float32, device_of(backend)), problem.outputs)
    assert found["output"].shape == found["sum"].shape == found["dx"].shape == shape
    assert torch.equal(found["dweight"], torch.zeros_like(found["dweight"]))


def test_empty_rows_run_on_stock() -> None:
    x = torch.randn(3, 0)
    assert bigkern.explain("norm", x, 0).chosen == "torch"
    assert bigkern.layer_norm(x, 0).shape == (3, 0)


# ---- autograd and compilation ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_wanted_gradients(backend: str) -> None:
    inputs = tensors(backend, torch.float32, (5, 24), True, True, True)
    grad = torch.randn(5, 24, device=device_of(backend))
    full = None
    for needed in itertools.product((True, False), repeat=4):
        if not any(needed):
            continue
        leaves = [t.detach().requires_grad_(n) for t, n in zip(inputs, needed, strict=True) if t is not None]
        with run_backend("norm", backend):
            y = call("layer", *leaves)[0]
            y.backward(grad)
        found = [t.grad for t in leaves]
        full = found if all(needed) else full
        assert full is not None
        for got, want, n in zip(found, full, needed, strict=True):
            assert (got is None) == (not n)
            assert got is None or torch.allclose(got, want)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_backward_is_deterministic(backend: str) -> None:
    problem = norm(37, 264, residual=True, both=True)
    inputs = problem.make(torch.bfloat16, device_of(backend))
    with run_backend("norm", backend):
        first, second = (results(problem.ours, inputs, problem.outputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_reference(kind: str) -> None:
    x, residual = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True).unbind(0)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def function(*t: Tensor) -> tuple[Tensor, Tensor]:
        y, s, _, _ = torch.ops.bigkern.norm(*t, 1e-5, kind, 0.0, None)
        return y, s

    assert torch.autograd.gradcheck(function, (x, residual, weight, bias))
    assert torch.autograd.gradcheck(
        lambda x: torch.ops.bigkern.norm(x, None, None, None, 1e-5, kind, 0.0, None)[0], x
    )


def test_reference_agrees_with_torch() -> None:
    x, weight, bias = torch.randn(4, 9), torch.randn(9), torch.randn(9)
    y, total, mean, rstd = reference.norm(x, None, weight, bias, 1e-5, "layer")
    expected = torch.native_layer_norm(x, (9,), weight, bias, 1e-5)
    assert total is None
    for ours, theirs in zip((y, mean, rstd), expected, strict=True):
        torch.testing.assert_close(ours, theirs.view(ours.shape))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, residual: bool, kind: str) -> None:
    x, weight, bias, r = tensors(backend, torch.float32, (2, 3, 16), True, kind == "layer", residual)
    for t in (x, weight, bias, r):
        if t is not None:
            t.requires_grad_()
    with run_backend("norm", backend):
        torch.library.opcheck(torch.ops.bigkern.norm.default, (x, r, weight, bias, 1e-5, kind, 0.0, None))
        _, _, mean, rstd = torch.ops.bigkern.norm(x, r, weight, bias, 1e-5, kind, 0.0, None)
        dy = torch.randn(2, 3, 16, device=device_of(backend))
        statistics = [None if t is None else t.detach() for t in (mean, rstd)]
        arguments = (dy, None, x.detach(), weight.detach(), *statistics, kind, True, kind == "layer")
        for dropout in ((0.0, None), (0.5, torch.tensor([1, 2]))):
            torch.library.opcheck(torch.ops.bigkern.norm_backward.default, (*arguments, *dropout))
            if residual:
                forward = (x, r, weight, bias, 1e-5, kind, *dropout)
                torch.library.opcheck(torch.ops.bigkern.norm.default, forward)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_without_recompiles(backend: str) -> None:
    device = device_of(backend)
    weight = torch.randn(16, device=device, requires_grad=True)

    def function(x: Tensor, r: Tensor) -> Tensor:
        y, s = bigkern.layer_norm(x, (16,), weight, weight, residual=r)
        return y * bigkern.rms_norm(s, (16,), weight)

    torch._dynamo.reset()
    with run_backend("norm", backend):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for M in (3, 5, 9):
                x, r = torch.randn(2, M, 16, device=device).unbind(0)
                torch._dynamo.mark_dynamic(x, 0)
                torch._dynamo.mark_dynamic(r, 0)
                x.requires_grad_()
                got = torch.autograd.grad(compiled(x, r).square().sum(), (x, weight))
                want = torch.autograd.grad(function(x, r).square().sum(), (x, weight))
                for ours, theirs in zip(got, want, strict=True):
                    torch.testing.assert_close(ours, theirs)


def test_unmeasured_layer_norm_is_stocks_and_rms_norm_ours() -> None:
    small, large = torch.randn(4, 64, requires_grad=True), torch.randn(2048, 768, requires_grad=True)
    assert "not measured here" in str(bigkern.explain("norm", large, 768))
    for x in (small, large):
        assert bigkern.explain("norm", x, x.shape[1:], kind="rms").chosen == "cpu"
    with torch.no_grad():
        assert "no gradient" in str(bigkern.explain("norm", small, 64, kind="rms"))
        assert bigkern.explain("norm", large, 768, kind="rms").chosen == "cpu"


def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    x, weight = torch.randn(256, 4096), torch.randn(4096, requires_grad=True)
    chosen = bigkern.explain("norm", x, 4096, weight).chosen
    compiled = torch.compile(lambda x: bigkern.layer_norm(x, 4096, weight, weight), fullgraph=True)
    (got,) = torch.autograd.grad(compiled(x).sum(), weight)
    (want,) = torch.autograd.grad(bigkern.layer_norm(x, 4096, weight, weight).sum(), weight)
    torch.testing.assert_close(got, want, msg=lambda text: f"on {chosen}: {text}")


# ---- what is refused -------------------------------------------------------------------------------


def test_other_parameter_dtype_runs_on_stock() -> None:
    x, weight = torch.randn(4, 8, dtype=torch.bfloat16), torch.randn(8)
    explanation = bigkern.explain("norm", x, 8, weight)
    assert explanation.chosen == "torch"
    assert "weight has dtype torch.float32" in str(explanation)
    assert torch.equal(bigkern.layer_norm(x, 8, weight, weight), F.layer_norm(x, (8,), weight, weight))
    with bigkern.use("cpu"), pytest.raises(bigkern.BackendRefused, match="weight has dtype"):
        bigkern.layer_norm(x, 8, weight)


def test_autocast_runs_on_stock() -> None:
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu"):
        assert "autocast" in str(bigkern.explain("norm", x, 8))
        assert bigkern.layer_norm(x, 8).dtype == F.layer_norm(x, (8,)).dtype


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_default_eps_of_rms_is_torchs(dtype: torch.dtype) -> None:
    x = torch.full((2, 8), 1e-4, dtype=dtype)
    with bigkern.use("torch"):
        assert torch.equal(bigkern.rms_norm(x, 8), F.rms_norm(x, (8,)))
    assert bind(x, 8, eps=None, kind="rms").eps > 0


BAD = [
    ("x must be a Tensor", TypeError, {"x": [1.0]}),
    ("x must be floating", TypeError, {"x": torch.ones(2, 8, dtype=torch.long)}),
    ("normalized_shape", RuntimeError, {"normalized_shape": ()}),
    ("normalized_shape", RuntimeError, {"normalized_shape": 9}),
    ("normalized_shape", RuntimeError, {"normalized_shape": (2, 2, 8)}),
    ("weight must be a Tensor", TypeError, {"weight": 1.0}),
    ("weight must be floating", TypeError, {"weight": torch.ones(8, dtype=torch.long)}),
    ("weight must have normalized_shape", RuntimeError, {"weight": torch.ones(7)}),
    ("weight must be on", ValueError, {"weight": torch.ones(8, device="meta")}),
    ("bias must have normalized_shape", RuntimeError, {"bias": torch.ones(1, 8)}),
    ("residual must have x's dtype", TypeError, {"residual": torch.ones(2, 8, dtype=torch.float16)}),
    ("residual must have x's shape", RuntimeError, {"residual": torch.ones(8)}),
    ("residual must be on", ValueError, {"residual": torch.ones(2, 8, device="meta")}),
    ("eps must be finite", ValueError, {"eps": float("nan")}),
    ("eps must be finite and not negative", ValueError, {"eps": -1.0}),
    ("dropout_p must be in", ValueError, {"dropout_p": 1.0}),
    ("dropout_p needs a residual", ValueError, {"dropout_p": 0.5}),
]


@pytest.mark.parametrize(("message", "error", "change"), BAD)
def test_bad_arguments(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"x": torch.randn(2, 8), "normalized_shape": 8}
    with pytest.raises(error, match=message):
        bigkern.layer_norm(**{**arguments, **change})


def by_torch(kind: str, x: Tensor, weight: Tensor, _bias: None, _residual: None) -> Sequence[Tensor]:
    return ((F.layer_norm if kind == "layer" else F.rms_norm)(x, x.shape[-1:], weight, eps=1e-5),)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_torch_func(kind: str) -> None:
    x, weight = torch.randn(3, 64, 512), torch.rand(512)

    def loss(function: Any, x: Tensor) -> Tensor:
        return function(kind, x, weight, None, None)[0].square().mul(x).sum()

    slopes = [torch.func.vmap(torch.func.grad(partial(loss, f)))(x) for f in (call, by_torch)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-4)


# ---- layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("LayerNorm", (16,), {}),
        ("LayerNorm", ((3, 16),), {"bias": False}),
        ("LayerNorm", (16, 1e-3), {"elementwise_affine": False}),
        ("RMSNorm", (16,), {}),
        ("RMSNorm", ([3, 16],), {"eps": 1e-3, "elementwise_affine": False}),
    ],
)
def test_layers_are_drop_in(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ours, theirs = getattr(bigkern.nn, name)(*args, **kwargs), getattr(torch.nn, name)(*args, **kwargs)
    assert isinstance(ours, getattr(torch.nn, name))
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for module in (ours, theirs):
        for parameter in module.parameters():
            torch.nn.init.uniform_(parameter, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(ours(x), theirs(x))
    for module in (ours, theirs):
        with pytest.raises(RuntimeError, match="normalized_shape"):
            module(torch.randn(2, 3, 15))
