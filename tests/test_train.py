"""``bigkern train``: resumes bit for bit, survives interruption and damage, names what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bigkern.cli.main import main
from bigkern.models import RecurrentConfig, RecurrentLM
from bigkern.terminal.console import Failure
from bigkern.train import checkpoint, compare, corpus
from bigkern.train.trainer import Recipe, Streaming

safetensors = pytest.importorskip("safetensors.torch")

SIZE = ["--batch", "2", "--context", "16", "--layers", "1", "--width", "16"]
OWN = {"gpt": ["--heads", "2"], "lstm": ["--embedding", "8"]}
QUICK = [*SIZE, "--warmup", "2", "--eval-every", "10", "--sample", "0"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(600)))
    return path


def train(text: Path, out: Path, *options: str, model: str = "gpt") -> int:
    return main(["train", model, "--data", str(text), "--out", str(out), *QUICK, *OWN[model], *options])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(safetensors.load_file(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("model", "options"),
    [("gpt", ()), ("gpt", ("--dropout", "0.1")), ("lstm", ("--dropout", "0.1")), ("lstm", ("--cell", "gru"))],
)
def test_resuming_gives_the_same_bits(
    text: Path, tmp_path: Path, model: str, options: tuple[str, ...]
) -> None:
    straight, halved = tmp_path / "straight", tmp_path / "halved"
    assert train(text, straight, "--steps", "20", *options, model=model) == 0
    assert train(text, halved, "--steps", "20", "--save-every", "10", *options, model=model) == 0
    for name in checkpoint.FILES:
        (halved / "step-000020" / name).unlink()
    (halved / "step-000020").joinpath("state.json").unlink()
    (halved / "step-000020").rmdir()
    torch.randn(7)  # the state of the process must not matter
    again = ["train", model, "--out", str(halved), "--resume", "--sample", "0", "--eval-every", "10"]
    assert main(again) == 0
    ours, theirs = weights(straight / "step-000020"), weights(halved / "step-000020")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    states = [json.loads((run / "step-000020/state.json").read_text()) for run in (straight, halved)]
    assert states[0]["history"] == states[1]["history"]


def test_writes_what_it_says(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--steps", "30", "--lr", "0.01", "--sample", "20", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "summary.json").read_text())
    state = json.loads((out / "step-000030/state.json").read_text())
    losses = state["history"]["train"]
    assert len(losses) == 30
    assert sum(losses[-5:]) < sum(losses[:5]) - 2.0
    assert report["loss"]["validation"] == report["validation"][-1][1]
    assert len(report["sample"]["continuation"]) > 0
    assert not list(out.glob(".*"))
    if report["figure"] is not None:
        assert Path(report["figure"]).read_bytes().startswith(b"\x89PNG")


def test_interrupting_saves_a_checkpoint(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "bigkern", "train", "gpt", "--data", str(text), "--out", str(out)]
    run = subprocess.Popen(
        [*command, *QUICK, *OWN["gpt"], "--steps", "100000", "--save-every", "5"],
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not checkpoint.folders(out) and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=30)
    assert run.returncode == 130, said
    assert "--resume" in said
    _, _, state = checkpoint.load(checkpoint.folders(out)[-1])
    assert len(state["history"]["train"]) == state["step"]
    assert not [name for name in os.listdir(out) if name.startswith(".")]


@pytest.mark.parametrize("name", [*checkpoint.FILES, "state.json"])
def test_damaged_checkpoints_are_named(
    text: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--steps", "4", "--save-every", "2") == 0
    file = out / "step-000004" / name
    file.write_bytes(file.read_bytes()[:-7])
    assert train(text, out, "--resume") == 2
    said = capsys.readouterr().err
    assert str(file) in said
    assert "damaged" in said
    assert "step-000002" in said  # the way out


def test_a_flipped_bit_is_noticed(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--steps", "2") == 0
    file = out / "step-000002/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(Failure, match="not what was written"):
        checkpoint.load(file.parent)


def test_resuming_with_other_settings_is_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(text, out, "--steps", "2") == 0
    assert train(text, out, "--steps", "2") == 2
    assert "holds a checkpoint" in capsys.readouterr().err
    assert train(text, out, "--resume", "--lr", "0.5") == 2
    assert "--lr 0.5: the checkpoint was made with 0.001" in capsys.readouterr().err
    text.write_text(text.read_text() + "one more line\n")
    assert train(text, out, "--resume", "--steps", "3") == 2
    assert "the data or its tokenizer has changed" in capsys.readouterr().err
    assert train(text, tmp_path / "none", "--resume") == 2
    assert "there is no checkpoint in" in capsys.readouterr().err
    assert train(text, out, "--resume", model="lstm") == 2
    assert "the checkpoint is of gpt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cell", "gru"], "--cell is a setting of lstm, not of gpt"),
        (["--data", "no/such/file"], "cannot read no/such/file"),
        (["--context", "100000"], "the data is too short"),
        (["--width", "15"], "width 15 must be a multiple of heads 2"),
        (["--steps", "0"], "--steps must be at least 1, not 0"),
        (["--lr", "nan"], "--lr must be finite"),
    ],
)
def test_wrong_calls_write_nothing(
    text: Path, tmp_path: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(text, out, *options) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_unreadable_and_empty_data(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(Failure, match="no text in"):
        corpus.read([empty])
    (empty / "binary").write_bytes(b"\0\1\2")
    with pytest.raises(Failure, match="no text in"):
        corpus.read([empty])
    (empty / "loop").symlink_to(empty / "nowhere")
    (empty / "text").write_text("some text")
    assert corpus.read([empty]) == b"some text"
    assert corpus.read([empty / "binary"]) == b"\0\1\2"  # asked for outright


def test_default_data_is_the_standard_library() -> None:
    files = corpus.standard_library()
    names = {file.name for file in files}
    assert {"argparse.py", "dataclasses.py"} <= names
    assert not any("site-packages" in file.parts for file in files)


def test_batches_depend_on_seed_and_step_alone() -> None:
    tokens = torch.arange(200, dtype=torch.uint8)
    data = corpus.Corpus(corpus.Bytes(), tokens, tokens, "")
    x, y = data.batch("train", 0, 3, 4, 8)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x, data.batch("train", 0, 3, 4, 8)[0])
    assert not torch.equal(x, data.batch("train", 0, 4, 4, 8)[0])
    assert not torch.equal(x, data.batch("train", 1, 3, 4, 8)[0])
    assert not torch.equal(x, data.batch("validation", 0, 3, 4, 8)[0])
    starts = {int(s) for step in range(200) for s in data.batch("train", 0, step, 8, 199)[0][:, 0]}
    assert starts == {0}  # 200 tokens hold one sequence of 199 and its targets


def test_streams_read_the_text_one_stretch_after_another() -> None:
    tokens = torch.arange(203, dtype=torch.uint8)
    data = corpus.Corpus(corpus.Bytes(), tokens, tokens[:41], "")
    assert data.stretches("train", 4, 8) == 6  # 50 tokens a stream: 6 stretches and the last target
    x, y = (
        torch.cat(rows, 1) for rows in zip(*(data.stretch("train", i, 4, 8) for i in range(6)), strict=True)
    )
    assert torch.equal(x, torch.arange(48) + 50 * torch.arange(4)[:, None])
    assert torch.equal(y, x + 1)
    recipe = Recipe(9, 4, 8, lr=0.1, warmup=0, weight_decay=0.0, clip=0.0, seed=0, eval_every=9)
    model = RecurrentLM(RecurrentConfig(cell="gru", layers=1, width=8))
    trainer = Streaming(model, torch.optim.SGD(model.parameters()), data, recipe, torch.device("cpu"))
    states = []
    for _ in range(7):
        trainer.train_step()
        states.append(trainer.state)
    trainer.evaluate()
    assert trainer.state is states[-1]
    stepped = Streaming(model, trainer.optimizer, data, recipe, torch.device("cpu"))
    stepped.step = 5
    stepped.carry({name: tensor.clone() for name, tensor in trainer.carried().items()})
    assert torch.equal(stepped.state, states[-1])
    stepped.batch("train", 5)
    assert stepped.state is not None
    stepped.batch("train", 6)  # the streams begin anew
    assert stepped.state is None


def test_a_short_text_for_many_streams(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(text, tmp_path / "run", "--batch", "100", model="lstm") == 2
    assert "a step needs 1700" in capsys.readouterr().err
    assert train(text, tmp_path / "run", "--positions", "rotary", model="lstm") == 2
    assert "--positions is a setting of gpt, not of lstm" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_bpe_is_trained_once_and_kept(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    options = ([text], "bpe", 300, 16, tmp_path / "cache")
    first = corpus.load(*options)
    assert first.tokenizer.vocab_size == 300
    assert first.tokenizer.decode(first.tokenizer.encode(b"7 times 7 is 49.").tolist()) == "7 times 7 is 49."
    monkeypatch.setattr(corpus.Bpe, "train", None)
    again = corpus.load(*options)
    assert again.digest == first.digest
    assert torch.equal(again.train, first.train)


def test_learning_rate() -> None:
    recipe = Recipe(100, 1, 1, lr=1.0, warmup=10, weight_decay=0.0, clip=0.0, seed=0, eval_every=1)
    assert recipe.lr_at(0) == pytest.approx(0.1)
    assert recipe.lr_at(9) == recipe.lr_at(10) == 1.0
    assert recipe.lr_at(55) == pytest.approx(0.55)
    assert recipe.lr_at(100) == pytest.approx(0.1)


def test_compare(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(text, tmp_path / "run", "--compare", "--steps", "12", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "run/compare.json").read_text())
    assert len(report["variants"]) == 3
    for variant in report["variants"].values():
        assert len(variant["train"]) == 12
        assert variant["loss"]["first"] == pytest.approx(
            report["variants"]["bigkern"]["loss"]["first"], rel=1e-5
        )
        assert variant["largest_gap_to_bigkern"] < 1e-2
        low, middle, high = variant["step_ms"]
        assert 0 < low <= middle <= high
        assert variant["memory"]["saved_for_backward"] > 0


def test_compare_fits_its_steps_into_the_time(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "LEAST_STEPS", 3)
    options = ("--compare", "--steps", "12", "--seconds", "1e-6", "--json")
    assert train(text, tmp_path / "run", *options, model="lstm") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["settings"]["steps"] == 3
    assert report["model"] == "lstm"
    for variant in report["variants"].values():
        assert len(variant["train"]) == 3
        assert variant["relative_validation_gap"] < 5e-3
        assert variant["largest_gap_to_bigkern"] < 1e-2


def test_seconds_without_compare_is_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(text, tmp_path / "run", "--seconds", "5") == 2
    assert "--seconds goes with --compare" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
