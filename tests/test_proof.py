"""Proofs by workers: what a crash, a hang, a mistake and a refusal cost; and all of it on a fake GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_gpu
import pytest
import torch

import bigkern
from bigkern.cli.main import main
from bigkern.core import evidence, registry, tune, wisdom
from bigkern.ops import problems, proof
from bigkern.terminal import options

CPU = torch.device("cpu")
CASES = [
    (dtype, SimpleNamespace(label=f"case {i}")) for dtype in (torch.float32, torch.bfloat16) for i in range(3)
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(evidence, "proven", {})
    monkeypatch.setattr(evidence, "place", lambda index: "a GPU")
    monkeypatch.setattr(evidence, "kernel", lambda op, candidate: f"{op}, {candidate}")


@pytest.fixture
def proved(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What a worker makes of six cases, half in float32 and half in bfloat16, alternately "a" and "b".

    ``each`` maps a case's number to what the worker does when it comes to it.
    """

    def run(*jobs: str, each: dict[int, str], silent: float = 30.0) -> list[proof.Proof]:
        script = [
            "import json, os, sys, time",
            "say = lambda **words: print(json.dumps(words), flush=True)",
            f"for case in range(int(sys.argv[4]), {len(CASES)}):",
            "    dtype = 'float32' if case < 3 else 'bfloat16'",
            "    words = dict(case=case, variants=[f'{dtype} {\"ab\"[case % 2]}'])",
            "    say(**words)",
            "    verdict, trouble = 'pass', ''",
            f"    exec({each!r}.get(case, ''))",
            "    say(**words, verdict=verdict, trouble=trouble)",
        ]
        monkeypatch.setattr(proof, "COMMAND", (sys.executable, "-c", "\n".join(script)))
        monkeypatch.setattr(proof, "SILENT", silent)
        monkeypatch.setattr(proof, "cases", lambda op: CASES)
        return proof.prove([("norm", job) for job in jobs or ("triton",)], CPU, lambda *_: None)

    return run


EVERY = {f"{dtype} {word}": "pass" for dtype in ("float32", "bfloat16") for word in "ab"}


def test_what_passes_is_recorded_for_each_candidate(proved: Callable[..., Any]) -> None:
    found = proved("triton", "cuda", each={})
    assert [(p.candidate, p.cases, p.verdicts) for p in found] == [("triton", 6, EVERY), ("cuda", 6, EVERY)]
    recorded = evidence.read(evidence.user_file())
    assert recorded == {"a GPU": {"norm, triton": EVERY, "norm, cuda": EVERY}}
    assert evidence.verdict("norm", "cuda", 0, "bfloat16 a") == "pass"


@pytest.mark.parametrize(
    ("does", "verdict"),
    [
        ("os.kill(os.getpid(), 9)", "crash"),
        ("time.sleep(600)", "crash"),
        ("verdict, trouble = 'fail', 'wrong by 3'", "fail"),
    ],
)
def test_a_bad_case_costs_that_case_alone(proved: Callable[..., Any], does: str, verdict: str) -> None:
    [found] = proved(each={1: does}, silent=2.0)
    assert found.verdicts == {**EVERY, "float32 b": verdict}
    assert found.cases == 6
    [trouble] = found.troubles
    assert trouble in ("wrong by 3", "case 1 float32: the process died or fell silent")
    assert evidence.verdict("norm", "triton", 0, "float32 b") == verdict
    assert evidence.verdict("norm", "triton", 0, "float32 a") == "pass"


def test_one_failure_among_a_variants_cases_is_its_verdict(proved: Callable[..., Any]) -> None:
    [found] = proved(each={0: "verdict = 'fail'"})
    assert found.verdicts == {**EVERY, "float32 a": "fail"}


def test_a_refusal_proves_nothing_and_costs_nothing(proved: Callable[..., Any]) -> None:
    [found] = proved(each={1: "verdict = None"})
    assert found.verdicts == {variant: "pass" for variant in EVERY if variant != "float32 b"}
    assert found.troubles == []


