"""Factors that DeepSpeed ZeRO keeps in pieces of flat tensors: whole for a moment, and back.

ZeRO joins the parameters of a group and gives every process one piece of the whole in float32. Its
own optimizer steps that piece, whose gradient is unscaled and clipped by then. Before that step the
pieces of the factors' gradients are summed into whole ones, and afterwards every process puts its
piece of the aligned ones back: one collective for all pairs of a parameter group.

Nothing of DeepSpeed is replaced, and DeepSpeed is not imported. What is read is where its
optimizers keep parameters, tested with DeepSpeed 0.19:

=========================== ============== ============================== ======================
optimizer                   groups         pieces that are stepped        place of a parameter
=========================== ============== ============================== ======================
ZeRO 1, 2                   bit16_groups   single_partition_of_fp32_…     ``p._hp_mapping``
ZeRO 1, bf16 and float32    bf16_groups    fp32_groups_flat_partition     ``p._hp_mapping``
ZeRO 3                      fp16_groups    fp32_partitioned_groups_flat   ``grad_position``
=========================== ============== ============================== ======================
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lorapro.live import check_current, check_zeros

if TYPE_CHECKING:
    from lorapro.factors import LoraPair

__all__ = [
    "ZeroFactors",
    "in_pieces",
    "optimizers_of",
    "refuse_modes",
    "refuse_pieces",
    "whole_factors",
]

GROUPS = (
    ("bit16_groups", "single_partition_of_fp32_groups"),
    ("bf16_groups", "fp32_groups_flat_partition"),
    ("fp16_groups", "fp32_partitioned_groups_flat"),
)


INSTEAD = (
    "for efficient mode give DeepSpeed torch.optim.AdamW, or an optimizer in its configuration, "
    "and call lorapro.align_gradients(engine, model) after deepspeed.initialize; under Trainer: "
    "lorapro.use_lorapro(trainer)"
)


def refuse_modes(optimizer: str, mode: str) -> None:
    """Refuse what needs whole factors in its step, which DeepSpeed ZeRO does not give.

    Raises:
        ValueError: for all but AdamW in efficient mode; says what to use instead.
    """
    name = f"mode={mode!r}" if optimizer == "adamw" else f"optimizer={optimizer!r}"
    if (optimizer, mode) != ("adamw", "efficient"):
        raise ValueError(
            f"{name} needs whole factors in its step, which DeepSpeed ZeRO keeps in pieces: use "
            f"DDP or FSDP2 (torch.distributed.fsdp.fully_shard), or {INSTEAD}."
        )


def refuse_pieces(pairs: Sequence[LoraPair], instead: str) -> None:
    """Refuse factors that DeepSpeed ZeRO keeps in pieces.

    Raises:
        ValueError: names the first pair, and what to do instead.
    """
    for pair in pairs:
        if hasattr(pair.A, "_hp_mapping") or hasattr(pair.A, "ds_id"):
            raise ValueError(
                f"the factors of pair {pair.name!r} are in pieces, as DeepSpeed ZeRO keeps them; "
                f"{instead}"
            )


def optimizers_of(optimizer: Any) -> tuple[Optimizer, Any]:
    """The torch optimizer inside, and DeepSpeed's around it (``None`` if there is none).

    Args:
        optimizer: a torch optimizer, a DeepSpeed engine or its optimizer, or accelerate's wrapper
            of one of these.

    Raises:
        ValueError: there is none inside, or DeepSpeed keeps it in a way that is not known here.
    """
    inner, around = optimizer, None
    while isinstance(inner, nn.Module) or not _is_plain(inner):
        module = type(inner).__module__
        if module.startswith("deepspeed") and not isinstance(inner, nn.Module):
            around = inner
        held = getattr(inner, "optimizer", None)
        if held is None:
            raise ValueError(
                f"expected a torch optimizer or a DeepSpeed engine, found a "
                f"{type(optimizer).__name__}"
                + ("; give deepspeed.initialize an optimizer." if "deepspeed" in module else ".")
            )
        inner = held
    return inner, around


def _is_plain(optimizer: Any) -> bool:
    """Whether this is the torch optimizer itself, and no wrapper of another."""
    held = getattr(optimizer, "optimizer", None)
    return isinstance(optimizer, Optimizer) and not hasattr(held, "param_groups")


@contextlib.contextmanager
def whole_factors(model: nn.Module | None) -> Iterator[None]:
    """While this lasts, factors have their shapes, also those that ZeRO-3 keeps in pieces."""
    from lorapro.factors import adapter_parameters, adapters_of, is_tuner_layer

    modules = () if model is None else model.modules()
    pieces = [
        p
        for module in modules
        if is_tuner_layer(module)
        for key in adapters_of(module)
        for p in adapter_parameters(module, key)
        if hasattr(p, "ds_id")
    ]
    if not pieces:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(pieces):
        yield


class ZeroFactors:
    """The factors of some pairs in one of DeepSpeed's optimizers.

    Args:
        zero: DeepSpeed's optimizer.
        pairs: the pairs.
        params: their factors ``[A0, B0, A1, B1, …]``.

    Raises:
        ValueError: an optimizer of DeepSpeed that is not known here; a trainable factor that it
            does not hold; a pair whose factors are stepped one after the other.
    """

    def __init__(self, zero: Any, pairs: Sequence[LoraPair], params: Sequence[nn.Parameter]):
        found = [(a, b) for a, b in GROUPS if hasattr(zero, a) and hasattr(zero, b)]
        if not found or getattr(zero, "zenflow", False) or hasattr(zero, "backup_optimizer"):
            raise ValueError(
                f"gradients inside DeepSpeed's {type(zero).__name__} cannot be aligned; expected "
                "ZeRO stage 1, 2 or 3, without ZenFlow and with all or nothing offloaded, or "
                "stage 0 in float32."
            )
        self.zero = zero
        groups, self.flats = (getattr(zero, name) for name in found[0])
        where = {id(p): i for i, held in enumerate(groups) for p in held}
        self.pairs: list[list[LoraPair]] = [[] for _ in groups]
        self.params: list[list[nn.Parameter]] = [[] for _ in groups]
        for pair, *factors in zip(pairs, params[::2], params[1::2], strict=True):
            held = {}
            for letter, p in zip("AB", factors, strict=True):
                if p.requires_grad and id(p) not in where:
                    raise ValueError(
                        f"the optimizer does not hold factor {letter} of {pair.name!r}; build it "
                        "from the parameters of this model."
                    )
                if p.requires_grad:
                    held[letter] = where[id(p)]
            if len(set(held.values())) > 1:
                raise ValueError(
                    f"DeepSpeed steps the factors of pair {pair.name!r} one after the other (A in "
                    f"its group {held['A']}, B in {held['B']}), so they cannot be aligned: put "
                    "both into one parameter group; under ZeRO-3 also raise "
                    "zero_optimization.sub_group_size."
                )
            i = next(iter(held.values()))
            self.pairs[i].append(pair)
            self.params[i] += factors

    def now(self, optimizer: Optimizer) -> Iterator[tuple[int, float | Tensor]]:
        """The groups that a step of the torch optimizer is about to move, with learning rates.

        DeepSpeed steps its groups one by one.
        """
        rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        for i, flat in enumerate(self.flats):
            if self.pairs[i] and id(flat) in rates and flat.grad is not None:
                yield i, rates[id(flat)]

    def whole(self, i: int) -> list[nn.Parameter]:
        """Whole factors of a group, in float32, with their whole gradients."""
        params = self.params[i]
        by_rows = hasattr(params[0], "ds_id")
        return self._gathered(i, params) if by_rows else self._summed(i, params)

    def store(self, i: int, whole: Sequence[nn.Parameter]) -> None:
        """Put this process's pieces of the gradients of :meth:`whole` back."""
        gradient = self.flats[i].grad
        for p, stand_in in zip(self.params[i], whole, strict=True):
            place = self._place(p)
            if stand_in.grad is not None and place is not None:
                piece, at = place
                new = stand_in.grad.reshape(-1)[at : at + piece.stop - piece.start]
                gradient[piece.start : piece.start + len(new)].copy_(new)

    def _place(self, p: Tensor) -> tuple[slice, int] | None:
        """What this process has of a parameter: where in its piece, from which element on."""
        if not p.requires_grad:
            return None
        if hasattr(p, "ds_id"):
            _, start, size = self.zero.grad_position[self.zero.get_param_id(p)]
            group: Any = getattr(p, "ds_process_group", None)
            return slice(start, start + size), dist.get_rank(group) * size
        mapping: Any = p._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        start, size = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
        return slice(start, start + size), mapping.lp_fragment_address.start

    def _summed(self, i: int, params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """ZeRO 1, 2: factors are whole everywhere, each gradient is the sum of its pieces."""
        moved = [p for p in params if p.requires_grad]
        total = moved[0].new_zeros(sum(p.numel() for p in moved), dtype=torch.float32)
        parts = total.split([p.numel() for p in moved])
        for p, part in zip(moved, parts, strict=True):
            place = self._place(p)
            if place is not None:
                piece, at = place
                part[at : at + piece.stop - piece.start].copy_(self.flats[i].grad[piece])
        dist.all_reduce(total, group=moved[0]._dp_group)  # type: ignore[attr-defined]
        gradients = {id(p): part for p, part in zip(moved, parts, strict=True)}
        return [_stand_in(p.detach(), gradients.get(id(p)), p.shape) for p in params]

    def _gathered(self, i: int, params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """ZeRO 3: factors and gradients are equal pieces, of which the last ones are padded."""
        flat = self.flats[i]
        pieces = []
        for p in params:
            place = self._place(p)
            if place is None:
                pieces.append(p.ds_tensor)  # type: ignore[attr-defined]
            else:
                pieces += [flat.detach()[place[0]], flat.grad[place[0]]]
        device = params[0].device
        own = torch.cat([x.reshape(-1).to(device, torch.float32) for x in pieces])
        group: Any = params[0].ds_process_group  # type: ignore[attr-defined]
        every = own.new_empty(dist.get_world_size(group), len(own))
        dist.all_gather(list(every), own, group=group)
        columns = iter(every.split([x.numel() for x in pieces], 1))
        return [
            _stand_in(next(columns), next(columns) if p.requires_grad else None, p.ds_shape)  # type: ignore[attr-defined]
            for p in params
        ]


def _stand_in(value: Tensor, gradient: Tensor | None, shape: Sequence[int]) -> nn.Parameter:
    """A parameter of a shape, and its gradient, from elements in order."""
    size = torch.Size(shape)

    def shaped(x: Tensor) -> Tensor:
        return x.reshape(-1)[: size.numel()].view(size).to(torch.float32)

    p = nn.Parameter(shaped(value))
    p.grad = None if gradient is None else shaped(gradient)
    return p


def in_pieces(
    optimizer: Optimizer,
    zero: Any,
    group: dict[str, Any],
    align: Callable[[Sequence[LoraPair], Sequence[Tensor], Callable[[Tensor], Any]], None],
) -> Callable[[], None]:
    """Align the gradients of what DeepSpeed is about to step.

    Args:
        optimizer: the torch optimizer that steps.
        zero: DeepSpeed's optimizer around it.
        group: the group of pairs.
        align: aligns the gradients of pairs, given their factors and a factor's learning rate.
    """
    factors = ZeroFactors(zero, group["pairs"], group["params"])
    seen: set[int] = set()

    @torch.no_grad()
    def align_now() -> None:
        check_current([group])
        for i, lr in factors.now(optimizer):
            pairs, params = factors.pairs[i], factors.whole(i)
            if i not in seen:
                check_zeros(pairs, params)
                seen.add(i)
            align(pairs, params, lambda _, lr=lr: lr)  # type: ignore[misc]
            factors.store(i, params)

    return align_now
