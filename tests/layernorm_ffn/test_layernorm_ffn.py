"""The feed-forward block on every backend against float64, and what surrounds the op."""

from __future__ import annotations

import importlib
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import simt_library
import torch
import torch.nn.functional as F
from parity import (
    BACKENDS,
    FUZZ_FROM,
    KERNEL_BACKENDS,
    assert_parity,
    device_of,
    poisoned_empty_memory,
    run_backend,
)
from torch import Tensor, nn

import bigkern
from bigkern.core.parity import Yardstick
from bigkern.ops.layernorm_ffn import reference
from bigkern.ops.layernorm_ffn.call import GATED, bind

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = ["layer", "rms", "none"]
PLACEMENTS = ["pre", "post"]
ACTIVATIONS = ["gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu"]
NAMES = ("x", "w1", "b1", "w2", "b2", "norm_weight", "norm_bias")


def inputs_of(
    where: str | torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...] = (5, 24),
    F_: int = 40,
    activation: str = "gelu",
    norm: str = "layer",
    bias: bool = True,
) -> list[Tensor | None]:
    """x, w1, b1, w2, b2, norm_weight, norm_bias; products keep the size of their inputs."""
    D, rows = shape[-1], 2 * F_ if activation in GATED else F_
    device = device_of(where) if isinstance(where, str) else where

    def make(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, device=device)).to(dtype)

    return [
        make(*shape),
        make(rows, D, scale=D**-0.5),
        make(rows) if bias else None,
        make(D, F_, scale=F_**-0.5),
        make(D) if bias else None,
        make(D) if norm != "none" else None,
        make(D) if bias and norm == "layer" else None,
    ]


