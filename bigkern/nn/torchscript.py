"""Layers under ``torch.jit.script``, which compiles torch's own layers and not the Python of ours."""

from __future__ import annotations

from typing import NoReturn

from torch import nn


class ScriptsAsStock:
    """A drop-in layer: what is compiled is the torch layer that it stands for, with the same parameters."""

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script's question what to compile in this layer's place; it stays in a parent's place."""
        assert isinstance(self, nn.Module)
        if (extras := self._beyond_stock()) is not None:
            refuse(f"{type(self).__name__} with {extras}")
        bases = (base for base in type(self).__mro__ if issubclass(base, nn.Module))
        stock = next(base for base in bases if base.__module__.startswith("torch.nn."))
        layer = stock.__new__(stock)
        layer.__dict__ |= {**self.__dict__, "_modules": dict(self._modules)}
        return layer

    def _beyond_stock(self) -> str | None:
        """What this layer does that the torch layer cannot."""
        return None


def refuse(layer: str) -> NoReturn:
    raise RuntimeError(f"torch.jit.script knows no {layer}; torch.jit.trace records one")
