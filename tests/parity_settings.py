"""The CPU's parity tests under other instruction sets, other roundings of stock, other numbers of threads.

Stock's rounding differs from machine to machine; here it is made to differ on one. Each setting runs all
tests that hold the CPU to parity, and their fuzzed cases from three places of the seeds. ``make
parity-settings`` prints a line for each and exits with 1 if any fails.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from bigkern.core import info

TESTS = Path(__file__).parent
OPS = ("attention", "norm", "layernorm_ffn", "linear", "recurrent", "adam")
BESIDE = ("parity", "nn", "nn_recurrent", "optim", "models_cnn")
SLOW = "not triton and not simt and not compile and not opcheck"

# Ours: instruction set and threads. Stock's: the code paths of MKL, oneDNN and ATen.
SETTINGS: list[dict[str, str]] = [
    {"BIGKERN_TEST_ISA": "portable", "BIGKERN_TEST_THREADS": "1", "MKL_CBWR": "COMPATIBLE"},
    {"BIGKERN_TEST_ISA": "avx2", "BIGKERN_TEST_THREADS": "2", "MKL_CBWR": "AVX2"},
    {"BIGKERN_TEST_ISA": "avx512", "BIGKERN_TEST_THREADS": "3", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"BIGKERN_TEST_ISA": "avx512bf16", "BIGKERN_TEST_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2"},
    {"BIGKERN_TEST_THREADS": "2", "ATEN_CPU_CAPABILITY": "default"},
]
FUZZED_FROM = (0, 10_000, 20_000)


def run(setting: dict[str, str], seed: int, workers: int) -> tuple[bool, str]:
    """All tests, or for later seeds the fuzzed ones."""
    which = SLOW if seed == FUZZED_FROM[0] else f"fuzz and {SLOW}"
    files = [str(TESTS / op) for op in OPS] + [str(TESTS / f"test_{name}.py") for name in BESIDE]
    workers = max(1, workers // int(setting["BIGKERN_TEST_THREADS"]))  # threads share the cores
    command = [sys.executable, "-m", "pytest", *files, "-k", which, "-n", str(workers), "--dist", "worksteal"]
    environment = os.environ | setting | {"BIGKERN_FUZZ_FROM": str(seed)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    if done.returncode:
        print(done.stdout[-8000:])
    summary = re.findall(r"^(?:=+ )?(\d+ (?:passed|failed).*?)(?: in .*)?$", done.stdout, re.M)
    return done.returncode == 0, summary[-1] if summary else done.stdout.strip().rsplit("\n", 1)[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    workers, failed = parser.parse_args().workers, 0
    best = info.isas()[-1]
    for setting in SETTINGS:
        if setting.get("BIGKERN_TEST_ISA", best) not in info.isas():
            setting = setting | {"BIGKERN_TEST_ISA": best}
        for seed in FUZZED_FROM:
            begin = time.monotonic()
            passed, summary = run(setting, seed, workers)
            failed += not passed
            named = ", ".join(
                f"{name.removeprefix('BIGKERN_TEST_')}={value}" for name, value in setting.items()
            )
            print(f"{named}; seeds from {seed}: {summary} ({time.monotonic() - begin:.0f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
