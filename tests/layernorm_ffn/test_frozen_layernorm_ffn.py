"""Frozen weights beyond test_parity.py: their bits and errors, bigkern.freeze, and what both refuse."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import DTYPES, KERNEL_BACKENDS, assert_parity, run_backend
from test_layernorm_ffn import inputs_of, stock
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import bigkern
from bigkern import FrozenWeight, freeze_weight, frozen_layernorm_ffn
from bigkern.core.parity import Yardstick
from bigkern.ops.layernorm_ffn import frozen_reference as reference
from bigkern.ops.layernorm_ffn import frozen_stock
from bigkern.ops.layernorm_ffn.frozen_call import FP8, bind, check_fp8

OP = "frozen_layernorm_ffn"
BACKENDS = [name for name in KERNEL_BACKENDS if name in ("cpu", "triton")]


def frozen(weight: Tensor, weights: str) -> FrozenWeight:
    """freeze_weight, also of fp8 where no GPU multiplies in it: Triton's interpreter does."""
    if weights == "fp8":
        return FrozenWeight(*reference.quantised(weight, FP8), None)
    return freeze_weight(weight, weights)  # type: ignore[arg-type]


def weight_as_it_acts(weight: FrozenWeight) -> Tensor:
    """float64."""
    values = weight.values.double()
    return values if weight.scale is None else values * weight.scale.double()[:, None]


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "activation"), [(3, "gelu"), (40, "swiglu"), (300, "gelu_tanh")])
def test_packed_is_the_same_to_the_last_bit(dtype: torch.dtype, rows: int, activation: str) -> None:
    inputs = inputs_of("cpu", dtype, (rows, 100), 200, activation)
    x, w1, b1, w2, b2, *norm = inputs
    assert w1 is not None
    assert w2 is not None
    weights = freeze_weight(w1, "packed", gated=activation == "swiglu"), freeze_weight(w2, "packed")
    assert weights[0].packed is not None
    with bigkern.use("cpu"), torch.no_grad():
        as_is = bigkern.layernorm_ffn(*inputs, activation=activation)  # type: ignore[arg-type]
        packed = frozen_layernorm_ffn(x, weights[0], b1, weights[1], b2, *norm, activation=activation)  # type: ignore[arg-type]
    assert torch.equal(as_is, packed)


@pytest.mark.parametrize(("weights", "bound"), [("packed", 1e-6), ("int8", 0.015), ("fp8", 0.07)])
def test_error_is_what_is_said(weights: str, bound: float) -> None:
    """The relative error of a block's output, without the residual that would hide it."""
    torch.manual_seed(0)
    inputs = inputs_of("torch", torch.float32, (64, 256), 1024)
    x, w1, b1, w2, b2, *norm = inputs
    want = stock(*inputs, activation="gelu", residual=False)
    first, second = frozen(w1, weights), frozen(w2, weights)  # type: ignore[arg-type]
    have = frozen_layernorm_ffn(x, first, b1, second, b2, *norm, residual=False)  # type: ignore[arg-type]
    error = float((have - want).norm() / want.norm())
    assert error < bound
    assert weights == "packed" or error > bound / 10  # or the bound says nothing


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
def test_quantised_weights(dtype: torch.dtype) -> None:
    w = torch.randn(33, 70) * torch.logspace(-3, 3, 33)[:, None]
    w[5] = 0.0
    q, scale = reference.quantised(w, dtype)
    assert q.dtype == dtype
    assert scale.shape == (33,)
    assert (q[5].float() == 0).all()
    relative = ((q.float() * scale[:, None] - w).abs() / w.abs().amax(1, keepdim=True).clamp(min=1e-30)).max()
    assert relative <= (0.5 / 127 if dtype == torch.int8 else 2.0**-4) * 1.001


# ---- stock in fp8 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_in_fp8_is_the_references(bias: bool) -> None:
    x, b = torch.randn(33, 64).bfloat16(), torch.randn(48).bfloat16() if bias else None
    weight = reference.Weight(*reference.quantised(torch.randn(48, 64), FP8))
    factors = (q.double() * scale.double()[:, None] for q, scale in (reference.quantised(x, FP8), weight))
    exact = F.linear(*factors, bias=None if b is None else b.double())
    yardstick = Yardstick({"y": exact}, lambda: {"y": reference.product(x, weight, b)})
    assert_parity(OP, "torch", {"y": frozen_stock.scaled_product(x, weight, b)}, yardstick)


