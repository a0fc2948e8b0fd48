"""What runs on a GPU alone, tried here on the CPU's kernels: that the scripts themselves are right."""

from __future__ import annotations

from typing import Any

import gpu_race
import gpu_sanitized
import pytest
import torch

from bigkern.core import info, registry

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(info.import_error is not None, reason="needs the compiled kernels")


def test_the_race_run_finds_the_same_bits(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_race.main(2, ("cpu",), CPU) == []
    assert capsys.readouterr().out.count("the same bits") == len(gpu_race.RUNS)
    for prepare in gpu_race.TRITON_RUNS.values():
        assert gpu_race.differing(prepare(CPU), 1, CPU) == 0


def test_the_race_run_notices_one_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    op = registry.get("decode_attention")
    right, count = op.backends["cpu"], [0]

    def racing(*arguments: Any) -> Any:
        o, lse = right.forward(*arguments)
        count[0] += 1
        if count[0] == 3:
            o.view(torch.int16)[0, 0, 0, 0] ^= 1
        return o, lse

    monkeypatch.setitem(op.backends, "cpu", registry.Backend("cpu", racing))
    with registry.use("cpu"):
        assert gpu_race.differing(gpu_race.decoding(CPU, 64), 4, CPU) == 1


def test_the_sanitized_calls_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sanitized, "DEVICE", "cpu")
    with registry.use("cpu"):
        for run in gpu_sanitized.RUNS:
            run(torch.float32)
    for run in gpu_sanitized.TRITON_RUNS:
        run(torch.float32)
