"""Parameters, gradients and moments that lie in memory in different orders, or lazily negated."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from parity import KERNEL_BACKENDS, device_of, run_backend
from torch import Tensor, nn
from torch.nn import Parameter

import bigkern
from bigkern.core import info
from bigkern.ops.adam import adam
from bigkern.ops.adam.call import Lists
from bigkern.ops.adam.dynamic8 import blocks_of
from bigkern.optim import Adam, AdamW

F32, BF16, CODES = torch.float32, torch.bfloat16, torch.uint8
SHAPE = (6, 5, 4, 3)  # 360 elements: codes of two blocks
ORDERS: dict[str, tuple[int, ...]] = {  # dimensions from the outermost to the innermost in memory
    "contiguous": (0, 1, 2, 3),
    "channels last": (0, 2, 3, 1),
    "reversed": (3, 2, 1, 0),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def ordered(x: Tensor, order: str) -> Tensor:
    """A copy of x that lies in memory in this order, or with gaps."""
    if order == "with gaps":
        return torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2].copy_(x)
    outer_to_inner = ORDERS[order]
    inverse = [outer_to_inner.index(d) for d in range(4)]
    return x.permute(outer_to_inner).clone(memory_format=torch.contiguous_format).permute(inverse)


# ---- the op ----------------------------------------------------------------------------------------

# The dtypes of p, the moments and the master.
STORAGES: dict[str, tuple[torch.dtype, torch.dtype, torch.dtype | None]] = {
    "float32": (F32, F32, None),
    "bfloat16 moments": (F32, BF16, None),
    "8-bit moments": (F32, CODES, None),
    "master": (BF16, F32, F32),
    "remainder, 8-bit moments": (BF16, CODES, torch.int16),
}


def call(
    storage: str, of_params: str, of_grads: str, of_moments: str, amsgrad: bool = False
) -> dict[str, Any]:
    """The arguments of a step, lying in these orders; masters lie as moments do."""
    p_type, m_type, master = STORAGES[storage]
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Tensor:
        return torch.randn(SHAPE, generator=generator)

    p, g, m, v, largest = drawn(), drawn(), drawn(), drawn().square(), drawn().square()
    arguments: dict[str, Any] = {
        "params": [ordered(p.to(p_type), of_params)],
        "grads": [ordered(g.to(p_type), of_grads)],
        "exp_avgs": [ordered((m.abs() * 60).to(m_type), of_moments)],
        "exp_avg_sqs": [ordered((v * 20).to(m_type), of_moments)],
        "max_exp_avg_sqs": [ordered((largest * 20).to(m_type), of_moments)] if amsgrad else [],
        "state_steps": [torch.tensor(3.0)],
    }
    if master is not None:
        exact = p.to(p_type).float() if master == F32 else torch.randint(-99, 99, SHAPE, generator=generator)
        arguments["masters"] = [ordered(exact.to(master), of_moments)]
    if m_type == CODES:
        blocks = blocks_of(p.numel())
        for name in ("exp_avg_scales", "exp_avg_sq_scales"):
            arguments[name] = [torch.rand(blocks, generator=generator)]
    return arguments


def assert_equal_lists(these: dict[str, Any], those: dict[str, Any], **tolerance: float) -> None:
    for name in Lists.names:
        for x, y in zip(these.get(name, []), those.get(name, []), strict=True):
            torch.testing.assert_close(x, y, **tolerance)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("of_params", "of_grads", "of_moments"),
    [
        *(orders for orders in itertools.product(ORDERS, ORDERS, ORDERS) if len(set(orders)) > 1),
        ("contiguous", "with gaps", "contiguous"),
        ("with gaps", "reversed", "contiguous"),
        ("reversed", "contiguous", "with gaps"),
    ],
)
def test_op_updates_each_element_wherever_it_lies(
    storage: str, of_params: str, of_grads: str, of_moments: str
) -> None:
    """As with everything in the moments' order, in which scales count their blocks."""
    amsgrad = storage == "float32"
    mixed = call(storage, of_params, of_grads, of_moments, amsgrad)
    alike = call(storage, of_moments, of_moments, of_moments, amsgrad)
    options = {"lr": 0.1, "weight_decay": 0.1, "amsgrad": amsgrad}
    adam(**mixed, **options)
    with bigkern.use("torch"):
        adam(**alike, **options)
    assert_equal_lists(mixed, alike, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_kernels_refuse_moments_in_another_order(backend: str, storage: str) -> None:
    if device_of(backend).type != "cpu":
        pytest.skip("the op's lists here are on the CPU")
    arguments = call(storage, "channels last", "channels last", "contiguous")
    with run_backend("adam", backend), pytest.raises(bigkern.BackendRefused, match="strides"):
        adam(**arguments)


# ---- the optimizers --------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "bfloat16 moments": {"state_dtype": BF16},
    "8-bit moments": {"state_dtype": CODES},
    "in backward": {"in_backward": True},
    "offload": {"offload": True},
    "offload, 8-bit moments": {"offload": True, "state_dtype": CODES},
    "torch's fused step": {"betas": (torch.tensor(0.9), torch.tensor(0.999)), "fused": True},
}


