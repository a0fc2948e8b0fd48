"""The evidence file: written whole or not at all; what cannot be believed is left out with a warning."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from bigkern.core import evidence
from bigkern.core.evidence import Entry


def entry(op: str = "attention", arch: str = "sm_90", cases: int = 10) -> Entry:
    return Entry(op, "triton", arch, cases, "a machine", torch.__version__, evidence.version())


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(evidence, "proven", frozenset())


def test_round_trip_and_verification() -> None:
    file = evidence.user_file()
    assert not evidence.verified("attention", "triton", "sm_90")
    evidence.write(file, [entry()])
    assert evidence.read(file) == [entry()]
    assert evidence.verified("attention", "triton", "sm_90")
    assert not evidence.verified("attention", "cuda", "sm_90")
    assert not evidence.verified("attention", "triton", "sm_80")


def test_later_evidence_replaces_earlier_of_the_same_kernel() -> None:
    file = evidence.user_file()
    evidence.write(file, [entry(cases=1), entry(op="adam")])
    evidence.write(file, [entry(cases=2)])
    assert {(e.op, e.cases) for e in evidence.read(file)} == {("attention", 2), ("adam", 10)}
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"entries": [{"op": "attention"}]}', json.dumps({"entries": 3})]
)
def test_a_broken_file_is_named(text: str) -> None:
    file = evidence.user_file()
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(ValueError, match=r"evidence\.json is not an evidence file"):
        evidence.read(file)


def test_the_committed_file_is_readable() -> None:
    evidence.read(evidence.COMMITTED)


def lay(text: str) -> Path:
    file = evidence.user_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    "unproven",
    [
        {"cases": 0},
        {"cases": -1},
        {"torch": "1.13.0"},
        {"bigkern": "0.0.1"},
    ],
    ids=str,
)
def test_no_cases_or_other_versions_prove_nothing(unproven: dict[str, object]) -> None:
    evidence.write(evidence.user_file(), [replace(entry(), **unproven)])  # type: ignore[arg-type]
    assert not evidence.verified("attention", "triton", "sm_90")


@pytest.mark.parametrize(
    "wrong", [{"cases": "10"}, {"cases": True}, {"op": ["attention"]}, {"torch": None}], ids=str
)
def test_a_field_of_another_type_is_named(wrong: dict[str, object]) -> None:
    file = lay(json.dumps({"entries": [asdict(entry()) | wrong]}))
    with pytest.raises(ValueError, match=f"is not an evidence file.*{next(iter(wrong))}"):
        evidence.read(file)


def folder(file: Path) -> None:
    file.mkdir()


def fifo(file: Path) -> None:
    os.mkfifo(file)


def nested(file: Path) -> None:
    file.write_text("[" * 100_000)


def broken(file: Path) -> None:
    file.write_text("{")


def binary(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize("lay_at", [folder, fifo, nested, broken, binary])
def test_what_is_no_evidence_file_is_ignored_with_one_warning(lay_at) -> None:
    file = evidence.user_file()
    file.parent.mkdir(parents=True)
    lay_at(file)
    with pytest.warns(UserWarning, match=r"evidence\.json is not an evidence file") as warned:
        evidence.refresh()
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not evidence.verified("attention", "triton", "sm_90")
    with pytest.raises(ValueError, match=r"evidence\.json is not an evidence file"):
        evidence.write(file, [entry()])


def test_nothing_is_written_through_a_link() -> None:
    file = evidence.user_file()
    file.parent.mkdir(parents=True)
    target = file.parent.parent / "target"
    target.write_text("mine")
    for name in ("evidence.tmp", "evidence.json.tmp"):
        (file.parent / name).symlink_to(target)
    evidence.write(file, [entry()])
    assert target.read_text() == "mine"
    assert evidence.read(file) == [entry()]


def test_a_user_without_a_home_has_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    evidence.refresh()
