"""Measuring candidates: with a clock and candidates of the test's own, and the command on real ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import bigkern
from bigkern.cli.main import main
from bigkern.core import registry, timing, tune, wisdom
from bigkern.core.op import Call, Measures, Op
from bigkern.core.registry import Backend
from bigkern.core.tune import Plan
from bigkern.ops import problems

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("own_wisdom")


# ---- candidates that take as long as the test says ---------------------------------------------------


@dataclass(slots=True)
class Doubled(Call):
    x: Tensor


class Result(NamedTuple):
    y: Tensor


class Now:
    """A clock that stands still but for what the candidates take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    clock = Now()
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    monkeypatch.setattr(tune.time, "monotonic", clock)
    monkeypatch.setattr(tune, "ASKING", 0.0)
    return clock


@pytest.fixture(scope="module")
def op() -> Iterator[Op]:
    double = Backend("reference", lambda call: 2 * call.x)
    measures = Measures(lambda call: (call.x.numel(),), lambda call: ("tall",) if call.x.dim() > 1 else ())
    yield Op("doubled", Doubled, Result, bind=Doubled, reference=double, measures=measures, compiled=False)
    del registry._ops["doubled"]


@pytest.fixture
def taking(op: Op, now: Now) -> Iterator[Any]:
    """Declares candidates that take these seconds: numbers, or functions of the call."""

    def declare(**seconds: Any) -> None:
        for name, each in seconds.items():

            def run(call: Doubled, each: Any = each) -> Tensor:
                now.seconds += each(call) if callable(each) else each
                return 2 * call.x

            op.register(Backend(name, run, by_torch=name == "torch"))

    yield declare
    op.backends = {}


def plan(op: Op, size: int = 64) -> Plan:
    return Plan(op, str(size), False, lambda: Doubled(torch.ones(size)))


def test_the_faster_candidate_is_chosen_from_then_on(op: Op, taking: Any) -> None:
    taking(cpu=2e-3, torch=1e-3)
    assert op.resolve(Doubled(torch.ones(64))).name == "cpu"
    [measured], problem = tune.run([plan(op)], CPU, 1.0, lambda *_: None)
    assert problem is None
    assert (measured.before, measured.after, measured.gain) == ("cpu", "torch", pytest.approx(2.0))
    assert measured.kind == ("float32", "forward")
    assert measured.point.us == pytest.approx({"cpu": 2000.0, "torch": 1000.0})
    assert op.resolve(Doubled(torch.ones(64))).name == "torch"
    assert op.resolve(Doubled(torch.ones(8, 8))).name == "cpu"  # of another kind
    wisdom.refresh()
    assert op.resolve(Doubled(torch.ones(100))).name == "torch"


def test_what_a_call_takes_before_its_kernel_counts(
    op: Op, taking: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "ASKING", 2e-6)
    taking(cpu=10e-6, torch=11e-6)
    [measured], _ = tune.run([plan(op)], CPU, 1.0, lambda *_: None)
    assert (measured.after, measured.point.us) == ("torch", pytest.approx({"cpu": 12.0, "torch": 11.0}))


def test_ours_must_win_three_rounds_of_four(op: Op, taking: Any) -> None:
    turns = iter(range(10**6))
    taking(cpu=lambda call: 3e-3 if next(turns) % 3 == 0 else 0.5e-3, torch=1e-3)
    [measured], _ = tune.run([plan(op)], CPU, 1.0, lambda *_: None)
    assert measured.point.us["cpu"] < measured.point.us["torch"]
    assert measured.after == "torch"


@pytest.mark.parametrize(
    ("sittings", "chosen"),
    [((0.8, 0.8), "cpu"), ((1.2, 1.2), "torch"), ((0.8, 1.2, 0.8), "cpu"), ((1.2, 0.8, 1.2), "torch")],
)
def test_where_two_sittings_disagree_a_third_decides(
    op: Op, taking: Any, sittings: tuple[float, ...], chosen: str
) -> None:
    told: list[Any] = []
    taking(cpu=lambda call: sittings[len(told)] * 1e-3, torch=1e-3)
    [measured], _ = tune.run([plan(op)], CPU, 1.0, lambda *said: told.append(said))
    assert (measured.after, len(told)) == (chosen, len(sittings))


