"""Every public name has a docstring, and every example in one runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import bigkern
from bigkern.core import info

SKIPPED = ("bigkern._info", "bigkern.triton_kernels", "bigkern.benchmarks", "bigkern.__main__")

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(bigkern.__path__, "bigkern.")
    if not module.name.startswith((*SKIPPED, "bigkern._ops"))
)


@pytest.mark.parametrize("name", ["bigkern", *MODULES])
def test_examples_run(name: str) -> None:
    if name.startswith("bigkern.patch.transformers.attention"):
        pytest.importorskip("transformers")
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


def test_public_names_are_documented_with_an_example() -> None:
    public = [getattr(bigkern, name) for name in bigkern.__all__]
    public = [thing for thing in public if inspect.isfunction(thing)]
    public += [getattr(module, name) for module in (bigkern.nn, bigkern.optim) for name in module.__all__]
    for thing in public:
        if thing is bigkern.unpatch:
            continue  # shown in patch's example
        text = inspect.getdoc(thing) or ""
        assert ">>>" in text, f"{thing.__name__} shows no example"
        assert "Raises" in text, f"{thing.__name__} does not say what it raises"


def test_the_extension_is_what_these_tests_run() -> None:
    """Without it every op would quietly be stock, and the suite would prove nothing."""
    assert info.import_error is None, info.import_error
