"""bigkern's optimizers over two gloo processes: FSDP2, DDP, and what torch.distributed.checkpoint saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

import optim_processes


def test_two_processes(tmp_path: Path) -> None:
    """One start for all checks: starting takes longer than most of them."""
    torch.multiprocessing.spawn(optim_processes.run, (str(tmp_path),), nprocs=optim_processes.WORLD)
    failures = []
    for rank in range(optim_processes.WORLD):
        outcomes = torch.load(tmp_path / f"outcomes-{rank}")
        assert set(outcomes) == set(optim_processes.CHECKS)
        failures += [f"{name}, process {rank}:\n{text}" for name, text in outcomes.items() if text]
    assert not failures, "\n".join(failures)
