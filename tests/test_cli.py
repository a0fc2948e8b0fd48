"""The command line: what it prints, as text and JSON, its exit codes, and the core without extras."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bigkern.benchmarks import cli as bench
from bigkern.cli import doctor
from bigkern.cli.main import COMMANDS, main
from bigkern.core import evidence, registry
from bigkern.core.problem import judge
from bigkern.ops import problems
from bigkern.ops.attention.backends import ATTENTION
from bigkern.terminal.console import Console


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)


def test_env_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    assert torch.__version__ in said
    for op in problems.OPS:
        assert op in said
    assert "->" in said


def test_env_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, report = document(capsys, "env")
    assert code == 0
    assert report["machine"]["torch"] == torch.__version__
    assert {row["op"] for row in report["ops"]} == set(problems.OPS)
    for row in report["ops"]:
        assert set(row["backends"]) == set(registry.get(row["op"]).backends)
        assert row["chosen"] in row["backends"]


UNLOADABLE = """
import sys, torch
def refuse(path):
    raise OSError("undefined symbol: xyz")
torch.ops.load_library = refuse
from bigkern.cli import doctor
from bigkern.ops import problems
from bigkern.cli.main import main
doctor.DTYPES, every = (torch.float32,), problems.small
problems.small = lambda op: every(op)[:1]
sys.exit(main(sys.argv[1:]))
"""


def test_an_extension_that_does_not_load_is_explained() -> None:
    """Neither command fails to start; both show the exact error, and doctor a fix."""

    def say(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-c", UNLOADABLE, *arguments]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # a busy machine makes sharing slow
        done = subprocess.run(command, capture_output=True, text=True, env=one_thread)
        return done.returncode, done.stdout

    code, said = say("env", "--json")
    assert code == 0, said
    report = json.loads(said)
    assert report["extension"]["import_error"] == "OSError: undefined symbol: xyz"
    assert {row["chosen"] for row in report["ops"] if row["device"] == "cpu"} == {"torch"}
    code, said = say("doctor")
    assert code == 1
    assert "OSError: undefined symbol: xyz\n  fix: " in said


@pytest.fixture
def only_one_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in problems.OPS:  # Triton's interpreter is slow, and tested elsewhere
        declared = registry.get(op)
        without = {name: backend for name, backend in declared.backends.items() if name != "triton"}
        monkeypatch.setattr(declared, "backends", without)
    monkeypatch.setattr(doctor, "DTYPES", (torch.float32,))
    every = problems.small
    monkeypatch.setattr(problems, "small", lambda op: every(op)[:1])


@pytest.mark.usefixtures("only_one_problem")
def test_doctor_finds_this_machine_well(capsys: pytest.CaptureFixture[str]) -> None:
    code, report = document(capsys, "doctor")
    assert code == 0, [f for f in report["findings"] if f["problem"]]
    assert report["passed"]
    ran = {(f["op"], f["backend"]) for f in report["findings"] if f["cases"]}
    assert {(op, "torch") for op in problems.OPS} <= ran
    assert {(op, "cpu") for op in problems.OPS if op != "batch_norm"} <= ran  # on a CPU it is stock's
    for finding in report["findings"]:
        assert finding["refused"] or finding["cases"]


@pytest.mark.usefixtures("only_one_problem")
def test_doctor_catches_a_wrong_kernel(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ATTENTION.reference

    def wrong(call: Any) -> Any:
        o, lse = right.forward(call)
        return o * 1.001, lse

    broken = registry.Backend("cpu", wrong, right.backward)
    monkeypatch.setitem(ATTENTION.backends, "cpu", broken)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "attention on cpu" in said
    assert "error" in said
    assert 'fix: use stock PyTorch here, `with bigkern.use(attention="torch"):`' in said


@pytest.mark.usefixtures("only_one_problem")
def test_doctor_survives_a_crashing_kernel(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> Any:
        raise RuntimeError("illegal instruction, almost")

    monkeypatch.setitem(registry.get("norm").backends, "cpu", registry.Backend("cpu", crash, crash))
    code, report = document(capsys, "doctor")
    assert code == 1
    (bad,) = [f for f in report["findings"] if f["problem"]]
    assert (bad["op"], bad["backend"]) == ("norm", "cpu")
    assert "illegal instruction, almost" in bad["problem"]
    assert "rebuild for torch" in bad["fix"]


def test_verify_records_gpu_kernels_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("bigkern.core.evidence.device_arch", lambda index: "sm_90")
    monkeypatch.setattr(evidence, "proven", frozenset())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    passed = doctor.Finding("attention", "cuda", "cuda:0", cases=5)
    failed = doctor.Finding("adam", "cuda", "cuda:0", cases=5, problem="wrong")
    stock = doctor.Finding("attention", "torch_flash", "cuda:0", cases=5)
    library = doctor.Finding("layernorm_ffn", "triton_library", "cuda:0", cases=3)
    on_cpu = doctor.Finding("attention", "cpu", "cpu", cases=5)
    untested = doctor.Finding("norm", "triton", "cuda:0", refused="no triton")
    recorded = doctor.verify([passed, failed, stock, library, on_cpu, untested])
    assert [(e.op, e.backend, e.arch, e.cases) for e in recorded] == [
        ("attention", "cuda", "sm_90", 5), ("layernorm_ffn", "triton_library", "sm_90", 3),
    ]  # fmt: skip
    assert evidence.read(evidence.user_file()) == recorded
    assert evidence.verified("layernorm_ffn", "triton_library", "sm_90")
    assert evidence.verified("attention", "cuda", "sm_90")


def test_wrong_calls_end_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "no_such_op"]) == 2
    said = capsys.readouterr().err
    assert said == (f"bigkern bench: there is no benchmark 'no_such_op'; there are {', '.join(bench.OPS)}\n")


def test_commands_work_without_the_extras(tmp_path: Path) -> None:
    """With torch and numpy alone: env runs, and train says what to install before it trains."""
    hide = (
        "import sys\n"
        "for extra in ('rich', 'safetensors', 'tokenizers', 'matplotlib', 'triton'):\n"
        "    sys.modules[extra] = None\n"
        "from bigkern.cli.main import main\n"
        "codes = [main(['env']), main(['train', 'gpt', '--out', sys.argv[1]])]\n"
        "assert codes == [0, 2], codes\n"
    )
    run = subprocess.run([sys.executable, "-c", hide, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "pip install 'bigkern[cli]'" in run.stderr


def test_tables_align(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table(("name", "ms", "note"), [("a", "1.5", "x"), ("bcd", "10", "")])
    assert capsys.readouterr().out.splitlines() == ["name   ms  note", "a     1.5  x", "bcd    10"]


def test_problems_pass_on_stock_itself() -> None:
    """The problems' own stock call and bigkern on the backend torch must agree: the oracle is consistent."""
    for op in problems.OPS:
        for problem in problems.small(op):
            verdicts = judge(problem, torch.float32, torch.device("cpu"), "torch")
            assert all(verdict.passed for verdict in verdicts.values()), (problem.label, verdicts)


