"""The update of the same tensors again and again, from a table of addresses that is packed once."""

from __future__ import annotations

import itertools
from typing import cast

import torch
from torch import Tensor

from bigkern.core import info
from bigkern.core.library import define_native
from bigkern.core.op import getter, listed
from bigkern.ops.adam.call import Adam, Lists

HYPER = {name: kind for name, kind in Adam.kinds.items() if name not in Lists.kinds}
define_native(
    "adam_pack(Tensor[] params, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor[] max_exp_avg_sqs,"
    " Tensor[] state_steps, Tensor[] masters, Tensor[] exp_avg_scales, Tensor[] exp_avg_sq_scales)"
    " -> Tensor table"
)
define_native(
    "adam_packed(Tensor param, Tensor exp_avg, Tensor? master, Tensor table, Tensor grads,"
    f" {listed(HYPER)}) -> ()"
)
define_native("grad_norm_packed(Tensor param, Tensor table, Tensor grads) -> Tensor")

_native = torch.ops.bigkern_native
_kept = getter([name for name in Lists.names if name != "grads"])
_hyper = getter(tuple(HYPER))


def _in_one(lists: Lists) -> list[Tensor]:
    return list(itertools.chain.from_iterable(_kept(lists)))


class Packed:
    """Parameters and their states as the table of addresses that the compiled kernels read.

    Unpacking lists of thousands of tensors costs more than updating small ones. A caller that updates
    the same tensors again and again packs them once, and before each use asks where they and the new
    gradients are: :meth:`find`.
    """

    def __init__(self, lists: Lists):
        """Pack all but the gradients."""
        self._table = _native.adam_pack.default(*_kept(lists))
        master = lists.masters[0] if lists.masters else None
        self._like = (lists.params[0], lists.exp_avgs[0], master)
        self._addresses = info.addresses(_in_one(lists))
        self._layouts = info.layouts([*lists.params, *lists.params])

    def find(self, lists: Lists) -> Tensor | None:
        """The gradients' addresses, for :meth:`update`; None unless each is stored as its parameter was and
        is, and the others lie where they lay when they were packed. None may be lazily negated."""
        try:
            found = info.addresses(lists.grads)
            if info.layouts([*lists.params, *lists.grads]) != self._layouts:
                return None
            if info.addresses(_in_one(lists)) != self._addresses:
                return None
        except RuntimeError:  # one has no address
            return None
        return torch.frombuffer(found, dtype=torch.int64)

    def update(self, grads: Tensor, call: Adam) -> None:
        """The op on what was packed, and on the gradients that :meth:`find` found."""
        _native.adam_packed.default(*self._like, self._table, grads, *_hyper(call))

    def grad_norm(self, grads: Tensor) -> Tensor:
        """The norm of the gradients that :meth:`find` found."""
        return cast(Tensor, _native.grad_norm_packed.default(self._like[0], self._table, grads))