def activate(p: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate, up = p.chunk(2, -1)
        return F.silu(gate) * up
    if activation == "geglu":
        gate, up = p.chunk(2, -1)
        return F.gelu(gate) * up
    return F.gelu(p, approximate="tanh") if activation == "gelu_tanh" else getattr(F, activation)(p)


def stock(*tensors: Any, norm: str, activation: str, placement: str, residual: bool = True) -> Tensor:
    x, w1, b1, w2, b2, weight, bias = tensors

    def normalise(s: Tensor) -> Tensor:
        if norm == "none":
            return s
        if norm == "layer":
            return F.layer_norm(s, s.shape[-1:], weight, bias, 1e-5)
        return F.rms_norm(s, s.shape[-1:], weight, 1e-5)

    n = normalise(x) if placement == "pre" else x
    y = F.linear(activate(F.linear(n, w1, b1), activation), w2, b2)
    y = x + y if residual else y
    return y if placement == "pre" else normalise(y)


def with_gradients(
    function: Any, inputs: Sequence[Any], grad: Tensor, options: dict[str, Any]
) -> dict[str, Tensor]:
    """y and the gradients of all inputs."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y = function(*inputs, **options)
    wanted = {f"d{name}": t for name, t in zip(NAMES, inputs, strict=True) if t is not None}
    grads = torch.autograd.grad(y, list(wanted.values()), grad.to(y.dtype))
    return {"y": y, **dict(zip(wanted, grads, strict=True))}


def judge(backend: str, inputs: Sequence[Any], **options: Any) -> None:
    """The output and every gradient by the parity rule."""
    grad = torch.randn(inputs[0].shape, device=inputs[0].device).to(inputs[0].dtype)
    compare(backend, inputs, grad, by_stock(inputs, grad, options), options)


def by_stock(inputs: Sequence[Any], grad: Tensor, options: dict[str, Any]) -> Yardstick:
    wide = [None if t is None else t.double() for t in inputs]
    return Yardstick(
        with_gradients(stock, wide, grad, options), partial(with_gradients, stock, inputs, grad, options)
    )


def by_the_torch_backend(inputs: Sequence[Any], grad: Tensor, options: dict[str, Any]) -> Yardstick:
    """For what stock does not have: dropout by a seed."""
    given = inputs, grad, options
    return Yardstick(in_torch(torch.float64, *given), partial(in_torch, grad.dtype, *given))


def in_torch(
    dtype: torch.dtype, inputs: Sequence[Any], grad: Tensor, options: dict[str, Any]
) -> dict[str, Tensor]:
    with bigkern.use(layernorm_ffn="torch"):
        converted = [None if t is None else t.detach().to(dtype) for t in inputs]
        return with_gradients(bigkern.layernorm_ffn, converted, grad, options)


def compare(
    backend: str, inputs: Sequence[Any], grad: Tensor, yardstick: Yardstick, options: dict[str, Any]
) -> None:
    with run_backend("layernorm_ffn", backend):
        ours = with_gradients(bigkern.layernorm_ffn, inputs, grad, options)
    assert_parity("layernorm_ffn", backend, ours, yardstick, f"{options}:")


@cache
def small_case(device: torch.device, dtype: torch.dtype, bias: bool, **options: Any) -> tuple[Any, ...]:
    """Inputs and what stock makes of them: the same for every backend."""
    inputs = inputs_of(device, dtype, (9, 24), 40, options["activation"], options["norm"], bias)
    grad = torch.randn(9, 24, device=device).to(dtype)
    return inputs, grad, by_stock(inputs, grad, options)


# ---- parity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity(backend: str, dtype: torch.dtype, norm: str, placement: str) -> None:
    poisoned_empty_memory()
    for activation, bias, residual in itertools.product(ACTIVATIONS, (True, False), (True, False)):
        options = {"norm": norm, "activation": activation, "placement": placement, "residual": residual}
        compare(backend, *small_case(device_of(backend), dtype, bias, **options), options)


@pytest.mark.parametrize(
    ("shape", "F_"), [((1, 1), 1), ((7, 7), 63), ((3, 3, 63), 7), ((2, 129), 1023), ((64, 33), 129)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_shapes(backend: str, shape: tuple[int, ...], F_: int) -> None:
    for dtype, activation, placement in itertools.product(
        (torch.float32, torch.bfloat16), ("gelu", "swiglu"), PLACEMENTS
    ):
        options = {"norm": "layer", "activation": activation, "placement": placement}
        judge(backend, inputs_of(backend, dtype, shape, F_, activation), **options)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_real_width(backend: str, activation: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = inputs_of(backend, dtype, (2, 20, 128), 512, activation)
        judge(backend, inputs, norm="layer", activation=activation, placement="pre")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_preactivations(backend: str, activation: str) -> None:
    """Tails of the activations: nothing overflows, and nothing is lost where they vanish."""
    inputs = inputs_of(backend, torch.float32, (6, 16), 32, activation)
    assert inputs[2] is not None
    inputs[2] = torch.linspace(-60, 60, inputs[2].numel(), device=inputs[2].device)
    judge(backend, inputs, norm="layer", activation=activation, placement="pre")


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_mean_and_tiny_variance(backend: str, placement: str) -> None:
    inputs = inputs_of(backend, torch.float32, (6, 32))
    assert inputs[0] is not None
    inputs[0] = 1e4 + 0.1 * inputs[0]
    judge(backend, inputs, norm="layer", activation="gelu", placement=placement)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_bias_activation(backend: str, activation: str) -> None:
    """The pass with a bias of its own, as after a product that takes none."""
    if backend == "cpu":
        return
    module = triton_functions() if backend == "triton" else native_ops(backend)
    for dtype, F_ in itertools.product(DTYPES, (64, 63)):
        columns = 2 * F_ if activation in GATED else F_
        product, bias = torch.randn(2, 7, columns, device=device_of(backend)).to(dtype).unbind(0)
        bias = bias[0].contiguous()

        def passed(p: Tensor, b: Tensor, activation: str = activation) -> dict[str, Tensor]:
            return {"preactivation": p + b, "out": reference.activate(p + b, activation)}

        yardstick = Yardstick(passed(product.double(), bias.double()), partial(passed, product, bias))
        biased = product.clone()
        ours = {"preactivation": biased, "out": module.bias_activation(biased, bias, activation, 0.0, None)}
        assert_parity("layernorm_ffn", backend, ours, yardstick, activation)


def triton_functions() -> Any:
    return importlib.import_module("bigkern.triton_kernels.layernorm_ffn")


def native_ops(backend: str) -> Any:
    return simt_library.ops() if backend == "simt" else torch.ops.bigkern_native


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_transposed_weights_are_read_where_they_lie(dtype: torch.dtype, activation: Any) -> None:
    """The same results as of contiguous ones, and gradients that lie as the weights do."""
    M, D, F_ = 2100, 33, 65  # tokens in two parts
    rows = 2 * F_ if activation == "swiglu" else F_
    x, w1, w2 = (torch.randn(s).to(dtype) * 0.1 for s in ((M, D), (D, rows), (F_, D)))

    def results(*weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [w.detach().requires_grad_() for w in weights]
        with bigkern.use("cpu"):
            y = bigkern.layernorm_ffn(x, leaves[0], None, leaves[1], None, norm="none", activation=activation)
        return y, *torch.autograd.grad(y, leaves, x)

    y, dw1, dw2 = results(w1.t(), w2.t())
    want, *gradients = results(w1.t().contiguous(), w2.t().contiguous())
    assert torch.equal(y, want)
    torch.testing.assert_close([dw1, dw2], gradients)
    assert dw2.t().is_contiguous()
    assert dw1.t().is_contiguous() or activation == "swiglu"


# ---- fuzzing ---------------------------------------------------------------------------------------

SEEDS = {"cpu": 400, "torch": 50, "cuda": 100, "triton": 20, "simt": 30}
FUZZ = [case for case in itertools.product(BACKENDS, range(max(SEEDS.values()))) if case[1] < SEEDS[case[0]]]


@dataclass(frozen=True)
class Call:
    """Any combination of what the op can do, at any small size, some inputs not contiguous."""

    sizes: tuple[int, int, int]
    dtype: torch.dtype
    without: tuple[int, ...]  # of the optional inputs
    strided: tuple[int, ...]
    options: dict[str, Any]

    def inputs(self, backend: str, draw: int) -> tuple[list[Tensor | None], Tensor]:
        torch.manual_seed(draw)
        rows, D, F_ = self.sizes
        activation, norm = self.options["activation"], self.options["norm"]
        inputs = inputs_of(backend, self.dtype, (rows, D), F_, activation, norm)
        for i, tensor in enumerate(inputs):
            if i in self.without:
                inputs[i] = None
            elif i in self.strided and tensor is not None:
                inputs[i] = tensor.repeat_interleave(2, -1)[..., ::2]
        return inputs, torch.randn(rows, D).to(device_of(backend), self.dtype)


def random_call(seed: int, largest: int) -> Call:
    draw = random.Random(seed)
    rows, D, F_ = (draw.choice((1, 7, draw.randint(1, largest))) for _ in range(3))
    without = tuple(i for i in (2, 4, 5, 6) if draw.random() < 0.3)
    strided = tuple(i for i in range(7) if draw.random() < 0.2)
    options = {
        "norm": draw.choice(NORMS),
        "activation": draw.choice(ACTIVATIONS),
        "placement": draw.choice(PLACEMENTS),
        "residual": draw.random() < 0.7,
        "dropout_p": draw.choice((0.0, 0.0, 0.1, 0.5)),
        "hidden_dropout_p": draw.choice((0.0, 0.0, 0.2)),
        "seed": seed,
        "save": draw.choice(("preactivation", "input")),
    }
    return Call((rows, D, F_), draw.choice(DTYPES), without, strided, options)


@pytest.mark.parametrize(("backend", "seed"), FUZZ)
def test_fuzz(backend: str, seed: int) -> None:
    poisoned_empty_memory()
    seed += FUZZ_FROM
    call = random_call(seed, 200 if backend in ("cpu", "torch", "cuda") else 40)
    inputs, grad = call.inputs(backend, seed)
    compare(backend, inputs, grad, by_the_torch_backend(inputs, grad, call.options), call.options)


# ---- layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str, placement: str) -> None:
    x, w1, b1, w2, _b2, weight, bias = inputs_of(backend, torch.float32, (2, 6, 24))
    assert x is not None
    assert w1 is not None
    assert b1 is not None
    assert w2 is not None
    assert weight is not None
    strided = [
        x.transpose(0, 1),
        w1.t().contiguous().t(),
        b1.repeat_interleave(2)[::2],
        torch.cat([w2, w2], 1)[:, :40],
        weight[:1].expand(24),
        torch.cat([weight, weight])[3:27],
        bias,
    ]
    judge(backend, strided, norm="layer", activation="gelu", placement=placement)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_no_rows_run_on_stock(placement: str) -> None:
    inputs = inputs_of("cpu", torch.float32, (2, 0, 24))
    options = {"norm": "layer", "activation": "gelu", "placement": placement}
    assert "empty" in str(bigkern.explain("layernorm_ffn", *inputs, **options))
    found = with_gradients(bigkern.layernorm_ffn, inputs, torch.zeros(2, 0, 24), options)
    assert found.pop("y").shape == found.pop("dx").shape == (2, 0, 24)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in found.values())


# ---- autograd --------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_parameters(backend: str, placement: str) -> None:
    """Each gradient alone and each one left out; what is not wanted is not there."""
    inputs = inputs_of(backend, torch.float32, activation="swiglu")
    options: dict[str, Any] = {"norm": "layer", "activation": "swiglu", "placement": placement}
    grad = torch.randn(5, 24, device=device_of(backend))
    with run_backend("layernorm_ffn", backend):
        _, *full = with_gradients(bigkern.layernorm_ffn, inputs, grad, options).values()
        for alone, invert in itertools.product(range(7), (False, True)):
            needed = [(i == alone) != invert for i in range(7)]
            leaves = [
                t.detach().requires_grad_(n) for t, n in zip(inputs, needed, strict=True) if t is not None
            ]
            bigkern.layernorm_ffn(*leaves, **options).backward(grad)
            for leaf, want, n in zip(leaves, full, needed, strict=True):
                assert (leaf.grad is None) == (not n)
                assert leaf.grad is None or torch.allclose(leaf.grad, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_weights(backend: str) -> None:
    """The same parameters used twice, and one tensor in two places, add up their gradients."""
    x = torch.randn(4, 16, device=device_of(backend))
    w = (torch.randn(16, 16, device=x.device) / 4).requires_grad_()
    b = torch.randn(16, device=x.device, requires_grad=True)

    def twice(block: Any, x: Tensor, w: Tensor, b: Tensor) -> dict[str, Tensor]:
        options = {"norm": "layer", "activation": "silu", "placement": "pre"}
        y = block(block(x, w, b, w, b, b, b, **options), w, b, w, b, b, b, **options)
        return dict(zip(("dw", "db"), torch.autograd.grad(y.square().sum(), (w, b)), strict=True))

    with run_backend("layernorm_ffn", backend):
        ours = twice(bigkern.layernorm_ffn, x, w, b)
    exact = twice(stock, x.double(), *(t.detach().double().requires_grad_() for t in (w, b)))
    assert_parity("layernorm_ffn", backend, ours, Yardstick(exact, partial(twice, stock, x, w, b)))


def op_options(activation: str, placement: str, save: str, norm: str = "layer", residual: bool = True) -> Any:
    """What follows the tensors in the op's arguments, without dropout."""
    return (None, norm, activation, placement, residual, 1e-5, 0.0, 0.0, save)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_saves_only_what_a_backward_needs(backend: str, placement: str) -> None:
    inputs = inputs_of(backend, torch.float32, (4, 8, 24), 40, "swiglu")
    op = torch.ops.bigkern.layernorm_ffn
    with run_backend("layernorm_ffn", backend):
        nothing, of_input, saved = (
            op(*inputs, *op_options("swiglu", placement, save))
            for save in ("nothing", "input", "preactivation")
        )
    assert all(t is None for t in (*nothing[1:], *of_input[1:]))
    assert torch.equal(nothing[0], saved[0])
    assert torch.equal(of_input[0], saved[0])
    shapes = [None if t is None else tuple(t.shape) for t in saved[1:]]
    assert shapes == [(32, 24) if placement == "post" else None, (32,), (32,), (32, 80)]
    if backend == "torch":
        return
    leaves = [None if t is None else t.requires_grad_() for t in inputs]
    parameters = sum(t.numel() for t in leaves[1:] if t is not None)
    beyond = {"input": 0, "preactivation": 2 * 32 + 32 * 80 + (32 * 24 if placement == "post" else 0)}
    for save, numbers in beyond.items():
        kept = saved_numbers(backend, leaves, activation="swiglu", placement=placement, save=save)
        assert kept == parameters + 32 * 24 + numbers


def saved_numbers(backend: str, leaves: Sequence[Any], **options: Any) -> int:
    kept: list[int] = []
    with (
        run_backend("layernorm_ffn", backend),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t),
    ):
        bigkern.layernorm_ffn(*leaves, **options)
    return sum(kept)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_saving_the_input_gives_the_same_bits(backend: str, placement: str) -> None:
    for dtype, activation in itertools.product((torch.float32, torch.bfloat16), ("gelu", "swiglu")):
        inputs = inputs_of(backend, dtype, (7, 24), 40, activation)
        grad = torch.randn(7, 24, device=device_of(backend)).to(dtype)
        drop = {"dropout_p": 0.1, "hidden_dropout_p": 0.2, "seed": 5}
        with run_backend("layernorm_ffn", backend):
            runs = [
                with_gradients(
                    bigkern.layernorm_ffn,
                    inputs,
                    grad,
                    {"activation": activation, "placement": placement, "save": save, **drop},
                )
                for save in ("preactivation", "input")
            ]
        assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_gradients_are_added_to_sums(backend: str) -> None:
    """Three micro-batches into fp32 sums; what is left of the gradients is as without them."""
    for dtype, activation in itertools.product(DTYPES, ("gelu", "geglu")):
        inputs = inputs_of(backend, dtype, (6, 24), 40, activation)
        leaves = [None if t is None else t.requires_grad_() for t in inputs]
        sums = [torch.ones_like(t, dtype=torch.float32) for t in (leaves[1], leaves[3])]
        options = {"activation": activation, "dropout_p": 0.2}
        grads = [torch.randn(6, 24, device=device_of(backend)).to(dtype) for _ in range(3)]
        with run_backend("layernorm_ffn", backend):
            for seed, grad in enumerate(grads):
                y = bigkern.layernorm_ffn(*leaves, **options, seed=seed, weight_grads=sums)
                y.backward(grad)
                assert leaves[1].grad is None
                assert leaves[3].grad is None

        def summed(dtype: torch.dtype, given: Any = (inputs, grads, options, sums)) -> dict[str, Tensor]:
            inputs, grads, options, sums = given
            steps = [in_torch(dtype, inputs, g, options | {"seed": i}) for i, g in enumerate(grads)]
            starts = [torch.ones_like(t, dtype=torch.promote_types(dtype, torch.float32)) for t in sums]
            return {
                name: sum((step[name] for step in steps), start)
                for name, start in zip(("dw1", "dw2"), starts, strict=True)
            }

        ours = dict(zip(("dw1", "dw2"), sums, strict=True))
        yardstick = Yardstick(summed(torch.float64), partial(summed, dtype))
        assert_parity("layernorm_ffn", backend, ours, yardstick, f"{activation} sum of")


