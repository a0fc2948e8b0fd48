"""What bigkern's optimizers fold into the step: clipping, zeroing, the backward pass, the way to the CPU."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import bigkern
from bigkern.optim import Adam, AdamW

STORAGES: list[dict[str, Any]] = [
    {},
    {"state_dtype": torch.bfloat16},
    {"state_dtype": torch.uint8},
    {"amsgrad": True},
]


pytestmark = pytest.mark.usefixtures("one_thread")


def leaves(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    torch.manual_seed(0)
    return [Parameter(torch.randn(shape).to(dtype)) for shape in ((5, 3), (7,), (), (0,), (300,))]


def set_grads(params: list[Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def assert_same(ours: list[Any], theirs: list[Any], **tolerance: float) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, **(tolerance or {"rtol": 1e-5, "atol": 1e-6}))


# ---- the norm, and zeros ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_clipping_is_torchs_over_all_groups(cls: Any, max_norm: float, dtype: torch.dtype) -> None:
    ours, theirs = leaves(dtype), leaves(dtype)
    optimizer = cls([{"params": ours[:2]}, {"params": ours[2:], "lr": 0.1}], max_norm=max_norm)
    stock = getattr(torch.optim, cls.__name__)([{"params": theirs[:2]}, {"params": theirs[2:], "lr": 0.1}])
    for step in range(5):
        set_grads(ours, step)
        set_grads(theirs, step)
        before = [p.grad.clone() for p in ours]  # type: ignore[union-attr]
        norm = nn.utils.clip_grad_norm_(theirs, max_norm)
        optimizer.step()
        stock.step()
        torch.testing.assert_close(optimizer.grad_norm, norm, check_dtype=False)
        assert optimizer.grad_norm.shape == ()
        assert_same([p.grad for p in ours], before, rtol=0.0, atol=0.0)
    assert_same(ours, theirs)


def test_norm_over_several_dtypes_and_parameters_without_gradient() -> None:
    params = [*leaves(), *leaves(torch.float64), *leaves(torch.bfloat16)]
    optimizer = AdamW(params, max_norm=1.0)
    assert optimizer.grad_norm is None
    optimizer.step()
    assert optimizer.grad_norm == 0
    set_grads(params, 0)
    params[0].grad = None
    optimizer.step()
    expected = sum(float((p.grad.double() ** 2).sum()) for p in params[1:]) ** 0.5  # type: ignore[union-attr]
    assert float(optimizer.grad_norm) == pytest.approx(expected, rel=1e-5)
    assert not optimizer.state[params[0]]


def test_clipping_with_grad_scaler_sees_unscaled_gradients() -> None:
    ours, theirs = leaves(), leaves()
    optimizer, stock = AdamW(ours, max_norm=0.5), torch.optim.AdamW(theirs)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(3):
        set_grads(ours, step, scale=64.0)
        set_grads(theirs, step)
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update(64.0)
        norm = nn.utils.clip_grad_norm_(theirs, 0.5)
        stock.step()
        torch.testing.assert_close(optimizer.grad_norm, norm)
    assert_same(ours, theirs)


@pytest.mark.parametrize("options", STORAGES, ids=str)
def test_zero_grads(options: dict[str, Any]) -> None:
    ours, theirs = leaves(), leaves()
    optimizer, other = (
        AdamW(ours, seed=1, zero_grads=True, **options),
        AdamW(theirs, seed=1, **options),
    )
    for step in range(3):
        set_grads(ours, step)
        set_grads(theirs, step)
        kept = [p.grad for p in ours]
        optimizer.step()
        other.step()
        assert all(p.grad is g and not g.any() for p, g in zip(ours, kept, strict=True))  # type: ignore[union-attr]
    assert_same(ours, theirs, rtol=0.0, atol=0.0)


# ---- in the backward pass ---------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 300), nn.GELU(), nn.Linear(300, 20), nn.GELU(), nn.Linear(20, 1))


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


@pytest.mark.parametrize("options", [o for o in STORAGES if o.get("state_dtype") != torch.bfloat16], ids=str)
def test_step_in_backward(options: dict[str, Any]) -> None:
    """The plain trajectory, learning rates of a scheduler and groups included, without a gradient kept."""
    results = []
    for in_backward in (False, True):
        model = network()
        weights = [p for p in model.parameters() if p.dim() == 2]
        biases = [p for p in model.parameters() if p.dim() == 1]
        groups: Any = [{"params": weights}, {"params": biases, "lr": 0.05}]
        optimizer = AdamW(groups, lr=0.01, in_backward=in_backward, **options)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)
        for step in range(12):
            loss = loss_of(model, step)
            loss.backward()
            assert all((p.grad is None) == in_backward for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        results.append((list(model.parameters()), loss, [float(s["step"]) for s in optimizer.state.values()]))
    assert_same(results[1][0], results[0][0], rtol=0.0, atol=0.0)
    assert results[1][2] == results[0][2] == [12.0] * 6


def test_most_gradient_memory_in_backward_is_one_parameters() -> None:
    peaks = {}
    for in_backward in (False, True):
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
        optimizer = AdamW(model.parameters(), in_backward=in_backward)
        alive: list[int] = []
        for p in model.parameters():

            def note(_: Tensor, model: nn.Module = model, alive: list[int] = alive) -> None:
                alive.append(sum(q.grad.numel() for q in model.parameters() if q.grad is not None))

            p.register_post_accumulate_grad_hook(note)  # after ours
        model(torch.ones(2, 64)).sum().backward()
        optimizer.step()
        peaks[in_backward] = max(alive)
    assert peaks == {False: 8 * (64 * 64 + 64), True: 0}


def test_in_backward_rounds_every_parameter_by_bits_of_its_own() -> None:
    first, second = (Parameter(torch.ones(512, dtype=torch.bfloat16)) for _ in range(2))
    AdamW([first, second], lr=1e-3, stochastic_rounding=True, seed=1, in_backward=True)
    optimizer = AdamW([first, second], lr=1e-3, stochastic_rounding=True, seed=1, in_backward=True)
    (first + second).sum().backward()
    assert 0.05 < float((first == second).float().mean()) < 0.95
    assert float(optimizer.state[first]["step"]) == 1  # the optimizer that was thrown away did not step


def test_in_backward_with_closure_left_gradients_new_groups_and_copies() -> None:
    model, other = network(), nn.Linear(3, 3)
    optimizer = AdamW(model.parameters(), in_backward=True)
    optimizer.add_param_group({"params": other.parameters()})

    def closure() -> Tensor:
        loss = loss_of(model, 0) + other(torch.ones(3)).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) > 0
    assert {float(s["step"]) for s in optimizer.state.values()} == {1.0}
    other.weight.grad = torch.ones(3, 3)
    optimizer.step()
    assert float(optimizer.state[other.weight]["step"]) == 2
    optimizer.load_state_dict(optimizer.state_dict())
    for duplicate in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        twin = duplicate(optimizer)
        p = twin.param_groups[0]["params"][0]
        p.sum().backward()
        assert p.grad is None
        assert float(twin.state[p]["step"]) == 2
    assert float(optimizer.state[next(model.parameters())]["step"]) == 1
    reference = [bool(p._post_accumulate_grad_hooks) for p in model.parameters()]
    assert all(reference)
    del optimizer
    gc.collect()
    loss_of(model, 1).backward()
    assert all(p.grad is not None for p in model.parameters())  # nobody is left to take them


def test_in_backward_refuses_grad_scaler() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), in_backward=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match="in_backward steps before GradScaler has seen the gradients"):
        scaler.step(optimizer)


# ---- offloaded --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [*STORAGES, {"max_norm": 0.1, "zero_grads": True}], ids=str)
def test_offload_takes_the_same_steps(options: dict[str, Any], dtype: torch.dtype) -> None:
    """From CPU to CPU: the same copies, there and back, that a GPU's parameters take."""
    extra = {"master_weights": True} if dtype == torch.bfloat16 else {}
    ours, theirs = leaves(dtype), leaves(dtype)
    optimizer = AdamW(ours, lr=0.01, seed=1, offload=True, **options, **extra)
    other = AdamW(theirs, lr=0.01, seed=1, **options, **extra)
    for step in range(4):
        for params, o in ((ours, optimizer), (theirs, other)):
            set_grads(params, step)
            o.step()
        if step == 1:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if step == 2:
            ours[0].data = ours[0].data.clone()
    assert_same(ours, theirs, rtol=0.0, atol=0.0)
    assert_same([p.grad for p in ours], [p.grad for p in theirs], rtol=0.0, atol=0.0)
    for p, q in zip(ours, theirs, strict=True):
        assert list(optimizer.state[p]) == list(other.state[q])
        assert {x.device.type for x in optimizer.state[p].values()} == {"cpu"}


