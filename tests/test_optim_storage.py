"""What bigkern's optimizers store in other ways than torch: moments, masters, bits drawn at random."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from parity import assert_parity
from torch import Tensor
from torch.nn import Parameter

import bigkern
from bigkern.core.parity import Yardstick
from bigkern.ops.adam.dynamic8 import dequantised, quantised
from bigkern.ops.adam.reference import in_memory, joined, stochastically_rounded
from bigkern.optim import Adam, AdamW

BF16, FP32, CODES = torch.bfloat16, torch.float32, torch.uint8

# The parameters' dtype, the options, and the bytes that a parameter and its state then take.
STORAGES: dict[str, tuple[torch.dtype, dict[str, Any], float]] = {
    "fp32, bf16 moments": (FP32, {"state_dtype": BF16}, 8),
    "fp32, 8-bit moments": (FP32, {"state_dtype": CODES}, 6 + 8 / 256),
    "bf16, fp32 masters": (BF16, {"master_weights": True, "state_dtype": FP32}, 14),
    "bf16, remainders": (BF16, {"master_weights": "remainder", "state_dtype": FP32}, 12),
    "bf16, remainders, 8-bit": (BF16, {"master_weights": "remainder", "state_dtype": CODES}, 6 + 8 / 256),
    "bf16 at random": (BF16, {"stochastic_rounding": True}, 6),
    "bf16 at random, 8-bit": (BF16, {"stochastic_rounding": True, "state_dtype": CODES}, 4 + 8 / 256),
    "fp16, fp32 masters": (torch.float16, {"master_weights": True, "state_dtype": FP32}, 14),
}
NAMES = list(STORAGES)
HYPER: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.05}


@pytest.fixture(autouse=True, params=["torch", "chosen"])
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Stock PyTorch and whatever is chosen here, by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if request.param == "torch":
        with bigkern.use("torch"):
            yield
    else:
        yield
    torch.set_num_threads(threads)


def leaves(dtype: torch.dtype, seed: int = 0) -> list[Parameter]:
    torch.manual_seed(seed)
    shapes = ((40, 13), (7,), (), (0,), (300,))
    params = [Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    params.append(Parameter(torch.randn(6, 5, dtype=dtype).t()))  # dense, but not contiguous
    return params


def set_grads(params: list[Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        g = torch.randn(p.shape, generator=generator) * scale + 0.1
        p.grad = torch.empty_like(p).copy_(g)


def run(optimizer: torch.optim.Optimizer, params: list[Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        set_grads(params, step)
        optimizer.step()


def make(name: str, **more: Any) -> tuple[AdamW, list[Parameter]]:
    dtype, options, _ = STORAGES[name]
    params = leaves(dtype)
    return AdamW(params, **{**HYPER, **options, **more}), params


def bits(x: Tensor) -> Tensor:
    return x.detach().clone()


def everything(optimizer: torch.optim.Optimizer, params: list[Parameter]) -> list[Tensor]:
    return [bits(x) for p in params for x in (p, *optimizer.state[p].values())]


def assert_equal(these: list[Tensor], those: list[Tensor]) -> None:
    for a, b in zip(these, those, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


# ---- the numbers ------------------------------------------------------------------------------------


class ByHand:
    """torch.optim.AdamW in float32, whose parameters and states are stored as asked after each step."""

    def __init__(self, params: list[Parameter], dtype: torch.dtype, options: dict[str, Any]):
        self.params, self.dtype, self.options = params, dtype, options
        self.optimizer = torch.optim.AdamW(params, **HYPER)
        self.generator = torch.Generator().manual_seed(7)

    def step(self) -> None:
        self.optimizer.step()
        for p in self.params:
            for name in ("exp_avg", "exp_avg_sq"):
                moment = self.optimizer.state[p][name]
                moment.copy_(self._stored(moment, self.options.get("state_dtype") or self.dtype, name))
            if not self.options.get("master_weights"):
                p.data.copy_(self._stored(p.detach(), self.dtype, "p"))

    def _stored(self, x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        if dtype == CODES:
            signed = name == "exp_avg"
            flat = in_memory(x)
            values = dequantised(*quantised(flat, signed), signed)
            return (
                values.view(x.t().shape).t() if x.dim() == 2 and not x.is_contiguous() else values.view_as(x)
            )
        if dtype == BF16 and name != "exp_avg":
            random = torch.randint(1 << 16, x.shape, generator=self.generator)
            return stochastically_rounded(x, random).float()
        return x.to(dtype).float()


@pytest.mark.parametrize("name", NAMES)
def test_200_steps_are_as_right_as_the_storage_allows(name: str) -> None:
    """Against float64, by the error of torch's own steps with the same storage between them."""
    dtype, options, _ = STORAGES[name]
    optimizer, ours = make(name)
    exact = [Parameter(p.detach().double()) for p in ours]
    hand = [Parameter(p.detach().float()) for p in ours]
    stock, reference = ByHand(hand, dtype, options), torch.optim.AdamW(exact, **HYPER)
    for step in range(200):
        set_grads(ours, step)
        for p, q, r in zip(ours, exact, hand, strict=True):
            q.grad, r.grad = p.grad.double(), p.grad.float()  # type: ignore[union-attr]
        for o in (optimizer, reference, stock):
            o.step()
    backend = optimizer.explain()[0].chosen
    found, wide, low = (torch.cat([in_memory(p.detach()) for p in params]) for params in (ours, exact, hand))
    yardstick = Yardstick({"p": wide}, lambda: {"p": low.to(dtype)})  # many numbers: one run will do
    assert_parity("adam", backend, {"p": found.to(dtype)}, yardstick, name)


