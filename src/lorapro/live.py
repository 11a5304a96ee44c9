"""Whether an optimizer still trains what its model trains.

Between two steps a model may change: adapters are merged, deleted, switched or added, parameters
are made anew. An optimizer holds parameters, so it would go on with those that are gone. Groups
therefore remember the model and the name of each parameter in it, and a step compares.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lorapro.factors import LoraPair

__all__ = [
    "HELD",
    "Places",
    "check_current",
    "check_gradients",
    "check_zeros",
    "in_parameters",
    "name_among",
]

logger = logging.getLogger(__name__)

HELD = "lorapro_held"  # on parameters that an optimizer of this package trains
# Children under which a wrapper that was put around a module, or taken away, keeps it.
WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module")


class Places:
    """Where a model keeps the parameters of a group.

    Args:
        model: the model.
        params: the parameters; one that is not the model's has no place.
    """

    def __init__(self, model: Any, params: Sequence[Any]) -> None:
        names = {id(p): name for name, p in model.named_parameters()}
        self.model = model
        self.paths = [names.get(id(p), "").split(".") for p in params]
        self.adapters = set(getattr(model, "peft_config", ()))

    def now(self, i: int) -> Any:
        """What the model has in the place of parameter i; ``None`` if nothing."""
        *path, last = self.paths[i]
        module = self.model
        for key in path:
            inner = module._modules
            while key not in inner and key not in WRAPPERS:
                wrapped = [inner[name] for name in WRAPPERS if name in inner]
                if not wrapped:
                    return None
                inner = wrapped[0]._modules
            module = inner.get(key, module)
        return getattr(module, last, None)

    def added(self) -> str | None:
        """Name of a parameter with a gradient, of an adapter that is new and nobody's."""
        new = set(getattr(self.model, "peft_config", ())) - self.adapters
        if new:
            for name, p in self.model.named_parameters():
                trained = p.requires_grad and p.grad is not None and not hasattr(p, HELD)
                if trained and new & set(name.split(".")):
                    return name
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Places | None:
        if id(self.model) not in memo:
            return None  # an optimizer that is copied without its model
        copied = object.__new__(Places)
        copied.__dict__ = {**vars(self), "model": memo[id(self.model)]}
        return copied

    def __reduce__(self) -> Any:
        return type(None), ()  # a pickled optimizer does not take its model along

    def __repr__(self) -> str:
        return f"Places({len(self.paths)})"


def name_of(group: dict[str, Any], i: int) -> str:
    """What parameter i of a group is called in messages."""
    if "pairs" in group:
        return f"factor {'AB'[i % 2]} of pair {group['pairs'][i // 2].name!r}"
    return repr(group["names"][i]) if "names" in group else "a parameter"


def name_among(groups: Sequence[dict[str, Any]], p: Tensor) -> str:
    """What a parameter of some group is called in messages."""
    for group in groups:
        for i, q in enumerate(group["params"]):
            if p is q:
                return name_of(group, i)
    return "a parameter"


