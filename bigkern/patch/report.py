"""What ``patch`` and ``freeze`` say of a model: one row a module, printed as a table."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bigkern.core import registry


@dataclass(frozen=True, slots=True)
class Row:
    """One module of the model: the op it now calls, the backend that runs it, or why it was left alone."""

    module: str
    type: str
    op: str  # "-" for a module that is as it was
    backend: str
    reason: str
    refused: bool = False  # whether stock PyTorch runs it because the op could not, whatever the size
    measured: bool = False  # whether the backend was chosen by what was measured on this machine

    @classmethod
    def of(cls, name: str, kind: str, op: str, explanation: registry.Explanation | None, why: str) -> Row:
        """Of a module that calls the op: what explain says, or why the stock forward runs."""
        if explanation is None:
            return cls(name, kind, op, "torch", why, refused=True)
        chosen = explanation.chosen
        reasons = {choice.backend: choice.reason for choice in explanation}
        why = reasons.get(chosen, "what use() forces refuses it")
        point = explanation.point
        if point is not None and chosen in point.gain:
            faster = min(us for name, us in point.us.items() if registry.is_stock(name)) / point.us[chosen]
            why = f"measured at {'x'.join(map(str, point.sizes))}: {faster:.2f}x as fast as torch"
        elif registry.is_stock(chosen):  # why no kernel of ours does, by the last that could on this device
            ours = [c for c in explanation if "_" not in c.backend and not registry.is_stock(c.backend)]
            here = [c for c in ours if not c.reason.startswith("tensors are on")]
            why = f"{here[-1].backend}: {here[-1].reason}" if here else why
        return cls(name, kind, op, chosen, why, measured=point is not None)


class Report(tuple[Row, ...]):
    """What was done to a model, module by module; prints as a table, where similar layers share a row."""

    @property
    def patched(self) -> int:
        """How many modules call an op now."""
        return len({row.module for row in self if row.op != "-"})

    @property
    def left(self) -> tuple[Row, ...]:
        """The rows of what was left to stock PyTorch because no op could stand in."""
        return tuple(row for row in self if row.refused)

    def json(self) -> str:
        return json.dumps([asdict(row) for row in self])

    def __str__(self) -> str:
        header = ("module", "type", "op", "backend", "reason")
        alike: dict[tuple[str, ...], list[str]] = {}
        for r in self:
            key = (_NUMBER.sub("#", r.module), r.type, r.op, r.backend, r.reason)
            alike.setdefault(key, []).append(r.module)
        lines = [header, *((together(names), *rest) for (_, *rest), names in alike.items())]
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        table = [
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(line[:4], widths, strict=True)), line[4]]
            ).rstrip()
            for line in lines
        ]
        table.append(f"{self.patched} modules patched, {len(self.left)} left alone")
        unmeasured = len({r.module for r in self if r.op != "-" and not r.measured})
        if unmeasured:
            table.append(
                f"for {unmeasured} of them nothing was measured here: run `bigkern tune` once (two minutes), "
                "or a step of this model inside `with bigkern.tune():`"
            )
        return "\n".join(table)

    __repr__ = __str__


_NUMBER = re.compile(r"\d+")


def together(names: Sequence[str]) -> str:
    """``layers.0-11.norm`` of names that differ in numbers alone."""
    columns = zip(*(map(int, _NUMBER.findall(name)) for name in names), strict=True)
    ranges = iter([_range(sorted(set(column))) for column in columns])
    return _NUMBER.sub(lambda _: next(ranges), names[0])


def _range(numbers: Sequence[int]) -> str:
    first, last = numbers[0], numbers[-1]
    if len(numbers) == 1:
        return str(first)
    return f"{first}-{last}" if last - first == len(numbers) - 1 else ",".join(map(str, numbers))


class PatchReport(Report):
    """The report of ``patch``; as a context manager it takes back at its end what that one call changed."""

    _undo: Callable[[], int]

    def __new__(cls, rows: Iterable[Row], undo: Callable[[], int]) -> PatchReport:
        self = super().__new__(cls, rows)
        self._undo = undo
        return self

    def __enter__(self) -> PatchReport:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo()

    def __reduce__(self) -> tuple[Any, ...]:
        return Report, (tuple(self),)  # a copy is what was said; it takes nothing back
