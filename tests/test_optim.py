"""bigkern.optim.Adam and AdamW in the place of torch.optim's."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import bigkern
from bigkern.core import info
from bigkern.optim import Adam, AdamW

OURS = {"Adam": Adam, "AdamW": AdamW}
STOCK = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}
NAMES = list(OURS)


pytestmark = pytest.mark.usefixtures("one_thread")


def leaves(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    torch.manual_seed(0)
    return [Parameter(torch.randn(shape).to(dtype)) for shape in ((5, 3), (7,), (), (0,), (129,))]


def set_grads(params: list[Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def run(optimizer: torch.optim.Optimizer, params: list[Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        set_grads(params, step)
        optimizer.step()


def assert_same(ours: list[Parameter], theirs: list[Parameter], **tolerance: float) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, **(tolerance or {"rtol": 1e-5, "atol": 1e-6}))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.2},
    {"amsgrad": True},
    {"maximize": True, "weight_decay": 0.1},
    {"lr": torch.tensor(0.01)},
    {"foreach": True},
    {"foreach": False},
    {"fused": True},
    {"lr": torch.tensor(0.01), "fused": True, "amsgrad": True},
    {"betas": (torch.tensor(0.8), torch.tensor(0.95))},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_same_trajectory_and_state(name: str, options: dict[str, Any]) -> None:
    ours, theirs = leaves(), leaves()
    optimizer, stock = OURS[name](ours, **options), STOCK[name](theirs, **options)
    run(optimizer, ours, 0, 30)
    run(stock, theirs, 0, 30)
    assert_same(ours, theirs)
    mine, other = optimizer.state_dict(), stock.state_dict()
    assert mine["param_groups"] == other["param_groups"]
    assert mine["state"].keys() == other["state"].keys()
    for i in mine["state"]:
        assert list(mine["state"][i]) == list(other["state"][i])
        for key, value in mine["state"][i].items():
            torch.testing.assert_close(value, other["state"][i][key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    """Low precision against torch's fused path, which also computes in float32; float64 is torch itself."""
    ours, theirs = leaves(dtype), leaves(dtype)
    low = dtype in (torch.bfloat16, torch.float16)
    options = {"eps": 1e-3, "fused": True} if low else {}
    optimizer = OURS[name](ours, **options)
    run(optimizer, ours, 0, 10)
    run(STOCK[name](theirs, **options), theirs, 0, 10)
    tolerance = {torch.float64: {"rtol": 1e-12, "atol": 1e-13}, torch.complex64: {}}
    assert_same(ours, theirs, **tolerance.get(dtype, {"rtol": 0.02, "atol": 0.02}))
    if dtype == torch.float64:
        assert optimizer.explain()[0].chosen == "torch"


