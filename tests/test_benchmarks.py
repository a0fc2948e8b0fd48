"""The benchmarks: parity before time, files that round-trip, regressions told from noise."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bigkern
from bigkern.benchmarks import (
    attention_peers,
    bench_adam,
    bench_attention,
    bench_layernorm_ffn,
    bench_models,
    bench_norm,
    bench_overhead,
    bench_recurrent,
    breakdown,
    footprint,
    harness,
    model_problems,
    recurrent_peers,
    summary,
    table,
)
from bigkern.benchmarks.model_problems import Network
from bigkern.cli.main import main
from bigkern.core import registry, timing
from bigkern.core.problem import Problem
from bigkern.ops.attention import problems as attention_problems
from bigkern.ops.attention.decode_problems import decode
from bigkern.ops.layernorm_ffn.problems import layernorm_ffn
from bigkern.ops.norm.backends import NORM
from bigkern.ops.norm.problems import norm
from bigkern.ops.recurrent import recurrent
from bigkern.terminal.console import Console, Failure

CPU = torch.device("cpu")
MODULES = (bench_attention, bench_norm, bench_layernorm_ffn, bench_recurrent, bench_adam, bench_overhead)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> harness.Bench:
    monkeypatch.setattr(harness.Bench, "budget", 0.0)
    return harness.Bench(CPU, quick=True, console=Console(), peaks={"copy": 10.0, "float32": 0.1})


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small work on many threads waits for them, where others use them, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(problem: Problem) -> harness.Case:
    return harness.Case(
        problem, [harness.ours(problem), harness.by_autograd("eager", problem.stock, "torch")]
    )


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rsplit("_", 1)[-1])
def test_every_benchmark_has_cases(module: Any, bench: harness.Bench) -> None:
    cases = module.cases(bench)
    assert cases
    for case in cases:
        assert case.contestants[0].name == "bigkern"
        assert len(case.contestants) > 1
    assert len({case.problem.label for case in cases}) == len(cases)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [True, False])
def test_the_attention_sweep_covers_lengths_and_features(
    device: str, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_peers, "compiler_works", lambda _: True)
    cases = bench_attention.cases(harness.Bench(torch.device(device), quick, Console()))
    groups = {case.group for case in cases}
    assert groups == {"full", "causal", "window", "bias", "varlen", "decode"}
    assert len({case.problem.label for case in cases}) == len(cases)
    for case in cases:
        names = [contestant.name for contestant in case.contestants]
        assert names[:2] == ["bigkern", "sdpa"]
        assert len(set(names)) == len(names)
        assert case.gate is not None
        assert case.gate.op == case.problem.op
        assert math.isnan(case.x) == (case.panel == "")
    if device == "cuda" and not quick:
        places = {(case.panel, case.x) for case in cases if case.panel}
        lengths = (128, 512, 1024, 2048, 4096, 8192, 16384)
        panels = [f"D {D}, {rule}" for D in (64, 128, 256) for rule in ("full", "causal")]
        assert places == {(panel, S) for panel in panels for S in lengths}
        assert {c.name for c in cases[0].contestants} >= {"sdpa-cudnn", "sdpa-efficient", "sdpa-math", "flex"}


def small_attention_cases() -> list[harness.Case]:
    window = attention_problems.attention(1, 2, 33, 16, True, window=(7, 0))
    bias = attention_problems.attention(2, 2, 33, 16, bias="learned")
    lengths = [17, 1, 30]
    packs = attention_problems.varlen(lengths, 2, 16, True)
    paged = decode([33, 7], 4, 40, 16, kv_heads=2, page_size=8)
    whole = decode([40, 40], 4, 40, 16)
    peers = [
        (window, attention_peers.dense(window, CPU, True, 7, with_flex=False)),
        (bias, attention_peers.dense(bias, CPU, False, with_flex=False)),
        (packs, attention_peers.packed(packs, CPU, True, lengths)),
        (paged, attention_peers.decoding(paged, CPU, [33, 7], True)),
        (whole, attention_peers.decoding(whole, CPU, [40, 40], False)),
    ]
    return [harness.Case(p, [harness.ours(p), *others], group="feature") for p, others in peers]


@pytest.mark.parametrize("case", small_attention_cases(), ids=lambda case: case.problem.label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_peers_agree_and_are_timed(
    case: harness.Case, dtype: torch.dtype, bench: harness.Bench
) -> None:
    bench.peaks["bfloat16"] = 0.1
    rows = harness.measure(case, dtype, bench)
    assert rows[0].wrong == ""
    refused = {row.contestant: row.wrong for row in rows if row.wrong}
    assert set(refused) <= {"sdpa-flash"}, refused  # which knows no bias with a gradient
    modes = {row.mode for row in rows if row.contestant == "sdpa"}
    assert modes == ({"forward", "backward", "both"} if case.problem.differentiable else {"forward"})
    assert {row.group for row in rows} == {"feature"}


class Installed:
    """flash-attn and xformers as they are called, computed by bigkern: are our calls of them right?"""

    class LowerTriangularMask:
        pass

    @staticmethod
    def flash_attn_func(q: Any, k: Any, v: Any, *, causal: bool, window_size: tuple[int, int]) -> Any:
        window = tuple(None if n < 0 else n for n in window_size)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return bigkern.attention(q, k, v, causal=causal, window=window).transpose(1, 2)  # type: ignore[arg-type, union-attr]

    @staticmethod
    def flash_attn_varlen_func(*packed: Any, causal: bool) -> Any:
        return bigkern.varlen_attention(*packed, causal=causal), None

    @staticmethod
    def flash_attn_with_kvcache(
        q: Any, k: Any, v: Any, *, cache_seqlens: Any, causal: bool, block_table: Any = None
    ) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = bigkern.decode_attention(q, k, v, cache_seqlens, page_table=block_table, causal=causal)
        return o.transpose(1, 2)  # type: ignore[union-attr]

    @staticmethod
    def memory_efficient_attention(q: Any, k: Any, v: Any, *, attn_bias: Any) -> Any:
        return Installed.flash_attn_func(q, k, v, causal=attn_bias is not None, window_size=(-1, -1))


def test_packages_of_others_are_called_as_they_want(
    monkeypatch: pytest.MonkeyPatch, bench: harness.Bench
) -> None:
    monkeypatch.setattr(attention_peers, "_imported", lambda module, name: getattr(Installed, name, None))
    problem = attention_problems.attention
    calls = [
        (problem(1, 2, 33, 16), attention_peers._of_others(problem(1, 2, 33, 16), False, None)),
        (problem(1, 2, 33, 16, True), attention_peers._of_others(problem(1, 2, 33, 16, True), True, None)),
    ]
    window = problem(1, 2, 33, 16, True, window=(7, 0))
    packs = attention_problems.varlen([17, 1, 30], 2, 16, True)
    paged = decode([33, 7], 4, 40, 16, kv_heads=2, page_size=8)
    calls += [
        (window, attention_peers._of_others(window, True, 7)),
        (packs, attention_peers._flash_varlen(packs, True)),
        (paged, attention_peers._flash_decoding(paged)),
    ]
    found = []
    for asked, peers in calls:
        stock = harness.by_autograd("sdpa", asked.stock, "torch")
        rows = harness.measure(
            harness.Case(asked, [harness.ours(asked), stock, *peers]), torch.float32, bench
        )
        assert [row.wrong for row in rows if row.wrong] == []
        found.append([contestant.name for contestant in peers])
    flash = ["flash-attn", "flash-attn-3"]
    assert found == [[*flash, "xformers"], [*flash, "xformers"], flash, flash, flash]


def test_torchs_choice_is_named_and_not_timed_twice(bench: harness.Bench) -> None:
    problem = attention_problems.attention(1, 2, 65, 16, True)
    case = harness.Case(
        problem, [harness.ours(problem), *attention_peers.dense(problem, CPU, True, with_flex=False)]
    )
    rows = harness.measure(case, torch.float32, bench)
    assert {(row.contestant, row.backend) for row in rows if row.contestant != "bigkern"} == {
        ("sdpa", "flash"),
        ("sdpa-math", "math"),
    }


def test_rows_hold_what_was_measured(bench: harness.Bench) -> None:
    rows = harness.measure(tiny(norm(8, 16)), torch.float32, bench)
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
    op = NORM
    right = op.reference

    def wrong(call: Any) -> Any:
        y, *rest = right.forward(call)
        return y * 1.01, *rest

    monkeypatch.setitem(op.backends, "cpu", registry.Backend("cpu", wrong, right.backward))
    (row,) = harness.measure(tiny(norm(8, 16, "rms")), torch.float32, bench)
    assert "output" in row.wrong
    assert math.isnan(row.ms)


def contestant(name: str, call: Any) -> harness.Contestant:
    return harness.by_autograd(name, call, "torch")


def test_a_peer_that_is_wrong_or_refuses_is_left_out_with_its_reason(bench: harness.Bench) -> None:
    problem = norm(8, 16)

    def refuses(inputs: Any) -> Any:
        raise harness.LeftOut("no such shape")

    def forward_only(inputs: Any) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError("no backward\nat all")
        return problem.stock(inputs)

    case = tiny(problem)
    others = [
        contestant("wrong", lambda inputs: problem.stock(inputs) + 0.01 * inputs["x"]),
        contestant("refuses", refuses),
        contestant("half", forward_only),
    ]
    rows = harness.measure(
        dataclasses.replace(case, contestants=[*case.contestants, *others]), torch.float32, bench
    )
    left_out = {(row.contestant, row.mode): row.wrong for row in rows if row.wrong}
    assert set(left_out) == {("wrong", ""), ("refuses", ""), ("half", "backward")}
    assert left_out["wrong", ""].startswith("disagrees with bigkern: ")
    assert left_out["refuses", ""] == "no such shape"
    assert left_out["half", "backward"] == "NotImplementedError: no backward"
    assert [row.mode for row in rows if row.contestant == "half"] == ["forward", "backward"]
    assert all(math.isnan(row.ms) for row in rows if row.wrong)


def test_bigkern_gets_no_time_where_stock_disagrees_at_full_size(bench: harness.Bench) -> None:
    problem = norm(8, 16)
    stock = contestant("eager", lambda inputs: problem.stock(inputs) * 1.01)
    (row,) = harness.measure(harness.Case(problem, [harness.ours(problem), stock]), torch.float32, bench)
    assert row.contestant == "bigkern"
    assert row.wrong.startswith("disagrees with eager: ")


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
    tasks = [timing.Task(lambda _, i=i: order.append(i)) for i in range(3)]
    times = timing.take_turns(tasks, timing.Clock(CPU), budget=0.0)
    assert [len(t) for t in times] == [5, 5, 5]
    assert order[6:] == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2, 1, 2, 0]


def row(**changes: Any) -> table.Row:
    values: dict[str, Any] = {
        f.name: {"str": "", "float": 1.0, "int": 5}[str(f.type)] for f in dataclasses.fields(table.Row)
    }
    return table.Row(**{**values, "contestant": "bigkern", **changes})


def timed(ms: float, speedup: float, noise: float = 0.02) -> list[table.Row]:
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
        ([*timed(1.5, 1.3), row(contestant="other", wrong="refuses")], 1),
    ],
)
def test_regressions_are_told_from_noise(new: list[table.Row], found: int) -> None:
    assert len(table.regressions(timed(1.0, 2.0), new)) == found


def test_files_round_trip(tmp_path: Path) -> None:
    rows = [row(case="a, b", ms=0.25), row(ms=math.nan, wrong="output: largest error")]
    table.write(tmp_path / "deep" / "x.csv", rows)
    again = table.read(tmp_path / "deep" / "x.csv")
    assert again[0] == rows[0]
    assert math.isnan(again[1].ms)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    lines = (tmp_path / "deep" / "x.csv").read_text().splitlines()
    (tmp_path / "older.csv").write_text("\n".join(line.rsplit(",", 5)[0] for line in lines))
    (old, _) = table.read(tmp_path / "older.csv")  # from before there were sweeps
    assert (old.ms, old.panel) == (0.25, "")
    assert math.isnan(old.x)
    with pytest.raises(ValueError, match=r"other\.csv is not a result"):
        table.read(tmp_path / "other.csv")


def test_a_folders_other_tables_stay_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from bigkern.benchmarks import plot
    from bigkern.benchmarks.cli import _old_rows

    ours = [row(case="a", mode="forward", dtype="float32", device="cpu")]
    table.write(tmp_path / "norm.csv", ours)
    (tmp_path / "parity.csv").write_text("op,backend,dtype,tier,kind,worst_ratio,cases\nadam,cpu,,,,1,2\n")
    (tmp_path / "empty.csv").write_text("")
    assert table.files(tmp_path) == [tmp_path / "norm.csv"]
    assert _old_rows(tmp_path)[0].case == "a"
    plot.main([str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path / 'norm-cpu-float32.png'}\n"
    with pytest.raises(Failure, match=r"parity\.csv is not a result of"):
        _old_rows(tmp_path / "parity.csv")


def test_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bench: harness.Bench,
) -> None:
    monkeypatch.setattr(bench_norm, "cases", lambda _: [tiny(norm(8, 16))])
    monkeypatch.setattr(harness.Bench, "copy_rate", lambda _: 10.0)
    options = ["bench", "norm", "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path)]
    assert main([*options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (file,) = tmp_path.glob("*/norm.csv")
    assert len(report["rows"]) == len(table.read(file)) == 6
    fast = [dataclasses.replace(r, ms=1e-9, p20_ms=1e-9, p80_ms=1e-9) for r in table.read(file)]
    fast = [dataclasses.replace(r, speedup_p20=1e9) for r in fast]
    table.write(tmp_path / "old.csv", fast)
    assert main([*options, "--compare", str(tmp_path / "old.csv")]) == 1
    assert "slower than before" in capsys.readouterr().out
    assert main([*options, "--compare", str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in capsys.readouterr().err


def test_figures_come_from_the_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bigkern.benchmarks import plot

    file = tmp_path / "norm.csv"
    table.write(file, [row(case="a", mode="forward", dtype="float32", device="cpu", p20_ms=0.5, p80_ms=2.0)])
    (figure,) = plot.plot(file)
    assert figure.read_bytes().startswith(b"\x89PNG")


def point(speedup: float, contestant: str = "sdpa", **changes: Any) -> table.Row:
    return row(contestant=contestant, speedup=speedup, group="causal", mode="forward", **changes)


def test_the_summary_says_who_was_beaten_and_where_not() -> None:
    rows = [
        row(group="causal", mode="forward", case="a"),
        point(4.0, case="a"),
        point(2.0, "flex", case="a"),
        point(1.0, case="b"),
        point(0.5, "flex", case="b"),
        point(math.nan, "flash", case="b", wrong="refuses"),
    ]
    points = summary.points(rows)
    (line,) = summary.lines(points)
    assert (line.points, line.over_stock, line.over_fastest) == (2, pytest.approx(2.0), pytest.approx(1.0))
    assert (line.worst.row.case, line.worst.who, line.worst.fastest) == ("b", "flex", 0.5)
    stock, fastest, where = summary.verdicts(points)
    assert stock == "over stock: no point of 2 under 0.97x"
    assert fastest == "over the fastest other: 1 of 2 points under 0.97x:"
    assert where == "  0.50x over flex: b,  forward"
    assert summary.lines(summary.points([row(), row(contestant="eager")])) == []


def test_a_sweep_is_drawn_as_lines(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bigkern.benchmarks import plot

    file = tmp_path / "attention.csv"
    places = [(panel, x) for panel in ("D 64, full", "D 64, causal") for x in (128.0, 2048.0)]
    lines = [
        row(panel=panel, x=x, contestant=name, mode=mode, dtype="float32", device="cpu", unit="TFLOP/s")
        for panel, x in places
        for name in ("bigkern", "sdpa")
        for mode in ("forward", "backward", "both")
    ]
    bars = [
        row(case=f"{ms}", mode="forward", dtype="float32", device="cpu", ms=ms, p20_ms=ms, p80_ms=ms)
        for ms in (1.0, 100.0)
    ]
    table.write(file, [*lines, *bars, row(panel="D 64, full", contestant="flash", wrong="refuses")])
    drawn = plot.plot(file)
    assert [figure.name for figure in drawn] == [
        "attention-cpu-float32-sweep.png",
        "attention-cpu-float32.png",
    ]
    for figure in drawn:
        assert figure.read_bytes().startswith(b"\x89PNG")


def test_saved_memory_counts_blocks_of_memory_once_and_no_parameters() -> None:
    """x and its square share nothing; w is a parameter; x is kept twice and counts once."""
    x, w = (torch.randn(256, 1024, requires_grad=True) for _ in range(2))
    task = timing.Task(lambda _: None, setup=lambda: ((x * w) * x).sum())
    assert footprint.saved_mb(task, [w]) == 2.0  # x, and x w
    assert footprint.saved_mb(task, []) == 3.0


def test_saving_the_input_saves_memory() -> None:
    megabytes = {}
    for save in ("preactivation", "input"):
        problem = layernorm_ffn(512, 64, 256, save=save)
        inputs = problem.make(torch.float32, CPU)
        task = harness.ours(problem).tasks(inputs)["backward"]
        with bigkern.use("cpu"):
            megabytes[save] = footprint.saved_mb(task, [inputs[name] for name in problem.parameters])
    problem = layernorm_ffn(512, 64, 256)
    inputs = problem.make(torch.float32, CPU)
    eager = harness.by_autograd("eager", problem.stock, "torch").tasks(inputs)["backward"]
    stock = footprint.saved_mb(eager, [inputs[name] for name in problem.parameters])
    assert megabytes["preactivation"] <= 0.55 * stock
    assert megabytes["input"] <= 0.15 * stock


def test_a_forward_row_names_what_runs_without_gradients(bench: harness.Bench) -> None:
    """An RMSNorm of this size runs on our kernels with a gradient, and on stock without one."""
    problem = norm(32, 64, "rms")
    rows = harness.measure(harness.Case(problem, [harness.ours(problem)]), torch.float32, bench)
    assert {row.mode: row.backend for row in rows} == {"forward": "torch", "backward": "cpu", "both": "cpu"}


# ---- recurrent layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_recurrent_layers_are_swept_by_batch_and_hidden_size(device: str) -> None:
    from bigkern.benchmarks import plot

    cases = bench_recurrent.cases(harness.Bench(torch.device(device), False, Console()))
    assert len({case.problem.label for case in cases}) == len(cases)
    places: dict[str, set[float]] = {}
    module = bench_recurrent
    axes = {"batch": module.BATCHES, "hidden size": module.HIDDEN, "length": module.LENGTHS}
    for case in cases:
        assert [contestant.name for contestant in case.contestants[:2]] == ["bigkern", "eager"]
        if case.panel:
            places.setdefault(case.panel, set()).add(case.x)
        if device == "cpu":  # in which torch reaches 0.17 TFLOP/s on two cores, and backward is two forwards
            assert 3 * case.problem.flops / 0.17e12 < 2.0
    for panel, x in places.items():
        assert x == set(axes[panel.split(plot.AXIS)[1].split(",")[0]])
    groups = {case.group for case in cases}
    assert groups == {"LSTM, 2 layers", "GRU, 2 layers", "LSTM", "GRU", "forms"}


Layer = recurrent_peers.Layer
LAYERS = [
    (Layer("LSTM", 5, 3, 24, layers=2), "onednn"),
    (Layer("GRU", 5, 3, 24, bidirectional=True), "aten"),
    (Layer("LSTM", 5, 3, 24, lengths=(5, 2, 2)), "aten"),  # oneDNN knows no packed sequences
    (Layer("RNN", 5, 3, 24), "aten"),
    (Layer("LSTM", 5, 3, 24, layer_norm=True), "aten"),
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("layer", "stock"), LAYERS, ids=lambda value: getattr(value, "label", str)())
def test_recurrent_layers_agree_and_are_timed(
    layer: Layer, stock: str, bench: harness.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recurrent_peers, "COMPILED_STEPS", 1)
    bench.quick = False
    case = bench_recurrent._case(bench, layer, "forms", (torch.float32,), alone=True)
    *rows, compiled = harness.measure(case, torch.float32, bench)
    assert [(row.mode, row.contestant) for row in rows] == [
        (mode, name) for mode in ("forward", "backward", "both") for name in ("bigkern", "eager")
    ]
    assert compiled.wrong.endswith("steps, which takes too long; --compile includes it")
    assert not any(row.wrong for row in rows)
    assert {row.backend for row in rows if row.contestant == "eager"} == {stock}
    assert rows[0].step_us == pytest.approx(1e3 * rows[0].ms / (5 * layer.layers))
    assert rows[2].saved_mb > 0


def test_a_wrong_recurrent_layer_gets_no_time(bench: harness.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    op = registry.get("recurrent")
    right = op.reference

    def wrong(call: Any) -> Any:
        y, hn, *rest = right.forward(call)
        return y, hn * 1.001, *rest

    monkeypatch.setitem(op.backends, "cpu", registry.Backend("cpu", wrong, right.backward))
    case = bench_recurrent._case(bench, Layer("GRU", 5, 3, 24), "forms", (torch.float32,))
    with registry.use(recurrent="cpu"):
        (row,) = harness.measure(case, torch.float32, bench)
    assert row.wrong.startswith("hn on cpu: ")


class FlashRNN:
    """As it is called, computed by bigkern: gates in its order, tensors in its shapes."""

    @staticmethod
    def FlashRNNConfig(**options: Any) -> dict[str, Any]:
        return options

    @staticmethod
    def flashrnn(Wx: Any, R: Any, b: Any, *, config: dict[str, Any]) -> Any:
        T, B, G, heads, H = Wx.shape
        assert (heads, config["head_dim"], config["batch_size"]) == (1, H, B)
        assert (config["input_shape"], config["output_shape"]) == ("TBGHD", "STBHD")
        order = [1, 2, 0] if config["function"] == "gru" else list(range(G))  # theirs n r z of h, r z n of x
        w_hh, b_hh = R[order].reshape(G * H, H), torch.zeros(G, H)
        if config["function"] == "gru":
            b_hh = torch.cat((torch.zeros(2, H), b[0]))
            b = b[1:]
        mode = {"lstm": "LSTM", "gru": "GRU", "elman": "RNN_TANH"}[config["function"]]
        weights = [torch.eye(G * H), w_hh, b.flatten(), b_hh.flatten()]
        y, _ = recurrent(Wx.reshape(T, B, G * H), None, weights, mode)
        return y.view(1, T, B, 1, H), None


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("kind", "ways"), [("LSTM", 2), ("GRU", 1), ("RNN", 2)])
def test_flashrnn_is_called_as_it_wants(kind: str, ways: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashrnn", FlashRNN)
    layer = Layer(kind, 4, 3, 16, layers=2)
    inputs = layer.problem().make(torch.float32, CPU)
    expected = layer.stock(inputs)(inputs["x"])[0]
    found = recurrent_peers.flashrnn(layer)
    assert len(found) == ways
    for _, build, _ in found:
        (y,) = build(inputs)(inputs["x"])
        assert harness.disagreement({"output": expected.detach()}, {"output": y.detach()}) == ""
    assert recurrent_peers.flashrnn(dataclasses.replace(layer, bidirectional=True)) == []
    monkeypatch.setitem(sys.modules, "flashrnn", None)
    assert recurrent_peers.flashrnn(layer) == []


def test_speed_ups_are_drawn_by_what_varies(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bigkern.benchmarks import plot

    file = tmp_path / "recurrent.csv"
    rows = [
        row(panel=f"{kind}: {axis}", x=x, contestant=name, mode=mode, dtype=dtype, device="cpu")
        for kind, axes in (("LSTM", ("batch", "length")), ("GRU", ("batch",)))
        for axis in axes
        for x in (1.0, 8.0)
        for name in ("bigkern", "eager")
        for mode in ("forward", "both")
        for dtype in ("float32", "bfloat16")
    ]
    table.write(file, rows)
    (figure,) = plot.plot(file)
    assert figure.name == "recurrent-cpu-speedup.png"
    assert figure.read_bytes().startswith(b"\x89PNG")


# ---- whole models ----------------------------------------------------------------------------------


def small_gpt2() -> Network:
    return model_problems.gpt2(
        "small GPT-2", n_embd=32, n_layer=2, n_head=2, vocab_size=99, bos_token_id=0, eos_token_id=0
    )


def small_bert() -> Network:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    return model_problems.bert("small BERT", vocab_size=99, **sizes)


def small_plan(network: Network) -> bench_models.Plan:
    sizes = ([(2, 16)], [(2, 16)])
    return bench_models.Plan(network, (1, 16), sizes, sizes)


def test_the_models_are_the_published_ones_and_never_cut() -> None:
    pytest.importorskip("transformers")
    millions = {
        "encoder layer D768": 7.1,
        "encoder layer D1024": 12.6,
        "GPT-2 124M": 124.4,
        "BERT-base": 109.5,
        "ViT-B/16": 86.6,
        "ResNet-50": 25.6,
        "ConvNeXt-T": 28.6,
    }
    for plan in bench_models.PLANS:
        with torch.device("meta"):
            model = plan.network.build()
        counted = sum(p.numel() for p in model.parameters()) / 1e6
        assert counted == pytest.approx(millions.pop(plan.network.name), abs=0.1)
    assert not millions


@pytest.mark.parametrize(
    ("quick", "device", "count"), [(False, "cpu", 17), (False, "cuda", 14), (True, "cpu", 2)]
)
def test_every_model_is_trained_and_run(
    quick: bool, device: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(model_problems, "forward_flops", lambda *_: 1.0)
    cases = bench_models.cases(harness.Bench(torch.device(device), quick, Console()))
    assert len({case.problem.label for case in cases}) == len(cases) == count
    for case in cases:
        assert [c.name for c in case.contestants[:2]] == ["bigkern", "eager"]
        assert ("cut" in case.group) == (device == "cpu")


@pytest.mark.usefixtures("one_thread")
def test_a_model_is_timed_and_its_time_explained(
    bench: harness.Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench_models, "PLANS", [small_plan(small_gpt2())])
    bench.quick = False
    inference, training = bench_models.cases(bench)
    rows = [
        *harness.measure(inference, torch.float32, bench),
        *harness.measure(training, torch.float32, bench),
    ]
    timed = [(row.mode, row.contestant) for row in rows if not row.wrong]
    assert timed == [
        *(("inference", name) for name in ("bigkern", "eager", "bigkern-frozen")),
        *(("training", name) for name in ("bigkern", "eager", "eager-fused")),
    ]
    left_out = [row.wrong for row in rows if row.wrong]
    assert left_out == 4 * ["compiling takes too long for this run; --compile includes it"]
    parameters = sum(p.numel() for p in small_gpt2().stock().parameters()) * 4 / 2**20
    for row in rows[:2]:
        assert row.peak_mb > row.state_mb >= parameters
    trained = [row for row in rows if row.mode == "training" and not row.wrong]
    assert all(row.state_mb == pytest.approx(3 * parameters, rel=0.2) for row in trained)
    assert all(0 < row.rate < math.inf for row in rows if not row.wrong)
    assert [each.contestant for each in bench.breakdowns] == [name for _, name in timed]
    for each in bench.breakdowns:
        assert sum(each.shares.values()) == pytest.approx(1.0)
        assert each.shares["linear, FFN"] > 0
        assert (each.shares["optimizer"] > 0) == (each.mode == "training")
    file = tmp_path / "models_time.json"
    breakdown.write(file, bench.breakdowns)
    breakdown.write(file, bench.breakdowns[3:], part=True)
    assert breakdown.read(file) == bench.breakdowns
    pytest.importorskip("matplotlib")
    (figure,) = breakdown.plot(file)
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("training", [False, True])
def test_a_model_that_is_wrong_gets_no_time(
    training: bool, bench: harness.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    op = registry.get("layernorm_ffn")
    right = op.backends["torch"]

    def wrong(call: Any) -> Any:
        return right.forward(call) * 1.001

    for name in ("cpu", "torch"):
        monkeypatch.setitem(op.backends, name, registry.Backend(name, wrong, by_torch=True))
    case = bench_models.case(bench, small_bert(), (16, 32), training, (16, 32))
    (row,) = harness.measure(case, torch.float32, bench)
    assert re.match(r"logits: \w+ error", row.wrong)
    assert math.isnan(row.ms)


def test_operators_are_told_apart() -> None:
    names = {
        "aten::addmm": "linear, FFN",
        "bigkern_native::layernorm_ffn_backward": "linear, FFN",
        "bigkern_native::linear_backward": "linear, FFN",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
        "_AttentionBackward": "attention",
        "aten::native_layer_norm_backward": "norms",
        "aten::cudnn_batch_norm": "norms",
        "bigkern_native::norm": "norms",
        "aten::mkldnn_convolution": "convolution",
        "Optimizer.step#AdamW.step": "optimizer",
        "bigkern_native::adam_packed": "optimizer",
        "aten::_log_softmax": "loss, embedding",
        "aten::_softmax": "attention",
        "aten::gelu_backward": "elementwise",
        "aten::add_": "elementwise",
        "aten::copy_": None,
    }
    assert {name: breakdown._kind_of(name) for name in names} == names


def test_a_part_of_a_benchmark_leaves_the_rest_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: harness.Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_norm, "cases", lambda _: [tiny(norm(8, 16)), tiny(norm(4, 16))])
    monkeypatch.setattr(harness.Bench, "copy_rate", lambda _: 10.0)
    options = ["bench", "norm", "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path), "--only"]
    assert main([*options, "LAYER", "4x"]) == 0
    (file,) = tmp_path.glob("*/norm.csv")
    assert {row.case for row in table.read(file)} == {"layer 4x16"}
    for _ in range(2):
        assert main([*options, "8x16"]) == 0
    assert [row.case for row in table.read(file)] == 6 * ["layer 4x16"] + 6 * ["layer 8x16"]
    assert main([*options, "nothing"]) == 2
    assert "no case has 'nothing' in its name" in capsys.readouterr().err


def test_models_need_transformers_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bench: harness.Bench
) -> None:
    def absent() -> None:
        raise Failure("models: pip install 'bigkern[transformers]'")

    monkeypatch.setattr(model_problems, "need_transformers", absent)
    options = ["--device", "cpu", "--out", str(tmp_path)]
    assert main(["bench", "models", *options]) == 2
    assert "pip install 'bigkern[transformers]'" in capsys.readouterr().err
    monkeypatch.setattr("bigkern.benchmarks.cli.OPS", ("models",))
    assert main(["bench", *options]) == 0  # everything that there is
    assert "left out: models: pip install" in capsys.readouterr().out
