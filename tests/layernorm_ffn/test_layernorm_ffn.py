"""The feed-forward block beyond test_parity.py: extremes, layouts, and what surrounds the op."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import simt_library
import torch
from parity import (
    BACKENDS,
    DTYPES,
    KERNEL_BACKENDS,
    LIBRARY_BACKENDS,
    assert_parity,
    check,
    device_of,
    run_backend,
)
from torch import Tensor, nn

import bigkern
from bigkern.core.parity import Yardstick
from bigkern.core.problem import Inputs, Problem, results
from bigkern.ops.layernorm_ffn import reference
from bigkern.ops.layernorm_ffn.call import GATED, bind
from bigkern.ops.layernorm_ffn.problems import ACTIVATIONS, NAMES, PLACEMENTS, layernorm_ffn
from bigkern.ops.layernorm_ffn.stock import activate

KERNELS, EVERY = KERNEL_BACKENDS + LIBRARY_BACKENDS, BACKENDS + LIBRARY_BACKENDS


def inputs_of(
    where: str,
    dtype: torch.dtype,
    shape: tuple[int, ...] = (5, 24),
    F_: int = 40,
    activation: str = "gelu",
    norm: str = "layer",
    bias: bool = True,
) -> list[Tensor | None]:
    """x, w1, b1, w2, b2, norm_weight, norm_bias."""
    problem = layernorm_ffn(math.prod(shape[:-1]), shape[-1], F_, activation, norm=norm, biases=bias)
    made = problem.make(dtype, device_of(where))
    x, *parameters = (made[name].detach() if name in made else None for name in NAMES)
    return [x.view(shape), *parameters]


def stock(*tensors: Tensor | None, residual: bool = True, **words: str) -> Tensor:
    x, _, _, w2, *_ = tensors
    problem = layernorm_ffn(x.shape[0], *w2.shape, **words, biases=True, residual=residual)
    return problem.stock({name: t for name, t in zip(NAMES, tensors, strict=True) if t is not None})


def with_gradients(inputs: Sequence[Any], grad: Tensor, **options: Any) -> dict[str, Tensor]:
    """y and the gradients of all inputs."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y = bigkern.layernorm_ffn(*inputs, **options)
    wanted = {f"d{name}": t for name, t in zip(NAMES, inputs, strict=True) if t is not None}
    grads = torch.autograd.grad(y, list(wanted.values()), grad.to(y.dtype))
    return {"y": y, **dict(zip(wanted, grads, strict=True))}


# ---- numbers of any kind ---------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", KERNELS)
def test_extreme_preactivations(backend: str, activation: str) -> None:
    """Tails of the activations: nothing overflows, and nothing is lost where they vanish."""

    def values(drawn: Inputs) -> Inputs:
        return drawn | {"b1": torch.linspace(-60, 60, drawn["b1"].numel())}

    check(replace(layernorm_ffn(6, 16, 32, activation), values=values), backend, torch.float32)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("backend", KERNELS)
def test_large_mean_and_tiny_variance(backend: str, placement: str) -> None:
    def values(drawn: Inputs) -> Inputs:
        return drawn | {"x": 1e4 + 0.1 * drawn["x"]}

    problem = layernorm_ffn(6, 32, 40, placement=placement)
    check(replace(problem, values=values), backend, torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", [name for name in KERNEL_BACKENDS if name != "cpu"])
def test_bias_activation(backend: str, activation: str) -> None:
    """The pass with a bias of its own, as after a product that takes none."""
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


# ---- layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("backend", KERNELS)
def test_strided_inputs(backend: str, placement: str) -> None:
    problem = layernorm_ffn(12, 24, 40, placement=placement)
    shapes = {
        "x": (2, 6, 24),
        "w1": (24, 40),
        "b1": (80,),
        "w2": (24, 80),
        "norm_weight": (1,),
        "norm_bias": (48,),
    }
    views = {
        "x": lambda t: t.transpose(0, 1),
        "w1": Tensor.t,
        "b1": lambda t: t[::2],
        "w2": lambda t: t[:, :40],
        "norm_weight": lambda t: t.expand(24),
        "norm_bias": lambda t: t[3:27],
    }
    check(replace(problem, shapes=problem.shapes | shapes, views=views), backend, torch.float32)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_no_rows_run_on_stock(placement: str) -> None:
    inputs = inputs_of("cpu", torch.float32, (2, 0, 24))
    options = {"norm": "layer", "activation": "gelu", "placement": placement}
    assert "empty" in str(bigkern.explain("layernorm_ffn", *inputs, **options))
    found = with_gradients(inputs, torch.zeros(2, 0, 24), **options)
    assert found.pop("y").shape == found.pop("dx").shape == (2, 0, 24)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in found.values())