def network(dtype: torch.dtype = F32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(first, last):
        x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x.to(dtype)).square().sum().backward()
        optimizer.step()


def expected(options: dict[str, Any], last: int) -> nn.Module:
    """torch's own steps, not fused: those know strides."""
    model = network()
    train(model, torch.optim.AdamW(model.parameters(), 0.1, amsgrad=options.get("amsgrad", False)), 0, last)
    return model


def assert_same(ours: nn.Module, theirs: nn.Module, options: dict[str, Any]) -> None:
    """Within 1e-4, a thousandth of a step of lr 0.1, or, where moments lose bits, half a step."""
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            p.float(), q, rtol=1e-4, atol=0.05 if "state_dtype" in options else 1e-4, check_stride=False
        )


def assert_in_order(model: nn.Module, optimizer: AdamW) -> None:
    for p in model.parameters():
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master"):
            if name in optimizer.state[p]:
                assert optimizer.state[p][name].stride() == p.stride()


@pytest.mark.parametrize("backend", ["torch", "chosen"])
@pytest.mark.parametrize("name", OPTIONS)
def test_model_turned_channels_last_after_two_steps(name: str, backend: str) -> None:
    model, options = network(), OPTIONS[name]
    optimizer = AdamW(model.parameters(), lr=0.1, seed=1, **options)
    train(model, optimizer, 0, 2)
    model.to(memory_format=torch.channels_last)
    if backend == "torch":
        with bigkern.use("torch"):
            train(model, optimizer, 2, 5)
    else:
        train(model, optimizer, 2, 5)
    assert_same(model, expected(options, 5), options)
    assert_in_order(model, optimizer)


def test_moments_brought_into_order_stay_there_and_are_updated_by_kernels() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, 0, 2)
    model.to(memory_format=torch.channels_last)
    train(model, optimizer, 2, 3)
    moments = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    train(model, optimizer, 3, 4)
    assert all(optimizer.state[p]["exp_avg"] is m for p, m in zip(model.parameters(), moments, strict=True))
    assert optimizer.explain()[0].chosen == ("cpu" if info.import_error is None else "torch")


