"""BatchNorm beyond test_parity.py: numbers and layouts of any kind, and the layer against torch's."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import parity
import pytest
import torch
import torch.nn.functional as F
from parity import check, device_of, run_backend
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import bigkern
from bigkern.core.problem import Inputs, Problem, results
from bigkern.ops.batch_norm import batch_norm, problems, reference
from bigkern.ops.batch_norm.call import BatchNorm

BACKENDS = [name for name in parity.BACKENDS if name in ("torch", "triton")]  # there are no others
KERNELS = [name for name in BACKENDS if name != "torch"]
LAST = torch.channels_last

pytestmark = pytest.mark.usefixtures("one_thread")


def last(x: Tensor) -> Tensor:
    """The same with the channels of a pixel side by side, in any number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def of(*shape: int, **options: bool) -> Problem:
    return problems.batch_norm(*shape, **options, statistics=True)


def tensors(
    backend: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    affine: bool,
    residual: bool,
    parameters: Any = None,
) -> list[Tensor | None]:
    device, C = device_of(backend), shape[1]
    x, r = (last(2 * torch.randn(shape) + 0.5).to(device, dtype) for _ in range(2))
    weight, bias = (
        t.to(device, parameters or torch.float32) for t in (1 + 0.2 * torch.randn(C), torch.randn(C))
    )
    return [x, weight if affine else None, bias if affine else None, r if residual else None]


# ---- parity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", KERNELS)
def test_many_rows(backend: str, training: bool) -> None:
    """More rows than one pass of persistent programs takes, and several tiles of columns."""
    check(of(3, 72, 17, 15, residual=True, training=training), backend, torch.float32)
    check(of(2, 8, 31, 17, training=training), backend, torch.bfloat16)


def changed(problem: Problem, change: Callable[[Tensor], Tensor]) -> Problem:
    """The problem with other numbers in x, which is drawn as [N, H, W, C]."""

    def values(drawn: Inputs) -> Inputs:
        drawn = problem.values(drawn)
        return drawn | {"x": change(drawn["x"])}

    return replace(problem, values=values)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_mean_far_from_zero(backend: str) -> None:
    for mean, deviation in ((1e3, 1.0), (-1e4, 1e-1), (1e-20, 1e-22)):
        problem = changed(of(4, 20, 9, 7, relu=False), lambda x, m=mean, d=deviation: m + d * x)
        check(problem, backend, torch.float32)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_first_row_that_is_like_no_other(backend: str) -> None:
    for row in ((0, 0, 0), (0,)):
        at = tuple(torch.tensor(i) for i in row)
        problem = changed(of(4, 20, 13, 11, relu=False), lambda x, at=at: x.index_put(at, torch.tensor(1e4)))
        check(problem, backend, torch.float32)


@pytest.mark.parametrize("backend", KERNELS)
def test_extreme_values(backend: str) -> None:
    large, three = (lambda x: (1e4 * x).clamp(-6e4, 6e4), lambda x: 3 + 0 * x)
    for change, relu in ((large, True), (torch.zeros_like, False), (three, False)):
        check(changed(of(4, 16, 5, 5, relu=relu), change), backend, torch.float16)


@pytest.mark.parametrize("backend", KERNELS)
def test_outputs_lie_as_x_does(backend: str) -> None:
    for problem in problems.forms()[:8]:
        inputs = problem.make(torch.float32, device_of(backend))
        with run_backend("batch_norm", backend):
            assert problem.ours(inputs)[0].stride() == inputs["x"].stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_stays_in_its_channel(backend: str) -> None:
    x, _, _, residual = tensors(backend, torch.float32, (3, 8, 5, 5), True, True)
    x[1, 5, 0, 0] = float("nan")
    with run_backend("batch_norm", backend):
        y = batch_norm(x, None, None, training=True, residual=residual, activation="relu")
    assert y[:, 5].isnan().all()
    assert y[:, [0, 1, 2, 3, 4, 6, 7]].isfinite().all()