def test_remainders_are_masters_to_the_last_bit() -> None:
    with_masters, ours = make("bf16, fp32 masters")
    with_remainders, theirs = make("bf16, remainders")
    run(with_masters, ours, 0, 20)
    run(with_remainders, theirs, 0, 20)
    for p, q in zip(ours, theirs, strict=True):
        master = with_masters.state[p]["master"]
        assert torch.equal(in_memory(master), joined(q.detach(), with_remainders.state[q]["master"]))


@pytest.mark.parametrize("name", NAMES)
def test_bytes(name: str) -> None:
    dtype, options, expected = STORAGES[name]
    p = Parameter(torch.randn(512, 64).to(dtype))
    optimizer = AdamW([p], **options)
    run(optimizer, [p], 0, 1)
    tensors = [p, *(x for key, x in optimizer.state[p].items() if key != "step")]
    assert sum(x.numel() * x.element_size() for x in tensors) == expected * p.numel()
    assert all(x.isfinite().all() for x in tensors)


def test_other_parameters_keep_torchs_storage() -> None:
    for dtype in (torch.float64, torch.complex64):
        ours, theirs = ([Parameter(torch.ones(9, dtype=dtype))] for _ in range(2))
        optimizer = AdamW(ours, state_dtype=CODES, master_weights=True)
        run(optimizer, ours, 0, 3)
        run(torch.optim.AdamW(theirs), theirs, 0, 3)
        torch.testing.assert_close(ours, theirs)
        assert {x.dtype for x in optimizer.state[ours[0]].values()} == {torch.float32, dtype}


def test_groups_store_in_their_own_ways() -> None:
    params = leaves(FP32)
    own = {"params": params[:1], "state_dtype": FP32}
    optimizer = AdamW([own, {"params": params[1:]}], state_dtype=CODES)
    run(optimizer, params, 0, 3)
    assert [optimizer.state[p]["exp_avg"].dtype for p in params[:2]] == [FP32, CODES]


# ---- at random --------------------------------------------------------------------------------------