@pytest.mark.parametrize("direction", ["to torch", "from torch"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_state_dict_in_the_middle_of_a_run(name: str, amsgrad: bool, direction: str) -> None:
    params, unbroken = leaves(), leaves()
    first, second = (OURS, STOCK) if direction == "to torch" else (STOCK, OURS)
    optimizer = first[name](params, lr=0.02, amsgrad=amsgrad)
    run(optimizer, params, 0, 10)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = second[name](params, lr=1.0)
    run(other, [Parameter(p.detach().clone()) for p in params], 0, 0)
    other.load_state_dict(torch.load(file))
    run(other, params, 10, 20)
    run(STOCK[name](unbroken, lr=0.02, amsgrad=amsgrad), unbroken, 0, 20)
    assert_same(params, unbroken)


def test_loading_a_state_drops_what_was_cached() -> None:
    params = leaves()
    optimizer = AdamW(params)
    run(optimizer, params, 0, 3)
    saved, start = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    run(optimizer, params, 3, 6)
    expected = [p.detach().clone() for p in params]
    optimizer.load_state_dict(saved)
    for p, q in zip(params, start, strict=True):
        p.data.copy_(q)
    run(optimizer, params, 3, 6)
    for p, q in zip(params, expected, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("change", ["data", "state", "frozen", "group list", "amsgrad", "dtype", "strides"])
def test_cached_table_follows_every_change(change: str) -> None:
    """What a plan remembers is replaced behind its back; the numbers must not notice."""
    ours, theirs = leaves(), leaves()
    optimizer, stock = AdamW(ours, lr=0.05), torch.optim.AdamW(theirs, lr=0.05)
    for params, o in ((ours, optimizer), (theirs, stock)):
        run(o, params, 0, 3)
        set_grads(params, 3)
        if change == "data":
            params[0].data = params[0].data.clone()
            o.state[params[1]]["exp_avg"].set_(o.state[params[1]]["exp_avg"].clone())
        elif change == "state":
            o.state[params[0]]["exp_avg"] = torch.ones_like(params[0])
            o.state[params[1]] = {
                "step": torch.tensor(1.0),
                "exp_avg": torch.zeros_like(params[1]),
                "exp_avg_sq": torch.ones_like(params[1]),
            }
        elif change == "frozen":
            params[1].grad = None
        elif change == "group list":
            o.param_groups[0]["params"] = params[:2]
        elif change == "amsgrad":
            o.param_groups[0]["amsgrad"] = True
            for p in params:
                o.state[p]["max_exp_avg_sq"] = torch.zeros_like(p)
        elif change == "dtype":
            params[0].grad = None
            params[0].data = params[0].data.double()
            for key in ("exp_avg", "exp_avg_sq"):
                o.state[params[0]][key] = o.state[params[0]][key].double()
            params[0].grad = torch.ones_like(params[0])
        elif change == "strides":
            params[0].grad = torch.empty(3, 5).t().copy_(params[0].grad)
        o.step()
        o.step()
    assert_same(ours, theirs)


def test_parameters_without_gradient_are_left_alone() -> None:
    params = leaves()
    optimizer = AdamW(params)
    optimizer.step()
    assert not optimizer.state
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    optimizer.step()
    assert list(optimizer.state) == [params[1]]
    set_grads(params, 0)
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [1, 3, 1, 1, 1]


@pytest.mark.parametrize("name", NAMES)
def test_scheduler_groups_names_hooks_and_closure(name: str) -> None:
    results = []
    for classes in (OURS, STOCK):
        params, calls = leaves(), []
        optimizer = classes[name]([("a", params[0]), ("b", params[1])], lr=0.1)
        optimizer.add_param_group({"params": [("c", params[4])], "lr": 0.5, "weight_decay": 0.3})
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append("post"))

        def closure(optimizer: Any = optimizer, params: Any = params) -> Tensor:
            optimizer.zero_grad()
            loss = sum((p**2).sum() for p in params)
            loss.backward()
            return loss

        losses = []
        for _ in range(5):
            losses.append(float(optimizer.step(closure)))
            scheduler.step()
        assert calls == ["pre", "post"] * 5
        results.append((params, losses, optimizer.state_dict()["param_groups"]))
    assert_same(results[0][0], results[1][0])
    # Losses of float32 parameters that differ as above: Python's numbers would be compared as float64.
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=0.0)
    assert results[0][2] == results[1][2]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies(duplicate: Any) -> None:
    params = leaves()
    optimizer = AdamW(params, amsgrad=True)
    run(optimizer, params, 0, 3)
    other = duplicate(optimizer)
    copied = other.param_groups[0]["params"]
    run(other, copied, 3, 6)
    run(optimizer, params, 3, 6)
    assert_same(params, copied, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_is_torchs_class_with_torchs_signature_before_its_own(name: str) -> None:
    assert issubclass(OURS[name], STOCK[name])
    ours, theirs = (inspect.signature(x[name].__init__).parameters.values() for x in (OURS, STOCK))
    told = [(p.name, p.kind, p.default) for p in ours]
    torchs = [(p.name, p.kind, p.default) for p in theirs]
    assert told[: len(torchs)] == torchs
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind, _ in told[len(torchs) :])
    assert OURS[name](leaves()).defaults == STOCK[name](leaves()).defaults
    assert repr(OURS[name](leaves())) == repr(STOCK[name](leaves()))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "learning rate"),
        ({"eps": -1.0}, ValueError, "epsilon"),
        ({"betas": (1.0, 0.9)}, ValueError, "beta parameter at index 0"),
        ({"betas": (0.9, -0.1)}, ValueError, "beta parameter at index 1"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
        ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
        ({"lr": torch.tensor(0.1), "foreach": True}, ValueError, "lr as a Tensor"),
        ({"fused": True, "foreach": True}, RuntimeError, "cannot be `True` together"),
        ({"fused": True, "differentiable": True}, RuntimeError, "does not support `differentiable`"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_constructor_errors_are_torchs(
    name: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    for classes in (STOCK, OURS):
        with pytest.raises(error, match=message):
            classes[name](leaves(), **options)


@pytest.mark.parametrize("steps", [0, 3])
def test_sparse_gradients_are_refused(steps: int) -> None:
    params = leaves()
    optimizer = Adam(params)
    run(optimizer, params, 0, steps)
    set_grads(params, 0)
    params[0].grad = params[0].grad.to_sparse()  # type: ignore[union-attr]
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_grad_scaler(dtype: torch.dtype, bad: bool) -> None:
    """GradScaler hands scale and found_inf to the step; an infinite gradient skips it, steps included."""
    ours, theirs = leaves(dtype), leaves(dtype)
    for params, cls in ((ours, AdamW), (theirs, torch.optim.AdamW)):
        optimizer, scaler = cls(params, lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(4):
            set_grads(params, step, scale=8.0)
            scaler.scale(torch.zeros(()))
            if bad and step == 2:
                params[0].grad[0, 0] = float("inf")  # type: ignore[index]
            scaler.step(optimizer)
            scaler.update(8.0)
        assert float(optimizer.state[params[1]]["step"]) == (3 if bad else 4)
    assert_same(ours, theirs)
    assert_same([p.grad for p in ours], [p.grad for p in theirs])  # type: ignore[misc]


def test_use_and_explain() -> None:
    params = leaves()
    optimizer = AdamW(params)
    set_grads(params, 0)
    chosen = "cpu" if info.import_error is None else "torch"
    assert [e.chosen for e in optimizer.explain()] == [chosen]
    with bigkern.use("torch"):
        assert [e.chosen for e in optimizer.explain()] == ["torch"]
        optimizer.step()
    before = float(optimizer.state[params[0]]["step"])
    optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == before + 1
    group = optimizer.param_groups[0]
    group["differentiable"] = True
    assert "differentiable" in str(optimizer.explain()[0])


@pytest.mark.parametrize("name", NAMES)
def test_differentiable(name: str) -> None:
    """The gradient of the updated parameter with respect to the gradient that updated it."""
    slopes = []
    for classes in (OURS, STOCK):
        p, g = torch.ones(3, requires_grad=True), torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
        moved = p.clone()
        optimizer = classes[name]([moved], lr=0.1, eps=0.1, differentiable=True)
        moved.grad = g.clone()
        optimizer.step()
        slopes.append(torch.autograd.grad(moved.sum(), g)[0])
    torch.testing.assert_close(*slopes)


def test_mixed_dtypes_in_a_group() -> None:
    ours, theirs = ([*leaves(), *leaves(torch.float64)] for _ in range(2))
    run(AdamW(ours), ours, 0, 5)
    run(torch.optim.AdamW(theirs), theirs, 0, 5)
    assert_same(ours, theirs)


def test_graph_error_after_the_step() -> None:
    """As with torch's optimizers, backward through a value that the step has overwritten is an error."""
    p = Parameter(torch.ones(3))
    optimizer = AdamW([p])
    p.grad = torch.ones(3)
    for _ in range(3):
        loss = (p * p).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_compiled_step() -> None:
    ours, theirs = leaves()[:2], leaves()[:2]
    optimizer = AdamW(ours)
    step = torch.compile(optimizer.step, backend="eager")
    for i in range(3):
        set_grads(ours, i)
        step()
    run(torch.optim.AdamW(theirs), theirs, 0, 3)
    assert_same(ours, theirs)