@pytest.mark.parametrize("backend", KERNELS)
def test_layouts_beside_x(backend: str) -> None:
    """Residual, parameters, statistics and dy lie as they like; dy may be a broadcast one."""
    problem = of(3, 12, 5, 4, residual=True)
    every = {"weight": (60,), "bias": (60,), "fixed_mean": (60,), "fixed_var": (24,)}
    views = problem.views | {"weight": lambda t: t[::5], "bias": lambda t: t[3:15]}
    views |= {"fixed_mean": lambda t: t[20:32], "fixed_var": lambda t: t[::2]}
    for shape, lies in (
        ((3, 12, 5, 4), torch.Tensor.detach),
        ((3, 1, 5, 4), lambda r: r.expand(3, 12, 5, 4)),
        ((3, 4, 5, 12), lambda r: r.movedim(-1, 1).flip(2).transpose(2, 3)),
    ):
        shapes = problem.shapes | every | {"residual": shape}
        for training in (True, False):
            other = of(3, 12, 5, 4, residual=True, training=training)
            check(replace(other, shapes=shapes, views=views | {"residual": lies}), backend, torch.float32)
    x, wide = (
        problem.make(torch.float32, device_of(backend))["x"].detach(),
        (1 + torch.rand(60)).to(device_of(backend)),
    )
    mean, var = wide[20:32], wide[:24:2].contiguous()  # torch 2.13 mistakes a strided one in this backward
    with run_backend("batch_norm", backend):
        x.requires_grad_()
        (dx,) = torch.autograd.grad(batch_norm(x, mean, var, activation="relu").sum(), x)
    rstd = torch.rsqrt(var + 1e-5).view(-1, 1, 1)
    torch.testing.assert_close(dx, torch.where(x > mean.view(-1, 1, 1), rstd, 0.0))


