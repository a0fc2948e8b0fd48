"""Adam and AdamW as drop-in replacements of ``torch.optim``'s.

They *are* torch's classes: constructor, errors, parameter groups, hooks and state dicts are inherited.
Only the step differs. It gathers a group's tensors once, and then, as long as they are the same tensors
in the same memory, hands bigkern's op a ready table:

    step 1   torch's _init_group -> buckets by device and dtype -> which backend     a plan
    step 2   the plan still holds? -> pack the addresses -> one call a bucket
    step 3   the plan still holds? -> one call a bucket
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import starmap
from operator import attrgetter, is_, itemgetter
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adam import adam as torch_adam
from torch.optim.optimizer import _use_grad_for_differentiable

from bigkern import registry
from bigkern.ops.adam import ADAM, Packed
from bigkern.ops.adam_arguments import split_lr

Group = dict[str, Any]
Tensors = list[Tensor]


@dataclass
class _Bucket:
    """The parameters of a group that share a device and a dtype: one call of the op."""

    params: list[Tensor]
    states: list[dict[str, Tensor]]
    backend: registry.Backend
    amsgrad: bool
    packed: Packed | None = None

    def lists(self) -> tuple[Tensors, ...] | None:
        """The op's lists as they are now, or None where they are not what this bucket was made for."""
        grads: Any = [p.grad for p in self.params]
        if any(g is None for g in grads) or any(map(attrgetter("is_sparse"), grads)):
            return None
        maxima = self._of("max_exp_avg_sq") if self.amsgrad else []
        states = (self._of("exp_avg"), self._of("exp_avg_sq"), maxima, self._of("step"))
        if self.packed is not None and not self.packed.matches((self.params, *states, [], [], [])):
            return None
        if self.packed is None and len(set(map(attrgetter("device", "dtype"), self.params))) != 1:
            return None
        return self.params, grads, *states, [], [], []

    def _of(self, key: str) -> Tensors:
        return list(map(itemgetter(key), self.states))

    def update(self, lists: tuple[Tensors, ...], hyper: tuple[Any, ...]) -> None:
        if self.backend.name not in ("cuda", "cpu"):
            self.backend.forward(*lists, *hyper)
            return
        params, grads, *states = lists
        if self.packed is None:
            self.packed = Packed((params, *states))
        if self.packed.fits(grads):
            self.packed.update(grads, *hyper)
            torch.autograd.graph.increment_version(params)
        else:
            ADAM.resolve(*lists, *hyper).forward(*lists, *hyper)


@dataclass
class _Plan:
    """What the steps of one group have in common, until something about the group changes."""

    params: Tensors
    amsgrad: bool
    buckets: list[_Bucket]
    idle: Tensors  # the group's parameters that have no gradient

    def lists(self, group: Group) -> list[tuple[Tensors, ...]] | None:
        """The buckets' lists, or None where the plan no longer holds."""
        if self.amsgrad != group["amsgrad"] or not _same(self.params, group["params"]):
            return None
        if any(p.grad is not None for p in self.idle):
            return None
        lists = [bucket.lists() for bucket in self.buckets]
        return None if any(bucket is None for bucket in lists) else cast(Any, lists)


def _same(these: list[Any], those: list[Any]) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))


def _empty_lists() -> tuple[Tensors, Tensors, Tensors, Tensors, Tensors, Tensors]:
    """params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps: torch's order, and the op's."""
    return [], [], [], [], [], []


def _plain(tensors: Iterable[Tensor]) -> bool:
    return set(map(type, tensors)) <= {Tensor, Parameter}