def test_a_worker_that_does_not_start_is_said_and_proves_nothing(
    proved: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    proved(each={})
    monkeypatch.setattr(proof, "COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    monkeypatch.setattr(evidence, "proven", {})
    [found] = proof.prove([("norm", "cuda")], CPU, lambda *_: None)
    assert (found.verdicts, found.troubles) == ({}, ["the worker did not start"])


def test_interrupted_the_finished_dtypes_stay(proved: Callable[..., Any]) -> None:
    def interrupt(of: proof.Proof, label: str) -> None:
        if of.cases == 4:
            raise KeyboardInterrupt

    proved(each={4: "time.sleep(600)"}, silent=0.5)  # sets the worker up
    evidence.user_file().unlink()
    with pytest.raises(KeyboardInterrupt):
        proof.prove([("norm", "triton")], CPU, interrupt)
    recorded = evidence.read(evidence.user_file())["a GPU"]["norm, triton"]
    assert recorded == {"float32 a": "pass", "float32 b": "pass"}


def test_a_home_that_cannot_be_written_keeps_the_verdicts_for_the_process(
    proved: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    [found] = proved(each={})
    assert "kept for this process alone" in str(found.unwritten)
    assert evidence.verdict("norm", "triton", 0, "float32 a") == "pass"


@pytest.mark.parametrize("op", problems.OPS)
def test_every_option_of_a_call_is_in_a_case(op: str) -> None:
    """Every word that a call of some form is asked about."""

    def words(asked: list[Any]) -> set[str]:
        bound = (problems.bound(problem, torch.float32, CPU) for problem in asked)
        return {variant for call in bound for variant in registry.get(op).variants(call)}

    assert words(problems.forms(op)) <= words(problems.proof(op))


# ---- from end to end on a fake GPU -----------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a fake GPU beside a real one")
    fake_gpu.appear(monkeypatch.setattr)
    monkeypatch.setattr(options, "device", lambda text: CPU)
    monkeypatch.setattr(registry, "_warned", set())
    monkeypatch.setattr(wisdom, "state", wisdom.State({}, {}))


@pytest.mark.usefixtures("gpu")
def test_prove_measure_record_dispatch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is proven: stock runs. Proven and measured slower: stock runs. Faster: Triton's kernel does."""
    x, weight = torch.randn(65, 768), torch.randn(768)

    def reason() -> str:
        explanation = bigkern.explain("norm", x, 768, weight)
        return next(choice.reason for choice in explanation if choice.backend == "triton")

    with pytest.warns(UserWarning, match="no GPU kernel is proven on fake-gpu, fake software; .* tune"):
        assert reason() == "not proven on this GPU for float32 layer; run `bigkern tune`"

    def measured_as(**seconds: float) -> None:
        def warm_up(tasks: Any, _: Any) -> list[float]:
            for task in tasks:
                task.run(None)
            return [1e-3] * len(tasks)

        def rounds(tasks: Any, *_: Any) -> list[list[float]]:
            return [[seconds[name]] * 4 for name in ("triton", "cpu", "torch")[-len(tasks) :]]

        monkeypatch.setattr(tune, "warm_up", warm_up)
        monkeypatch.setattr(tune, "rounds", rounds)
        monkeypatch.setattr(tune, "noise", lambda device: 0.0)
        assert main(["tune", "norm"]) == 0

    measured_as(triton=2e-3, cpu=9.0, torch=1e-3)
    said = capsys.readouterr().out
    assert "candidates to prove on fake-gpu" in said
    assert "norm  triton" in said
    assert reason() == "measured at 65x768: torch 2.00x faster"
    measured_as(triton=1e-3, cpu=9.0, torch=2e-3)
    assert "to prove" not in capsys.readouterr().out  # it is known by now
    assert reason() == "runs this call"
    ran: list[str] = []
    triton = registry.get("norm").backends["triton"]
    monkeypatch.setitem(
        registry.get("norm").backends,
        "triton",
        registry.Backend("triton", lambda call: (ran.append("triton"), triton.forward(call))[1]),
    )
    y = bigkern.layer_norm(x, (768,), weight)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (768,), weight))
    assert ran == ["triton"]
    assert evidence.read(evidence.user_file())["fake-gpu, fake software"]
    assert wisdom.read(wisdom.folder() / "fake-gpu.json")


@pytest.mark.usefixtures("gpu")
def test_what_was_not_proven_whole_is_proven_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "DTYPES", (torch.float32, torch.bfloat16))
    job = [("norm", "triton")]
    assert proof.unproven(["norm"], CPU) == job
    evidence.record("norm", "triton", 0, {"float32 layer": "pass"})
    assert proof.unproven(["norm"], CPU) == job
    evidence.record("norm", "triton", 0, {"bfloat16 layer": "pass"})
    assert proof.unproven(["norm"], CPU) == []
    evidence.record("norm", "triton", 0, {"bfloat16 layer": "crash"})
    assert proof.unproven(["norm"], CPU) == job


@pytest.mark.usefixtures("gpu")
def test_a_call_of_which_one_option_is_unproven_is_stocks() -> None:
    evidence.record("norm", "triton", 0, {"float32 layer": "pass", "float32 residual": "fail"})
    x = torch.randn(4, 64)
    reasons = {c.backend: c.reason for c in bigkern.explain("norm", x, 64, residual=x)}
    assert reasons["triton"] == "not right on this GPU for float32 residual: fail in its proof"
    with bigkern.use("triton"):
        assert bigkern.explain("norm", x, 64, residual=x).chosen == "triton"