def test_other_memory_formats_run_on_stock() -> None:
    x = torch.randn(2, 6, 5, 4)
    for case in (x, x.to(memory_format=LAST)[:, ::2], torch.randn(5, 4, 6, 2).permute(3, 2, 0, 1)):
        y = batch_norm(case, None, None, training=True, residual=case)
        torch.testing.assert_close(y, F.batch_norm(case, None, None, training=True) + case)
        if "triton" in BACKENDS and not torch.cuda.is_available():
            with (
                bigkern.use(batch_norm="triton"),
                pytest.raises(bigkern.BackendRefused, match="channels_last"),
            ):
                batch_norm(case, None, None, training=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_wanted_gradients(backend: str) -> None:
    inputs = tensors(backend, torch.float32, (2, 6, 3, 3), True, True)
    grad = torch.randn(2, 6, 3, 3).to(device_of(backend))
    running = [torch.zeros(6), torch.ones(6)]
    for training, relu in ((True, True), (False, False)):
        full = None
        for needed in itertools.product((True, False), repeat=4):
            if not any(needed):
                continue
            leaves = [
                t.detach().requires_grad_(n) for t, n in zip(inputs, needed, strict=True) if t is not None
            ]
            with run_backend("batch_norm", backend):
                x, weight, bias, residual = leaves
                kept = [t.clone().to(grad.device) for t in running]
                options = {"residual": residual, "activation": "relu" if relu else None}
                batch_norm(x, *kept, weight, bias, training, **options).backward(grad)
            found = [t.grad for t in leaves]
            full = found if all(needed) else full
            for got, want, n in zip(found, full, needed, strict=True):
                assert (got is None) == (not n)
                assert got is None or torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("backend", KERNELS)
def test_the_same_bits_in_every_run(backend: str) -> None:
    problem = of(2, 24, 13, 13, residual=True)
    inputs = problem.make(torch.bfloat16, device_of(backend))
    with run_backend("batch_norm", backend):
        first, second = (results(problem.ours, inputs, problem.outputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- what is saved, autograd and compilation -------------------------------------------------------


@pytest.mark.parametrize("backend", KERNELS)
def test_what_is_saved(backend: str) -> None:
    """x, and y where there is a residual and a ReLU: nothing else of an image's size."""
    x, weight, bias, residual = tensors(backend, torch.float32, (4, 16, 8, 8), True, True)
    cases = ((None, None, 1), (None, "relu", 1), (residual, None, 1), (residual, "relu", 2))
    for r, activation, images in cases:
        leaf, sizes = x.detach().requires_grad_(), []
        with run_backend("batch_norm", backend), saved_tensors_hooks(partial(note, sizes), lambda t: t):
            batch_norm(leaf, None, None, weight, bias, True, residual=r, activation=activation)
        assert sum(size for size in sizes if size > 16) == images * x.numel()


def note(sizes: list[int], saved: Tensor) -> Tensor:
    sizes.append(saved.numel())
    return saved


@pytest.mark.parametrize("relu", [True, False])
def test_gradcheck_of_the_reference(relu: bool) -> None:
    x, residual = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, requires_grad=True).unbind(0)
    weight, bias, mean = torch.randn(3, 4, dtype=torch.float64).unbind(0)
    var = torch.rand(4, dtype=torch.float64) + 0.5
    weight.requires_grad_(), bias.requires_grad_()
    for r, statistics in itertools.product((residual, None), ((None, None), (mean, var))):

        def function(x: Tensor, w: Any, b: Any, r: Any, statistics: Any = statistics) -> Tensor:
            return torch.ops.bigkern.batch_norm(x, r, w, b, *statistics, 1e-5, relu)[0]

        assert torch.autograd.gradcheck(function, (x, weight, bias, r))
        assert torch.autograd.gradcheck(function, (x, None, None, r))


def test_reference_agrees_with_torch() -> None:
    x, weight, bias = torch.randn(4, 9, 3, 3), torch.randn(9), torch.randn(9)
    y, mean, var = reference.batch_norm(BatchNorm(x, None, weight, bias, None, None, 1e-5, False))
    expected, save_mean, save_rstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5)
    for got, want in zip((y, mean, torch.rsqrt(var + 1e-5)), (expected, save_mean, save_rstd), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, residual: bool) -> None:
    x, weight, bias, r = tensors(backend, torch.float32, (2, 6, 3, 4), True, residual)
    for t in (x, weight, bias, r):
        if t is not None:
            t.requires_grad_()
    mean, var = (t.to(x.device) for t in (torch.zeros(6), torch.ones(6)))
    with run_backend("batch_norm", backend):
        for statistics in ((None, None), (mean, var)):
            arguments = (x, r, weight, bias, *statistics, 1e-5, True)
            torch.library.opcheck(torch.ops.bigkern.batch_norm.default, arguments)
        dy, y = torch.randn_like(x).detach(), x.detach() if residual else None
        arguments = (dy, x.detach(), y, weight.detach(), bias.detach(), mean, var, 1e-5, True, True, residual)
        torch.library.opcheck(torch.ops.bigkern.batch_norm_backward.default, (*arguments, True, True))
    if backend == "torch":
        torch.library.opcheck(
            torch.ops.bigkern.batch_norm.default,
            (x.detach()[:, ::2], None, None, None, None, None, 1e-5, True),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_without_recompiles(backend: str) -> None:
    device = device_of(backend)
    layer = bigkern.nn.BatchNorm2d(8, activation="relu").to(device)
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    with run_backend("batch_norm", backend):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for N in (3, 5, 9):
                x, r = (torch.randn(N, 8, 4, 4, device=device).to(memory_format=LAST) for _ in range(2))
                torch._dynamo.mark_dynamic(x, 0)
                torch._dynamo.mark_dynamic(r, 0)
                x.requires_grad_()
                got = torch.autograd.grad(compiled(x, r).square().sum(), (x, *layer.parameters()))
                want = torch.autograd.grad(twin(x, r).square().sum(), (x, *twin.parameters()))
                for a, b in zip((*got, *layer.buffers()), (*want, *twin.buffers()), strict=True):
                    torch.testing.assert_close(a, b)


def test_transforms_run() -> None:
    x = torch.randn(3, 2, 4, 5, 5)
    r = torch.randn(3, 2, 4, 5, 5)
    mapped = torch.vmap(lambda x, r: batch_norm(x, None, None, training=True, residual=r, activation="relu"))
    want = torch.stack(
        [(F.batch_norm(a, None, None, training=True) + b).relu() for a, b in zip(x, r, strict=True)]
    )
    torch.testing.assert_close(mapped(x, r), want)


# ---- what is refused -------------------------------------------------------------------------------


def test_a_cpu_runs_stock() -> None:
    explanation = bigkern.explain("batch_norm", torch.randn(2, 4, 3, 3), None, None, training=True)
    assert explanation.chosen == "torch"
    assert "no CPU kernel" in str(explanation)


def test_stock_is_torch_to_the_last_bit() -> None:
    x, r = torch.randn(2, 2, 4, 5, 5).unbind(0)
    mine, theirs = ([torch.zeros(4), torch.ones(4)] for _ in range(2))
    y = batch_norm(x, *mine, training=True, residual=r, activation="relu")
    assert torch.equal(y, (F.batch_norm(x, *theirs, training=True) + r).relu())
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    mixed = batch_norm(x.bfloat16(), *mine, residual=r)
    assert mixed.dtype == torch.float32  # as an addition has it


BAD = [
    ("x must be a Tensor", TypeError, {"x": [1.0]}),
    ("x must be floating", TypeError, {"x": torch.ones(2, 4, 3, 3, dtype=torch.long)}),
    ("x must be \\[N, C, \\*\\]", RuntimeError, {"x": torch.ones(4)}),
    ("running_mean must be a Tensor", TypeError, {"running_mean": 0.0}),
    ("running_mean must be defined in evaluation mode", RuntimeError, {"running_mean": None}),
    ("running_var must be defined in evaluation mode", RuntimeError, {"running_var": None}),
    ("either both be None or neither", ValueError, {"running_var": None, "training": True}),
    ("running_var should contain 4 elements not 5", RuntimeError, {"running_var": torch.ones(5)}),
    ("running_var must have shape", RuntimeError, {"running_var": torch.ones(1, 4)}),
    ("weight should contain 4 elements not 3", RuntimeError, {"weight": torch.ones(3)}),
    ("weight must be floating", TypeError, {"weight": torch.ones(4, dtype=torch.long)}),
    ("weight must be on", ValueError, {"weight": torch.ones(4, device="meta")}),
    ("bias should contain 4 elements", RuntimeError, {"bias": torch.ones(8)}),
    ("residual must be a Tensor", TypeError, {"residual": 1.0}),
    ("residual must have x's shape", RuntimeError, {"residual": torch.ones(4, 3, 3)}),
    ("residual must be on", ValueError, {"residual": torch.ones(2, 4, 3, 3, device="meta")}),
    ("more than 1 value per channel", ValueError, {"x": torch.ones(1, 4, 1, 1), "training": True}),
    ("momentum must be a number", TypeError, {"momentum": None}),
    ("eps must be finite and not negative", ValueError, {"eps": -1.0}),
    ("activation must be None or 'relu'", ValueError, {"activation": "gelu"}),
]


@pytest.mark.parametrize(("message", "error", "change"), BAD)
def test_bad_arguments(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    running = {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    arguments: dict[str, Any] = {"x": torch.randn(2, 4, 3, 3), **running}
    with pytest.raises(error, match=message):
        batch_norm(**{**arguments, **change})
    assert torch.equal(running["running_mean"], torch.zeros(4))


# ---- the layer -------------------------------------------------------------------------------------

LAYERS = [  # as torch's module_db has them, and in the end ours alone
    ((3,), {}),
    ((3, 1e-3, None), {}),
    ((3, 1e-3, 0.8), {}),
    ((3, 1e-3, 0.8, False), {}),
    ((3, 1e-3, 0.8, True, False), {}),
    ((3,), {"bias": False}),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_is_drop_in(backend: str, training: bool) -> None:
    """Outputs, gradients and running statistics over steps in both modes; repr, keys and pickle."""
    device = device_of(backend)
    for args, kwargs in LAYERS:
        pair = [
            cls(*args, **kwargs).to(device).train(training)
            for cls in (bigkern.nn.BatchNorm2d, nn.BatchNorm2d)
        ]
        assert isinstance(pair[0], nn.BatchNorm2d)
        assert repr(pair[0]) == repr(pair[1])
        assert list(pair[0].state_dict()) == list(pair[1].state_dict())
        for module in pair:
            for parameter in module.parameters():
                nn.init.uniform_(parameter, generator=torch.Generator(device).manual_seed(1))
        for step in range(3):
            inputs = [last(torch.randn(2, 3, 6, 6) + step).to(device).requires_grad_()] * 2
            with run_backend("batch_norm", backend):
                outputs = [module(x) for module, x in zip(pair, inputs, strict=True)]
            weights = torch.randn_like(outputs[0])
            grads = [
                torch.autograd.grad(y, [x, *module.parameters()], weights)
                for y, x, module in zip(outputs, inputs, pair, strict=True)
            ]
            torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(*(dict(module.named_buffers()) for module in pair))
            if step == 1:
                for module in pair:
                    module.train(not training)
        again = pickle.loads(pickle.dumps(pair[0]))
        assert list(again.state_dict()) == list(pair[1].state_dict())


def test_layer_of_an_empty_batch() -> None:
    pair = [cls(5, 1e-3, 0.3, False) for cls in (bigkern.nn.BatchNorm2d, nn.BatchNorm2d)]
    outputs = [module(torch.randn(0, 5, 2, 2)) for module in pair]
    assert outputs[0].shape == outputs[1].shape == (0, 5, 2, 2)
    torch.testing.assert_close(*(module.state_dict() for module in pair))


def test_layer_with_residual_and_activation() -> None:
    layer, plain = bigkern.nn.BatchNorm2d(4, activation="relu"), nn.BatchNorm2d(4)
    x, r = torch.randn(2, 2, 4, 3, 3).unbind(0)
    assert torch.equal(layer(x, residual=r), (plain(x) + r).relu())
    assert torch.equal(layer(x), plain(x).relu())
    assert repr(layer).endswith("activation='relu')")
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).activation == "relu"
    plain.__class__ = bigkern.nn.BatchNorm2d  # a layer that was torch's
    assert torch.equal(plain(x, r), layer.train()(x, r)) is False  # no ReLU
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(x[0])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 4, 1, 1))
    with pytest.raises(RuntimeError, match="should contain 3 elements not 4"):
        layer(torch.randn(2, 3, 4, 4))
    with pytest.raises(ValueError, match="activation must be"):
        bigkern.nn.BatchNorm2d(4, activation="gelu")
