"""What every optimizer of this package shares: groups that hold pairs, stacking by shape, saving.

Roles of a parameter group
    pairs   low-rank pairs, ``params = [A0, B0, A1, B1, …]``, from ``lorapro.lora_param_groups``
    plain   any other parameter, trained by the optimizer's ordinary rule
    base    frozen weights ``W0`` that decay with their adapter (AdamW in full mode only)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lorapro.choices import check_choice
from lorapro.factors import as_A, as_B, from_A, from_B
from lorapro.functional import X_CHOICES, align

__all__ = ["Bucket", "PairOptimizer", "aligned_gradients", "buckets", "plain_gradients"]

PAIRS, PLAIN, BASE = "pairs", "plain", "base"
# What describes the model rather than the run: kept from the live optimizer when a state is loaded.
STRUCTURE = ("role", "names", "scalings", "layouts", "blocks", "unaligned")
WEIGHT = "weight"


class Bucket(NamedTuple):
    """Pairs of one shape, stacked: (k, r, n) and (k, m, r), k the number of matrices in all."""

    params: list[tuple[Tensor, Tensor]]
    layout: str
    blocks: int
    A: Tensor
    B: Tensor
    grad_A: Tensor | None
    grad_B: Tensor | None
    scaling: float | Tensor

    def split(self, d_A: Tensor | None, d_B: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Undo the stacking: (parameter, direction in its stored shape and dtype)."""
        for i, (A, B) in enumerate(self.params):
            part = slice(i * self.blocks, (i + 1) * self.blocks)
            if d_A is not None:
                yield A, from_A(d_A[part], A).to(A.dtype)
            if d_B is not None:
                yield B, from_B(d_B[part], B, self.layout).to(B.dtype)


def buckets(group: dict[str, Any]) -> Iterator[Bucket]:
    """Stack the pairs of a group by shape, dtype, device, layout and which gradients exist.

    Pairs without any gradient are left out.

    Raises:
        RuntimeError: a sparse gradient.
    """
    rows: dict[tuple[Any, ...], list[int]] = {}
    params = group["params"]
    for i, (layout, blocks) in enumerate(zip(group["layouts"], group["blocks"], strict=True)):
        A, B = params[2 * i], params[2 * i + 1]
        if A.grad is None and B.grad is None:
            continue
        for p in (A, B):
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(
                    f"pair {group['names'][i]!r} has a sparse gradient; build the embedding with "
                    "sparse=False."
                )
        key = (A.shape, B.shape, A.dtype, B.dtype, A.device, layout, blocks)
        rows.setdefault((*key, A.grad is None, B.grad is None), []).append(i)
    for (*_, layout, blocks, no_A, no_B), members in rows.items():
        pairs = [(params[2 * i], params[2 * i + 1]) for i in members]
        values = [group["scalings"][i] for i in members]
        scaling: float | Tensor = values[0]
        if any(v != values[0] for v in values):
            repeated = [v for v in values for _ in range(blocks)]
            scaling = torch.tensor(repeated, dtype=torch.float64, device=pairs[0][0].device)
        yield Bucket(
            pairs,
            layout,
            blocks,
            torch.cat([as_A(A.detach(), layout, blocks) for A, _ in pairs]),
            torch.cat([as_B(B.detach(), layout, blocks) for _, B in pairs]),
            None if no_A else torch.cat([as_A(A.grad, layout, blocks) for A, _ in pairs]),
            None if no_B else torch.cat([as_B(B.grad, layout, blocks) for _, B in pairs]),
            scaling,
        )


def aligned_gradients(group: dict[str, Any], x: str) -> list[tuple[Tensor, Tensor]]:
    """(parameter, aligned gradient) for every parameter of a pairs group that has a gradient."""
    aligned: list[tuple[Tensor, Tensor]] = []
    for b in buckets(group):
        aligned += b.split(*align(b.A, b.B, b.grad_A, b.grad_B, b.scaling, x=x))
    return aligned


def plain_gradients(group: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """(parameter, gradient) for every parameter of a plain group that has a gradient."""
    return [(p, p.grad) for p in group["params"] if p.grad is not None]


class PairOptimizer(Optimizer):
    """A ``torch.optim.Optimizer`` whose groups may hold low-rank pairs.

    Subclasses implement :meth:`update` for one group. State is keyed by parameter, everything an
    instance needs lives in ``param_groups`` and ``state``, so copying, pickling and resuming are
    torch's own.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        lr = defaults["lr"]
        if not lr > 0:
            raise ValueError(f"lr is {lr}, expected a positive learning rate.")
        if not defaults["weight_decay"] >= 0:
            raise ValueError(f"weight_decay is {defaults['weight_decay']}, expected 0 or more.")
        super().__init__(params, defaults)
        if not any(group["role"] == PAIRS for group in self.param_groups):
            raise ValueError(
                "no parameter group holds LoRA pairs; build the groups with "
                "lorapro.lora_param_groups(model)."
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: one from ``lorapro.lora_param_groups``, or plain parameters.

        Raises:
            ValueError: unknown x, a non-positive lr, a parameter that is in a group already.
        """
        group = dict(param_group)
        group.setdefault("role", PLAIN)
        check_choice("x", group.get("x", self.defaults["x"]), X_CHOICES)
        lr = group.get("lr", self.defaults["lr"])
        if not lr > 0:
            raise ValueError(f"lr is {lr}, expected a positive learning rate.")
        bases = group.pop("bases", None)
        super().add_param_group(group)
        if group["role"] == PAIRS:
            self._adopt_bases(group, bases or [])

    def _adopt_bases(self, group: dict[str, Any], bases: list[Any]) -> None:
        """Hook for optimizers that also move the base weights."""

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
        for group in self.param_groups:
            if group["role"] == BASE:
                self._decay_bases(group)
            else:
                self.update(group)
        return loss

    def _decay_bases(self, group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])

    def state_dict(self) -> dict[str, Any]:
        """As torch's; decayed base weights ride along, since no adapter file carries them."""
        for group in self.param_groups:
            if group["role"] == BASE:
                for p in group["params"]:
                    self.state[p][WEIGHT] = p.detach()
        packed = super().state_dict()
        self._drop_carried_weights()
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's. Pairs keep the scalings of the live model.

        Raises:
            ValueError: the state was saved for other pairs.
        """
        live = [{k: g[k] for k in STRUCTURE if k in g} for g in self.param_groups]
        for saved, group in zip(state_dict["param_groups"], live, strict=False):
            if "names" in saved and saved["names"] != group.get("names"):
                differ = [
                    f"{a!r} (saved) and {b!r} (here)"
                    for a, b in zip(saved["names"], group.get("names", []), strict=False)
                    if a != b
                ]
                raise ValueError(
                    "the saved state belongs to other parameters: "
                    + (differ[0] if differ else "their numbers differ")
                    + ". Load it into an optimizer built for the same model and adapter."
                )
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, live, strict=True):
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