@pytest.mark.parametrize(
    ("dtype", "N", "in_fp8"),
    [(torch.bfloat16, 48, True), (torch.bfloat16, 40, False), (torch.half, 48, False)],
)
def test_a_gpu_multiplies_bfloat16_in_fp8(dtype: torch.dtype, N: int, in_fp8: bool) -> None:
    """What torch's product with a scale for each row takes; the rest is the reference's."""

    def product(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return frozen_stock.product(x, reference.Weight(w, scale), bias)

    with FakeTensorMode():
        x, bias = (torch.empty(shape, dtype=dtype, device="cuda") for shape in ((33, 64), (N,)))
        w = torch.empty(N, 64, dtype=FP8, device="cuda")
        traced = make_fx(product)(x, w, torch.empty(N, device="cuda"), bias)
        y = product(x, w, torch.empty(N, device="cuda"), bias)
    assert (y.shape, y.dtype) == ((33, N), dtype)
    assert ("aten._scaled_mm.default" in {str(node.target) for node in traced.graph.nodes}) == in_fp8


# ---- what surrounds the op -------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["packed", "int8"])
def test_gradients_pass_through(weights: str) -> None:
    """x, biases and norm get the gradients of the block with the weights as they act; the weights none."""
    inputs = [t if t is None else t.requires_grad_() for t in inputs_of("torch", torch.float64, (5, 24), 40)]
    x, w1, b1, w2, b2, *norm = inputs
    assert w1 is not None
    assert w2 is not None
    first, second = freeze_weight(w1, weights), freeze_weight(w2, weights)  # type: ignore[arg-type]
    y = frozen_layernorm_ffn(x, first, b1, second, b2, *norm)  # type: ignore[arg-type]
    leaves = [t for t in (x, b1, b2, *norm) if t is not None]
    acting = (x, weight_as_it_acts(first), b1, weight_as_it_acts(second), b2, *norm)
    want = stock(*acting, activation="gelu")
    for ours, theirs in zip(
        torch.autograd.grad(y.square().sum(), leaves), torch.autograd.grad(want.square().sum(), leaves),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_opcheck_and_compile(backend: str) -> None:
    torch._dynamo.reset()
    x, w1, b1, w2, b2, *norm = inputs_of(backend, torch.float32, (6, 24), 40)
    first, second = (freeze_weight(w, "int8") for w in (w1, w2))  # type: ignore[arg-type]
    arguments = bind(x, first, b1, second, b2, *norm).flat()  # type: ignore[arg-type]

    def block(x: Tensor) -> Tensor:
        return frozen_layernorm_ffn(x, first, b1, second, b2, *norm) * 2  # type: ignore[arg-type]

    with run_backend(OP, backend), torch.no_grad():
        torch.library.opcheck(torch.ops.bigkern.frozen_layernorm_ffn.default, arguments)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(2):
                torch.testing.assert_close(compiled(x), block(x))  # type: ignore[arg-type]


def blocks(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(
        bigkern.nn.LayerNormFFN(48, 96, "swiglu", "rms", bias=False),
        nn.Linear(48, 48),
        bigkern.nn.FeedForward(48, 96, dropout=0.1),
        bigkern.nn.LayerNormFFN(48, 64, placement="post"),
    ).to(dtype)


@pytest.mark.parametrize("weights", ["packed", "int8"])
def test_freeze(weights: str) -> None:
    torch.manual_seed(0)
    model = blocks().eval()
    x = torch.randn(20, 48)
    with torch.no_grad():
        before = model(x)
        report = bigkern.freeze(model, weights)  # type: ignore[arg-type]
        after = model(x)
    assert report.patched == 3
    assert type(model[1]) is nn.Linear
    error = float((after - before).norm() / before.norm())
    assert error < (1e-6 if weights == "packed" else 0.02)
    assert bigkern.freeze(model, weights).patched == 0  # type: ignore[arg-type]
    keys = set(blocks().state_dict())
    scales = {f"{i}.linear{j}.weight_scale" for i in (0, 2, 3) for j in (1, 2)}
    assert set(model.state_dict()) == (keys if weights == "packed" else keys | scales)
    assert {n for n, _ in model.named_parameters()} == {n for n in keys if ".linear" not in n or "bias" in n}
    assert "weights=" in repr(model)


@pytest.mark.parametrize("weights", ["packed", "int8"])
def test_a_frozen_model_travels(weights: str) -> None:
    """state_dict, deepcopy, pickle and .to(): the packed copy follows the weight."""
    torch.manual_seed(0)
    x = torch.randn(20, 48)
    model, other = blocks().eval(), blocks().eval()
    for m in (model, other):
        bigkern.freeze(m, weights)  # type: ignore[arg-type]
    with torch.no_grad():
        want = model(x)
        assert not torch.allclose(other(x), want)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file))
        assert torch.equal(other(x), want)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(x), want)
        narrow = model.to(torch.bfloat16)
        torch.testing.assert_close(narrow(x.bfloat16()).float(), want, rtol=0.1, atol=0.1)
    if weights == "int8":
        assert narrow[0].linear1.weight.dtype == torch.int8
        assert narrow[0].linear1.weight_scale.dtype == torch.float32


