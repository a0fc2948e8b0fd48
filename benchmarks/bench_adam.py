"""One AdamW step over the parameters of known models, against torch's ways of doing it and other libraries'.

Everyone steps the same parameters with the same gradients, and keeps states of their own. What bigkern can
store otherwise (clipping folded in, moments in bf16 or 8 bits, bf16 parameters with a master or without)
stands in groups of its own, against what torch offers for the same purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bigkern.benchmarks.harness import Bench, Case, Contestant
from bigkern.core.problem import Inputs
from bigkern.core.timing import Task
from bigkern.ops.adam import problems
from bigkern.optim import AdamW

Sizes = list[tuple[int, ...]]
Step = Callable[[torch.optim.Optimizer, list[torch.nn.Parameter]], Any]

HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
STOCK: dict[str, dict[str, Any]] = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
MAX_NORM = 1.0

# Our options, and the bytes that a step must move for each parameter, by group.
STORAGE: dict[str, tuple[dict[str, Any], float, torch.dtype]] = {
    "clipping": ({"max_norm": MAX_NORM}, 32, torch.float32),
    "bf16 moments": ({"state_dtype": torch.bfloat16}, 20, torch.float32),
    "8-bit moments": ({"state_dtype": torch.uint8}, 16 + 16 / 256, torch.float32),
    "bf16, stochastic": ({"stochastic_rounding": True}, 14, torch.bfloat16),
    "bf16, fp32 masters": ({"master_weights": True, "state_dtype": torch.float32}, 28, torch.bfloat16),
    "bf16, remainders": ({"master_weights": "remainder", "state_dtype": torch.float32}, 26, torch.bfloat16),
}


# ---- whose parameters ------------------------------------------------------------------------------


def transformer(layers: int, width: int, vocabulary: int = 0, positions: int = 0) -> Sizes:
    """Of a GPT: twelve tensors a block, embeddings, the last norm."""
    block: Sizes = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    outside: Sizes = [(vocabulary, width), (positions, width), (width,), (width,)] if vocabulary else []
    return layers * block + outside


def resnet50() -> Sizes:
    """161 tensors: convolutions, and the weights and biases of their norms."""
    sizes: Sizes = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes: Sizes = [(planes, width, 1, 1), (planes, planes, 3, 3), (4 * planes, planes, 1, 1)]
            shapes += [(4 * planes, width, 1, 1)] if block == 0 else []
            for shape in shapes:
                sizes += [shape, shape[:1], shape[:1]]
            width = 4 * planes
    return [*sizes, (1000, 2048), (1000,)]


def models(bench: Bench) -> dict[str, Sizes]:
    if bench.quick:
        return {"4 blocks of 256": transformer(4, 256)}
    found = {
        "2 blocks of 1024": transformer(2, 1024),
        "GPT-2 124M": transformer(12, 768, 50257, 1024),
        "BERT-large": transformer(24, 1024, 30522, 512),
        "ResNet-50": resnet50(),
        "10,000 small": [(1000,)] * 10_000,
    }
    return found | ({"one of 1 B": [(1 << 30,)]} if bench.device.type == "cuda" else {})


# ---- cases -----------------------------------------------------------------------------------------


def cases(bench: Bench) -> list[Case]:
    found = models(bench)
    plain = [_case(name, sizes) for name, sizes in found.items()]
    name, sizes = next(iter(found.items()))
    return plain + [_storage_case(name, sizes, group) for group in STORAGE]


def _label(name: str, sizes: Sizes) -> str:
    count = sum(torch.Size(size).numel() for size in sizes)
    return f"{name}, {count / 1e6:.1f} M in {len(sizes)} tensors"


def _case(name: str, sizes: Sizes) -> Case:
    problem = problems.adam(sizes, _label(name, sizes))
    gate = (
        problems.adam(sizes[:12], "its first tensors") if len(sizes) > 1 else problems.adam([(1 << 20,)], "")
    )
    large = problem.elements > 7 * 2e8  # torch's unfused ways would need the memory of several models more
    ways = ("default", "fused") if large else STOCK
    ours = _stepping("bigkern", partial(AdamW, **HYPER))
    stock = [_stepping(f"adamw-{way}", partial(torch.optim.AdamW, **HYPER, **STOCK[way])) for way in ways]
    return Case(problem, [ours, *stock, *_others()], gate, (torch.float32,), "step")


def _storage_case(name: str, sizes: Sizes, group: str) -> Case:
    options, bytes_each, dtype = STORAGE[group]
    width = torch.finfo(dtype).bits // 8
    problem = problems.adam(sizes, f"{_label(name, sizes)}, {group}", elements=bytes_each / width)
    ours = _stepping("bigkern", partial(AdamW, **HYPER, **options))
    clip = group == "clipping"
    stock = [
        _stepping(
            f"adamw-{way}", partial(torch.optim.AdamW, **HYPER, **STOCK[way]), _clipped if clip else _step
        )
        for way in ("default", "fused")
    ]
    eight = _eight_bit() if group == "8-bit moments" else []
    return Case(
        problem, [ours, *stock, *eight], problems.adam_storage(group, [(63, 65), (1023,)]), (dtype,), group
    )


def _step(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
    optimizer.step()


def _clipped(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
    optimizer.step()


def _stepping(name: str, make: Callable[[Any], torch.optim.Optimizer], step: Step = _step) -> Contestant:
    """Steps of an optimizer with gradients that stay."""
    optimizers: list[torch.optim.Optimizer] = []

    def tasks(inputs: Inputs) -> dict[str, Task]:
        parameters = [torch.nn.Parameter(t) for n, t in inputs.items() if n.startswith("p_")]
        gradients = (t for n, t in inputs.items() if n.startswith("g_"))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizers[:] = [make(parameters)]
        return {"step": Task(lambda _: step(optimizers[0], parameters), state=partial(_state_mb, optimizers))}

    def backend(inputs: Inputs) -> str:
        explain = getattr(optimizers[0], "explain", None)
        return "torch" if explain is None else explain()[0].chosen  # type: ignore[no-any-return]

    return Contestant(name, tasks, backend)


def _state_mb(optimizers: list[torch.optim.Optimizer]) -> float:
    """What the optimizer keeps between steps."""
    tensors = [x for state in optimizers[0].state.values() for x in state.values() if torch.is_tensor(x)]
    return sum(x.untyped_storage().nbytes() for x in tensors) / 2**20


# ---- other libraries, where they are installed -----------------------------------------------------


def _others() -> list[Contestant]:
    found = []
    try:
        from apex.optimizers import FusedAdam

        found.append(_stepping("apex", partial(FusedAdam, adam_w_mode=True, **HYPER)))
    except ImportError:
        pass
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        found.append(_stepping("deepspeed-cpu", partial(DeepSpeedCPUAdam, adamw_mode=True, **HYPER)))
    except ImportError:
        pass
    return found


def _eight_bit() -> list[Contestant]:
    found = []
    try:
        from bitsandbytes.optim import AdamW8bit

        found.append(_stepping("bitsandbytes", partial(AdamW8bit, **HYPER)))
    except ImportError:
        pass
    try:
        from torchao.optim import AdamW8bit as TorchaoAdamW8bit

        found.append(_stepping("torchao", partial(TorchaoAdamW8bit, **HYPER)))
    except ImportError:
        pass
    return found