FEATURES = ("causal", "bottom_right", "kv heads", "window", "softcap", "ALiBi", "sinks", "dropout", "lse")
FEATURES += ("bias with gradient", "varlen")


def test_doctor_asks_for_every_feature_of_attention() -> None:
    """Its evidence is what turns GPU kernels on."""
    for asked in (problems.small("attention"), problems.thorough("attention")):
        labels = " | ".join(problem.label for problem in asked)
        assert all(feature in labels for feature in FEATURES), labels
        assert len({problem.label for problem in asked}) == len(asked)
    for asked in (problems.small("decode_attention"), problems.thorough("decode_attention")):
        labels = " | ".join(problem.label for problem in asked)
        assert all(feature in labels for feature in ("kv heads", "window", "softcap", "sinks", "pages of"))


def test_doctor_asks_for_every_form_of_a_recurrent_layer() -> None:
    forms = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU", "bidirectional", "packed", "zoneout")
    for asked in (problems.small("recurrent"), problems.thorough("recurrent")):
        labels = " | ".join(problem.label for problem in asked)
        assert all(form in labels for form in forms), labels
        assert len({problem.label for problem in asked}) == len(asked)


def test_a_wrong_lse_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ATTENTION.reference

    def wrong(call: Any) -> Any:
        o, lse = right.forward(call)
        return o, lse + 0.01

    monkeypatch.setitem(ATTENTION.backends, "cpu", registry.Backend("cpu", wrong, right.backward))
    (problem,) = (problem for problem in problems.small("attention") if problem.outputs == ("output", "lse"))
    verdicts = judge(problem, torch.float32, torch.device("cpu"), "cpu")
    assert set(verdicts) == {"output", "lse", "dq", "dk", "dv"}
    assert verdicts["output"].passed
    assert not verdicts["lse"].passed


@pytest.mark.parametrize(
    "example", sorted((Path(__file__).parent.parent / "examples").glob("*.py")), ids=lambda p: p.stem
)
def test_examples_run(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # small models on a busy machine
    runpy.run_path(str(example), run_name="__main__")
    torch.set_num_threads(before)
    assert capsys.readouterr().out
