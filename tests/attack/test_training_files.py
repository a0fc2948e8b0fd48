"""``bigkern train`` under attack: killed, full disks, damaged files, closed pipes, diverging losses."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigkern.cli.main import main
from bigkern.terminal import files
from bigkern.terminal.console import Console, RunFailed
from bigkern.train import checkpoint, corpus
from bigkern.train.trainer import Trainer

safetensors = pytest.importorskip("safetensors.torch")
SafetensorError = pytest.importorskip("safetensors").SafetensorError
pytest.importorskip("tokenizers")

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = ["--batch", "2", "--context", "16", "--layers", "1", "--width", "16", "--warmup", "2"]
MODEL, OPTIMIZER, STATE = *checkpoint.FILES, "state.json"
OWN = {"gpt": ["--heads", "2"], "lstm": ["--embedding", "8"]}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(600)))
    return path


def options(text: Path, out: Path, *more: str, model: str = "gpt") -> list[str]:
    quiet = ["--eval-every", "100", "--sample", "0"]
    return ["train", model, "--data", str(text), "--out", str(out), *SIZE, *OWN[model], *quiet, *more]


def train(text: Path, out: Path, *more: str, model: str = "gpt") -> int:
    return main(options(text, out, *more, model=model))


def the_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on stderr: one line."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


def hidden(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


def save(out: Path, step: int, **weights: torch.Tensor) -> None:
    optimizer: dict[str, Any] = {"state": {}, "param_groups": []}
    checkpoint.save(out, step, weights or {"w": torch.zeros(2)}, optimizer, {}, {})


def names(out: Path) -> list[str]:
    return [folder.name for folder in checkpoint.folders(out)]


# ---- which folders are checkpoints, and which are deleted ------------------------------------------


def test_checkpoints_are_ordered_by_their_step(tmp_path: Path) -> None:
    for step in (999_995, 1_000_000, 1_000_005):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-1000000", "step-1000005"]


def test_saving_never_deletes_a_newer_checkpoint(tmp_path: Path) -> None:
    for step in (7, 8, 3):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-000003", "step-000007", "step-000008"]


def test_only_folders_named_as_checkpoints_are_checkpoints(tmp_path: Path) -> None:
    others = ("step-000005-notes", "step-junk", "step-", "step-5b", "xstep-000004")
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text("mine")
    (tmp_path / "step-000001").write_text("a file")
    for step in (10, 20, 30):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-000020", "step-000030"]
    assert all((tmp_path / name / "notes").read_text() == "mine" for name in others)
    assert (tmp_path / "step-000001").read_text() == "a file"


def test_a_folder_of_the_user_does_not_hinder_training(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "step-junk").mkdir(parents=True)
    assert train(text, out, "--steps", "2") == 0
    assert train(text, out, "--steps", "4", "--resume") == 0
    assert names(out) == ["step-000002", "step-000004"]


# ---- divergence ------------------------------------------------------------------------------------


@pytest.fixture
def loss_is_nan_from_step_6_on(monkeypatch: pytest.MonkeyPatch) -> None:
    true_loss = Trainer.loss

    def loss(self: Trainer, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return true_loss(self, inputs, targets) * (float("nan") if self.step >= 5 else 1.0)

    monkeypatch.setattr(Trainer, "loss", loss)


@pytest.mark.usefixtures("loss_is_nan_from_step_6_on")
def test_training_stops_at_the_first_loss_that_is_not_finite(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--steps", "20", "--save-every", "2", "--sample", "5") == 1
    line = the_line(capsys)
    assert "diverged: the loss of step 6 is nan" in line
    assert str(out / "step-000004") in line
    assert names(out) == ["step-000002", "step-000004"]
    assert not (out / "summary.json").exists()


@pytest.mark.usefixtures("loss_is_nan_from_step_6_on")
def test_a_validation_loss_that_is_not_finite_stops_too(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(text, tmp_path / "run", "--steps", "5") == 1
    line = the_line(capsys)
    assert "diverged: the validation loss after step 5 is nan" in line
    assert "no checkpoint" in line


@pytest.mark.parametrize("model", ["gpt", "lstm"])
def test_a_huge_learning_rate_leaves_no_checkpoint_that_is_not_finite(
    text: Path, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    more = ("--steps", "6", "--save-every", "1", "--lr", "1e38", "--clip", "0")
    assert train(text, out, *more, model=model) == 1
    assert "diverged" in the_line(capsys)
    for folder in checkpoint.folders(out):
        checkpoint.load(folder)  # refuses what is not finite


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(RunFailed, match="diverged: b is not finite after step 2"):
        save(tmp_path, 2, a=torch.zeros(2), b=torch.tensor([1.0, float("inf")]))
    assert names(tmp_path) == ["step-000001"]
    assert not hidden(tmp_path)


@pytest.mark.usefixtures("loss_is_nan_from_step_6_on")
def test_a_comparison_that_diverges_ends_in_one_line(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bigkern.train.compare.measure_memory", lambda this: {})
    assert train(text, tmp_path / "run", "--compare", "--steps", "20") == 1
    assert "training diverged: the loss of step 6 is nan" in the_line(capsys)
    assert not (tmp_path / "run/compare.json").exists()


def test_json_documents_hold_null_for_what_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    Console(as_json=True).emit({"a": [float("nan"), 1.5], "b": (float("inf"),), "c": Path("x")})
    said = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert said == {"a": [None, 1.5], "b": [None], "c": "x"}


# ---- the folder of the run -------------------------------------------------------------------------


@pytest.fixture
def no_step_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "train_step", lambda self: pytest.fail("a step was taken"))
    monkeypatch.setattr(
        "bigkern.train.compare.measure_memory", lambda this: pytest.fail("memory was measured")
    )


@pytest.mark.usefixtures("no_step_is_taken")
@pytest.mark.parametrize("more", [(), ("--compare",), ("--tokenizer", "bpe")])
@pytest.mark.parametrize("where", ["file", "file/beneath", "/proc/none", "x" * 300, "loop"])
def test_a_folder_that_cannot_be_written_is_found_out_before_the_first_step(
    text: Path, tmp_path: Path, where: str, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    out = tmp_path / where
    assert train(text, out, *more) == 2
    assert f"cannot write to {out}" in the_line(capsys)
    assert (tmp_path / "file").read_text() == "a file"


def test_asking_whether_a_folder_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    files.require_writable(tmp_path / "a/b/c")
    assert not list(tmp_path.iterdir())


# ---- a full disk -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("full", "left"),
    [
        (f"step-000004.*{MODEL}", "step-000002"),
        (f"step-000004.*{STATE}", "step-000002"),
        ("summary.json", "step-000004"),
    ],
)
def test_a_full_disk_ends_in_one_line_and_keeps_the_older_checkpoint(
    text: Path,
    tmp_path: Path,
    full: str,
    left: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_file, write_text = safetensors.save_file, Path.write_text

    def full_for_tensors(tensors: Any, path: Path) -> None:
        if re.search(full, str(path)):
            raise SafetensorError("Error while serializing: I/O error: No space left on device")
        save_file(tensors, path)

    def full_for_text(path: Path, content: str) -> int:
        if re.search(full, str(path)):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, content)

    monkeypatch.setattr(safetensors, "save_file", full_for_tensors)
    monkeypatch.setattr(Path, "write_text", full_for_text)
    out = tmp_path / "run"
    assert train(text, out, "--steps", "4", "--save-every", "2") == 1
    line = the_line(capsys)
    assert "cannot write" in line
    assert "No space left on device" in line
    assert str(out / left) in line
    assert names(out)[-1] == left
    assert not hidden(out)


LIMITED = """
import resource, sys
from bigkern.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
sys.exit(main(sys.argv[1:]))
"""


def test_files_that_may_not_grow_end_in_one_line(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, _, said = run_python(LIMITED, *options(text, out, "--steps", "2"))
    assert code == 1, said
    (line,) = said.splitlines()
    assert "cannot write a checkpoint" in line
    assert "File too large" in line
    assert not hidden(out)


# ---- signals ---------------------------------------------------------------------------------------


def run_python(code: str, *arguments: str) -> tuple[int, str, str]:
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=quiet)
    return done.returncode, done.stdout, done.stderr


SIGNALLED = """
import os, signal, sys
import safetensors.torch
from pathlib import Path
from bigkern.cli.main import main