def test_offload_with_grad_scaler_and_in_backward() -> None:
    ours, theirs = leaves(), leaves()
    for params, options in ((ours, {"offload": True}), (theirs, {})):
        optimizer, scaler = AdamW(params, **options), torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(3):
            set_grads(params, step, scale=8.0)
            scaler.scale(torch.zeros(()))
            scaler.step(optimizer)
            scaler.update(8.0)
    assert_same(ours, theirs, rtol=0.0, atol=0.0)
    assert_same([p.grad for p in ours], [p.grad for p in theirs], rtol=0.0, atol=0.0)
    models = [network(), network()]
    for model, options in zip(models, ({"offload": True, "in_backward": True}, {}), strict=True):
        train(model, AdamW(model.parameters(), **options), 0, 5)
    assert_same(list(models[0].parameters()), list(models[1].parameters()), rtol=0.0, atol=0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("options", [*STORAGES, {"max_norm": 0.1, "zero_grads": True}], ids=str)
@pytest.mark.parametrize("offload", [False, True])
def test_gpu_takes_the_cpus_steps(offload: bool, options: dict[str, Any]) -> None:
    there, here = [Parameter(p.detach().cuda()) for p in leaves()], leaves()
    optimizer = AdamW(there, lr=0.01, seed=1, offload=offload, **options)
    other = AdamW(here, lr=0.01, seed=1, **options)
    for step in range(4):
        set_grads(here, step)
        for p, q in zip(there, here, strict=True):
            p.grad = q.grad.cuda()  # type: ignore[union-attr]
        optimizer.step()
        other.step()
    assert_same([p.cpu() for p in there], here, rtol=1e-4, atol=1e-4)
    assert_same([p.grad.cpu() for p in there], [p.grad for p in here])  # type: ignore[union-attr]
    moments = [optimizer.state[p]["exp_avg"] for p in there]
    assert all(m.is_pinned() if offload else m.is_cuda for m in moments if m.numel())


# ---- errors and neighbours --------------------------------------------------------------------------


@pytest.mark.parametrize("names", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.uint8}, {"offload": True}], ids=str)
def test_wrong_gradient_names_its_parameter(options: dict[str, Any], steps: int, names: bool) -> None:
    params = leaves()
    optimizer = AdamW([(f"p{i}", p) for i, p in enumerate(params)] if names else params, **options)
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()
    who = "parameter 'p4'" if names else "parameter 4"
    bad: list[tuple[str, Any]] = [
        (r"shape \(300,\), not \(2,\)", torch.ones(2)),
        ("dtype torch.float32, not torch.float64", torch.ones(300, dtype=torch.float64)),
        ("does not support sparse gradients", torch.ones(300).to_sparse()),
    ]
    for message, grad in bad:
        set_grads(params, 9)
        # torch refuses to assign such a gradient; it comes about when .data is replaced afterwards.
        if grad.layout == torch.strided:
            params[4].grad.data = grad  # type: ignore[union-attr]
        else:
            params[4].grad = grad
        before = [p.detach().clone() for p in params]
        with pytest.raises(RuntimeError, match=f"{message}.*{who}"):
            optimizer.step()
        assert_same([p.detach() for p in params], before, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_gradients_stored_in_other_orders_come_and_go(backend: str) -> None:
    """As they do where the last layer has one output; the fast path returns with the usual order."""
    ours, theirs = ([Parameter(torch.ones(6, 4)), Parameter(torch.ones(1, 5))] for _ in range(2))
    optimizer, stock = AdamW(ours, max_norm=1.0), torch.optim.AdamW(theirs)
    for step in range(6):
        set_grads(ours, step)
        set_grads(theirs, step)
        if step in (0, 3):
            ours[0].grad = torch.empty(4, 6).t().copy_(ours[0].grad)  # type: ignore[arg-type]
        if step in (1, 4):
            ours[1].grad = ours[1].grad.as_strided((1, 5), (1, 1))  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(theirs, 1.0)
        stock.step()
        if backend == "torch":
            with bigkern.use("torch"):
                optimizer.step()
        else:
            optimizer.step()
    assert_same(ours, theirs)
    assert backend == "torch" or optimizer._plans()[0,].buckets[0].backend.name == "cpu"  # type: ignore[union-attr]


def test_explain_names_the_backend_of_every_bucket() -> None:
    params = [*leaves(), *leaves(torch.bfloat16)]
    optimizer = AdamW(params, state_dtype=torch.uint8, max_norm=1.0)
    set_grads(params, 0)
    explained = optimizer.explain()
    assert len(explained) == 2
    assert {e.chosen for e in explained} <= {"cpu", "torch"}
    assert all(float(optimizer.state[p]["step"]) == 0 for p in params)


def test_compiled_step_with_options() -> None:
    ours, theirs = leaves(), leaves()
    optimizer, other = AdamW(ours, state_dtype=torch.uint8), AdamW(theirs, state_dtype=torch.uint8)
    step = torch.compile(optimizer.step, backend="eager")
    for i in range(2):
        set_grads(ours, i)
        set_grads(theirs, i)
        step()
        other.step()
    assert_same(ours, theirs, rtol=0.0, atol=0.0)


def test_subclasses_of_tensor_refuse_options() -> None:
    class Other(Tensor):
        pass

    p = Parameter(torch.ones(3).as_subclass(Other))
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"state_dtype does not go with .*subclass of Tensor"):
        AdamW([p], state_dtype=torch.uint8).step()


