"""What two gloo processes check of bigkern's optimizers; test_optim_distributed.py starts them.

Every check runs in both processes, which hold the same seeds and see their half of each batch.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from bigkern.optim import AdamW

WORLD, STEPS = 2, 20
Options = dict[str, Any]
OPTIONS: dict[str, Options] = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "clipped": {"max_norm": 0.05},
    "clipped, zeroed": {"max_norm": 0.05, "zero_grads": True},
}
COMPACT: dict[str, tuple[torch.dtype, Options]] = {
    "bf16 moments": (torch.float32, {"state_dtype": torch.bfloat16}),
    "8-bit": (torch.float32, {"state_dtype": torch.uint8}),
    "masters": (torch.bfloat16, {"master_weights": True, "state_dtype": torch.float32}),
    "remainders": (torch.bfloat16, {"master_weights": "remainder", "state_dtype": torch.float32}),
    "at random": (torch.bfloat16, {"stochastic_rounding": True}),
}


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    # 33 and 3 rows: the two shards are of different sizes.
    return nn.Sequential(nn.Linear(16, 33), nn.Tanh(), nn.Linear(33, 3)).to(dtype)


def optimizer_of(model: nn.Module, options: Options) -> AdamW:
    biases = [p for p in model.parameters() if p.dim() == 1]
    weights = [p for p in model.parameters() if p.dim() == 2]
    return AdamW([{"params": weights}, {"params": biases, "weight_decay": 0.0}], lr=0.01, **options)


def train(model: nn.Module, optimizer: AdamW, first: int, last: int, *, halves: bool) -> None:
    """Steps on the batches of these numbers; with ``halves`` this process's half of each."""
    dtype = next(model.parameters()).dtype
    for step in range(first, last):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        target = x[:, :3].sin()
        if halves:
            x, target = (t.chunk(WORLD)[dist.get_rank()] for t in (x, target))
        (model(x.to(dtype)) - target.to(dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(p: Tensor) -> Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def alone(options: Options, first: int = 0, last: int = STEPS) -> tuple[nn.Module, AdamW]:
    model = network()
    optimizer = optimizer_of(model, options)
    train(model, optimizer, first, last, halves=False)
    return model, optimizer


def sharded(
    mesh: DeviceMesh, options: Options, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, AdamW]:
    model = network(dtype)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model, optimizer_of(model, options)


def assert_same(these: Any, those: Any, **tolerance: float) -> None:
    for a, b in zip(these, those, strict=True):
        torch.testing.assert_close(whole(a), whole(b), **(tolerance or {"rtol": 1e-5, "atol": 1e-6}))


# ---- the checks -------------------------------------------------------------------------------------


def fsdp(mesh: DeviceMesh, scratch: Path, name: str) -> None:
    expected, single = alone(OPTIONS[name])
    model, optimizer = sharded(mesh, OPTIONS[name])
    train(model, optimizer, 0, STEPS, halves=True)
    assert_same(model.parameters(), expected.parameters())
    if single.grad_norm is not None:
        torch.testing.assert_close(optimizer.grad_norm, single.grad_norm)
    assert all(isinstance(optimizer.state[p]["exp_avg"], DTensor) for p in model.parameters())
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    assert {e.chosen for e in optimizer.explain()} == {"cpu"}


def fsdp_in_backward(mesh: DeviceMesh, scratch: Path) -> None:
    expected, _ = alone({})
    model, optimizer = sharded(mesh, {"in_backward": True})
    train(model, optimizer, 0, STEPS, halves=True)
    assert_same(model.parameters(), expected.parameters())


def in_backward_refuses_replicas(mesh: DeviceMesh, scratch: Path) -> None:
    """Whether the model is wrapped before the optimizer is made or after, or there were no processes yet."""
    model = network()
    with pytest.raises(ValueError, match="in_backward must be False for plain parameters"):
        optimizer_of(DistributedDataParallel(model), {"in_backward": True})
    with pytest.raises(ValueError, match="in_backward must be False for plain parameters"):
        optimizer_of(model, {"in_backward": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_world_size", lambda: 1)  # as before the processes have met
        optimizer = optimizer_of(model, {"in_backward": True})
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="in_backward must be False for plain parameters"):
        train(DistributedDataParallel(model), optimizer, 0, 1, halves=True)
    assert_same(model.parameters(), before, rtol=0.0, atol=0.0)


def ddp(mesh: DeviceMesh, scratch: Path, name: str) -> None:
    expected, single = alone(OPTIONS[name])
    model = network()
    optimizer = optimizer_of(model, OPTIONS[name])
    train(DistributedDataParallel(model), optimizer, 0, STEPS, halves=True)
    assert_same(model.parameters(), expected.parameters())
    if single.grad_norm is not None:
        torch.testing.assert_close(optimizer.grad_norm, single.grad_norm)


def replicas_round_alike(mesh: DeviceMesh, scratch: Path) -> None:
    """Though the processes' generators differ, as they do where data are drawn."""
    model = network(torch.bfloat16)
    torch.manual_seed(dist.get_rank())
    optimizer = optimizer_of(model, {"stochastic_rounding": True})
    train(DistributedDataParallel(model), optimizer, 0, 5, halves=True)
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(mine) for _ in range(WORLD)]
    dist.all_gather(both, mine)
    assert torch.equal(*both)


def shards_round_apart(mesh: DeviceMesh, scratch: Path) -> None:
    p = nn.Parameter(distribute_tensor(torch.ones(1024, dtype=torch.bfloat16), mesh, [Shard(0)]))
    p.grad = torch.ones_like(p)
    AdamW([p], lr=1e-3, stochastic_rounding=True).step()
    halves = whole(p).chunk(2)
    assert 0.05 < float((halves[0] == halves[1]).float().mean()) < 0.95


def offload_is_refused(mesh: DeviceMesh, scratch: Path) -> None:
    with pytest.raises(ValueError, match="CPUOffloadPolicy"):
        sharded(mesh, {"offload": True})


def norm_of_any_placement(mesh: DeviceMesh, scratch: Path) -> None:
    """Sharded gradients are summed over the mesh, replicated ones and plain ones are not."""
    torch.manual_seed(0)
    values = [torch.randn(7, 5), torch.randn(6), torch.randn(3)]
    params = [
        nn.Parameter(distribute_tensor(values[0], mesh, [Shard(0)])),
        nn.Parameter(distribute_tensor(values[1].clone(), mesh, [Replicate()])),
        nn.Parameter(values[2].clone()),
    ]
    plain = [nn.Parameter(v.clone()) for v in values]
    for p, q, v in zip(params, plain, values, strict=True):
        q.grad = v.clone()
        p.grad = distribute_tensor(v, mesh, p.placements) if isinstance(p, DTensor) else v.clone()
    optimizer, other = AdamW(params, max_norm=1.0), AdamW(plain, max_norm=1.0)
    params[0].grad = params[0].grad.redistribute(placements=[Replicate()])  # not as its parameter is
    optimizer.step()
    other.step()
    torch.testing.assert_close(optimizer.grad_norm, torch.cat([v.flatten() for v in values]).norm())
    assert_same(params, plain)


def shards_in_any_order(mesh: DeviceMesh, scratch: Path) -> None:
    """The state of contiguous shards goes on with channels last ones; gradients are lazily negated."""
    torch.manual_seed(0)
    whole_weight = torch.randn(8, 3, 2, 2)
    p, q = nn.Parameter(distribute_tensor(whole_weight, mesh, [Shard(0)])), nn.Parameter(whole_weight.clone())
    optimizer, other = AdamW([p], lr=0.1), torch.optim.AdamW([q], lr=0.1)
    for step in range(4):
        if step == 2:
            turned = p.data.to_local().to(memory_format=torch.channels_last)
            p = nn.Parameter(DTensor.from_local(turned, mesh, [Shard(0)]))
            saved, optimizer = optimizer.state_dict(), AdamW([p])
            optimizer.load_state_dict(saved)
        q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(step))
        mine = distribute_tensor(q.grad, mesh, [Shard(0)]).to_local()
        p.grad = DTensor.from_local(torch._neg_view(-mine) if step % 2 else mine, mesh, [Shard(0)])
        optimizer.step()
        other.step()
    assert optimizer.state[p]["exp_avg"].to_local().stride() == p.to_local().stride() == (12, 1, 6, 3)
    assert_same([p], [q])


def saved_sharded(mesh: DeviceMesh, scratch: Path, name: str) -> None:
    """Through files of torch.distributed.checkpoint, in the middle of a run."""
    dtype, options = COMPACT[name]
    model, optimizer = sharded(mesh, options, dtype)
    train(model, optimizer, 0, 5, halves=True)
    saved = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": saved, "model": model.state_dict()}, checkpoint_id=scratch)
    train(model, optimizer, 5, 10, halves=True)
    other, twin = sharded(mesh, options, dtype)
    target = {"optimizer": get_optimizer_state_dict(other, twin), "model": other.state_dict()}
    dcp.load(target, checkpoint_id=scratch)
    other.load_state_dict(target["model"])
    set_optimizer_state_dict(other, twin, target["optimizer"])
    kinds = [{k: v.dtype for k, v in optimizer.state[p].items()} for p in model.parameters()]
    assert [{k: v.dtype for k, v in twin.state[p].items()} for p in other.parameters()] == kinds
    train(other, twin, 5, 10, halves=True)
    # Codes are quantised anew, by another block's largest number if the cut is another.
    tolerance = {"rtol": 0.02, "atol": 0.01} if name == "8-bit" else {"rtol": 0.0, "atol": 0.0}
    assert_same(other.parameters(), model.parameters(), **tolerance)


def saved_full(mesh: DeviceMesh, scratch: Path, name: str) -> None:
    """A whole state dict: into one process's optimizer, and into the shards again."""
    dtype, options = COMPACT[name]
    model, optimizer = sharded(mesh, options, dtype)
    train(model, optimizer, 0, 5, halves=True)
    full = StateDictOptions(full_state_dict=True)
    saved = get_optimizer_state_dict(model, optimizer, options=full)
    single = network(dtype)
    for p, q in zip(single.parameters(), model.parameters(), strict=True):
        p.data.copy_(whole(q))
    one = optimizer_of(single, options)
    set_optimizer_state_dict(single, one, saved)
    key = {"masters": "master", "remainders": "master"}.get(name, "exp_avg")
    for p, q in zip(single.parameters(), model.parameters(), strict=True):
        mine, theirs = one.state[p], optimizer.state[q]
        assert float(mine["step"]) == float(theirs["step"]) == 5
        assert mine[key].dtype == theirs[key].dtype
        if name != "8-bit":
            assert torch.equal(mine[key], _gathered(theirs[key]))
    other, twin = sharded(mesh, options, dtype)
    saved = get_optimizer_state_dict(model, optimizer, options=full)
    set_optimizer_state_dict(other, twin, saved, options=full)
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        if name not in ("8-bit", "remainders"):  # remainders want the model loaded first
            assert torch.equal(_gathered(twin.state[p][key]), _gathered(optimizer.state[q][key]))


def _gathered(x: Any) -> Tensor:
    """full_tensor(), for the dtypes too that gloo has no collectives for."""
    return x.to(torch.float32).full_tensor().to(x.dtype)


CHECKS: dict[str, Callable[[DeviceMesh, Path], None]] = {
    **{f"fsdp, {n}": lambda m, s, n=n: fsdp(m, s, n) for n in OPTIONS},  # type: ignore[misc]
    **{f"ddp, {n}": lambda m, s, n=n: ddp(m, s, n) for n in OPTIONS},  # type: ignore[misc]
    **{f"saved sharded, {n}": lambda m, s, n=n: saved_sharded(m, s, n) for n in COMPACT},  # type: ignore[misc]
    **{f"saved full, {n}": lambda m, s, n=n: saved_full(m, s, n) for n in COMPACT},  # type: ignore[misc]
    "fsdp in backward": fsdp_in_backward,
    "shards in any order": shards_in_any_order,
    "in backward refuses replicas": in_backward_refuses_replicas,
    "replicas round alike": replicas_round_alike,
    "shards round apart": shards_round_apart,
    "offload is refused": offload_is_refused,
    "norm of any placement": norm_of_any_placement,
}


def run(rank: int, folder: str) -> None:
    """One process: every check in turn, and what each of them raised, into a file."""
    torch.set_num_threads(1)
    store, patience = f"file://{folder}/store", timedelta(seconds=120)  # should the other process have failed
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=patience)
    mesh = init_device_mesh("cpu", (WORLD,))
    outcomes = {}
    for i, (name, check) in enumerate(CHECKS.items()):
        try:
            check(mesh, Path(folder) / str(i))
            outcomes[name] = None
        except Exception:
            outcomes[name] = traceback.format_exc()
    torch.save(outcomes, f"{folder}/outcomes-{rank}")
    dist.destroy_process_group()