def check_current(groups: Sequence[dict[str, Any]]) -> None:
    """Refuse a step on parameters that the model no longer has.

    Raises:
        ValueError: names what was made anew, deleted, merged or added, and what to do.
    """
    for group in groups:
        params, places = group["params"], group.get("places")
        # Pairs by hand have no places, DeepSpeed's partitions are others.
        if places is None or len(params) != len(places.paths):
            continue
        for i, p in enumerate(params):
            now = places.now(i) if places.paths[i] != [""] else p
            # FSDP2 may leave a layer whole between its passes.
            if now is p or (hasattr(p, "placements") and not hasattr(now, "placements")):
                continue
            if "pairs" in group:
                group["pairs"][i // 2].current_scaling()  # says it of a deleted adapter
            raise ValueError(
                f"{name_of(group, i)} is no longer what the model trains: it was made anew after "
                "the optimizer was built (load_adapter, resize_token_embeddings, fully_shard, …); "
                "build a new optimizer, and load this one's state_dict if the shapes are the same."
            )
        added = places.added()
        if added is not None:
            raise ValueError(
                f"{added!r} is trained by no optimizer: its adapter was added after this one was "
                "built. Build a new one, or give it the groups of "
                "lora_param_groups(model, adapter=…) by add_param_group."
            )


def check_gradients(pairs: Sequence[LoraPair], params: Sequence[Tensor], first: bool) -> None:
    """Refuse a step in which no pair has a gradient; at the first, name those that have none.

    Args:
        pairs: the pairs.
        params: their factors ``[A0, B0, A1, B1, …]``.
        first: whether this is the first step.

    Raises:
        ValueError: names the first pair.
    """
    given = [p.grad is not None for p in params]
    if not any(given):
        for pair in pairs:
            pair.current_scaling()  # says it of a merged or deleted adapter
        raise ValueError(
            f"none of {len(pairs)} pairs has a gradient (the first is {pairs[0].name!r}): call "
            "backward() before step(), with the adapter of the optimizer active, and build the "
            "optimizer or hook from the parameters that the model trains now, after fully_shard, "
            "FSDP or anything else that makes new ones."
        )
    if first and len(params) == 2 * len(pairs):
        _warn_of_idle(pairs, given)


def check_zeros(pairs: Sequence[LoraPair], params: Sequence[Tensor]) -> None:
    """Name pairs whose gradients are zero: how it looks where missing ones are filled up."""
    _warn_of_idle(pairs, [p.grad is not None and bool(p.grad.any()) for p in params])


def _warn_of_idle(pairs: Sequence[LoraPair], given: Sequence[bool]) -> None:
    idle = [p.name for i, p in enumerate(pairs) if not any(given[2 * i : 2 * i + 2])]
    if idle:
        logger.warning(
            "%d of %d pairs have no gradient at the first step and stay as they are until they "
            "get one: %s",
            len(idle),
            len(pairs),
            ", ".join(idle[:3]) + (", …" if len(idle) > 3 else ""),
        )


def in_parameters(
    optimizer: Optimizer,
    group: dict[str, Any],
    align: Callable[[Sequence[LoraPair], Sequence[Tensor], Callable[[Tensor], Any]], None],
) -> Callable[[], None]:
    """Align the gradients that the parameters of an optimizer carry, whenever it is called.

    Args:
        optimizer: the torch optimizer that steps.
        group: the group of pairs.
        align: aligns the gradients of pairs, given their factors and a factor's learning rate.

    Raises:
        ValueError: names a trainable factor that the optimizer does not hold.
    """
    pairs = group["pairs"]
    # Where each factor sits in the optimizer: accelerate exchanges parameters for sharded ones.
    places = {
        id(p): (g, i)
        for g, of_group in enumerate(optimizer.param_groups)
        for i, p in enumerate(of_group["params"])
    }
    where = [places.get(id(p)) for p in group["params"]]
    for i, p in enumerate(group["params"]):
        if p.requires_grad and id(p) not in places:
            raise ValueError(
                f"the optimizer does not hold factor {'AB'[i % 2]} of {pairs[i // 2].name!r}; "
                "build it from the parameters of this model."
            )
    for g in optimizer.param_groups:
        for p in g["params"]:
            setattr(p, HELD, True)

    def lr_of(p: Tensor) -> Any:
        return next(g["lr"] for g in optimizer.param_groups if any(p is q for q in g["params"]))

    @torch.no_grad()
    def align_now() -> None:
        params = [
            q
            for p, at in zip(group["params"], where, strict=True)
            for q in ([p] if at is None else optimizer.param_groups[at[0]]["params"][at[1] :][:1])
            if q.dim() == p.dim()
        ]
        check_current([{**group, "params": params}])
        if params:
            check_gradients(pairs, params, first=not group.get("aligned"))
        group["aligned"] = True
        align(pairs, params, lr_of)

    return align_now
