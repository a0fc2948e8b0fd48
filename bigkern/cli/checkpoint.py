"""Checkpoints of ``bigkern train``: a folder a step, complete or absent.

    <out>/step-000500/model.safetensors       the model's state dict
                      optimizer.safetensors   the tensors of the optimizer's state dict, torch's RNG, and
                                              what a recurrent model carries from step to step
                      state.json              all else, and the digests of the two files above

The folder is filled under another name and renamed when it is whole, so that an interrupted write leaves
nothing that could be taken for a checkpoint. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigkern.cli.console import Failure

KEPT = 2
CARRIED = "carried."
FILES = ("model.safetensors", "optimizer.safetensors")


def require_safetensors() -> Any:
    """The module, or a :class:`Failure` that says how to install it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise Failure("checkpoints need the package safetensors: pip install 'bigkern[cli]'") from error
    return safetensors.torch


def folders(out: Path) -> list[Path]:
    """The checkpoints in ``out``, oldest first."""
    return sorted(p for p in out.glob("step-*") if p.is_dir())


def save(
    out: Path,
    step: int,
    model: dict[str, Tensor],
    optimizer: dict[str, Any],
    extra: dict[str, Any],
    carried: dict[str, Tensor],
) -> Path:
    """Write the checkpoint of ``step`` and drop all but the newest ``KEPT``.

    ``extra`` goes into state.json; ``carried`` is what one step hands to the next, a recurrent model's state.
    """
    target = out / f"step-{step:06d}"
    scratch = out / f".{target.name}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    tensors, groups = _flatten(optimizer)
    tensors |= {f"{CARRIED}{name}": tensor for name, tensor in carried.items()}
    tensors["rng"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng_cuda"] = torch.cuda.get_rng_state()
    try:
        for name, content in zip(FILES, (model, tensors), strict=True):
            require_safetensors().save_file(
                {k: t.detach().contiguous() for k, t in content.items()}, scratch / name
            )
        digests = {name: _digest(scratch / name) for name in FILES}
        state = {"step": step, "optimizer": groups, "digests": digests, **extra}
        (scratch / "state.json").write_text(json.dumps(state))
        shutil.rmtree(target, ignore_errors=True)
        scratch.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for old in folders(out)[:-KEPT]:
        shutil.rmtree(old)
    return target


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """``(model state dict, optimizer state dict, state.json)``, the last with the RNG states under ``rng``.

    Raises:
        Failure: a file is missing, truncated or altered; the message names it and an older checkpoint.
    """
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text())
        digests, groups = state["digests"], state["optimizer"]
        contents = []
        for name in FILES:
            path = folder / name
            if _digest(path) != digests[name]:
                raise ValueError("its content is not what was written")
            contents.append(require_safetensors().load_file(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise Failure(f"cannot resume: {path} is damaged ({reason}); {_way_out(folder)}") from error
    model, tensors = contents
    state["rng"] = {name: tensors.pop(name) for name in ("rng", "rng_cuda") if name in tensors}
    names = [name for name in tensors if name.startswith(CARRIED)]
    state["carried"] = {name.removeprefix(CARRIED): tensors.pop(name) for name in names}
    return model, _unflatten(tensors, groups), state


def restore_rng(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["rng"])
    if "rng_cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["rng_cuda"])


def _way_out(folder: Path) -> str:
    older = [p for p in folders(folder.parent) if p < folder]
    return f"delete {folder} to resume from {older[-1].name}" if older else f"delete {folder} to start anew"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flatten(optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's tensors under ``<parameter>.<name>``, and the rest as JSON can hold it."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, values in optimizer["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                scalars[f"{index}.{name}"] = value
    return tensors, {"scalars": scalars, "param_groups": optimizer["param_groups"]}


def _unflatten(tensors: dict[str, Tensor], groups: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **groups["scalars"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    for group in groups["param_groups"]:
        if "betas" in group:
            group["betas"] = tuple(group["betas"])  # JSON has no tuples
    return {"state": state, "param_groups": groups["param_groups"]}