number, times = signal.Signals[sys.argv[1]], int(sys.argv[2])
whole = safetensors.torch.save_file

def save_file(tensors, path):
    whole(tensors, path)
    if "step-000004" in str(path) and path.name == "model.safetensors":
        for _ in range(times):
            os.kill(os.getpid(), number)

safetensors.torch.save_file = save_file
sys.exit(main(sys.argv[3:]))
"""


def test_what_a_killed_run_leaves_is_swept_by_the_next(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    call = options(text, out, "--steps", "6", "--save-every", "2")
    code, _, _ = run_python(SIGNALLED, "SIGKILL", "1", *call)
    assert code == -signal.SIGKILL
    assert names(out) == ["step-000002"]
    assert len(hidden(out)) == 1
    with running() as process:
        busy = out / f".step-000009.{process}.partial"
        busy.mkdir()
        (out / ".mine").mkdir()
        (out / ".notes.7.txt").write_text("mine")
        assert main([*call, "--resume"]) == 0
        assert sorted(hidden(out)) == sorted([".mine", ".notes.7.txt", busy.name])
    assert names(out) == ["step-000004", "step-000006"]


class running:
    """While it lasts, another process runs; gives its id."""

    def __enter__(self) -> int:
        self.process = subprocess.Popen(["sleep", "60"])
        return self.process.pid

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


@pytest.mark.parametrize(("times", "left"), [(1, ["step-000002", "step-000004"]), (2, ["step-000002"])])
def test_interrupting_while_a_checkpoint_is_written(
    text: Path, tmp_path: Path, times: int, left: list[str]
) -> None:
    """Once: it is finished first. Twice: at once, and it leaves nothing."""
    out = tmp_path / "run"
    call = options(text, out, "--steps", "9", "--save-every", "2")
    code, _, errors = run_python(SIGNALLED, "SIGINT", str(times), *call)
    assert code == 130
    assert "Traceback" not in errors
    assert names(out) == left
    assert not hidden(out)
    for folder in checkpoint.folders(out):
        checkpoint.load(folder)


def test_interrupting_the_last_save_does_not_lose_it(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, _, errors = run_python(SIGNALLED, "SIGTERM", "1", *options(text, out, "--steps", "4"))
    assert "Traceback" not in errors
    assert code == 130
    assert names(out) == ["step-000004"]


# ---- output that cannot be written -----------------------------------------------------------------


def test_when_nobody_reads_any_more_training_saves_and_stops(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = subprocess.Popen(
        [sys.executable, "-m", "bigkern", *options(text, out, "--steps", "4000")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.stdout is not None
    assert run.stderr is not None
    run.stdout.readline()
    run.stdout.close()
    (line,) = run.stderr.read().splitlines()
    assert run.wait() == 1
    assert "standard output" in line
    (folder,) = checkpoint.folders(out)
    assert str(folder) in line
    checkpoint.load(folder)


def test_a_line_of_progress_that_cannot_be_written_saves_first(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    say = Console.say

    def closed(self: Console, words: str = "") -> None:
        if words.startswith(" 4/40"):
            monkeypatch.setattr("builtins.print", broken)
        try:
            say(self, words)
        finally:
            monkeypatch.setattr("builtins.print", whole)

    def broken(*_: object, **__: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    whole = print
    monkeypatch.setattr(Console, "say", closed)
    assert train(text, out, "--steps", "40") == 1
    assert str(out / "step-000004") in the_line(capsys)
    assert names(out) == ["step-000004"]


def test_output_on_a_full_disk_ends_in_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "bigkern", "env"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "bigkern env: cannot write to standard output: No space left on device"
    ]


# ---- the cache of a BPE tokenizer ------------------------------------------------------------------


def reorder(path: Path) -> None:
    document = json.loads(path.read_text())
    vocabulary = document["model"]["vocab"]
    document["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    path.write_text(json.dumps(document))


CACHE_DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "label of other JSON": ("tokens.json", lambda p: p.write_text("[1, 2]")),
    "label cut": ("tokens.json", lambda p: p.write_text(p.read_text()[:9])),
    "label of bytes": ("tokens.json", lambda p: p.write_bytes(b"\xff\xfe\0")),
    "label is a folder": ("tokens.json", lambda p: (p.unlink(), p.mkdir())),
    "no vocabulary": ("tokenizer.json", lambda p: p.unlink()),
    "vocabulary cut": ("tokenizer.json", lambda p: p.write_text(p.read_text()[:99])),
    "vocabulary of other JSON": ("tokenizer.json", lambda p: p.write_text("{}")),
    "vocabulary reordered": ("tokenizer.json", reorder),
    "no tokens": ("tokens.npy", lambda p: p.unlink()),
    "tokens cut": ("tokens.npy", lambda p: p.write_bytes(p.read_bytes()[:-9])),
    "tokens empty": ("tokens.npy", lambda p: p.write_bytes(b"")),
    "tokens beyond the vocabulary": ("tokens.npy", lambda p: np.save(p, np.full(9999, 60_000, np.uint16))),
    "tokens of floats": ("tokens.npy", lambda p: np.save(p, np.zeros((99, 99)))),
}


@pytest.mark.parametrize("damage", CACHE_DAMAGE)
def test_a_damaged_cache_is_made_anew(text: Path, tmp_path: Path, damage: str) -> None:
    cache, said = tmp_path / "cache", []
    first = corpus.load([text], "bpe", 300, 16, cache, said.append)
    assert not said
    name, spoil = CACHE_DAMAGE[damage]
    spoil(cache / name)
    if damage == "label is a folder":
        with pytest.raises(RunFailed, match="cannot write"):
            corpus.load([text], "bpe", 300, 16, cache, said.append)
        return
    again = corpus.load([text], "bpe", 300, 16, cache, said.append)
    (line,) = said
    assert str(cache) in line
    assert "anew" in line
    assert torch.equal(again.train, first.train)
    assert again.digest == first.digest
    corpus.load([text], "bpe", 300, 16, cache, said.append)
    assert len(said) == 1


def test_another_tokenizer_cannot_go_on_from_a_checkpoint(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, bpe = tmp_path / "run", ("--tokenizer", "bpe", "--vocab-size", "300")
    assert train(text, out, *bpe, "--steps", "2") == 0
    assert train(text, out, *bpe, "--steps", "3", "--resume") == 0
    (out / "tokens.json").unlink()
    right = corpus._pieces  # other pieces, other merges
    monkeypatch.setattr(corpus, "_pieces", lambda text: [piece[::-1] for piece in right(text)])
    assert train(text, out, *bpe, "--steps", "4", "--resume") == 2
    assert "the data or its tokenizer has changed" in the_line(capsys)


# ---- a checkpoint edited by hand -------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the text, and a run of two steps of each model."""
    folder = tmp_path_factory.mktemp("trained")
    words = folder / "text.txt"
    words.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(600)))
    for model in OWN:
        assert train(words, folder / model, "--steps", "2", model=model) == 0
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def again(folder: Path, *more: str, model: str = "gpt") -> int:
    return main(["train", model, "--out", str(folder / model), "--resume", "--sample", "0", *more])


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a file, and its digest in state.json too."""
    tensors = safetensors.load_file(path)
    change(tensors)
    path.unlink()
    safetensors.save_file(tensors, path)
    state = json.loads((path.parent / STATE).read_text())
    state["digests"][path.name] = checkpoint._digest(path)
    (path.parent / STATE).write_text(json.dumps(state))


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        state = json.loads(path.read_text())
        change(state)
        path.write_text(json.dumps(state))

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda path: rewrite(path, change)


def nan(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda t: t[name].view(-1)[:1].fill_(float("nan"))


def forget(state: dict[str, Any]) -> None:
    del state["digests"][MODEL]


W, M = "token.weight", "0.exp_avg"
EDITS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no weights": (MODEL, Path.unlink, "No such file"),
    "no optimizer": (OPTIMIZER, Path.unlink, "No such file"),
    "no state": (STATE, Path.unlink, "No such file"),
    "weights cut": (MODEL, lambda p: p.write_bytes(p.read_bytes()[:-7]), "not what was written"),
    "weights empty": (MODEL, lambda p: p.write_bytes(b""), "not what was written"),
    "state cut": (STATE, lambda p: p.write_text(p.read_text()[:-7]), "damaged"),
    "state of bytes": (STATE, lambda p: p.write_bytes(b"\xff\xfe"), "damaged"),
    "state too deep": (STATE, lambda p: p.write_text("[" * 100_000), "damaged"),
    "state a list": (STATE, lambda p: p.write_text("[]"), "damaged"),
    "state a number": (STATE, lambda p: p.write_text("7"), "damaged"),
    "state empty": (STATE, lambda p: p.write_text("{}"), "damaged"),
    "state without digests": (STATE, edit(lambda s: s.pop("digests")), "damaged"),
    "digests a list": (STATE, edit(lambda s: s.update(digests=[])), "damaged"),
    "no digest of weights": (
        MODEL,
        lambda p: edit(forget)(p.with_name(STATE)),
        "not what was written",
    ),
    **{
        f"state without {key}": (STATE, edit(lambda s, key=key: s.pop(key)), "not what was written")
        for key in ("step", "model", "settings", "corpus", "history", "optimizer")
    },
    "another step": (STATE, edit(lambda s: s.update(step="two")), "not what was written"),
    "another width": (STATE, edit(lambda s: s["settings"].update(width=32)), "not what was written"),
    "a setting of words": (STATE, edit(lambda s: s["settings"].update(lr="fast")), "not what was written"),
    "another history": (STATE, edit(lambda s: s["history"].update(train=None)), "not what was written"),
    "another rate": (STATE, edit(lambda s: s["settings"].update(lr=0.5)), "not what was written"),
    "weights not finite": (MODEL, tensors(nan(W)), f"{W} is not finite"),
    "weights of another shape": (MODEL, tensors(lambda t: t.update({W: t[W][:-1].clone()})), f"{W} is"),
    "weights of another dtype": (MODEL, tensors(lambda t: t.update({W: t[W].half()})), f"{W} is float16"),
    "a weight too few": (MODEL, tensors(lambda t: t.pop(W)), f"{W} is missing"),
    "a weight too many": (MODEL, tensors(lambda t: t.update(w=torch.zeros(2))), "w is not"),
    "weights without tensors": (MODEL, tensors(dict.clear), "is missing"),
    "moments not finite": (OPTIMIZER, tensors(nan(M)), f"{M} is not finite"),
    "moments of another shape": (OPTIMIZER, tensors(lambda t: t.update({M: torch.zeros(3)})), f"{M} is"),
    "moments of another dtype": (OPTIMIZER, tensors(lambda t: t.update({M: t[M].int()})), f"{M} is int32"),
    "a moment too few": (OPTIMIZER, tensors(lambda t: t.pop(M)), f"{M} is missing"),
    "a moment too many": (
        OPTIMIZER,
        tensors(lambda t: t.update({"99.exp_avg": t[M].clone()})),
        "99.exp_avg is not",
    ),
    "a moment of no parameter": (OPTIMIZER, tensors(lambda t: t.update(m=torch.zeros(2))), "m is not"),
    "a moment of words": (OPTIMIZER, tensors(lambda t: t.update({"a.b": torch.zeros(2)})), "a.b is not"),
    "no random state": (OPTIMIZER, tensors(lambda t: t.pop("rng")), "rng is missing"),
    "random state cut": (OPTIMIZER, tensors(lambda t: t.update(rng=t["rng"][:9].clone())), "rng"),
    "random state of floats": (OPTIMIZER, tensors(lambda t: t.update(rng=t["rng"].float())), "rng"),
    "not a file of tensors": (MODEL, lambda p: forge(p, b"not tensors"), ""),
    "tensors cut": (MODEL, lambda p: forge(p, p.read_bytes()[:-7]), ""),
}
CARRIED_EDITS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "state not finite": (OPTIMIZER, tensors(nan("carried.h")), "carried.h is not finite"),
    "state of another shape": (
        OPTIMIZER,
        tensors(lambda t: t.update({"carried.h": torch.zeros(1, 3, 16)})),
        "the carried state: h is",
    ),
    "state of another dtype": (
        OPTIMIZER,
        tensors(lambda t: t.update({"carried.c": t["carried.c"].half()})),
        "the carried state: c is float16",
    ),
    "no state": (OPTIMIZER, tensors(lambda t: t.pop("carried.c")), "the carried state: c is missing"),
    "a state too many": (
        OPTIMIZER,
        tensors(lambda t: t.update({"carried.d": torch.zeros(2)})),
        "the carried state: d is not",
    ),
}


def forge(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    edit(lambda s: s["digests"].update({path.name: checkpoint._digest(path)}))(path.with_name(STATE))


@pytest.mark.parametrize(
    ("model", "name"), [*(("gpt", name) for name in EDITS), *(("lstm", name) for name in CARRIED_EDITS)]
)
def test_an_edited_checkpoint_is_refused_in_one_line(
    copied: Path, model: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file, spoil, words = (EDITS if model == "gpt" else CARRIED_EDITS)[name]
    folder = copied / model / "step-000002"
    spoil(folder / file)
    capsys.readouterr()
    assert again(copied, "--steps", "3", model=model) == 2
    line = the_line(capsys)
    assert str(folder / file) in line
    assert words in line


def test_checkpoints_that_nobody_edited_are_taken(copied: Path) -> None:
    for model in OWN:
        assert again(copied, "--steps", "3", model=model) == 0


def test_a_checkpoint_under_the_name_of_another_step_is_refused(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(copied / "gpt/step-000002", copied / "gpt/step-000007")
    assert again(copied, "--steps", "9") == 2
    line = the_line(capsys)
    assert "step-000007" in line
    assert "of step 2" in line
    assert "step-000002" in line


def test_going_on_to_fewer_steps_is_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert again(copied, "--steps", "1") == 2
    assert "--steps 1" in the_line(capsys)


def test_going_on_to_the_same_steps_only_finishes(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--steps", "4", "--save-every", "2") == 0
    shutil.rmtree(out / "step-000004")
    (out / "summary.json").unlink()
    assert train(text, out, "--steps", "2", "--resume") == 0
    assert json.loads((out / "summary.json").read_text())["validation"][-1][0] == 2


# ---- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--device", "foo"], "--device must be cpu, cuda or cuda:N, not 'foo'"),
        (["--device", "meta"], "--device must be cpu, cuda or cuda:N, not 'meta'"),
        (["--device", ""], "--device must be cpu, cuda or cuda:N, not ''"),
        (["--device", "cpu:7"], "--device must be cpu, cuda or cuda:N, not 'cpu:7'"),
        (["--device", "cuda:999"], "--device cuda:999: torch sees"),
        (["--device", "cuda:-1"], "--device must be"),
        (["--device", "cuda:" + "9" * 30], "--device must be"),
        (["--seed", str(10**23)], "--seed must be at most"),
        (["--seed", "-1"], "--seed must"),
        (["--batch", "99999999999"], "--batch must be at most"),
        (["--batch", "2000000000"], "the data is too short"),
        (["--context", str(10**30)], "--context must be at most"),
        (["--width", str(10**12)], "--width must be at most"),
        (["--layers", str(10**25)], "--layers must be at most"),
        (["--warmup", str(10**25)], "--warmup must be at most"),
        (["--steps", str(10**25)], "--steps must be at most"),
        (["--tokenizer", "bpe", "--vocab-size", str(10**12)], "--vocab-size must be at most"),
        (["--save-every", "-3"], "--save-every must not be negative"),
        (["--eval-every", "-3"], "--eval-every must be at least 1"),
        (["--sample", "-3"], "--sample must not be negative"),
        (["--dropout", "1.5"], "dropout must be in [0, 1)"),
        (["--dropout", "nan"], "dropout must be in [0, 1)"),
        (["--lr", "inf"], "--lr must be finite"),
        (["--data", "x" * 300], "cannot read xxx"),
    ],
)
def test_wrong_options_end_in_one_line(
    text: Path, tmp_path: Path, more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(text, tmp_path / "run", "--steps", "2", *more) == 2
    assert words in the_line(capsys)
    assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_fit_into_memory_ends_in_one_line(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(text, tmp_path / "run", "--width", "2000000000") == 1
    assert "out of memory" in the_line(capsys)


def test_a_vocabulary_is_no_larger_than_its_text_allows(text: Path, tmp_path: Path) -> None:
    tokens = corpus.load([text], "bpe", 2**31 - 1, 16, tmp_path)
    assert 256 < tokens.tokenizer.vocab_size < 256 + text.stat().st_size


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--device", "foo"], "--device must be cpu, cuda or cuda:N, not 'foo'"),
        (["--device", "cuda:999"], "--device cuda:999: torch sees"),
        (["--out", "/proc/none"], "cannot write to /proc/none"),
        (["--out", __file__], f"cannot write to {__file__}"),
        (["--compare", "no/such/file"], "no/such/file"),
        (["--compare", sys.executable], "is not a result of `bigkern bench`"),
    ],
)
def test_wrong_options_of_bench_end_in_one_line(
    more: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bigkern.benchmarks.cli._measure", lambda *_: pytest.fail("something was measured"))
    assert main(["bench", "linear", *more]) == 2
    assert words in the_line(capsys)


def test_a_damaged_table_is_found_out_before_its_part_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bigkern.benchmarks.harness.Bench.name", lambda self: "here")
    monkeypatch.setattr("bigkern.benchmarks.cli._measure", lambda *_: pytest.fail("something was measured"))
    table = tmp_path / "here/linear.csv"
    table.parent.mkdir()
    table.write_text("not,a,table\n1,2,3\n")
    assert main(["bench", "linear", "--only", "x", "--out", str(tmp_path)]) == 2
    assert f"{table} is not a result" in the_line(capsys)
    assert table.read_text() == "not,a,table\n1,2,3\n"


def test_interrupting_any_command_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("bigkern.cli.env.run", interrupt)
    assert main(["env"]) == 130
    assert the_line(capsys) == "bigkern env: interrupted"


def test_a_closed_output_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was started without a standard output has None in its place."""
    monkeypatch.setattr(sys, "stdout", None)
    console = Console()
    console.say("nobody hears it")
    console.table(("a", "b"), [("1", "2")])
    console.emit({})


def test_characters_that_the_output_cannot_show_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    Console().say("one \ufffd, two \udcff")
    assert ascii_only.buffer.getvalue() == b"one ?, two ?\n"
