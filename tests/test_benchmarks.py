"""The benchmarks: parity before time, files that round-trip, regressions told from noise."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bigkern import registry
from bigkern.benchmarks import (
    bench_adam,
    bench_attention,
    bench_layernorm_ffn,
    bench_norm,
    bench_overhead,
    harness,
)
from bigkern.cli import problems
from bigkern.cli.console import Console
from bigkern.cli.main import main

CPU = torch.device("cpu")
ROOMS = (bench_attention, bench_norm, bench_layernorm_ffn, bench_adam, bench_overhead)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> harness.Bench:
    monkeypatch.setattr(harness.Bench, "budget", 0.0)
    return harness.Bench(CPU, quick=True, console=Console(), peaks={"copy": 10.0, "float32": 0.1})


def tiny(problem: problems.Problem) -> harness.Case:
    return harness.Case(
        problem, [harness.ours(problem), harness.by_autograd("eager", problem.stock, "torch")]
    )


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.__name__.rsplit("_", 1)[-1])
def test_every_benchmark_has_cases(room: Any, bench: harness.Bench) -> None:
    cases = room.cases(bench)
    assert cases
    for case in cases:
        assert case.contestants[0].name == "bigkern"
        assert len(case.contestants) > 1
    assert len({case.problem.label for case in cases}) == len(cases)


def test_rows_hold_what_was_measured(bench: harness.Bench) -> None:
    rows = harness.measure(tiny(problems.norm(8, 16)), torch.float32, bench)
    assert [(row.mode, row.contestant) for row in rows] == [
        (mode, name) for mode in ("forward", "backward", "both") for name in ("bigkern", "eager")
    ]
    for row in rows:
        assert 0 < row.p20_ms <= row.ms <= row.p80_ms
        assert row.rounds >= 5
        assert row.wrong == ""
        assert row.unit == "GB/s"
        assert row.share == pytest.approx(row.rate / 10.0)
    assert rows[0].speedup == 1.0
    assert rows[0].backend in registry.ORDER
    forward = rows[0]
    assert forward.rate == pytest.approx(2 * 8 * 16 * 4 / (forward.ms / 1e3) / 1e9)


def test_a_wrong_result_gets_no_time(bench: harness.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    op = registry.get("norm")
    right = op.backends["torch"]

    def wrong(*arguments: Any) -> Any:
        y, *rest = right.forward(*arguments)
        return y * 1.01, *rest

    monkeypatch.setitem(op.backends, "cpu", registry.Backend("cpu", wrong, right.backward))
    (row,) = harness.measure(tiny(problems.norm(8, 16)), torch.float32, bench)
    assert "output" in row.wrong
    assert math.isnan(row.ms)


def test_adam_steps_are_gated_and_timed(bench: harness.Bench) -> None:
    case = bench_adam._case("toy", [(64, 8), (64,)])
    rows = harness.measure(case, torch.float32, bench)
    assert [row.contestant for row in rows[:4]] == [
        "bigkern",
        "adamw-default",
        "adamw-foreach",
        "adamw-fused",
    ]
    assert all(row.mode == "step" and row.unit == "GB/s" for row in rows)


def test_turns_are_taken_in_rotation() -> None:
    order: list[int] = []
    tasks = [harness.Task(lambda _, i=i: order.append(i)) for i in range(3)]
    times = harness.take_turns(tasks, harness.Clock(CPU), budget=0.0)
    assert [len(t) for t in times] == [5, 5, 5]
    assert order[6:] == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2, 1, 2, 0]


def row(**changes: Any) -> harness.Row:
    values: dict[str, Any] = {
        f.name: {"str": "", "float": 1.0, "int": 5}[str(f.type)] for f in dataclasses.fields(harness.Row)
    }
    return harness.Row(**{**values, "contestant": "bigkern", **changes})


def timed(ms: float, speedup: float, noise: float = 0.02) -> list[harness.Row]:
    def spread(name: str, value: float) -> dict[str, float]:
        return {
            name.format(""): value,
            name.format("_p20"): value * (1 - noise),
            name.format("_p80"): value * (1 + noise),
        }

    def milliseconds(value: float) -> dict[str, float]:
        return {"ms": value, "p20_ms": value * (1 - noise), "p80_ms": value * (1 + noise)}

    return [
        row(**milliseconds(ms)),
        row(contestant="eager", **milliseconds(ms * speedup), **spread("speedup{}", speedup)),
    ]


@pytest.mark.parametrize(
    ("new", "found"),
    [
        (timed(1.0, 2.0), 0),  # the same
        (timed(0.5, 4.0), 0),  # better
        (timed(1.5, 2.0), 0),  # the machine is slower, for everyone
        (timed(1.0, 1.5), 0),  # the other became faster
        (timed(1.5, 1.3), 1),  # slower
        (timed(1.5, 1.3, noise=0.4), 0),  # perhaps slower
        ([row(wrong="output: NaN")], 1),
        ([row(op="unknown")], 0),
    ],
)
def test_regressions_are_told_from_noise(new: list[harness.Row], found: int) -> None:
    assert len(harness.regressions(timed(1.0, 2.0), new)) == found


def test_files_round_trip(tmp_path: Path) -> None:
    rows = [row(case="a, b", ms=0.25), row(ms=math.nan, wrong="output: max error")]
    harness.write(tmp_path / "deep" / "x.csv", rows)
    again = harness.read(tmp_path / "deep" / "x.csv")
    assert again[0] == rows[0]
    assert math.isnan(again[1].ms)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv is not a result"):
        harness.read(tmp_path / "other.csv")


def test_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bench: harness.Bench,
) -> None:
    monkeypatch.setattr(bench_norm, "cases", lambda _: [tiny(problems.norm(8, 16))])
    monkeypatch.setattr(harness.Bench, "copy_rate", lambda _: 10.0)
    options = ["bench", "norm", "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path)]
    assert main([*options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (file,) = tmp_path.glob("*/norm.csv")
    assert len(report["rows"]) == len(harness.read(file)) == 6
    fast = [dataclasses.replace(r, ms=1e-9, p20_ms=1e-9, p80_ms=1e-9) for r in harness.read(file)]
    fast = [dataclasses.replace(r, speedup_p20=1e9) for r in fast]
    harness.write(tmp_path / "old.csv", fast)
    assert main([*options, "--compare", str(tmp_path / "old.csv")]) == 1
    assert "slower than before" in capsys.readouterr().out
    assert main([*options, "--compare", str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in capsys.readouterr().err


def test_figures_come_from_the_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bigkern.benchmarks import plot

    file = tmp_path / "norm.csv"
    harness.write(
        file, [row(case="a", mode="forward", dtype="float32", device="cpu", p20_ms=0.5, p80_ms=2.0)]
    )
    (figure,) = plot.plot(file)
    assert figure.read_bytes().startswith(b"\x89PNG")