# ---- dropout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout(backend: str, dtype: torch.dtype, norm: str, placement: str) -> None:
    poisoned_empty_memory()
    cases = itertools.product(
        ("gelu", "relu", "swiglu"), (True, False), ((0.3, 0.0), (0.0, 0.4), (0.25, 0.5))
    )
    for seed, (activation, residual, (p, hidden_p)) in enumerate(cases):
        inputs = inputs_of(backend, dtype, (3, 5, 24), 40, activation, norm)
        grad = torch.randn(3, 5, 24, device=device_of(backend)).to(dtype)
        options = {"norm": norm, "activation": activation, "placement": placement, "residual": residual}
        options |= {"dropout_p": p, "hidden_dropout_p": hidden_p, "seed": seed, "offset": 3}
        compare(backend, inputs, grad, by_the_torch_backend(inputs, grad, options), options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_dropout_keeps(backend: str) -> None:
    """An identity for W2 shows the draws: their share, their scale, and that they follow the seed."""
    size, p = 64, 0.25
    device = device_of(backend)
    x, zero, eye = torch.ones(40, size, device=device), torch.zeros(size, size), torch.eye(size)
    inputs = [x, zero.to(device), torch.ones(size, device=device), eye.to(device), None]

    def draw(**options: Any) -> Tensor:
        with run_backend("layernorm_ffn", backend):
            return bigkern.layernorm_ffn(*inputs, activation="relu", residual=False, **options)

    for name in ("dropout_p", "hidden_dropout_p"):
        y = draw(**{name: p}, seed=1)
        assert y.unique().tolist() == pytest.approx([0.0, 1.0 / (1.0 - p)])
        assert abs((y == 0).float().mean().item() - p) < 4 * (p * (1 - p) / y.numel()) ** 0.5
        assert torch.equal(y, draw(**{name: p}, seed=1))
        assert not torch.equal(y, draw(**{name: p}, seed=2))
        assert not torch.equal(y, draw(**{name: p}, seed=1, offset=1))
        torch.manual_seed(0)
        free = draw(**{name: p})
        assert not torch.equal(free, draw(**{name: p}))
        torch.manual_seed(0)
        assert torch.equal(free, draw(**{name: p}))
    assert not torch.equal(draw(dropout_p=p, seed=1), draw(hidden_dropout_p=p, seed=1))


# ---- determinism, gradcheck ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_backward_is_deterministic(backend: str) -> None:
    inputs = inputs_of(backend, torch.bfloat16, (37, 64), 128)
    grad = torch.randn(37, 64, device=device_of(backend))
    options = {"norm": "layer", "activation": "gelu", "placement": "pre"}
    with run_backend("layernorm_ffn", backend):
        runs = [with_gradients(bigkern.layernorm_ffn, inputs, grad, options) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_reference(activation: str, placement: str) -> None:
    for norm, residual in (("layer", True), ("rms", False), ("none", True)):
        inputs = inputs_of("torch", torch.float64, (3, 4), 5, activation, norm)
        leaves = [None if t is None else t.cpu().requires_grad_() for t in inputs]
        options = op_options(activation, placement, "preactivation", norm, residual)
        present = [t for t in leaves if t is not None]

        def function(*tensors: Tensor, options: Any = options, leaves: Any = leaves) -> Tensor:
            given = iter(tensors)
            return torch.ops.bigkern.layernorm_ffn(
                *(None if t is None else next(given) for t in leaves), *options
            )[0]

        assert torch.autograd.gradcheck(function, present)


# ---- compilation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, placement: str) -> None:
    inputs = inputs_of(backend, torch.float32, (2, 3, 8), 12, "swiglu")
    key = torch.tensor([3, 4])
    options = ("layer", "swiglu", placement, True, 1e-5, 0.25, 0.5)
    op, backward = torch.ops.bigkern.layernorm_ffn, torch.ops.bigkern.layernorm_ffn_backward
    leaves = [None if t is None else t.requires_grad_() for t in inputs]
    plain = [None if t is None else t.detach() for t in leaves]
    dy = torch.randn(2, 3, 8, device=device_of(backend))
    with run_backend("layernorm_ffn", backend):
        for save in ("preactivation", "input"):
            torch.library.opcheck(op.default, (*leaves, key, *options, save))
        torch.library.opcheck(op.default, (*plain, key, *options, "nothing"))
        _, *saved = op(*plain, key, *options, "preactivation")
        some = [False, True, True, False, False, False, True]
        for wanted in ([True] * 7, some):
            torch.library.opcheck(backward.default, (dy, *plain, key, *saved, *options, wanted))
        torch.library.opcheck(backward.default, (dy, *plain, key, *(None,) * 4, *options, some))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_without_recompiles(backend: str) -> None:
    torch._dynamo.reset()
    _, *parameters = inputs_of(backend, torch.float32)
    leaves = [None if t is None else t.requires_grad_() for t in parameters]

    def function(x: Tensor) -> Tensor:
        return bigkern.layernorm_ffn(bigkern.layernorm_ffn(x, *leaves), *leaves, placement="post")

    with run_backend("layernorm_ffn", backend):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for M in (3, 5, 9):
                x = torch.randn(M, 24, device=device_of(backend))
                torch._dynamo.mark_dynamic(x, 0)
                x.requires_grad_()
                got = torch.autograd.grad(compiled(x).square().sum(), (x, leaves[0]))
                want = torch.autograd.grad(function(x).square().sum(), (x, leaves[0]))
                for ours, theirs in zip(got, want, strict=True):
                    torch.testing.assert_close(ours, theirs)


def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    x, *parameters = inputs_of("cpu", torch.float32, (64, 64), 256)
    leaves = [None if t is None else t.requires_grad_() for t in parameters]
    compiled = torch.compile(lambda x: bigkern.layernorm_ffn(x, *leaves), fullgraph=True)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), leaves[0])
    (want,) = torch.autograd.grad(bigkern.layernorm_ffn(x, *leaves).square().sum(), leaves[0])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