@pytest.mark.parametrize("masters", [True, "remainder"])
def test_masters_follow_a_model_turned_channels_last(masters: Any) -> None:
    turned, kept = network(BF16), network(BF16)
    options: dict[str, Any] = {"lr": 0.1, "master_weights": masters, "state_dtype": F32}
    for model in (turned, kept):
        optimizer = AdamW(model.parameters(), **options)
        for step in range(4):
            if step == 2 and model is turned:
                model.to(memory_format=torch.channels_last)
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
            optimizer.step()
    for p, q in zip(turned.parameters(), kept.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("direction", ["from torch", "to torch"])
@pytest.mark.parametrize("name", ["plain", "amsgrad", "8-bit moments", "offload"])
def test_state_of_a_contiguous_model_goes_to_a_channels_last_one(name: str, direction: str) -> None:
    options = OPTIONS[name]
    amsgrad = options.get("amsgrad", False)
    first = network()
    made: list[Any] = [
        torch.optim.AdamW(first.parameters(), lr=0.1, amsgrad=amsgrad),
        AdamW(first.parameters(), lr=0.1, seed=1, **options),
    ]
    saving = made[direction == "to torch"]
    train(first, saving, 0, 3)
    second = network().to(memory_format=torch.channels_last)
    second.load_state_dict(first.state_dict())
    made = [
        AdamW(second.parameters(), lr=0.1, seed=1, **options),
        torch.optim.AdamW(second.parameters(), lr=0.1, amsgrad=amsgrad),
    ]
    loading = made[direction == "to torch"]
    loading.load_state_dict(saving.torch_state_dict() if direction == "to torch" else saving.state_dict())
    train(second, loading, 3, 6)
    assert_same(second, expected(options, 6), options)


@pytest.mark.parametrize("order", ["channels last", "reversed", "with gaps"])
@pytest.mark.parametrize(
    "options", [{}, {"state_dtype": CODES}, {"max_norm": 1.0, "zero_grads": True}], ids=str
)
def test_gradients_in_any_order(options: dict[str, Any], order: str) -> None:
    ours, theirs = (Parameter(torch.ones(SHAPE)) for _ in range(2))
    optimizer, other = AdamW([ours], lr=0.1, **options), AdamW([theirs], lr=0.1, **options)
    for step in range(4):
        g = torch.randn(SHAPE, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = ordered(g, order if step % 2 else "contiguous"), g
        optimizer.step()
        other.step()
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# ---- lazily negated and conjugated -----------------------------------------------------------------


@pytest.mark.parametrize("first", ["plain", "negated"])
@pytest.mark.parametrize("backend", ["torch", "chosen"])
@pytest.mark.parametrize(
    "options",
    [{}, {"state_dtype": CODES}, {"max_norm": 1.0}, {"offload": True}, {"zero_grads": True}],
    ids=str,
)
@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_negated_gradient_steps_the_other_way(
    cls: Any, options: dict[str, Any], backend: str, first: str
) -> None:
    ours, theirs = (Parameter(torch.ones(300)) for _ in range(2))
    optimizer, other = cls([ours], lr=0.1, **options), cls([theirs], lr=0.1, **options)
    for step in range(4):
        g = torch.randn(300, generator=torch.Generator().manual_seed(step))
        theirs.grad = g.clone()
        ours.grad = torch._neg_view(-g) if step > 0 or first == "negated" else g.clone()
        if backend == "torch":
            with bigkern.use("torch"):
                optimizer.step()
        else:
            optimizer.step()
        other.step()
        assert torch.equal(ours.grad, theirs.grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_conjugated_gradient_of_a_complex_parameter() -> None:
    ours, theirs = (Parameter(torch.ones(9, dtype=torch.complex64)) for _ in range(2))
    optimizer, other = AdamW([ours], lr=0.1), AdamW([theirs], lr=0.1)
    for step in range(4):
        g = torch.randn(9, dtype=torch.complex64, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = g.conj() if step else g.conj().resolve_conj(), g.conj().resolve_conj()
        optimizer.step()
        other.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("negated", ["params", "grads", "exp_avgs"])
def test_op_sees_through_lazy_negation(negated: str) -> None:
    plain = {
        name: [x.clone() for x in tensors] for name, tensors in call("float32", *["contiguous"] * 3).items()
    }
    lazy = {name: [x.clone() for x in tensors] for name, tensors in plain.items()}
    lazy[negated] = [torch._neg_view(-x) for x in lazy[negated]]
    adam(**plain)
    adam(**lazy)
    assert_equal_lists(lazy, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_kernels_refuse_lazy_negation(backend: str) -> None:
    arguments = {
        name: [x.to(device_of(backend)) for x in tensors]
        for name, tensors in call("float32", *["contiguous"] * 3).items()
    }
    arguments["grads"] = [torch._neg_view(g) for g in arguments["grads"]]
    with run_backend("adam", backend), pytest.raises(bigkern.BackendRefused, match="negated"):
        adam(**arguments)


def test_parameter_turned_where_it_lies_with_a_gradient_in_the_old_order() -> None:
    ours, theirs = (
        Parameter(torch.randn(5, 5, generator=torch.Generator().manual_seed(0))) for _ in range(2)
    )
    optimizer, other = AdamW([ours], lr=0.1), torch.optim.AdamW([theirs], lr=0.1)
    for step in range(4):
        g = torch.randn(5, 5, generator=torch.Generator().manual_seed(step))
        for p in (ours, theirs):
            p.grad = g.clone()
            if step == 2:
                p.data = p.data.t()
        optimizer.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
