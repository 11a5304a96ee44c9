"""Parameter groups for the optimizers: pairs in one group, everything else trainable in another."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from lorapro.choices import first_few
from lorapro.factors import (
    LoraPair,
    Pairing,
    UnalignableLayerError,
    adapter_parameters,
    adapters_of,
    find_pairs,
    is_tuner_layer,
    memory_of,
)
from lorapro.live import Places

__all__ = ["lora_param_groups"]

logger = logging.getLogger(__name__)


def lora_param_groups(
    model: nn.Module | None,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    adapter: str | None = None,
    pairs: Iterable[LoraPair] | None = None,
    on_unaligned: str = "error",
) -> list[dict[str, Any]]:
    """Parameter groups for the optimizers of this package: the pairs, then all else trainable.

    Args:
        model: a PEFT model; ``None`` if ``pairs`` are all there is to train.
        lr: learning rate of all groups; ``None`` leaves it to the optimizer.
        weight_decay: weight decay of all groups; ``None`` leaves it to the optimizer.
        adapter: train the pairs of this adapter only; other adapters are left out.
        pairs: pairs by hand, for low-rank modules that are not PEFT's. They are added to those
            found in the model.
        on_unaligned: ``"error"``, or ``"plain"`` to train layers that cannot be aligned with the
            plain rule, and list them in the log and in the group's ``"unaligned"``.

    Returns:
        A list of groups. Pairs come as ``params = [A0, B0, A1, B1, …]`` with their list of
        :class:`lorapro.factors.LoraPair` in ``pairs``; a frozen factor stays in the list, the
        update of its partner needs its value. Heads, biases, norms, DoRA magnitudes and
        ``modules_to_save`` form a group of their own.

    Raises:
        UnalignableLayerError: a trainable adapter layer is no pair ``s·B·A`` (the message names it
            and the reason).
        ValueError: no trainable pair, an unknown adapter, a parameter given in two pairs.

    >>> from peft import LoraConfig, get_peft_model
    >>> net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    >>> config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    >>> [(g["role"], len(g["params"])) for g in lora_param_groups(get_peft_model(net, config))]
    [('pairs', 2), ('plain', 2)]
    """
    if on_unaligned not in ("error", "plain"):
        raise ValueError(f"on_unaligned is {on_unaligned!r}, expected 'error' or 'plain'.")
    found = Pairing((), ()) if model is None else find_pairs(model, adapter)
    all_pairs = [*(pairs or ()), *found.pairs]
    if found.unaligned:
        listed = first_few([f"{name}: {reason}" for name, reason in found.unaligned])
        if on_unaligned == "error":
            raise UnalignableLayerError(
                f"cannot align {listed}. Leave such layers out of the adapter, freeze them, or "
                "pass on_unaligned='plain' to train them without alignment."
            )
        logger.warning("trained without alignment: %s", listed)
    if not all_pairs:
        raise ValueError(
            "the model has no trainable LoRA pair; expected a PEFT model with LoRA layers that "
            "require gradients (for a loaded adapter: PeftModel.from_pretrained(…, "
            "is_trainable=True); for one of several: model.set_adapter(name)), or "
            "pairs=[LoraPair(…)] by hand."
        )
    options: dict[str, Any] = {}
    if lr is not None:
        options["lr"] = lr
    if weight_decay is not None:
        options["weight_decay"] = weight_decay
    groups = [{**_pairs_group(all_pairs), **options}]
    if model is not None:
        groups[0]["places"] = Places(model, groups[0]["params"])
    plain = list(_plain_parameters(model, all_pairs, adapter))
    if plain:
        groups.append(
            {
                "params": [p for _, p in plain],
                "names": [n for n, _ in plain],
                "places": Places(model, [p for _, p in plain]),
                "role": "plain",
                "unaligned": [name for name, _ in found.unaligned],
                **options,
            }
        )
    return groups


def _pairs_group(pairs: Sequence[LoraPair]) -> dict[str, Any]:
    params: list[nn.Parameter] = []
    owner: dict[int, str] = {}
    for pair in pairs:
        for p in (pair.A, pair.B):
            if memory_of(p) in owner:
                raise ValueError(
                    f"pair {pair.name!r} shares a parameter with pair {owner[memory_of(p)]!r}; "
                    "each parameter may be in one pair only."
                )
            owner[memory_of(p)] = pair.name
            params.append(p)
    return {"params": params, "pairs": list(pairs), "role": "pairs"}


def _plain_parameters(
    model: nn.Module | None, pairs: Sequence[LoraPair], adapter: str | None
) -> Iterator[tuple[str, nn.Parameter]]:
    if model is None:
        return
    taken = {id(p) for pair in pairs for p in (pair.A, pair.B)}
    if adapter is not None:
        # Another adapter's parameters are not this optimizer's to move.
        taken |= {
            id(p)
            for module in model.modules()
            if is_tuner_layer(module)
            for key in adapters_of(module)
            if key != adapter
            for p in adapter_parameters(module, key)
        }
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in taken:
            yield name, p
