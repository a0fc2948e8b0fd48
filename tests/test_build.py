"""What setup.py says before it builds anything: wrong settings and missing tools are named."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def setup(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_an_unknown_setting_is_named() -> None:
    done = setup(BIGKERN_CUDA="maybe")
    assert done.returncode != 0
    assert "BIGKERN_CUDA must be auto, 0 or 1, not 'maybe'" in done.stderr


def test_cuda_demanded_and_missing_is_an_error_that_names_it() -> None:
    done = setup(BIGKERN_CUDA="1", CUDA_HOME="/nonexistent")
    assert done.returncode != 0
    missing = "built without CUDA" if torch.version.cuda is None else "there is no nvcc in /nonexistent/bin"
    assert missing in done.stderr


def test_without_cuda_the_settings_pass() -> None:
    assert setup(BIGKERN_CUDA="0").returncode == 0


def test_the_source_distribution_holds_what_is_compiled(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    command += ["sdist", "--dist-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        held = {name.split("/", 1)[1] for name in packed.getnames() if "/" in name}
    needed = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert needed <= held
