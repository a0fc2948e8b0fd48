"""A GPU that Triton's interpreter serves: tensors lie on the CPU, and whoever asks is told that it is a GPU.

python tests/fake_gpu.py OP CANDIDATE DEVICE FIRST      a worker of bigkern.ops.proof on it
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton_interpreter

from bigkern.core import device, evidence
from bigkern.ops import problems, proof


def appear(setattr_: Callable[[Any, str, Any], None] = setattr) -> None:
    """With few of an op's problems, as the interpreter takes its time."""
    triton_interpreter.repair()
    setattr_(device, "is_gpu", lambda _: True)
    setattr_(device, "gpu_fingerprint", lambda index: "fake-gpu")
    setattr_(evidence, "place", lambda index: "fake-gpu, fake software")
    setattr_(problems, "proof", problems.small)
    setattr_(problems, "grid", problems.small)
    setattr_(proof, "DTYPES", (torch.float32,))
    setattr_(proof, "COMMAND", (sys.executable, __file__))


if __name__ == "__main__":
    appear()
    proof.work(sys.argv[1], sys.argv[2], torch.device(sys.argv[3]), int(sys.argv[4]))
