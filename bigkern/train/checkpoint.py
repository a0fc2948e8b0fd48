"""Checkpoints of ``bigkern train``: a folder a step, complete or absent.

    <out>/step-000500/model.safetensors       the model's state dict
                      optimizer.safetensors   the tensors of the optimizer's state dict, torch's RNG, and
                                              what a recurrent model carries from step to step
                      state.json              all else, and digests: of the two files above, and of all else

The folder is filled under another name and renamed when it is whole, and renamed again before it is deleted,
so that an interruption leaves nothing that could be taken for a checkpoint. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigkern.terminal.console import Failure, RunFailed
from bigkern.terminal.files import partial

KEPT = 2
CARRIED = "carried."
RNG = ("rng", "rng_cuda")
FILES = ("model.safetensors", "optimizer.safetensors")
NAME = re.compile(r"step-([0-9]+)")


def require_safetensors() -> None:
    """Raise a :class:`Failure` that says how to install it, if safetensors is not installed."""
    try:
        import safetensors.torch  # noqa: F401
    except ImportError as error:
        raise Failure("checkpoints need the package safetensors: pip install 'bigkern[cli]'") from error


def folders(out: Path) -> list[Path]:
    """The checkpoints in ``out``, oldest first."""
    return sorted((p for p in out.glob("step-*") if NAME.fullmatch(p.name) and p.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    """The step that the name of a checkpoint's folder says."""
    return int(folder.name.removeprefix("step-"))


def newest(out: Path) -> str:
    """What there is to go on from, in words."""
    found = folders(out)
    return f"the newest checkpoint is {found[-1]}" if found else f"there is no checkpoint in {out}"


def save(
    out: Path,
    step: int,
    model: dict[str, Tensor],
    optimizer: dict[str, Any],
    extra: dict[str, Any],
    carried: dict[str, Tensor],
) -> Path:
    """Write the checkpoint of ``step``; of all up to it the newest ``KEPT`` remain.

    ``extra`` goes into state.json; ``carried`` is what one step hands to the next, a recurrent model's state.

    Raises:
        RunFailed: a tensor is not finite, or the files cannot be written; older checkpoints stay.
    """
    require_safetensors()
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors, rest = flatten(optimizer)
    tensors |= {f"{CARRIED}{name}": tensor for name, tensor in carried.items()}
    if name := _not_finite(model) or _not_finite(tensors):
        raise RunFailed(f"training diverged: {name} is not finite after step {step}")
    tensors["rng"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng_cuda"] = torch.cuda.get_rng_state()
    target = out / f"step-{step:06d}"
    scratch = partial(target)
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        for name, content in zip(FILES, (model, tensors), strict=True):
            save_file({k: t.detach().contiguous() for k, t in content.items()}, scratch / name)
        state = {"step": step, "optimizer": rest, **extra}
        digests = {name: _digest(scratch / name) for name in FILES} | {"state.json": _digest_of(state)}
        (scratch / "state.json").write_text(json.dumps({"digests": digests, **state}))
        _delete(target)
        scratch.replace(target)
        for old in [p for p in folders(out) if step_of(p) <= step][:-KEPT]:
            _delete(old)
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"cannot write a checkpoint into {out}: {_reason(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _delete(folder: Path) -> None:
    if folder.is_dir():
        doomed = folder.rename(partial(folder.with_name(f"old-{folder.name}")))
        shutil.rmtree(doomed)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """``(model state dict, optimizer state dict, state.json)``, the last with the RNG states under ``rng``.

    Raises:
        Failure: a file is missing, truncated or altered; the message names it and an older checkpoint.
    """
    require_safetensors()
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "state.json"
    try:
        state = _read_state(path)
        if state["step"] != step_of(folder):
            raise ValueError(f"it is of step {state['step']}")
        contents = []
        for name in FILES:
            path = folder / name
            if _digest(path) != state["digests"].get(name):
                raise ValueError("its content is not what was written")
            contents.append(load_file(path))
            if bad := _not_finite(contents[-1]):
                raise ValueError(f"{bad} is not finite")
        model, tensors = contents
        state["rng"] = {name: tensors.pop(name) for name in RNG if name in tensors}
        names = [name for name in tensors if name.startswith(CARRIED)]
        state["carried"] = {name.removeprefix(CARRIED): tensors.pop(name) for name in names}
        return model, _unflatten(tensors, state["optimizer"]), state
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise damaged(path, _reason(error)) from error


def damaged(path: Path, reason: str) -> Failure:
    """The failure to resume from the checkpoint that the file ``path`` belongs to, and the way out."""
    folder = path.parent
    older = [p for p in folders(folder.parent) if step_of(p) < step_of(folder)]
    way_out = f"to resume from {older[-1].name}" if older else "to start anew"
    return Failure(f"cannot resume: {path} is damaged ({reason}); delete {folder} {way_out}")


def restore_rng(states: dict[str, Tensor]) -> None:
    """Put torch's generators into the states that a checkpoint holds.

    Raises:
        ValueError: they are no states of a generator.
    """
    try:
        torch.set_rng_state(states["rng"])
        if "rng_cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["rng_cuda"])
    except KeyError as error:
        raise ValueError("rng is missing") from error
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"rng is no state of a generator: {error}") from error


def misfit(expected: dict[str, Tensor], found: dict[str, Tensor]) -> str | None:
    """Return the first difference of names, shapes or dtypes, in words; None if there is none."""
    for name in (*expected, *found):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is not a part of it"
        if (has := _kind(found[name])) != (needs := _kind(expected[name])):
            return f"{name} is {has}, not {needs}"
    return None


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor with a NaN or an infinity."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _read_state(path: Path) -> dict[str, Any]:
    state = json.loads(path.read_text())
    if not isinstance(state, dict) or not isinstance(digests := state.pop("digests", None), dict):
        raise ValueError("it has no digests")
    if digests.get(path.name) != _digest_of(state):
        raise ValueError("its content is not what was written")
    return {"digests": digests, **state}


def _digest_of(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flatten(optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
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


def _unflatten(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **rest["scalars"]}.items():
        index, _, name = key.partition(".")
        if not index.isdecimal():
            raise ValueError(f"{key} is not a part of it")
        state.setdefault(int(index), {})[name] = value
    for group in rest["param_groups"]:
        if "betas" in group:
            group["betas"] = tuple(group["betas"])  # JSON has no tuples
    return {"state": state, "param_groups": rest["param_groups"]}