# ---- what is refused -------------------------------------------------------------------------------


def test_float64_and_autocast_run_on_stock() -> None:
    inputs = inputs_of("cpu", torch.float64)
    assert bigkern.explain("layernorm_ffn", *inputs).chosen == "torch"
    inputs = inputs_of("cpu", torch.float32)
    with torch.autocast("cpu"):
        assert "autocast" in str(bigkern.explain("layernorm_ffn", *inputs))
        y = bigkern.layernorm_ffn(*inputs)
        expected = stock(*inputs, norm="layer", activation="gelu", placement="pre")
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)


BAD = [
    ("x must be a Tensor", TypeError, {"x": None}),
    ("x must be floating", TypeError, {"x": torch.ones(2, 8, dtype=torch.long)}),
    ("w1 must have x's dtype", TypeError, {"w1": torch.ones(12, 8, dtype=torch.float16)}),
    ("w1 must be", ValueError, {"w1": torch.ones(12, 7)}),
    ("w1 must be", ValueError, {"activation": "swiglu"}),
    ("w1 must be a Tensor", TypeError, {"w1": None}),
    ("b1 must be", ValueError, {"b1": torch.ones(1, 12)}),
    ("b1 must be on", ValueError, {"b1": torch.ones(12, device="meta")}),
    ("w2 must be", ValueError, {"w2": torch.ones(9, 12)}),
    ("w2", ValueError, {"w2": torch.tensor(1.0)}),
    ("b2 must be", ValueError, {"b2": torch.ones(12)}),
    ("norm_weight must be", ValueError, {"norm_weight": torch.ones(9)}),
    ("norm_bias must be None", ValueError, {"norm": "rms", "norm_bias": torch.ones(8)}),
    ("norm_weight must be None", ValueError, {"norm": "none", "norm_weight": torch.ones(8)}),
    ("norm must be", ValueError, {"norm": "batch"}),
    ("activation must be", ValueError, {"activation": "tanh"}),
    ("placement must be", ValueError, {"placement": "middle"}),
    ("eps must be finite", ValueError, {"eps": float("inf")}),
    ("eps must be finite and not negative", ValueError, {"eps": -1e-5}),
    ("dropout_p must be in", ValueError, {"dropout_p": 1.0}),
    ("hidden_dropout_p must be in", ValueError, {"hidden_dropout_p": -0.1}),
    ("seed must be an int", ValueError, {"seed": -1}),
    ("save must be", ValueError, {"save": "everything"}),
    ("weight_grads must be two", ValueError, {"weight_grads": torch.ones(12, 8)}),
    (r"weight_grads\[1\] must be contiguous", ValueError, {"weight_grads": (torch.ones(12, 8),) * 2}),
    (r"weight_grads\[0\] must be a float32", ValueError, {"weight_grads": (None, torch.ones(8, 12))}),
]


