"""The part of ``patch`` that knows transformers, and imports it only where a model is made of it."""

from __future__ import annotations

import warnings

from torch import nn

from bigkern.patch.describe import TOKENS
from bigkern.patch.report import Row

BEFORE = "_bigkern_attention_before"  # as integrations.transformers calls it, which needs an import

SEALED = "a part of its model is compiled or scripted already"

Walk = list[tuple[str, nn.Module, str | None]]  # name, module, why it must stay as it is


def blocks(*models: nn.Module) -> dict[str, dict[type[nn.Module], type[nn.Module]]]:
    """The tables of our blocks by op, if there is a module of transformers in these models."""
    bases = {base for model in models for module in model.modules() for base in type(module).__mro__}
    if not any(base.__module__.startswith("transformers.") for base in bases):
        return {}
    try:
        from bigkern.patch.transformers.blocks import BLOCKS
        from bigkern.patch.transformers.layers import LAYERS
    except (ImportError, AttributeError) as error:
        reason = f"its attention and blocks need transformers 5.17 or later, and run as they are: {error}"
        warnings.warn(f"{type(models[0]).__name__}: {reason}", stacklevel=3)
        return {}
    return {**BLOCKS, "layernorm_ffn": LAYERS | BLOCKS["layernorm_ffn"]}


def disable(module: nn.Module) -> int:
    """Give a transformers model its attention back if it was patched; returns how many modules' that was."""
    if BEFORE not in module.__dict__:
        return 0
    from bigkern.patch.transformers import attention as transformers

    transformers.disable(module)  # type: ignore[arg-type]
    return len([inner for inner in module.modules() if transformers.attends(inner)])


class Attention:
    """The attention of the transformers models within a model: what runs it, or why that stays as it is."""

    def __init__(self, walk: Walk, known: bool) -> None:
        self._walk = walk
        self._left: dict[nn.Module, tuple[str, bool]] = {}  # module -> why not, and whether that is a refusal
        self._known = known  # whether there are modules of transformers, and a version that we know

    def enable(self, wanted: bool) -> list[nn.Module]:
        """Enable each model that can be, if wanted; returns those that were not before."""
        if not self._known:
            return []
        from transformers import PreTrainedModel

        from bigkern.patch.transformers import attention as transformers

        enabled: list[nn.Module] = []
        inside: set[nn.Module] = set()
        sealed = {module for _, module, reason in self._walk if reason is not None}
        for _, model, _ in self._walk:
            if model in inside or not isinstance(model, PreTrainedModel):
                continue
            parts = set(model.modules())
            inside |= parts
            reason = SEALED if sealed & parts else transformers.refusal(model)
            if reason is not None:
                self._left |= dict.fromkeys(parts, (reason, True))
            elif not wanted:
                self._left |= dict.fromkeys(parts, ("attention is not among ops", False))
            elif not transformers.is_enabled(model):
                transformers.enable(model)
                enabled.append(model)
        return enabled

    def row(self, name: str, module: nn.Module, named_so: bool) -> Row | None:
        """Of a module that attends, or is named so in a model that has no module known to attend."""
        if not self._known:
            return None
        from bigkern.patch.transformers import attention as transformers

        kind = type(module).__name__
        if transformers.attends(module) and transformers.is_chosen(module):
            return Row.of(name, kind, "attention", transformers.explain(module, TOKENS), "")
        if not transformers.attends(module) and not named_so:
            return None
        if module in self._left:
            reason, refused = self._left[module]
            return Row(name, kind, "-", "torch", reason, refused)
        if transformers.attends(module):
            return Row(name, kind, "-", "torch", "its model chooses its attention: patch that", refused=True)
        return None
