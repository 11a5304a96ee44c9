"""What every optimizer of this package shares: groups that hold pairs, and saving.

Roles of a parameter group
    pairs   low-rank pairs from ``lorapro.lora_param_groups``: ``params = [A0, B0, A1, B1, …]``, and
            in ``pairs`` the :class:`lorapro.factors.LoraPair` each two of them belong to
    plain   any other parameter, trained by the optimizer's ordinary rule
    base    frozen weights ``W0`` that decay with their adapter (``lorapro.bases``)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lorapro.bases import BASE, base_group, bases_to_move, decay_bases
from lorapro.choices import check_choice
from lorapro.distributed.sharding import sharding_of
from lorapro.distributed.zero import INSTEAD, refuse_pieces
from lorapro.functional import X_CHOICES
from lorapro.live import HELD, check_current, check_gradients, name_among
from lorapro.options import check_numbers
from lorapro.states import Resumable, check_held

__all__ = ["PAIRS", "PLAIN", "PairOptimizer", "plain_gradients"]

PAIRS, PLAIN = "pairs", "plain"


class PairOptimizer(Resumable):
    """A ``torch.optim.Optimizer`` whose groups may hold low-rank pairs.

    Subclasses implement :meth:`update` for one group. State is keyed by parameter, everything an
    instance needs lives in ``param_groups`` and ``state``, so copying, pickling and resuming are
    torch's own.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        check_numbers(defaults)
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
            ValueError: an option out of range, a parameter that is in a group already.
        """
        group = dict(param_group)
        group.setdefault("role", PLAIN)
        options = {**self.defaults, **group}
        check_choice("x", options["x"], X_CHOICES)
        check_numbers(options)
        if group["role"] == PAIRS:
            for pair, A, B in zip(
                group["pairs"], group["params"][::2], group["params"][1::2], strict=True
            ):
                sharding_of(pair, A, B)  # refuses what no step could work with
        decays = group["role"] == PAIRS and self.decays_bases(options)
        moved = bases_to_move(group, self.param_groups) if decays else []
        super().add_param_group(group)
        for p in group["params"]:
            setattr(p, HELD, True)
        if moved:
            super().add_param_group(base_group(moved, group, list(self.defaults)))

    def decays_bases(self, group: dict[str, Any]) -> bool:
        """Whether the base weights of a group of pairs decay with them: not as a rule."""
        return False

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
                decay_bases(group)
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
        check_held(self.state[p].get(key), p, shape, f"{key} of {name_among(self.param_groups, p)}")


def plain_gradients(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of a group that have gradients, and those.

    Raises:
        ValueError: a sparse gradient.
    """
    params = [p for p in group["params"] if p.grad is not None]
    grads = [p.grad for p in params]
    if any(g.is_sparse for g in grads):
        raise ValueError("a parameter has a sparse gradient, which AdamW and SGD here do not take.")
    return params, grads