def test_manual_seed_repeats_a_run() -> None:
    results = []
    for seed in (3, 3, 4):
        params = leaves(BF16)
        torch.manual_seed(seed)
        optimizer = AdamW(params, stochastic_rounding=True)
        run(optimizer, params, 0, 5)
        results.append(torch.cat([bits(p).flatten() for p in params]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("apart", ["groups", "buckets"])
def test_groups_and_buckets_draw_different_bits(apart: str) -> None:
    """Equal parameters with equal gradients part ways where they are rounded apart."""
    first, second = (Parameter(torch.full((512,), 1.0, dtype=BF16)) for _ in range(2))
    other = {"params": [second]} if apart == "groups" else {"params": [second], "state_dtype": FP32}
    groups: Any = [{"params": [first], "state_dtype": None}, other]
    if apart == "buckets":
        groups = [{"params": [first, Parameter(torch.ones(3)), second]}]
    optimizer = AdamW(groups, lr=1e-3, stochastic_rounding=True, seed=1)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    if apart == "buckets":
        # Another storage makes another bucket of the same group.
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[second][key] = torch.zeros(512)
        optimizer.state[second]["step"] = torch.zeros(())
    optimizer.step()
    assert 0.05 < float((first == second).float().mean()) < 0.95


def test_random_rounding_loses_nothing_on_average() -> None:
    """Steps of a sixteenth of bfloat16's last place: nearest rounding would stand still."""
    size = 4096
    p = Parameter(torch.ones(size, dtype=BF16))
    optimizer = AdamW([p], lr=2**-12, weight_decay=0.0, stochastic_rounding=True, seed=5)
    for _ in range(64):
        p.grad = -torch.ones_like(p)
        optimizer.step()
    moved, expected = float(p.detach().double().mean() - 1), 64 * 2**-12
    assert abs(moved - expected) < 6 * 2**-7 * (64 / size) ** 0.5  # six standard deviations
    assert optimizer.state[p]["exp_avg"].dtype == BF16


def test_bf16_moments_shrink() -> None:
    """By beta2 = 0.999 a step, which is less than half of bfloat16's last place."""
    p = Parameter(torch.ones(512))
    optimizer = AdamW([p], state_dtype=BF16, seed=5)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    v = optimizer.state[p]["exp_avg_sq"].fill_(1.0)
    for _ in range(300):
        optimizer.step()
    assert float(v.double().mean()) == pytest.approx(0.999**300, rel=0.02)
    assert torch.tensor(0.999).to(BF16) == 1  # to nearest: it would stay


# ---- saved and loaded -------------------------------------------------------------------------------


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("name", NAMES)
def test_resumed_run_goes_on_bit_for_bit(name: str) -> None:
    optimizer, params = make(name)
    run(optimizer, params, 0, 4)
    saved, weights = through_a_file(optimizer.state_dict()), [bits(p) for p in params]
    run(optimizer, params, 4, 8)
    torch.manual_seed(99)
    other, others = make(name, lr=1.0)
    for p, w in zip(others, weights, strict=True):
        p.data.copy_(w)
    other.load_state_dict(saved)
    run(other, others, 4, 8)
    assert_equal(everything(other, others), everything(optimizer, params))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("name", NAMES)
def test_copies(name: str, duplicate: Any) -> None:
    optimizer, params = make(name, max_norm=1.0)
    run(optimizer, params, 0, 2)
    other = duplicate(optimizer)
    copied = other.param_groups[0]["params"]
    run(other, copied, 2, 4)
    run(optimizer, params, 2, 4)
    assert_equal(everything(other, copied), everything(optimizer, params))
    assert other.grad_norm == optimizer.grad_norm


@pytest.mark.parametrize("name", NAMES)
def test_from_torch_and_back_in_the_middle_of_a_run(name: str) -> None:
    """Ten steps of torch.optim, ten of ours, ten of torch.optim, beside thirty of torch.optim in float32."""
    dtype, options, _ = STORAGES[name]
    params = leaves(dtype)
    unbroken = [Parameter(p.detach().float()) for p in params]
    first = torch.optim.AdamW(params, fused=dtype != FP32, **HYPER)
    run(first, params, 0, 10)
    ours = AdamW(params, lr=1.0, **options)
    ours.load_state_dict(through_a_file(first.state_dict()))
    assert ours.param_groups[0]["lr"] == HYPER["lr"]
    run(ours, params, 10, 20)
    kinds = {
        x.dtype for key, x in ours.state[params[0]].items() if key.startswith("exp") and "scale" not in key
    }
    assert kinds == {options.get("state_dtype") or dtype}
    last = torch.optim.AdamW(params, lr=1.0)
    last.load_state_dict(through_a_file(ours.torch_state_dict()))
    assert list(last.state[params[0]]) == ["step", "exp_avg", "exp_avg_sq"]
    assert "seed" not in last.param_groups[0]
    run(last, params, 20, 30)
    run(torch.optim.AdamW(unbroken, **HYPER), unbroken, 0, 30)
    for p, q in zip(params, unbroken, strict=True):
        torch.testing.assert_close(p.float(), q, rtol=0.05, atol=0.12)


@pytest.mark.parametrize("name", NAMES)
def test_plain_optimizer_loads_any_storage(name: str) -> None:
    optimizer, params = make(name)
    run(optimizer, params, 0, 3)
    other = AdamW(params, amsgrad=False)
    other.load_state_dict(optimizer.state_dict())
    assert list(other.state[params[0]]) == ["step", "exp_avg", "exp_avg_sq"]
    assert {x.dtype for x in other.state[params[0]].values()} == {FP32, params[0].dtype}
    assert not {"state_dtype", "seed", "master_weights"} & set(other.param_groups[0])


def test_loaded_state_shares_no_memory_with_the_saved_one() -> None:
    optimizer, params = make("bf16, remainders, 8-bit")
    run(optimizer, params, 0, 2)
    other, others = make("bf16, remainders, 8-bit")
    other.load_state_dict(optimizer.state_dict())
    before = everything(optimizer, params)
    run(other, others, 2, 4)
    assert_equal(everything(optimizer, params), before)


@pytest.mark.parametrize("storage", ["plain", *NAMES])
def test_state_of_another_architecture(storage: str) -> None:
    dtype, options, _ = STORAGES.get(storage, (FP32, {}, 0))
    old = [
        ("weight", Parameter(torch.ones(5, 3, dtype=dtype))),
        ("bias", Parameter(torch.ones(3, dtype=dtype))),
    ]
    new = [
        ("weight", Parameter(torch.ones(5, 3, dtype=dtype))),
        ("bias", Parameter(torch.ones(4, dtype=dtype))),
    ]
    source, target = AdamW(old, **options), AdamW(new, **options)
    for named, optimizer in ((old, source), (new, target)):
        run(optimizer, [p for _, p in named], 0, 1)
    before = everything(target, [p for _, p in new])
    with pytest.raises(
        ValueError, match=r"parameter 'bias', exp_avg of shape \(3,\), and the parameter has \(4,\)"
    ):
        target.load_state_dict(source.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        target.load_state_dict({"state": {}, "param_groups": []})
    foreign = source.state_dict()
    foreign["state"] = {0: {"momentum_buffer": torch.ones(5, 3)}}
    with pytest.raises(ValueError, match="parameter 'weight', no step"):
        target.load_state_dict(foreign)
    assert_equal(everything(target, [p for _, p in new]), before)
    assert target.param_groups[0]["lr"] == 1e-3


# ---- GradScaler -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_overflow_changes_nothing(name: str) -> None:
    optimizer, params = make(name, max_norm=1.0)
    run(optimizer, params, 0, 2)
    before = everything(optimizer, params)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    set_grads(params, 2)
    scaler.scale(torch.zeros(()))
    params[0].grad[0, 0] = float("inf")  # type: ignore[index]
    scaler.step(optimizer)
    scaler.update()
    assert_equal(everything(optimizer, params), before)
    set_grads(params, 3)
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    assert all(float(optimizer.state[p]["step"]) == 3 for p in params)


# ---- refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        (FP32, {"state_dtype": torch.float16}, "state_dtype must be None, .* not torch.float16"),
        (FP32, {"state_dtype": "8bit"}, "state_dtype must be None"),
        (FP32, {"master_weights": "half"}, "master_weights must be False, True or 'remainder', not 'half'"),
        (torch.float16, {"master_weights": "remainder"}, "is for bfloat16 parameters, not torch.float16"),
        (BF16, {"master_weights": True, "stochastic_rounding": True}, "without master_weights"),
        (FP32, {"state_dtype": CODES, "amsgrad": True}, "amsgrad must be False"),
        (FP32, {"seed": -1}, r"seed must be an int in \[0, 2\^63\)"),
        (FP32, {"max_norm": 0.0}, "max_norm must be a positive number"),
        (FP32, {"max_norm": float("nan")}, "max_norm must be a positive number"),
        (FP32, {"max_norm": 1.0, "in_backward": True}, "max_norm needs all gradients at once"),
        (
            FP32,
            {"state_dtype": BF16, "differentiable": True},
            "state_dtype does not go with .*differentiable",
        ),
        (FP32, {"max_norm": 1.0, "differentiable": True}, "max_norm does not go with"),
        (FP32, {"zero_grads": True, "betas": (torch.tensor(0.9), torch.tensor(0.9))}, "betas is a Tensor"),
    ],
)
@pytest.mark.parametrize("optimizer", [Adam, AdamW])
def test_refused(optimizer: Any, dtype: torch.dtype, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer(leaves(dtype), **options)


def test_refused_group_is_not_added() -> None:
    optimizer = AdamW([Parameter(torch.ones(3))], state_dtype=FP32)
    with pytest.raises(ValueError, match="state_dtype must be"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(3))], "state_dtype": torch.int8})
    assert len(optimizer.param_groups) == 1
