"""BatchNorm with residual and ReLU on every backend against float64, and the layer against torch's."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Sequence
from functools import partial
from typing import Any

import parity
import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity, device_of, poisoned_empty_memory, run_backend
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import bigkern
from bigkern.core.parity import Yardstick
from bigkern.ops.batch_norm import batch_norm, reference
from bigkern.ops.batch_norm.call import BatchNorm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = [name for name in parity.BACKENDS if name in ("torch", "triton")]  # there are no others
LAST = torch.channels_last
SHAPES = [
    (2, 3, 5, 7), (4, 64, 1, 1), (1, 1, 9, 9), (3, 129, 7, 3),
    (2, 24, 8, 8), (5, 40), (2, 6, 11), (2, 3, 2, 3, 4),
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def last(x: Tensor) -> Tensor:
    """The same with the channels of a pixel side by side, in any number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def stock(
    x: Tensor, weight: Any, bias: Any, residual: Any, running: Sequence[Tensor], training: bool, relu: bool
) -> Tensor:
    y = F.batch_norm(x, *running, weight, bias, training)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def ours(
    x: Tensor, weight: Any, bias: Any, residual: Any, running: Sequence[Tensor], training: bool, relu: bool
) -> Tensor:
    activation = "relu" if relu else None
    return batch_norm(x, *running, weight, bias, training, residual=residual, activation=activation)


