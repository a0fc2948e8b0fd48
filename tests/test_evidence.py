"""The evidence file: written whole or not at all, read with a clear error, kept by op, backend and arch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigkern import evidence
from bigkern.evidence import Entry


def entry(op: str = "attention", arch: str = "sm_90", cases: int = 10) -> Entry:
    return Entry(op, "triton", arch, cases, "a machine", "2.13.0", "0.1.0")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    evidence._entries.cache_clear()
    yield
    evidence._entries.cache_clear()


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