def test_a_candidate_that_refuses_or_is_unproven_is_not_run(op: Op, taking: Any) -> None:
    taking(cpu=1e-3, torch=2e-3)
    for options in ({"refuses": lambda _: "no"}, {"unproven": lambda _: "not yet"}):
        op.register(Backend("cuda", lambda _: pytest.fail("it ran"), **options))  # type: ignore[arg-type]
        [measured], _ = tune.run([plan(op)], CPU, 1.0, lambda *_: None)
        assert measured.after == "cpu"
    op.register(Backend("cpu", lambda _: pytest.fail("it ran"), refuses=lambda _: "no"))
    assert tune.run([plan(op)], CPU, 1.0, lambda *_: None) == ([], None)  # nothing to choose between


def test_time_is_shared_by_what_is_left(op: Op, taking: Any, now: Now) -> None:
    taking(cpu=1e-3, torch=1e-3)
    tune.run([plan(op, 4**i) for i in range(1, 11)], CPU, 1.0, lambda *_: None)
    assert now.seconds == pytest.approx(1.0, rel=0.2)


def test_an_interrupt_keeps_what_was_measured(op: Op, taking: Any) -> None:
    taking(cpu=2e-3, torch=1e-3)

    def tell(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune.run([plan(op), plan(op, 4096)], CPU, 1.0, tell)
    wisdom.refresh()
    assert op.resolve(Doubled(torch.ones(64))).name == "torch"
    assert op.resolve(Doubled(torch.ones(4096))).name == "cpu"


def test_where_nothing_can_be_written_the_process_keeps_it(
    op: Op, taking: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    taking(cpu=2e-3, torch=1e-3)
    _, problem = tune.run([plan(op)], CPU, 1.0, lambda *_: None)
    assert "kept for this process alone" in str(problem)
    assert op.resolve(Doubled(torch.ones(64))).name == "torch"


def test_noise_is_the_spread_of_a_task_against_itself(now: Now, monkeypatch: pytest.MonkeyPatch) -> None:
    def rounds(spread: float) -> Any:
        return lambda *_: [[1.0 + spread * (i % 5) for i in range(50)], [1.0] * 50]

    monkeypatch.setattr(tune, "take_turns", rounds(0.0))
    assert tune.noise(CPU) == 0.0
    monkeypatch.setattr(tune, "take_turns", rounds(0.1))
    assert tune.noise(CPU) == pytest.approx(0.1)


# ---- a model of one's own --------------------------------------------------------------------------


def test_a_block_measures_the_calls_that_passed(op: Op, taking: Any) -> None:
    taking(cpu=2e-3, torch=1e-3)
    with bigkern.tune(seconds=0.1) as measured:
        for size in (64, 64, 4096):
            op(Doubled(torch.ones(size)))
        assert not measured
    assert [m.point.sizes for m in measured] == [(64,), (4096,)]
    assert op.resolve(Doubled(torch.ones(64))).name == "torch"
    with pytest.raises(RuntimeError, match="leave its block"), bigkern.tune(), bigkern.tune():
        pass
    assert wisdom.noting is None


def test_a_block_sees_every_op_of_a_model_in_training() -> None:
    """Also calls that would otherwise be remembered, or left to stock for being small."""
    layer = bigkern.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0)
    lstm, norm = bigkern.nn.LSTM(32, 16), bigkern.nn.RMSNorm(16)
    x = torch.randn(2, 7, 32)

    def step() -> None:
        norm(lstm(layer(x))[0]).sum().backward()

    step()
    with bigkern.tune(seconds=0.1) as measured:
        step()
    ops = {m.plan.op.name for m in measured}
    assert ops == {"attention", "linear", "layernorm_ffn", "norm", "recurrent"}
    assert {m.kind[1] for m in measured} == {"training"}
    step()


def test_a_noted_call_has_the_strides_and_whole_numbers_of_the_first() -> None:
    q = torch.randn(12, 3, 8).half()
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    with bigkern.tune(seconds=0.0) as measured:
        bigkern.varlen_attention(q, q, q, ends, ends)
    assert measured
    call = measured[0].plan.make()
    assert (call.q.shape, call.q.stride(), call.q.dtype) == ((1, 3, 12, 8), (24, 8, 24, 1), torch.float16)
    assert torch.equal(call.cu_seqlens_q, ends)
    assert registry.get("attention").point(call) is not None


# ---- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", problems.OPS)
def test_the_grid_can_be_called(name: str) -> None:
    """Every plan makes its call, in the mode that it says, at sizes that no other plan has."""
    places = []
    for p in problems.plans(name, CPU, (torch.float32,)):
        if p.label.count("16384") or p.label.count("4096"):
            continue  # large, and the same code
        with torch.set_grad_enabled(p.training):
            place = p.op.place(p.make())
        assert place is not None
        assert place.kind[1] == ("training" if p.training else "forward")
        places.append(place[:3])
    assert len(set(places)) == len(places)


def test_what_a_gpu_is_given_besides_is_of_sizes_of_its_own() -> None:
    """And small enough for a card of 24 GB: inputs in float32 take 4 at most."""
    for name in problems.OPS:
        labels = [problem.label for problem in (*problems.grid(name), *problems.large(name))]
        assert len(set(labels)) == len(labels)
        for problem in problems.large(name):
            assert 4 * sum(torch.Size(shape).numel() for shape in problem.shapes.values()) < 4 << 30


COMMAND = ["tune", "grad_norm", "--seconds", "0.1", "--device", "cpu"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported = tmp_path / "w.json"
    assert main([*COMMAND, "--export", str(exported), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {"noise", "seconds", "machine", "problem"} < said.keys()
    assert {row["op"] for row in said["points"]} == {"grad_norm"}
    assert len(said["points"]) == len(problems.plans("grad_norm", CPU, (torch.float32, torch.bfloat16)))
    assert exported.exists()
    assert (wisdom.folder() / wisdom.file_name(wisdom.machine(CPU))).exists()


def test_the_commands_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["tune", "nothing"]) == 2
    assert "there is no op 'nothing'" in capsys.readouterr().err
    assert main(["tune", "--seconds", "-1"]) == 2
    assert "--seconds must be a positive number" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*COMMAND, "--export", str(tmp_path / "file/w")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_a_busy_machine_is_not_trusted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "noise", lambda device: 0.5)
    assert main(COMMAND) == 0
    assert "too busy to be trusted" in capsys.readouterr().out


def test_who_is_far_behind_in_the_warm_up_is_timed_no_more(op: Op, taking: Any, now: Now) -> None:
    taking(cpu=0.01, torch=0.5)
    [measured], _ = tune.run([plan(op)], CPU, 0.1, lambda *_: None)
    assert (measured.after, measured.point.gain) == ("cpu", {"cpu": pytest.approx(50.0)})
    assert 1.0 < now.seconds < 1.4


@pytest.mark.parametrize("first", [0.5, 5.0])
def test_a_first_call_that_imports_or_compiles_is_not_taken_for_a_slow_one(
    op: Op, taking: Any, first: float
) -> None:
    turns = iter(range(10**6))
    taking(cpu=lambda call: first if next(turns) == 0 else 1e-3, torch=2e-3)
    [measured], _ = tune.run([plan(op)], CPU, 0.1, lambda *_: None)
    assert (measured.after, measured.point.gain) == ("cpu", {"cpu": pytest.approx(2.0)})


def test_ours_may_be_far_behind(op: Op, taking: Any) -> None:
    taking(cpu=0.5, torch=0.01)
    [measured], _ = tune.run([plan(op)], CPU, 0.1, lambda *_: None)
    assert (measured.after, measured.point.gain) == ("torch", {"cpu": pytest.approx(0.02)})


def test_a_plain_choice_is_made_in_one_sitting(op: Op, taking: Any) -> None:
    told: list[Any] = []
    taking(cpu=1e-3, torch=3e-3)
    tune.run([plan(op)], CPU, 1.0, lambda *said: told.append(said))
    assert len(told) == 1


def test_sizes_that_would_take_too_long_are_left_out(op: Op, taking: Any) -> None:
    taking(cpu=1e-3, torch=lambda call: 1e-3 * call.x.numel())
    plans = [replace(plan(op, size), work=float(size)) for size in (16, 256, 4096)]
    found, _ = tune.run(plans, CPU, 1.0, lambda *_: None)
    assert [m.point.sizes for m in found] == [(16,), (256,)]
    found, _ = tune.run([plan(op, 4096)], CPU, 1.0, lambda *_: None)  # a call that somebody made
    assert [m.point.sizes for m in found] == [(4096,)]
