"""bigkern's optimizers over two gloo processes: FSDP2, DDP, and what torch.distributed.checkpoint saves."""

from __future__ import annotations

import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available()
    or not torch.distributed.is_gloo_available()
    or sys.platform == "win32",
    reason="torch was built without gloo",
)
processes = pytest.importorskip("optim_processes")

Outcomes = list[dict[str, str | None]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What every check raised in each process; they are started once."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(processes.run, (str(folder),), nprocs=processes.WORLD)
    return [torch.load(folder / f"outcomes-{rank}") for rank in range(processes.WORLD)]


@pytest.mark.parametrize("check", list(processes.CHECKS))
def test_two_processes(outcomes: Outcomes, check: str) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome[check] is None, f"process {rank}:\n{outcome[check]}"
