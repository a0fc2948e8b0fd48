"""A short training run with every way of storing: see benchmarks/adam_storage.py for the long one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bigkern.benchmarks import adam_storage
from bigkern.train import corpus

SIZE = adam_storage.Size(steps=40, context=64, batch=4, layers=1, width=32, eval_batches=8)


def test_every_storage_learns_like_float32(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source = tmp_path / "text"
    source.write_bytes(b"\n".join(path.read_bytes() for path in corpus.standard_library()[:40]))
    text = corpus.load([source], "bytes", 256, SIZE.context, tmp_path)
    report = adam_storage.compare(SIZE, text, print)
    torch.set_num_threads(threads)
    assert adam_storage.too_far(report) == []
    first = report["runs"][adam_storage.REFERENCE]["curve"][0][1]
    assert all(run["validation"] < 0.85 * first for run in report["runs"].values() if run["held"])
    adam_storage.draw(report, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_run_that_ends_elsewhere_is_named() -> None:
    runs = {"a": {"off": 0.02, "held": True}, "b": {"off": float("nan"), "held": True}}
    runs |= {"c": {"off": 0.5, "held": False}, "d": {"off": -0.009, "held": True}}
    assert adam_storage.too_far({"runs": runs}) == ["a", "b"]
