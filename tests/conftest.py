"""Where there is no GPU, Triton kernels run under Triton's interpreter: set before anything imports them."""

import atexit
import csv
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Test processes side by side share the cores: threads that outnumber them would spin at every barrier.
if "BIGKERN_TEST_THREADS" in os.environ:  # of parity_settings.py
    torch.set_num_threads(int(os.environ["BIGKERN_TEST_THREADS"]))
elif "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

if "BIGKERN_TEST_ISA" in os.environ:
    from bigkern.core import info

    info.set_isa(os.environ["BIGKERN_TEST_ISA"])

# Which candidate runs must not depend on what was measured on this machine, nor the next user's on tests.
if not torch.cuda.is_available():  # where evidence of a GPU's kernels is kept
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="bigkern-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
from bigkern.core import wisdom

UNMEASURED = wisdom.state = wisdom.State({}, {})

BUILD = Path(__file__).parent.parent / "build"


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Every test draws its own seeded random numbers, and knows of no measurement that another made."""
    torch.manual_seed(0)
    wisdom.state = UNMEASURED


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Many small operations crawl where threads have to share a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_wisdom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No wisdom but a test's own, in a cache of its own."""
    from bigkern.core import wisdom

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(wisdom, "state", wisdom.State({}, {}))


@pytest.fixture
def undeclined(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where every kernel of ours was measured faster."""
    from bigkern.core import registry, wisdom

    for op in registry.ops().values():
        if "cpu" in op.backends:
            monkeypatch.setitem(
                op.backends, "cpu", dataclasses.replace(op.backends["cpu"], declines=lambda _: None)
            )
    monkeypatch.setattr(wisdom, "state", wisdom.State({}, {}))  # what was decided before is forgotten


class Card:
    name, major, minor, multi_processor_count = "Fake GPU", 9, 0, 132
    shared_memory_per_block_optin = 227 << 10


@pytest.fixture
def fake_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What fake tensors on a GPU lie on: a card of which nothing is proven and nothing measured."""
    from bigkern.core import device, evidence, registry, wisdom

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Card)
    monkeypatch.setattr(registry, "_warned", {0})
    monkeypatch.setattr(evidence, "proven", {})
    monkeypatch.setattr(wisdom, "state", wisdom.State({}, {}))
    for cached in (device.gpu_fingerprint, evidence.place):
        cached.cache_clear()
    yield
    for cached in (device.gpu_fingerprint, evidence.place):
        cached.cache_clear()
    torch._dynamo.reset()


@pytest.fixture(scope="session", autouse=True)
def _triton_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        import triton_interpreter

        triton_interpreter.repair()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """One file a worker and table: ``make test`` merges and prints them."""
    from parity import RECORD, TIERS

    if not RECORD.worst:
        return
    ratios = [
        [op, backend, dtype, TIERS[backend], kind, f"{ratio:.3f}", cases]
        for (op, backend, dtype, kind), (ratio, cases) in sorted(RECORD.worst.items())
    ]
    _write("parity", ["op", "backend", "dtype", "tier", "kind", "worst_ratio", "cases"], ratios)
    passed = [
        [op, feature, backend, TIERS[backend], cases]
        for (op, feature, backend), cases in sorted(RECORD.features.items())
    ]
    _write("features", ["op", "feature", "backend", "tier", "cases"], passed)
    planted = [[*key, found] for key, found in RECORD.mistakes.items()]
    _write("planted", ["op", "dtype", "mistake", "found"], planted)


def _write(table: str, columns: list[str], rows: list[list[object]]) -> None:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    folder = BUILD / table
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{worker}-{os.getpid()}.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(columns)
        out.writerows(rows)