class _Step(torch.optim.Adam):
    """The step that both optimizers share."""

    _step_supports_amp_scaling = True  # GradScaler leaves unscaling and skipping to the kernel

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            for group in self.param_groups:
                self._torch_step(group)
            return loss
        plans = self._plans()
        for index, group in enumerate(self.param_groups):
            if _needs_torch(group) is not None:
                self._torch_step(group)
            else:
                self._step_group(plans, index, group)
        self.__dict__["_planned_states"] = list(self.state.values())
        return loss

    def explain(self) -> list[registry.Explanation]:
        """Which backend updates each group's parameters, and why each other one does not.

        Creates the state of parameters that have a gradient, as a step would, and updates nothing.

        Example:
            >>> import torch, bigkern
            >>> model = torch.nn.Linear(4, 4)
            >>> model(torch.ones(1, 4)).sum().backward()
            >>> bigkern.optim.AdamW(model.parameters()).explain()[0].chosen in ("cpu", "torch")
            True
        """
        with torch.no_grad():
            return [e for group in self.param_groups for e in self._explain_group(group)]

    def _explain_group(self, group: Group) -> list[registry.Explanation]:
        if (reason := _needs_torch(group)) is not None:
            return [registry.Explanation("adam", [registry.Choice("torch", True, reason)])]
        return list(starmap(ADAM.explain, self._calls(group)))

    # ---- a group's step ---------------------------------------------------------------------------

    def _plans(self) -> dict[int, _Plan]:
        """The plans of earlier steps, if the states that they gathered are still this optimizer's."""
        plans: dict[int, _Plan] = self.__dict__.setdefault("_plans_by_group", {})
        if not _same(self.__dict__.get("_planned_states", []), list(self.state.values())):
            plans.clear()
        return plans

    def _step_group(self, plans: dict[int, _Plan], index: int, group: Group) -> None:
        plan = plans.get(index)
        lists = None if plan is None or registry.forced() else plan.lists(group)
        if plan is not None and lists is not None:
            for bucket, bucket_lists in zip(plan.buckets, lists, strict=True):
                bucket.update(bucket_lists, self._hyper(group, bucket.params[0].device))
            return
        plans.pop(index, None)
        calls = self._calls(group)
        if not all(_plain(call[0]) and _plain(call[1]) for call in calls):
            self._torch_step(group)
            return
        backends = list(starmap(ADAM.resolve, calls))
        for backend, call in zip(backends, calls, strict=True):
            backend.forward(*call)
        if not registry.forced():
            buckets = [
                _Bucket(call[0], [self.state[p] for p in call[0]], backend, group["amsgrad"])
                for backend, call in zip(backends, calls, strict=True)
            ]
            idle = [p for p in group["params"] if p.grad is None]
            plans[index] = _Plan(list(group["params"]), group["amsgrad"], buckets, idle)

    def _calls(self, group: Group) -> list[tuple[Any, ...]]:
        """The op's arguments, one call for each device and dtype; creates missing state as torch does."""
        lists = _empty_lists()
        self._init_group(group, *lists)
        params, *_, steps = lists
        for i, (p, step) in enumerate(zip(params, steps, strict=True)):
            if step.device != p.device and p.is_floating_point() and _plain([p]):
                # torch counts on the CPU without fused or capturable; kernels read where they run.
                self.state[p]["step"] = steps[i] = step.to(p.device, torch.float32)
        buckets: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, p in enumerate(params):
            buckets.setdefault((p.device, p.dtype), []).append(i)
        return [
            (*([x[i] for i in chosen] if x else [] for x in lists), [], [], [], *self._hyper(group, device))
            for (device, _dtype), chosen in buckets.items()
        ]

    def _hyper(self, group: Group, device: torch.device) -> tuple[Any, ...]:
        """The op's arguments after the lists."""
        lr, lr_tensor = split_lr(group["lr"], device)
        beta1, beta2 = group["betas"]
        rates = (lr, float(beta1), float(beta2), float(group["eps"]), float(group["weight_decay"]))
        flags = (bool(group["decoupled_weight_decay"]), bool(group["amsgrad"]), bool(group["maximize"]))
        grad_scale, found_inf = (self._scalar(name, device) for name in ("grad_scale", "found_inf"))
        return *rates, *flags, False, 0.0, None, grad_scale, found_inf, lr_tensor, None

    def _scalar(self, name: str, device: torch.device) -> Tensor | None:
        """What GradScaler leaves on the optimizer for the length of a step."""
        value = getattr(self, name, None)
        return None if value is None else value.to(device, torch.float32, non_blocking=True)

    def _torch_step(self, group: Group) -> None:
        """One group's step as torch.optim takes it, with the group's own foreach and fused."""
        lists = _empty_lists()
        has_complex = self._init_group(group, *lists)
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if not group["fused"]:
            if found_inf is not None and bool(found_inf):
                return
            if grad_scale is not None:
                for grad in lists[1]:
                    grad.div_(grad_scale.to(grad.device))
            grad_scale = found_inf = None
        beta1, beta2 = group["betas"]
        torch_adam(
            *lists,
            amsgrad=group["amsgrad"],
            has_complex=has_complex,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            foreach=group["foreach"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            fused=group["fused"],
            grad_scale=grad_scale,
            found_inf=found_inf,
            decoupled_weight_decay=group["decoupled_weight_decay"],
        )


def _needs_torch(group: Group) -> str | None:
    """Why a group cannot be given to the op at all."""
    if group["differentiable"]:
        return "differentiable=True: autograd must see every operation"
    for name in ("betas", "eps", "weight_decay"):
        values = group[name] if name == "betas" else (group[name],)
        if any(isinstance(value, Tensor) for value in values):
            return f"{name} is a Tensor"
    return None


class Adam(_Step):
    r"""Adam with the arguments, defaults, errors and state of :class:`torch.optim.Adam`.

    ``m = beta1 m + (1 - beta1) g``, ``v = beta2 v + (1 - beta2) g^2``,
    ``p = p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)``

    One kernel reads and writes each tensor once. State dicts are torch's and load both ways, in the
    middle of a run. With :class:`torch.amp.GradScaler`, unscaling and skipping happen inside the kernel.
    ``foreach`` and ``fused`` are accepted and name paths of torch's, which are only taken where bigkern's
    kernels do not reach: float64, complex, DTensor, ``differentiable``; see :meth:`explain`.

    On a GPU the counts ``state["step"]`` live there, so every step can be captured in a CUDA graph and
    none waits for the device.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate, a number or a one-element tensor.
        betas: decay of the gradient's mean and of its square's.
        eps: added to the denominator.
        weight_decay: added to the gradient, times the parameter; with ``decoupled_weight_decay``, AdamW.
        amsgrad: divide by the largest second moment so far.
        foreach, maximize, capturable, differentiable, fused, decoupled_weight_decay: as torch's.

    Raises:
        ValueError, RuntimeError: as torch's class, naming the argument.

    Source: Kingma and Ba, Adam (2015); :class:`torch.optim.Adam`.

    Example:
        >>> import torch, bigkern
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = bigkern.optim.Adam(model.parameters(), lr=1e-3)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> isinstance(optimizer, torch.optim.Adam)
        True
    """


class AdamW(_Step, torch.optim.AdamW):
    r"""AdamW with the arguments, defaults, errors and state of :class:`torch.optim.AdamW`.

    As :class:`Adam`, but for the weight decay: ``p = p (1 - lr * weight_decay)`` before the update, and
    nothing added to the gradient.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused:
            as torch's class; see :class:`Adam`.

    Raises:
        ValueError, RuntimeError: as torch's class, naming the argument.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019);
    :class:`torch.optim.AdamW`.

    Example:
        >>> import torch, bigkern
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = bigkern.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state_dict()["state"][0])
        ['step', 'exp_avg', 'exp_avg_sq']
    """
