"""The step that both optimizers share.

It gathers a group's tensors once, and then, as long as they are the same tensors in the same memory, hands
bigkern's op a ready table:

    step 1   torch's _init_group -> buckets -> which backend                     a plan (plan.py)
    step 2   the plan still holds? -> pack the addresses -> one call a bucket
    step 3   the plan still holds? -> one call a bucket

With ``max_norm`` the norm of all gradients of all groups is taken between the gathering and the calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import _use_grad_for_differentiable

from bigkern.core import registry
from bigkern.ops.adam import ADAM
from bigkern.ops.adam.call import Adam, Lists, number, split_lr
from bigkern.optim import backward, states
from bigkern.optim.offload import Transfer
from bigkern.optim.options import SEED, Group, Storage, mixed, name_of
from bigkern.optim.plan import Bucket, Plan, Tensors, gradient_problem, plain, same
from bigkern.optim.shards import align_gradient, coordinate, is_dtensor, layout_of, raw, total_norm
from bigkern.optim.state_dicts import StateDict, StateDicts
from bigkern.optim.torch_step import needs_torch, torch_step

Key = tuple[int, ...]  # a group's index; and a parameter's in it, where it is updated alone
Call = tuple[Group, Bucket, Lists]


class Step(StateDicts):
    """What :class:`bigkern.optim.Adam` and ``AdamW`` do in torch's place."""

    _step_supports_amp_scaling = True  # GradScaler leaves unscaling and skipping to the kernel

    grad_norm: Tensor | None = None
    """With ``max_norm``: the norm of all gradients, unscaled, before they were clipped in the last step."""

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient is sparse, or not of its parameter's shape, dtype or device; no
                parameter has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not torch.compiler.is_compiling():
            self._step_groups()
        elif any(self._options.in_use(group) for group in self.param_groups):
            _step_groups_untraced(self)
        else:
            for group in self.param_groups:
                torch_step(self, group)
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
            return [e for i, group in enumerate(self.param_groups) for e in self._explain_group(i, group)]

    def _explain_group(self, index: int, group: Group) -> list[registry.Explanation]:
        if (reason := needs_torch(group)) is not None:
            return [registry.Explanation("adam", [registry.Choice("torch", True, reason)])]
        return [
            ADAM.explain(self._call(group, bucket, lists, None))
            for bucket in self._buckets((index,), group)
            if (lists := bucket.lists()) is not None
        ]

    def add_param_group(self, param_group: Group) -> None:
        """torch's, with storage options of its own: ``state_dtype``, ``master_weights``,
        ``stochastic_rounding`` and ``seed`` may stand in a group like ``lr``."""
        super().add_param_group(param_group)
        try:
            self._options.complete(param_group)
            self._check_options(param_group)
        except Exception:
            self.param_groups.pop()
            raise
        self._attach()

    def _check_options(self, group: Group) -> None:
        self._check_torch_step(group, needs_torch(group))
        for p in group["params"]:
            Storage.of(p, group, self._options.offload)
            if self._options.offload and is_dtensor(p):
                raise ValueError("offload is not for DTensors: FSDP2 has its own, CPUOffloadPolicy")
            if self._options.in_backward and (why := backward.problem(p)) is not None:
                raise ValueError(why)

    def _check_torch_step(self, group: Group, reason: str | None) -> None:
        """Refuse options where only torch's own step will do."""
        option = self._options.in_use(group)
        if option is not None and reason is not None:
            raise ValueError(f"{option} does not go with a step of torch's own: {reason}")

    # ---- in the backward pass ---------------------------------------------------------------------

    def _attach(self) -> None:
        if self._options.in_backward:
            backward.attach(self, self.__dict__.setdefault("_backward_hooks", {}))

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        self._attach()

    def step_parameter(self, index: int, position: int) -> None:
        """Update one parameter alone: what ``in_backward`` does when its gradient is there."""
        group = self.param_groups[index]
        p = group["params"][position]
        plans = self._plans()
        known = plans.get((index, position))
        if known is not None and known.buckets[0].states[0] is not self.state.get(p):
            del plans[index, position]
        alone = {**group, "params": [p]}
        self._update(self._calls((index, position), alone))

    # ---- all groups -------------------------------------------------------------------------------

    def _step_groups(self) -> None:
        if self._options.in_backward and getattr(self, "found_inf", None) is not None:
            raise RuntimeError("in_backward steps before GradScaler has seen the gradients: use bfloat16")
        plans = self._plans()
        if not same(self.__dict__.get("_planned_states", []), list(self.state.values())):
            plans.clear()
        calls: list[Call] = []
        for index, group in enumerate(self.param_groups):
            if (reason := needs_torch(group)) is not None:
                self._check_torch_step(group, reason)
                torch_step(self, group)
            else:
                calls += self._calls((index,), group)
        self._update(calls)
        self.__dict__["_planned_states"] = list(self.state.values())

    def _plans(self) -> dict[Key, Plan]:
        plans: dict[Key, Plan] = self.__dict__.setdefault("_plans_by_key", {})
        return plans

    def _update(self, calls: list[Call]) -> None:
        norm = self._norm(calls) if self._options.max_norm is not None else None
        ready = [(bucket, lists, self._call(group, bucket, lists, norm)) for group, bucket, lists in calls]
        for bucket, lists, call in ready:
            bucket.resolve(lists, call)
        grads_change = self._options.zero_grads or getattr(self, "grad_scale", None) is not None
        for bucket, lists, call in ready:
            bucket.update(lists, call, grads_change)

    def _norm(self, calls: list[Call]) -> Tensor:
        """The norm of all gradients as they came, with grad_scale still in them."""
        norm = total_norm([(bucket.layout, bucket.grad_norm(lists)) for _, bucket, lists in calls])
        scale = self._scalar("grad_scale", norm.device)
        self.grad_norm = norm if scale is None else norm / scale
        return norm

    # ---- a group ----------------------------------------------------------------------------------

    def _calls(self, key: Key, group: Group) -> list[Call]:
        """The buckets of a group with their lists, from its plan if that still holds."""
        plans = self._plans()
        plan = None if registry.forced() else plans.get(key)
        lists = None if plan is None else plan.lists(group)
        if plan is not None and lists is not None:
            return [(group, bucket, now) for bucket, now in zip(plan.buckets, lists, strict=True)]
        plans.pop(key, None)
        buckets = self._buckets(key, group)
        calls = [(group, bucket, now) for bucket in buckets if (now := bucket.lists()) is not None]
        if not all(plain(lists.params) and plain(lists.grads) for _, _, lists in calls):
            self._check_torch_step(group, "a parameter is of a subclass of Tensor")
            torch_step(self, group)
            return []
        if not registry.forced():
            idle = [p for p in group["params"] if p.grad is None]
            plans[key] = Plan(list(group["params"]), group["amsgrad"], group.get(SEED), buckets, idle)
        return calls

    def _buckets(self, key: Key, group: Group) -> list[Bucket]:
        """One for each device, dtype, storage and sharding; creates missing state."""
        params = self._ready_params(group)
        kinds: dict[Any, Tensors] = {}
        for p in params:
            state = self.state[p]
            local, moment, master = raw(p), raw(state["exp_avg"]), state.get("master")
            kind = (local.device, local.dtype, moment.dtype, getattr(master, "dtype", None), layout_of(p))
            kinds.setdefault(kind, []).append(p)
        return [self._bucket(group, (*key, n), chosen) for n, chosen in enumerate(kinds.values())]

    def _init_group(self, group: Group, *lists: Any) -> Any:
        """torch's, of states that lie in memory as their parameters do: no fused step looks at strides."""
        if not group["differentiable"]:
            for p in group["params"]:
                if p.grad is not None and p in self.state:
                    states.align(self.state[p], p, self._options.offload)
        return super()._init_group(group, *lists)

    def _bucket(self, group: Group, place: Key, params: Tensors) -> Bucket:
        layout, seed = layout_of(params[0]), None
        if SEED in group and Storage.of(params[0], group, False).rounds_at_random(params[0]):
            seed = mixed(group[SEED], *place, *coordinate(layout))
        transfer = Transfer(list(map(raw, params))) if self._options.offload else None
        return Bucket(params, [self.state[p] for p in params], group["amsgrad"], layout, seed, transfer)

    def _ready_params(self, group: Group) -> Tensors:
        """The parameters that have a gradient, with state."""
        with_grad = [p for p in group["params"] if p.grad is not None]
        for p in with_grad:
            align_gradient(p)
            if (problem := gradient_problem(p)) is not None:
                raise RuntimeError(f"{problem}: {name_of(self.param_groups, p)}")
        for p in with_grad:
            storage = Storage.of(p, group, self._options.offload)
            if len(self.state[p]) == 0 and not storage.is_torchs(p):
                self.state[p] = states.new(p, storage)
        params: Tensors = []
        self._init_group(group, params, [], [], [], [], [])
        for p in params:
            local, step = raw(p), self.state[p]["step"]
            device = torch.device("cpu") if self._options.offload else local.device
            if step.device != device and plain([local]):
                # torch counts on the CPU without fused or capturable; kernels read where they run.
                self.state[p]["step"] = step.to(device, torch.float32)
        return params

    def _call(self, group: Group, bucket: Bucket, lists: Lists, norm: Tensor | None) -> Adam:
        device = bucket.device
        lr, lr_tensor = split_lr(group["lr"], device)
        beta1, beta2 = group["betas"]
        return Adam(  # type: ignore[misc]  # mypy does not know how many the lists are
            *bucket.where_it_runs(lists).flat(),
            lr=lr,
            beta1=number("betas", beta1),
            beta2=number("betas", beta2),
            eps=number("eps", group["eps"]),
            weight_decay=number("weight_decay", group["weight_decay"]),
            decoupled=bool(group["decoupled_weight_decay"]),
            amsgrad=bool(group["amsgrad"]),
            maximize=bool(group["maximize"]),
            zero_grads=self._options.zero_grads,
            max_norm=float(self._options.max_norm or 0.0),
            seed=bucket.seed,
            grad_scale=self._scalar("grad_scale", device),
            found_inf=self._scalar("found_inf", device),
            lr_tensor=lr_tensor,
            grad_norm=None if norm is None else norm.to(device, torch.float32, non_blocking=True),
        )

    def _scalar(self, name: str, device: torch.device) -> Tensor | None:
        """What GradScaler leaves on the optimizer for the length of a step."""
        value = getattr(self, name, None)
        return None if value is None else value.to(device, torch.float32, non_blocking=True)


_step_groups_untraced = _disable_dynamo(Step._step_groups)
