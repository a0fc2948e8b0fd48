"""Wisdom: the nearest point decides, files are read whole or not at all, no measurement is lost."""

from __future__ import annotations

import json
import multiprocessing
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import bigkern
from bigkern.core import device, wisdom, wisdom_file
from bigkern.core.wisdom import Place
from bigkern.core.wisdom_file import Point, Points

CPU = torch.device("cpu")
KIND = ("float32", "forward")


pytestmark = pytest.mark.usefixtures("own_wisdom")


def here(threads: int | None = None) -> wisdom_file.Machine:
    return device.cpu_fingerprint(), threads or torch.get_num_threads()


def point(*sizes: int, cpu: float = 1.0, torch: float = 2.0, gain: float | None = None) -> Point:
    """Of a candidate cpu and stock, in microseconds."""
    return Point(sizes, {"cpu": cpu, "torch": torch}, {"cpu": torch / cpu if gain is None else gain})


def points(*of: Point, op: str = "linear", kind: tuple[str, ...] = KIND) -> Points:
    return {(op, kind): {p.sizes: p for p in of}}


def order(*sizes: int, op: str = "linear", kind: tuple[str, ...] = KIND, reach: float = 4.0) -> Any:
    return wisdom.order(Place(op, kind, sizes, CPU, reach))


FAST, SLOW = point(64, 64), point(1024, 1024, cpu=4.0)


# ---- choosing --------------------------------------------------------------------------------------


def test_the_nearest_point_decides() -> None:
    wisdom.remember(here(), points(FAST, SLOW))
    assert order(64, 64) == order(100, 100) == order(16, 256) == ("cpu", "torch")
    assert order(1024, 1024) == order(300, 300) == ("torch",)


def test_each_size_must_be_within_reach() -> None:
    wisdom.remember(here(), points(FAST))
    assert order(15, 64) == order(64, 257) == ()
    assert order(16, 64, reach=2.0) == () != order(32, 128, reach=2.0)
    wisdom.remember(here(), points(point(64, 4, cpu=3.0)))  # nearer in all, too far in one size
    assert order(64, 17) == ("cpu", "torch")


def test_kinds_ops_and_threads_are_apart() -> None:
    wisdom.remember(here(), points(FAST))
    assert order(64, 64, kind=("float32", "training")) == order(64, 64, op="norm") == order(64, 64, 64) == ()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert order(64, 64) == ()
        wisdom.remember(here(), points(point(64, 64, cpu=3.0)))
        assert order(64, 64) == ("torch",)
    finally:
        torch.set_num_threads(threads)
    assert order(64, 64) == ("cpu", "torch")


def test_ours_must_gain_three_percent_in_the_lower_quartile() -> None:
    assert point(1, gain=1.029).order == ("torch",)
    assert point(1, gain=1.03).order == ("cpu", "torch")
    several = Point((1,), {"cuda": 3.0, "triton": 2.0, "torch": 9.0}, {"cuda": 3.0, "triton": 4.5})
    assert several.order == ("triton", "cuda", "torch")


def test_yours_come_before_the_shipped_and_cover_no_more_than_they_measured() -> None:
    wisdom.state = wisdom.State(
        {here(): points(point(64, 64, cpu=3.0))}, {here(): points(FAST, point(4096, 4096))}
    )
    assert order(64, 64) == ("torch",)
    assert order(4096, 4096) == ("cpu", "torch")


def test_a_size_of_zero() -> None:
    wisdom.remember(here(), points(FAST))
    assert order(0, 64) == ()


def test_dispatch_and_explain_go_by_it() -> None:
    x, w = torch.randn(300, 64), torch.randn(64, 64)
    assert bigkern.explain("linear", x, w).chosen == "torch"  # the cautious rule
    wisdom.remember(here(), points(point(300, 64, 64)))
    found = bigkern.explain("linear", x, w)
    assert (found.chosen, found[-1].reason) == ("cpu", "measured at 300x64x64: cpu 2.00x faster")
    wisdom.remember(here(), points(point(300, 64, 64, cpu=3.0)))
    found = bigkern.explain("linear", x, w)
    assert (found.chosen, found[-2].reason) == ("torch", "measured at 300x64x64: torch 1.50x faster")
    wisdom.remember(here(), points(point(300, 64, 64, gain=1.01)))
    assert bigkern.explain("linear", x, w)[-2].reason.endswith("as fast as torch, within 3%")
    with bigkern.use("cpu"):
        assert bigkern.explain("linear", x, w).chosen == "cpu"


def test_what_is_remembered_of_calls_ends_with_new_wisdom() -> None:
    from bigkern.ops.norm.backends import NORM

    x = torch.randn(4, 64)
    kind = ("float32", "forward", "rms")
    for cpu, chosen in ((1.0, "cpu"), (3.0, "torch"), (1.0, "cpu")):
        wisdom.remember(here(), points(point(4, 64, cpu=cpu), op="norm", kind=kind))
        for _ in range(2):
            assert NORM.decided(x, (64,), None, None, 1e-5, None, "rms")[0].name == chosen


# ---- under torch.compile ---------------------------------------------------------------------------


