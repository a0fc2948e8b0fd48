"""The evidence file: written whole or not at all; what cannot be believed is left out with a warning."""

from __future__ import annotations

import json
import multiprocessing
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bigkern.core import device, evidence, info, registry

GPU = "a-gpu-sm90-132-227k, torch 2.11.0, driver 13.0"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(evidence, "proven", {})
    monkeypatch.setattr(evidence, "place", lambda index: [GPU, "another GPU"][index])
    monkeypatch.setattr(evidence, "kernel", lambda op, candidate: f"{op}, {candidate}, sources 1234abcd")


def test_a_verdict_holds_for_its_gpu_kernel_and_variant_alone() -> None:
    assert evidence.verdict("attention", "triton", 0, "bfloat16 window") is None
    assert evidence.record("attention", "triton", 0, {"bfloat16 window": "pass"}) is None
    for again in (lambda: None, evidence.refresh):
        again()
        assert evidence.verdict("attention", "triton", 0, "bfloat16 window") == "pass"
        assert evidence.verdict("attention", "cuda", 0, "bfloat16 window") is None
        assert evidence.verdict("attention", "triton", 1, "bfloat16 window") is None
        assert evidence.verdict("attention", "triton", 0, "float32 window") is None


def test_other_sources_or_versions_ask_for_new_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence.record("attention", "triton", 0, {"bfloat16 window": "pass"})
    with monkeypatch.context() as now:
        now.setattr(evidence, "kernel", lambda op, candidate: f"{op}, {candidate}, sources 99")
        assert evidence.verdict("attention", "triton", 0, "bfloat16 window") is None
    monkeypatch.setattr(evidence, "place", lambda index: GPU.replace("2.11", "2.12"))
    assert evidence.verdict("attention", "triton", 0, "bfloat16 window") is None


def test_the_later_verdict_counts_and_the_others_stay() -> None:
    evidence.record("norm", "triton", 0, {"float32 layer": "pass", "float32 rms": "pass"})
    evidence.record("norm", "triton", 0, {"float32 layer": "crash"})
    evidence.record("norm", "cuda", 0, {"float32 layer": "fail"})
    kernels = evidence.read(evidence.user_file())[GPU]
    assert kernels["norm, triton, sources 1234abcd"] == {"float32 layer": "crash", "float32 rms": "pass"}
    assert kernels["norm, cuda, sources 1234abcd"] == {"float32 layer": "fail"}
    assert evidence.count(0) == "1 of 3 kinds of calls proven"
    assert evidence.count(1) == "nothing proven"


def _record(home: str, name: str) -> None:
    os.environ["XDG_CACHE_HOME"] = home
    evidence.place, evidence.kernel = (lambda index: GPU), (lambda op, candidate: op)  # type: ignore[assignment]
    for i in range(20):
        evidence.record(f"{name}{i}", "triton", 0, {"float32 plain": "pass"})


def test_two_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("fork")
    both = [spawn.Process(target=_record, args=(str(tmp_path), name)) for name in ("a", "b")]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert len(evidence.read(evidence.user_file())[GPU]) == 40


@pytest.mark.parametrize(
    ("said", "about"),
    [
        ({"float32 plain": "pass"}, None),
        ({"float32 plain": "fail"}, "not right on this GPU for float32 plain: fail in its proof"),
        ({"float32 plain": "crash"}, "not right on this GPU for float32 plain: crash in its proof"),
        ({"float32 causal": "pass"}, "not proven on this GPU for float32 plain; run `bigkern tune`"),
    ],
)
def test_a_reason_says_what_is_missing(said: evidence.Verdicts, about: str | None) -> None:
    evidence.record("norm", "triton", 0, said)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert registry.unproven("norm", "triton", 0, ("float32 plain",)) == about


def test_of_several_variants_each_must_be_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_warned", {0})
    evidence.record("norm", "triton", 0, {"float32 window": "pass"})
    assert registry.unproven("norm", "triton", 0, ("float32 window",)) is None
    assert registry.unproven("norm", "triton", 0, ("float32 window", "float32 bias")) is not None


def test_a_gpu_without_any_proof_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_warned", set())
    asked = ("attention", "cuda", 0, ("float32 plain",))
    with pytest.warns(UserWarning, match="no GPU kernel is proven on a-gpu-sm90.*`bigkern tune`"):
        registry.unproven(*asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.unproven(*asked)


def test_what_a_kernel_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    sources = info.build().get("sources", "unknown")
    assert evidence.kernel("norm", "cuda") == f"norm, cuda, sources {sources}"
    triton = pytest.importorskip("triton")
    words = evidence.kernel("norm", "triton_library")
    assert words.startswith(f"norm, triton_library, triton {triton.__version__}, sources ")


def test_the_hash_changes_with_any_source(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.py", "b.py")]
    for file in files:
        file.write_text("1")
    before = evidence.sources_hash(files)
    assert evidence.sources_hash(reversed(files)) == before
    files[1].write_text("2")
    assert evidence.sources_hash(files) != before


def test_the_software_is_named() -> None:
    assert device.gpu_software().startswith(f"torch {torch.__version__}, driver ")


def test_the_shipped_file_is_readable() -> None:
    assert evidence.SHIPPED.exists()
    evidence.read(evidence.SHIPPED)


# ---- what is no evidence file ----------------------------------------------------------------------


def folder(file: Path) -> None:
    file.mkdir()


def fifo(file: Path) -> None:
    os.mkfifo(file)


def holding(text: str) -> Callable[[Path], Any]:
    return lambda file: file.write_text(text)


def of(**document: Any) -> Callable[[Path], Any]:
    return holding(json.dumps({"version": 2, "proven": {}} | document))


DAMAGED = {
    "a folder": folder,
    "a fifo": fifo,
    "nothing": holding(""),
    "a nest": holding("[" * 100_000),
    "cut off": holding('{"version": 2, "proven": {"a'),
    "binary": lambda file: file.write_bytes(b"\xff\xfe\x00"),
    "before versions": holding('{"entries": []}'),
    "a newer version": of(version=3),
    "a list": of(proven=[]),
    "a word": of(proven={GPU: {"norm": "pass"}}),
    "another verdict": of(proven={GPU: {"norm": {"float32 plain": "perhaps"}}}),
}


@pytest.mark.parametrize("lay", DAMAGED.values(), ids=DAMAGED)
def test_it_is_ignored_with_one_warning(lay: Callable[[Path], Any]) -> None:
    file = evidence.user_file()
    file.parent.mkdir(exist_ok=True)
    lay(file)
    with pytest.raises(ValueError, match=r"proven\.json is not an evidence file"):
        evidence.read(file)
    with pytest.warns(UserWarning, match=r"proven\.json is not an evidence file") as warned:
        evidence.refresh()
    assert len(warned) == 1
    assert evidence.verdict("norm", "triton", 0, "float32 plain") is None
    problem = evidence.record("norm", "triton", 0, {"float32 plain": "pass"})
    assert evidence.verdict("norm", "triton", 0, "float32 plain") == "pass"
    assert problem is None or (lay is folder and "kept for this process alone" in problem)


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    file, target = evidence.user_file(), tmp_path / "target"
    target.write_text("mine")
    file.parent.mkdir(parents=True, exist_ok=True)
    for name in ("proven.tmp", "proven.json.tmp"):
        (file.parent / name).symlink_to(target)
    evidence.record("norm", "triton", 0, {"float32 plain": "pass"})
    assert target.read_text() == "mine"


def test_a_user_without_a_home_has_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    evidence.refresh()
