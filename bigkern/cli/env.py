"""``bigkern env``: versions, how the extension was built, devices, and which backend runs each op here."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from bigkern.core import device as processor
from bigkern.core import evidence, info, wisdom
from bigkern.ops import problems
from bigkern.terminal.console import Console, machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])


def run(arguments: argparse.Namespace, console: Console) -> int:
    report = collect(getattr(torch, arguments.dtype))
    _show(report, console)
    console.emit(report)
    return 0


def devices() -> list[torch.device]:
    """The CPU, and every GPU that torch sees."""
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def optional_packages() -> dict[str, str | None]:
    from importlib import metadata

    found: dict[str, str | None] = {}
    for name in ("triton", "numpy", "rich", "safetensors", "tokenizers", "matplotlib"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def collect(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "machine": machine(),
        "packages": optional_packages(),
        "extension": {
            "summary": info.summary(),
            "import_error": info.import_error,
            "library": None if info.OPS_LIBRARY is None else str(info.OPS_LIBRARY),
            "build": info.build(),
        },
        "cuda_kernels": len(info.kernels()),
        "gpus": [
            {
                "name": torch.cuda.get_device_name(i),
                "fingerprint": processor.gpu_fingerprint(i),
                "proven": evidence.count(i),
            }
            for i in range(torch.cuda.device_count())
        ],
        "wisdom": [wisdom.summary(device) for device in devices()],
        "ops": [row for device in devices() for row in dispatch(device, dtype)],
    }


def dispatch(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """For a typical call of each op on this device: every backend and what it says."""
    rows = []
    for op in problems.OPS:
        problem = problems.typical(op)
        explanation = problem.explain(problem.make(dtype, device))
        rows.append(
            {
                "op": op,
                "device": str(device),
                "call": problem.label,
                "chosen": explanation.chosen,
                "backends": {choice.backend: choice.reason for choice in explanation},
            }
        )
    return rows


def _show(report: dict[str, Any], console: Console) -> None:
    about = report["machine"]
    lines = {
        "bigkern": about["bigkern"],
        "torch": about["torch"],
        "python": f"{about['python']} on {about['system']}",
        "cpu": f"{about['cpu']}, {about['threads']} threads",
        "gpus": ", ".join(f"{gpu['name']} ({gpu['proven']})" for gpu in report["gpus"]) or "none",
        "packages": ", ".join(f"{n} {v}" if v else f"no {n}" for n, v in report["packages"].items()),
        "extension": report["extension"]["summary"],
    }
    for number, of in enumerate(report["wisdom"]):
        known = f"{of['yours']} points measured here, {of['shipped']} shipped"
        lines[f"wisdom {number}" if number else "wisdom"] = f"{of['machine']}: {known}{of['advice']}"
    build = report["extension"]["build"]
    if "compiler" in build:
        lines["built"] = f"for torch {build['torch']} with compiler {build['compiler']}"
        if build.get("why_no_cuda"):
            lines["no CUDA kernels"] = build["why_no_cuda"]
    for name, value in lines.items():
        console.say(f"{name:<16} {value}")
    for entry in report["ops"]:
        console.say(f"\n{entry['op']} ({entry['call']}) on {entry['device']}")
        width = max(map(len, entry["backends"]))
        for backend, reason in entry["backends"].items():
            if reason == report["extension"]["summary"] and report["extension"]["import_error"]:
                reason = "the extension did not load, see above"
            console.say(f"  {'->' if backend == entry['chosen'] else '  '} {backend:<{width}}  {reason}")