@pytest.mark.parametrize("options", STORAGES, ids=str)
@pytest.mark.parametrize(
    "flags", [{"lr": torch.tensor(0.01)}, {"maximize": True}, {"capturable": True}], ids=str
)
def test_torchs_arguments_beside_options(flags: dict[str, Any], options: dict[str, Any]) -> None:
    """A learning rate in a tensor is the number; maximizing -f minimizes f; capturable changes nothing."""
    ours, theirs = leaves(), leaves()
    plain = {"lr": 0.01} if "lr" in flags else {}
    optimizer, other = AdamW(ours, seed=1, **flags, **options), AdamW(theirs, seed=1, **plain, **options)
    for step in range(4):
        set_grads(ours, step, scale=-1.0 if "maximize" in flags else 1.0)
        set_grads(theirs, step)
        optimizer.step()
        other.step()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if "lr" in flags else {"rtol": 0.0, "atol": 0.0}
    assert_same(ours, theirs, **tolerance)


def test_hugging_face_trainer(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    data = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, report_to=[], use_cpu=True, save_steps=2, disable_tqdm=True
    )
    options = {"lr": 1e-2, "state_dtype": torch.uint8}
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, optimizer_cls_and_kwargs=(AdamW, options)
    )
    trainer.train()
    state = trainer.optimizer.state[model.transformer.wte.weight]
    assert state["exp_avg"].dtype == torch.uint8
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.optimizer.state[model.transformer.wte.weight]["exp_avg"].dtype == torch.uint8
