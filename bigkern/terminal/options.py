"""Options that several commands have."""

from __future__ import annotations

import re

import torch

from bigkern.terminal.console import Failure


def device(text: str | None) -> torch.device:
    """The device of ``--device``: by default the first GPU that torch sees, or the CPU.

    Raises:
        Failure: it is of another kind, or torch does not see it.
    """
    gpus = torch.cuda.device_count()
    if text == "cpu" or (text is None and not gpus):
        return torch.device("cpu")
    match = re.fullmatch("cuda(?::([0-9]{1,4}))?", "cuda" if text is None else text)
    if match is None:
        raise Failure(f"--device must be cpu, cuda or cuda:N, not {text!r}")
    index = int(match[1] or 0)
    if index >= gpus:
        seen = "no GPU" if not gpus else "one GPU" if gpus == 1 else f"{gpus} GPUs"
        raise Failure(f"--device {text}: torch sees {seen} here")
    return torch.device("cuda", index)