@pytest.mark.parametrize("weights", ["packed", "int8"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_freeze_torchs_transformer(norm_first: bool, weights: str) -> None:
    """Patched first; with padding, which takes torch's containers elsewhere; and not to be unpatched."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(48, 4, 96, activation="gelu", batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    x, padding = torch.randn(3, 10, 48), torch.zeros(3, 10, dtype=torch.bool)
    padding[1, 7:] = True
    with torch.no_grad():
        before = [model(x), model(x, src_key_padding_mask=padding)[~padding]]
        assert bigkern.freeze(model, weights).patched == 0  # type: ignore[arg-type]
        bigkern.patch(model)
        assert bigkern.freeze(model, weights).patched == 2  # type: ignore[arg-type]
        after = [model(x), model(x, src_key_padding_mask=padding)[~padding]]
        bigkern.unpatch(model)
        again = model(x)
    for ours, theirs in zip(after, before, strict=True):
        error = float((ours - theirs).norm() / theirs.norm())
        assert error < (1e-6 if weights == "packed" else 0.02)
    torch.testing.assert_close(again, after[0], rtol=1e-4, atol=1e-5)
    assert type(model.layers[0]) is bigkern.nn.TransformerEncoderLayer
    assert "frozen_layernorm_ffn" in str(bigkern.patch(model))
    model.train()
    model(x)  # with dropout the layer falls back on its parts


def test_training_below_a_frozen_block() -> None:
    model = nn.Sequential(nn.Linear(48, 48), bigkern.nn.LayerNormFFN(48, 96))
    bigkern.freeze(model, "int8")
    model(torch.randn(4, 48)).sum().backward()
    assert model[0].weight.grad is not None
    assert model[1].linear1.bias.grad is not None
    assert model[1].linear1.weight.grad is None


# ---- refusals --------------------------------------------------------------------------------------


def test_bad_weights() -> None:
    w = torch.randn(8, 6)
    for arguments, error, message in (
        ((w, "int4"), ValueError, 'weights must be "packed", "int8" or "fp8"'),
        ((w.to(torch.int8), "int8"), TypeError, "weight must be a floating-point"),
        ((w[0], "int8"), ValueError, r"weight must be \[N, K\]"),
        ((w, "fp8"), ValueError, "needs a GPU of compute capability 8.9"),
    ):
        with pytest.raises(error, match=message):
            freeze_weight(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="even number of rows"):
        freeze_weight(w[:7], "int8", gated=True)


def test_fp8_needs_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(ValueError, match=r"weights=.fp8. needs .* 8\.9 .* has 8\.0"):
        check_fp8(torch.device("cuda", 0), "weights")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    check_fp8(torch.device("cuda", 0), "weights")


def changed(**change: Any) -> dict[str, Any]:
    x, w1, b1, w2, b2, norm_weight, norm_bias = inputs_of("torch", torch.float32, (5, 24), 40)
    names = {"x": x, "w1": freeze_weight(w1, "int8"), "b1": b1, "w2": freeze_weight(w2, "int8"), "b2": b2}  # type: ignore[arg-type]
    return {**names, "norm_weight": norm_weight, "norm_bias": norm_bias, **change}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w1": torch.ones(40, 24)}, TypeError, "w1 must be a FrozenWeight"),
        ({"w1": freeze_weight(torch.ones(41, 24), "int8")}, ValueError, r"w1 must be \(40, 24\)"),
        ({"w2": freeze_weight(torch.ones(23, 40), "int8")}, ValueError, r"w2 must be \(24, 40\)"),
        ({"w2": freeze_weight(torch.ones(24, 40).double(), "packed")}, TypeError, "w2 must have x's dtype"),
        ({"b1": torch.ones(41)}, ValueError, r"b1 must be \(40,\)"),
        ({"eps": -1.0}, ValueError, "eps must be finite"),
        ({"activation": "tanh"}, ValueError, 'activation must be "gelu", "gelu_tanh", "relu"'),
        ({"norm": "batch"}, ValueError, "norm must be"),
        ({"x": torch.ones(5, 24, dtype=torch.long)}, TypeError, "x must be floating point"),
    ],
)
def test_bad_inputs(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        frozen_layernorm_ffn(**changed(**change))


def test_bad_models() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        bigkern.freeze("model")  # type: ignore[arg-type]
    model = blocks()
    for weights, message in (("int3", "weights must be"), ("fp8", "needs a GPU")):
        with pytest.raises(ValueError, match=message):
            bigkern.freeze(model, weights)  # type: ignore[arg-type]
    assert not any(isinstance(m, bigkern.nn.FrozenLinear) for m in model.modules())
    bigkern.freeze(model)
    with pytest.raises(RuntimeError, match="no dropout"):
        model.train()(torch.randn(2, 48))
