"""Parameters that live on a device and are updated in the CPU's memory, beside their states.

device    p, g  ---- fetch ---->  p, g          host, pinned
                                  m, v, master  host, pinned, never on the device
          p     <-- send back --  p             after the step
"""

from __future__ import annotations

import torch
from torch import Tensor


class Transfer:
    """The host's copies of a list of parameters and their gradients; the same way from CPU to CPU."""

    def __init__(self, params: list[Tensor]):
        self.host = [_host_like(p) for p in params], [_host_like(p) for p in params]
        self._kinds = _kinds(params)

    def matches(self, params: list[Tensor], grads: list[Tensor]) -> bool:
        shapes_agree = [g.shape for g in grads] == [p.shape for p in params]
        return shapes_agree and _kinds(params) == self._kinds

    def fetch(self, params: list[Tensor], grads: list[Tensor]) -> None:
        """Copy to the host, and wait until it is there."""
        _copy(self.host[0] + self.host[1], params + grads)
        for device in {p.device for p in params if p.device.type != "cpu"}:
            torch.accelerator.current_stream(device).synchronize()

    def send_back(self, params: list[Tensor], grads: list[Tensor], with_grads: bool) -> None:
        """Copy to the device, whose stream orders this before whatever uses it next."""
        _copy(params, self.host[0])
        if with_grads:
            _copy(grads, self.host[1])


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)


def _host_like(p: Tensor) -> Tensor:
    return torch.empty_like(p.detach(), device="cpu", pin_memory=p.is_cuda)


def _kinds(params: list[Tensor]) -> list[tuple[torch.dtype, torch.Size, tuple[int, ...]]]:
    return [(p.dtype, p.shape, p.stride()) for p in params]
