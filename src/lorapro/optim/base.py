"""What every optimizer of this package shares: groups that hold pairs, and saving.

Roles of a parameter group
    pairs   low-rank pairs from ``lorapro.lora_param_groups``: ``params = [A0, B0, A1, B1, …]``, and
            in ``pairs`` the :class:`lorapro.factors.LoraPair` each two of them belong to
    plain   any other parameter, trained by the optimizer's ordinary rule
    base    frozen weights ``W0`` that decay with their adapter (AdamW in full mode only)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lorapro.choices import check_choice
from lorapro.distributed.sharding import local, sharding_of
from lorapro.distributed.zero import INSTEAD, refuse_pieces
from lorapro.functional import X_CHOICES
from lorapro.live import HELD, Places, check_current, check_gradients, name_of
from lorapro.states import DESCRIBED, check_held, check_same, describe, keep_float32

__all__ = ["BASE", "PAIRS", "PLAIN", "PairOptimizer"]

PAIRS, PLAIN, BASE = "pairs", "plain", "base"
# What describes the model rather than the run: kept from the live optimizer when a state is loaded.
STRUCTURE = ("role", "pairs", "names", "places", "unaligned")
WEIGHT = "weight"


class PairOptimizer(Optimizer):
    """A ``torch.optim.Optimizer`` whose groups may hold low-rank pairs.

    Subclasses implement :meth:`update` for one group. State is keyed by parameter, everything an
    instance needs lives in ``param_groups`` and ``state``, so copying, pickling and resuming are
    torch's own.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        _check_lr(defaults["lr"])
        if not defaults["weight_decay"] >= 0:
            raise ValueError(f"weight_decay is {defaults['weight_decay']}, expected 0 or more.")
        if not 0 <= defaults["damping"] < float("inf"):
            raise ValueError(f"damping is {defaults['damping']}, expected 0 or more steps.")
        super().__init__(params, defaults)
        if not any(group["role"] == PAIRS for group in self.param_groups):
            raise ValueError(
                "no parameter group holds LoRA pairs; build the groups with "
                "lorapro.lora_param_groups(model)."
            )

    def __repr__(self) -> str:
        lines = []
        for group in self.param_groups:
            held = str(len(group["params"]))
            if group["role"] == PAIRS:
                ranks = sorted({pair.rank for pair in group["pairs"]})
                held = f"{len(group['pairs'])} of rank {', '.join(map(str, ranks))}"
            shown = ", ".join(f"{key}={group[key]!r}" for key in self.defaults)
            lines.append(f"    {group['role']} ({held}): {shown}\n")
        return f"{type(self).__name__}(\n{''.join(lines)})"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: one from ``lorapro.lora_param_groups``, or plain parameters.

        Raises:
            ValueError: unknown x, a non-positive lr, a parameter that is in a group already.
        """
        group = dict(param_group)
        group.setdefault("role", PLAIN)
        check_choice("x", group.get("x", self.defaults["x"]), X_CHOICES)
        _check_lr(group.get("lr", self.defaults["lr"]))
        if group["role"] == PAIRS:
            for pair, A, B in zip(
                group["pairs"], group["params"][::2], group["params"][1::2], strict=True
            ):
                sharding_of(pair, A, B)  # refuses what no step could work with
        moved = self.bases_to_move(group)
        super().add_param_group(group)
        for p in group["params"]:
            setattr(p, HELD, True)
        if moved:
            options = {k: group[k] for k in self.defaults}
            bases: dict[str, Any] = {"params": moved, "role": BASE}
            if group.get("places"):
                from lorapro.export_guard import guard_saving

                bases["places"] = Places(group["places"].model, moved)
                guard_saving(group["places"].model)  # no adapter holds the base that decays
            super().add_param_group({**bases, **options})

    def bases_to_move(self, group: dict[str, Any]) -> list[Any]:
        """Base weights that a new group of pairs makes this optimizer decay: none, as a rule."""
        return []

    def update(self, group: dict[str, Any]) -> None:
        """Step one group."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: computes the loss and its gradients again, as for any torch optimizer.

        Returns:
            The closure's loss, or ``None``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not torch.compiler.is_compiling():
            self._check_live()
        for group in self.param_groups:
            if group["role"] == BASE:
                self._decay_bases(group)
            else:
                self.update(group)
        return loss

    def _check_live(self) -> None:
        """Refuse a step on what the model no longer trains, see ``lorapro.live``."""
        groups = [group for group in self.param_groups if group["role"] == PAIRS]
        pairs = [pair for group in groups for pair in group["pairs"]]
        cannot = f"{type(self).__name__} cannot step these"
        refuse_pieces(pairs, f"{cannot}: {INSTEAD}; for other modes use DDP or FSDP2.")
        check_current(self.param_groups)
        params = [p for group in groups for p in group["params"]]
        check_gradients(pairs, params, first=not getattr(self, "_has_stepped", False))
        self._has_stepped = True

    def check_state(self, p: Tensor, key: str, shape: Sequence[int]) -> None:
        """Refuse a state that does not go with its parameter: a ``ValueError`` names both."""
        check_held(self.state[p][key], p, shape, f"{key} of {self.name_of(p)}")

    def name_of(self, p: Tensor) -> str:
        """What a parameter is called in messages."""
        for group in self.param_groups:
            for i, q in enumerate(group["params"]):
                if p is q:
                    return name_of(group, i)
        return "a parameter"

    def _decay_bases(self, group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            torch._foreach_mul_(local(group["params"]), 1 - group["lr"] * group["weight_decay"])
            for p in group["params"]:
                p.lorapro_decayed = True  # read when an adapter is exported without its base

    def state_dict(self) -> dict[str, Any]:
        """As torch's; decayed base weights ride along, since no adapter file carries them."""
        for group in self.param_groups:
            if group["role"] == BASE:
                for p in group["params"]:
                    self.state[p][WEIGHT] = p.detach()
        packed = super().state_dict()
        self._drop_carried_weights()
        for group in packed["param_groups"]:
            group.pop("places", None)
            if "pairs" in group:
                group |= describe(group.pop("pairs"))
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's. Pairs keep the scalings of the live model.

        Raises:
            ValueError: the state was saved for other pairs, ranks, shapes, or another mode or x.
        """
        live = [{k: g[k] for k in STRUCTURE if k in g} for g in self.param_groups]
        check_same(state_dict, self.param_groups)
        super().load_state_dict(state_dict)
        keep_float32(self, state_dict)
        for group, own in zip(self.param_groups, live, strict=True):
            for key in DESCRIBED:
                group.pop(key, None)
            group.update(own)
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            if group["role"] == BASE:
                for p in group["params"]:
                    if WEIGHT in self.state.get(p, {}):
                        p.copy_(self.state[p][WEIGHT])
        self._drop_carried_weights()

    def _drop_carried_weights(self) -> None:
        for group in self.param_groups:
            if group["role"] == BASE:
                for p in group["params"]:
                    self.state.pop(p, None)


def _check_lr(lr: Any) -> None:
    if isinstance(lr, Tensor) and lr.dim():
        raise ValueError(f"lr is a tensor of shape {tuple(lr.shape)}, expected one without any.")
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr is {lr}, expected a positive finite learning rate.")