def results(
    function: Any, inputs: Sequence[Any], running: Sequence[Tensor], dy: Tensor, *options: bool
) -> dict[str, Tensor]:
    """Output, gradients of those inputs that are tensors, and running statistics."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    running = [t.clone() for t in running]
    y = function(*leaves, running, *options)
    wanted = {n: t for n, t in zip(NAMES, leaves, strict=True) if t is not None}
    grads = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype))
    found = {"y": y, **{f"d{n}": g for n, g in zip(wanted, grads, strict=True)}}
    return {**found, "running_mean": running[0], "running_var": running[1]}


NAMES = ("x", "weight", "bias", "residual")


def judge(backend: str, inputs: Sequence[Any], training: bool, relu: bool, running: Any = None) -> None:
    """Output, every gradient and the running statistics by the parity rule; strides are x's."""
    x = inputs[0]
    if running is None:
        dtype = next((t.dtype for t in inputs[1:3] if t is not None), x.dtype)
        running = [v.to(x.device, dtype) for v in (torch.randn(x.shape[1]), 0.5 + torch.rand(x.shape[1]))]
    dy = torch.randn(x.shape).to(x.device, x.dtype)
    with run_backend("batch_norm", backend):
        got = results(ours, inputs, running, dy, training, relu)
    wide = [None if t is None else t.double() for t in inputs]
    exact = results(stock, wide, [t.double() for t in running], dy, training, relu)
    yardstick = Yardstick(exact, partial(results, stock, inputs, running, dy, training, relu))
    if backend != "torch" or x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=LAST)):
        assert got["y"].stride() == x.stride()  # torch's own know no other formats
    assert_parity("batch_norm", backend, got, yardstick)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity(backend: str, dtype: torch.dtype) -> None:
    poisoned_empty_memory()
    for i, shape in enumerate(SHAPES):
        training, relu, residual = i % 3 != 2, i % 2 == 0, i % 4 < 2
        judge(backend, tensors(backend, dtype, shape, True, residual), training, relu)
    for training, relu, residual in itertools.product((True, False), repeat=3):
        judge(backend, tensors(backend, dtype, (2, 24, 5, 4), True, residual), training, relu)
        if residual == relu:
            judge(backend, tensors(backend, dtype, (3, 17, 2, 2), False, residual), training, relu)
    if dtype != torch.float32:
        judge(backend, tensors(backend, dtype, (2, 16, 6, 6), True, True, dtype), True, True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_rows(backend: str, training: bool) -> None:
    """More rows than one pass of persistent programs takes, and several tiles of columns."""
    poisoned_empty_memory()
    judge(backend, tensors(backend, torch.float32, (3, 72, 17, 15), True, True), training, True)
    judge(backend, tensors(backend, torch.bfloat16, (2, 8, 31, 17), True, False), training, True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mean_far_from_zero(backend: str) -> None:
    for mean, deviation in ((1e3, 1.0), (-1e4, 1e-1), (1e-20, 1e-22)):
        x, weight, bias, _ = tensors(backend, torch.float32, (4, 20, 9, 7), True, False)
        judge(backend, [mean + deviation * x, weight, bias, None], True, False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_first_row_that_is_like_no_other(backend: str) -> None:
    x, weight, bias, _ = tensors(backend, torch.float32, (4, 20, 13, 11), True, False)
    x[0, :, 0, 0] = 1e4
    judge(backend, [x, weight, bias, None], True, False)
    x[0] = 1e4
    judge(backend, [x, weight, bias, None], True, False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_values(backend: str) -> None:
    x, weight, bias, _ = tensors(backend, torch.float16, (4, 16, 5, 5), True, False)
    judge(backend, [(x * 1e4).clamp(-6e4, 6e4), weight, bias, None], True, True)
    judge(backend, [torch.full_like(x, 0.0), weight, bias, None], True, False)
    judge(backend, [torch.full_like(x, 3.0), weight, bias, None], True, False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_stays_in_its_channel(backend: str) -> None:
    x, _, _, residual = tensors(backend, torch.float32, (3, 8, 5, 5), True, True)
    x[1, 5, 0, 0] = float("nan")
    with run_backend("batch_norm", backend):
        y = batch_norm(x, None, None, training=True, residual=residual, activation="relu")
    assert y[:, 5].isnan().all()
    assert y[:, [0, 1, 2, 3, 4, 6, 7]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_beside_x(backend: str) -> None:
    """Residual, parameters, statistics and dy lie as they like; dy may be a broadcast one."""
    x, _, _, residual = tensors(backend, torch.float32, (3, 12, 5, 4), True, True)
    wide = (1 + torch.rand(60)).to(x.device)
    running = [wide[20:32], wide[:24:2]]
    for r in (residual.contiguous(), residual[:, :1].expand_as(x), residual.flip(2).transpose(2, 3).mT):
        for training in (True, False):
            judge(backend, [x, wide[::5], wide[3:15], r], training, True, running)
    mean, var = wide[20:32], wide[:24:2].contiguous()  # torch 2.13 mistakes a strided one in this backward
    with run_backend("batch_norm", backend):
        x.requires_grad_()
        (dx,) = torch.autograd.grad(batch_norm(x, mean, var, activation="relu").sum(), x)
    rstd = torch.rsqrt(var + 1e-5).view(-1, 1, 1)
    torch.testing.assert_close(dx, torch.where(x > mean.view(-1, 1, 1), rstd, 0.0))


def test_other_memory_formats_run_on_stock() -> None:
    x = torch.randn(2, 6, 5, 4)
    for case in (x, x.to(memory_format=LAST)[:, ::2], torch.randn(5, 4, 6, 2).permute(3, 2, 0, 1)):
        judge("torch", [case, None, None, torch.randn(case.shape)], True, True)
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
                ours(*leaves, [t.clone().to(grad.device) for t in running], training, relu).backward(grad)
            found = [t.grad for t in leaves]
            full = found if all(needed) else full
            for got, want, n in zip(found, full, needed, strict=True):
                assert (got is None) == (not n)
                assert got is None or torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_the_same_bits_in_every_run(backend: str) -> None:
    inputs = tensors(backend, torch.bfloat16, (2, 24, 13, 13), True, True)
    running = [t.to(device_of(backend)) for t in (torch.zeros(24), torch.ones(24))]
    dy = torch.randn(2, 24, 13, 13).to(device_of(backend))
    with run_backend("batch_norm", backend):
        first, second = (results(ours, inputs, running, dy, True, True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- what is saved, autograd and compilation -------------------------------------------------------


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
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