# ---- autograd --------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("backend", EVERY)
def test_frozen_parameters(backend: str, placement: str) -> None:
    """Each gradient alone and each one left out; what is not wanted is not there."""
    inputs = inputs_of(backend, torch.float32, activation="swiglu")
    options: dict[str, Any] = {"norm": "layer", "activation": "swiglu", "placement": placement}
    grad = torch.randn(5, 24, device=device_of(backend))
    with run_backend("layernorm_ffn", backend):
        _, *full = with_gradients(inputs, grad, **options).values()
        for alone, invert in itertools.product(range(7), (False, True)):
            needed = [(i == alone) != invert for i in range(7)]
            leaves = [
                t.detach().requires_grad_(n) for t, n in zip(inputs, needed, strict=True) if t is not None
            ]
            bigkern.layernorm_ffn(*leaves, **options).backward(grad)
            for leaf, want, n in zip(leaves, full, needed, strict=True):
                assert (leaf.grad is None) == (not n)
                assert leaf.grad is None or torch.allclose(leaf.grad, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", KERNELS)
def test_shared_weights(backend: str) -> None:
    """The same parameters used twice, and one tensor in two places, add up their gradients."""
    block = layernorm_ffn(4, 16, 16, "silu")

    def twice(once: Any, inputs: Inputs) -> Tensor:
        w, b = inputs["w1"], inputs["b1"]
        shared = {"w1": w, "w2": w} | dict.fromkeys(("b1", "b2", "norm_weight", "norm_bias"), b)
        return once(shared | {"x": once(shared | {"x": inputs["x"]})})

    ours, by_stock = (partial(twice, once) for once in (block.ours, block.stock))
    shapes = {"x": (4, 16), "w1": (16, 16), "b1": (16,)}
    problem = replace(
        block, shapes=shapes, public=ours, arguments=lambda inputs: ((inputs,), {}), stock=by_stock
    )
    check(problem, backend, torch.float32)


def op_options(activation: str, placement: str, save: str, norm: str = "layer", residual: bool = True) -> Any:
    """What follows the tensors in the op's arguments, without dropout."""
    return (None, norm, activation, placement, residual, 1e-5, 0.0, 0.0, save)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("backend", EVERY)
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
@pytest.mark.parametrize("backend", EVERY)
def test_saving_the_input_gives_the_same_bits(backend: str, placement: str) -> None:
    for dtype, activation in itertools.product((torch.float32, torch.bfloat16), ("gelu", "swiglu")):
        inputs = inputs_of(backend, dtype, (7, 24), 40, activation)
        grad = torch.randn(7, 24, device=device_of(backend)).to(dtype)
        drop = {"dropout_p": 0.1, "hidden_dropout_p": 0.2, "seed": 5}
        with run_backend("layernorm_ffn", backend):
            runs = [
                with_gradients(inputs, grad, activation=activation, placement=placement, save=save, **drop)
                for save in ("preactivation", "input")
            ]
        assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def in_sums(problem: Problem) -> Problem:
    """Three micro-batches, and what they add to sums of their weights' gradients."""

    def batches(inputs: Inputs) -> list[Tensor]:
        x = inputs["x"].detach()
        return [x, x.flip(0), -x.roll(1, 1)]  # gradients of y

    def ours(inputs: Inputs) -> tuple[Tensor, ...]:
        arguments, options = problem.arguments(inputs)
        sums = tuple(torch.ones_like(inputs[name], dtype=torch.float32) for name in ("w1", "w2"))
        for dy in batches(inputs):
            bigkern.layernorm_ffn(*arguments, **options, weight_grads=sums).backward(dy)
        assert inputs["w1"].grad is None
        assert inputs["w2"].grad is None
        return tuple(t.detach() for t in sums)

    def stock(inputs: Inputs) -> tuple[Tensor, ...]:
        weights, found = (inputs["w1"], inputs["w2"]), []
        for dy in batches(inputs):
            found.append(torch.autograd.grad(problem.stock(inputs), weights, dy))
        wide = torch.promote_types(inputs["x"].dtype, torch.float32)
        return tuple(sum(grads, torch.ones_like(grads[0], dtype=wide)) for grads in zip(*found, strict=True))

    given = {"public": ours, "arguments": lambda inputs: ((inputs,), {}), "stock": stock}
    return replace(problem, **given, outputs=("dw1", "dw2"))


@pytest.mark.parametrize("backend", KERNELS)
def test_weight_gradients_are_added_to_sums(backend: str) -> None:
    """What is left of the gradients is as without them."""
    for dtype, activation in itertools.product(DTYPES, ("gelu", "geglu")):
        check(in_sums(layernorm_ffn(6, 24, 40, activation, dropout=0.2)), backend, dtype)


# ---- dropout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", EVERY)
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


@pytest.mark.parametrize("backend", KERNELS)
def test_backward_is_deterministic(backend: str) -> None:
    problem = layernorm_ffn(37, 64, 128)
    inputs = problem.make(torch.bfloat16, device_of(backend))
    with run_backend("layernorm_ffn", backend):
        runs = [results(problem.ours, inputs) for _ in range(2)]
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


@pytest.mark.parametrize("backend", EVERY)
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
        expected = stock(*inputs, activation="gelu")
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