def test_a_traced_call_goes_by_it() -> None:
    """Sizes that are fixed are looked up; those that are left open bind no graph."""
    x, w = torch.randn(300, 64), torch.randn(64, 64)
    wisdom.remember(here(), points(point(300, 64, 64)))
    graphs: list[torch.fx.GraphModule] = []

    def kept(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    function = torch.compile(bigkern.linear, backend=kept, fullgraph=True, dynamic=False)
    torch.testing.assert_close(function(x, w), x @ w.t())
    assert "bigkern" in graphs[-1].code
    torch._dynamo.reset()
    wisdom.remember(here(), points(point(300, 64, 64, cpu=3.0)))
    torch.testing.assert_close(function(x, w), x @ w.t())
    assert "bigkern" not in graphs[-1].code
    torch._dynamo.reset()
    graphs.clear()
    function = torch.compile(bigkern.linear, backend=kept, fullgraph=True, dynamic=True)
    for rows in (300, 400, 500):
        function(torch.randn(rows, 64), w)
    assert len(graphs) == 1


# ---- files -----------------------------------------------------------------------------------------


def test_a_file_holds_what_was_measured(tmp_path: Path) -> None:
    of = points(FAST, SLOW) | points(point(1, 2, 3), op="norm", kind=("bfloat16", "training", "rms"))
    path = tmp_path / "w.json"
    wisdom_file.write(path, here(), of, wisdom.about())
    assert wisdom_file.read(path) == (here(), of)
    assert json.loads(path.read_text())["machine"]["torch"] == torch.__version__
    assert len(path.read_text().splitlines()) == 10  # a line for each op, kind and point


def test_load_export_forget(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run `bigkern tune`"):
        bigkern.wisdom.export(tmp_path / "w.json")
    assert wisdom.record(here(), points(FAST) | points(FAST, op="norm")) is None
    bigkern.wisdom.export(tmp_path / "w.json")
    bigkern.wisdom.forget(["norm"])
    assert order(64, 64)
    assert not order(64, 64, op="norm")
    wisdom.refresh()
    assert order(64, 64)
    assert not order(64, 64, op="norm")
    bigkern.wisdom.forget()
    assert not order(64, 64)
    assert not list(wisdom.folder().glob("*.json"))
    bigkern.wisdom.load(tmp_path / "w.json")
    assert order(64, 64, op="norm")


def test_a_later_measurement_replaces_the_same_point_alone() -> None:
    assert wisdom.record(here(), points(FAST, SLOW)) is None
    assert wisdom.record(here(), points(point(64, 64, cpu=8.0))) is None
    known = wisdom_file.read(wisdom.folder() / wisdom.file_name(here()))[1]
    assert known == points(SLOW, point(64, 64, cpu=8.0))


def test_very_many_points_are_the_latest() -> None:
    many = points(*(point(i, 1) for i in range(1, wisdom_file.MOST + 10)))
    assert next(iter(wisdom_file.merged({}, many)["linear", KIND])) == (10, 1)


def _records(first: int) -> None:
    for i in range(first, first + 20):
        assert wisdom.record(("machine", 1), points(point(i, i))) is None


def test_two_processes_that_write_at_once_lose_nothing() -> None:
    spawn = multiprocessing.get_context("fork")
    processes = [spawn.Process(target=_records, args=(first,)) for first in (1, 101)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    known = wisdom_file.read(wisdom.folder() / wisdom.file_name(("machine", 1)))[1]
    assert sorted(known["linear", KIND]) == [(i, i) for i in [*range(1, 21), *range(101, 121)]]


ROW = '{"sizes": [4], "us": {"cpu": 1, "torch": 2}, "gain": {"cpu": 2}}'
GOOD = '{"version": 1, "machine": {"fingerprint": "m", "threads": 2}, "points": {"linear": {"a b": [%s]}}}'
BAD = {
    "truncated": (GOOD % ROW)[:-9],
    "empty": "",
    "a newer version's": (GOOD % ROW).replace('"version": 1', '"version": 2'),
    "no JSON object": "[1, 2]",
    "no points": '{"version": 1, "machine": {"fingerprint": "m", "threads": 2}}',
    "no threads": (GOOD % ROW).replace('"threads": 2', '"threads": "2"'),
    "sizes in words": GOOD % ROW.replace("[4]", '["4"]'),
    "a negative size": GOOD % ROW.replace("[4]", "[-4]"),
    "no sizes": GOOD % ROW.replace("[4]", "[]"),
    "sizes of two lengths": GOOD % f"{ROW}, {ROW.replace('[4]', '[4, 4]')}",
    "no time": GOOD % ROW.replace('"cpu": 1', '"cpu": 0'),
    "not a number": GOOD % ROW.replace('"cpu": 1', '"cpu": NaN'),
    "a gain of nobody": GOOD % ROW.replace('"gain": {"cpu"', '"gain": {"gpu"'),
    "no stock": GOOD % ROW.replace(', "torch": 2', ""),
    "nested too deeply": "[" * 100_000,
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_a_bad_file_is_named_and_ignored(text: str) -> None:
    path = wisdom.folder() / wisdom.file_name(here())
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(UserWarning, match=re.escape(f"{path} is not a wisdom file")):
        wisdom.refresh()
    assert not order(4)
    with pytest.raises(ValueError, match="is not a wisdom file"):
        bigkern.wisdom.load(path)
    assert wisdom.record(here(), points(FAST)) is None  # which writes it anew
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wisdom.refresh()
    assert order(64, 64)


def test_another_machines_file_is_not_asked() -> None:
    assert wisdom.record(("another", torch.get_num_threads()), points(FAST)) is None
    wisdom.refresh()
    assert not order(64, 64)


def test_where_nothing_can_be_written_it_is_kept_for_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    problem = wisdom.record(here(), points(FAST))
    assert problem is not None
    assert "kept for this process alone" in problem
    assert order(64, 64)


def test_shipped_files_are_whole() -> None:
    for path in sorted(wisdom.SHIPPED.glob("*.json")):
        machine, of = wisdom_file.read(path)
        assert wisdom.file_name(machine) == path.name
        assert sum(map(len, of.values())) > 100