@pytest.mark.parametrize(("message", "error", "change"), BAD)
def test_bad_arguments(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "x": torch.randn(2, 8),
        "w1": torch.randn(12, 8),
        "b1": None,
        "w2": torch.randn(8, 12),
        "b2": None,
    }
    with pytest.raises(error, match=message):
        bigkern.layernorm_ffn(**{**arguments, **change})


def test_weight_grads_need_eager_mode() -> None:
    x, w1, w2 = torch.randn(2, 8), torch.randn(12, 8, requires_grad=True), torch.randn(8, 12)
    sums = (torch.zeros(12, 8), torch.zeros(8, 12))

    def function(x: Tensor) -> Tensor:
        return bigkern.layernorm_ffn(x, w1, None, w2, None, weight_grads=sums)

    with pytest.raises(Exception, match="weight_grads needs eager mode"):
        torch.func.vmap(function)(x[None])
    with pytest.raises(Exception, match="weight_grads needs eager mode"):
        torch.compile(function, fullgraph=True, backend="eager")(x)


# ---- the layer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layer(activation: Any, placement: Any, norm: Any) -> None:
    torch.manual_seed(3)
    layer = bigkern.nn.LayerNormFFN(16, 24, activation, norm, placement, dropout=0.25)
    torch.manual_seed(3)
    rows = 48 if activation in GATED else 24
    linear1, linear2 = nn.Linear(16, rows), nn.Linear(24, 16)
    assert torch.equal(layer.linear1.weight, linear1.weight)
    assert torch.equal(layer.linear2.bias, linear2.bias)
    norm_keys = ["norm.weight", "norm.bias"] if norm == "layer" else ["norm.weight"]
    assert list(layer.state_dict()) == [
        *(f"linear{i}.{p}" for i in (1, 2) for p in ("weight", "bias")),
        *norm_keys,
    ]

    x = torch.randn(3, 5, 16)
    tensors = [x, linear1.weight, linear1.bias, linear2.weight, linear2.bias, layer.norm.weight]
    tensors.append(layer.norm.bias if norm == "layer" else None)
    options = {"norm": norm, "activation": activation, "placement": placement}
    eps = 1e-5
    assert layer.norm.eps == eps
    torch.testing.assert_close(layer.eval()(x), stock(*tensors, **options))
    torch.manual_seed(7)
    dropped = bigkern.layernorm_ffn(*tensors, **options, dropout_p=0.25)
    torch.manual_seed(7)
    torch.testing.assert_close(layer.train()(x), dropped)
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("residual", [True, False])
def test_feed_forward(residual: bool) -> None:
    block = bigkern.nn.FeedForward(16, 24, "geglu", hidden_dropout=0.5, residual=residual)
    assert list(block.state_dict()) == [f"linear{i}.{p}" for i in (1, 2) for p in ("weight", "bias")]
    x = torch.randn(3, 5, 16)
    expected = block.linear2(activate(block.linear1(x), "geglu")) + (x if residual else 0)
    torch.testing.assert_close(block.eval()(x), expected)
    block.train()
    assert not torch.equal(block(x), block(x))
    with pytest.raises(ValueError, match="hidden_dropout"):
        bigkern.nn.FeedForward(16, 24, hidden_dropout=1.0)


def test_layer_options() -> None:
    layer = bigkern.nn.LayerNormFFN(8, 12, bias=False, eps=1e-3, dtype=torch.bfloat16)
    assert [tuple(p.shape) for p in layer.parameters()] == [(12, 8), (8, 12), (8,)]
    assert layer.norm.eps == 1e-3
    assert layer(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert "activation='gelu'" in repr(layer)
    assert "placement='pre'" in repr(layer)
    for change in ({"activation": "tanh"}, {"norm": "batch"}, {"placement": "both"}, {"dropout": 2.0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            bigkern.nn.LayerNormFFN(8, 12, **change)


def test_explain_names_the_block() -> None:
    inputs = inputs_of("cpu", torch.float32)
    explanation = bigkern.explain("layernorm_ffn", *inputs, activation="relu")
    assert explanation.chosen in ("cpu", "torch")
    assert "layernorm_ffn" in str(explanation)
    assert bind(*inputs).save == "nothing"
