"""From a model to its low-rank pairs: the one file that knows how adapters are laid out.

A :class:`LoraPair` is one adapted weight ``W = W0 + s·B·A`` with the two parameters as the adapter
stores them, the scaling ``s`` read from the layer, and a layout that says how the stored tensors
are matrices:

========== ============================================ ==========================================
layout     stored A, stored B                           matrices A: (k, r, n), B: (k, m, r)
========== ============================================ ==========================================
matrix     (r, …), (m, r, 1…)                           k = 1; Linear, Conv1D, Embedding, Conv1-3d
experts    (k·r, n), (m, r·k)                           one pair an expert (``target_parameters``)
groups     (k·r, …), (k·m, r, 1…)                       one pair a group (grouped convolutions)
========== ============================================ ==========================================

Adapters are PEFT's. Layers are recognised by what they hold, so PEFT itself is not imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

__all__ = [
    "LoraPair",
    "Pairing",
    "UnalignableLayerError",
    "adapter_parameters",
    "adapters_of",
    "as_A",
    "as_B",
    "find_pairs",
    "from_A",
    "from_B",
    "is_tuner_layer",
    "memory_of",
]

LAYOUTS = ("matrix", "experts", "groups")

# LoRA variants of PEFT whose trained delta is s·B·A itself (DoRA's magnitude is trained plainly,
# MiCA freezes one factor, activated LoRA masks tokens, LoRA-GA may subtract a frozen start).
_ALIGNABLE_VARIANTS = (
    "DoraLinearVariant",
    "DoraEmbeddingVariant",
    "DoraConv1dVariant",
    "DoraConv2dVariant",
    "DoraConv3dVariant",
    "ALoraLinearVariant",
    "MiCALinearVariant",
    "MiCAEmbeddingVariant",
    "FrozenInitialVariant",
)
# Tuner layers without factors, whose parameters any optimizer may train plainly beside LoRA.
_PLAIN_TUNERS = ("TrainableTokensLayer",)


class UnalignableLayerError(ValueError):
    """A trainable adapter layer has no pair ``s·B·A`` that could be aligned."""


class Live(NamedTuple):
    """What an adapter layer says of itself now; its own containers, by reference.

    Attributes:
        key: the adapter.
        scalings: scaling of every adapter of the layer.
        merged: the adapters that are merged into the base weight.
    """

    key: str
    scalings: dict[str, float]
    merged: list[str]


@dataclass(frozen=True)
class LoraPair:
    """One adapted weight: two parameters, their scaling, how they are matrices.

    Args:
        name: where the pair sits, for messages and checkpoints.
        A: parameter that holds A, (r, n) in the plain layout.
        B: parameter that holds B, (m, r) in the plain layout.
        scaling: ``s`` in ``W0 + s·B·A``.
        layout: ``"matrix"``, ``"experts"`` or ``"groups"``, see the table of this module.
        blocks: number k of pairs held in the two parameters; 1 for ``"matrix"``.
        base: the frozen weight ``W0``, for weight decay in full mode; ``None`` if there is none
            that could be scaled in place (a quantized one, say).
        live: where the layer keeps its scaling, which may change during training.

    Raises:
        ValueError: shapes that do not make a pair, or a scaling that is not a positive number.

    >>> import torch
    >>> A, B = nn.Parameter(torch.zeros(2, 5)), nn.Parameter(torch.zeros(3, 2))
    >>> pair = LoraPair("projection", A, B, scaling=2.0)
    >>> pair.rank, pair.shape
    (2, (3, 5))
    """

    name: str
    A: nn.Parameter = field(repr=False)
    B: nn.Parameter = field(repr=False)
    scaling: float
    layout: str = "matrix"
    blocks: int = 1
    base: nn.Parameter | None = field(default=None, repr=False)
    live: Live | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"pair {self.name!r}: layout {self.layout!r} is not one of {LAYOUTS}.")
        if not (self.scaling > 0 and math.isfinite(self.scaling)):
            raise ValueError(
                f"pair {self.name!r} has scaling {self.scaling!r}, expected a positive number."
            )
        stored = f"pair {self.name!r}: A {tuple(self.A.shape)} and B {tuple(self.B.shape)}"
        if min(self.A.dim(), self.B.dim()) < 2:
            raise ValueError(
                f"{stored}, expected matrices; FSDP1 and ZeRO-3 flatten them: use FSDP2 "
                "(fully_shard)."
            )
        try:
            A, B = self._shapes()
        except RuntimeError as error:
            raise ValueError(
                f"{stored} do not fit the layout {self.layout!r} with {self.blocks} block(s)."
            ) from error
        if A[-2] != B[-1]:
            raise ValueError(f"{stored} differ in rank; expected A (r, n) and B (m, r).")

    def current_scaling(self) -> float:
        """``s`` as the layer has it now.

        Raises:
            ValueError: the adapter is gone or merged since the pair was made.
        """
        if self.live is None:
            return self.scaling
        key, scalings, merged = self.live
        if key not in scalings:
            raise ValueError(
                f"pair {self.name!r}: adapter {key!r} was deleted after the optimizer was built; "
                "build a new one."
            )
        if key in merged:
            raise ValueError(
                f"pair {self.name!r}: adapter {key!r} is merged into its base weight and gets no "
                "gradient; unmerge it before training goes on."
            )
        scaling = float(scalings[key])
        if not (scaling > 0 and math.isfinite(scaling)):
            raise ValueError(
                f"pair {self.name!r} has scaling {scaling!r}, expected a positive number."
            )
        return scaling

    def _shapes(self) -> tuple[torch.Size, torch.Size]:
        A, B = (torch.empty(p.shape, device="meta") for p in (self.A, self.B))
        return tuple(t.shape for t in self.matrices(A, B))  # type: ignore[return-value]

    @property
    def rank(self) -> int:
        """Rank r of each block."""
        return self._shapes()[0][-2]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of each adapted block."""
        A, B = self._shapes()
        return B[-2], A[-1]

    def matrices(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """See A-like and B-like tensors (factors, gradients) as (k, r, n) and (k, m, r)."""
        return as_A(A, self.layout, self.blocks), as_B(B, self.layout, self.blocks)


def as_A(A: Tensor, layout: str, blocks: int) -> Tensor:
    """View of an A-shaped tensor as (k, r, n)."""
    return A.reshape(1 if layout == "matrix" else blocks, -1, A.shape[1:].numel())


def as_B(B: Tensor, layout: str, blocks: int) -> Tensor:
    """View of a B-shaped tensor as (k, m, r)."""
    if layout == "experts":
        return B.reshape(B.shape[0], B.shape[1] // blocks, blocks).permute(2, 0, 1)
    return B.reshape(1 if layout == "matrix" else blocks, -1, B.shape[1:].numel())


def from_A(d: Tensor, like: Tensor) -> Tensor:
    """Back from (k, r, n) to the stored shape of A."""
    return d.reshape(like.shape)


def from_B(d: Tensor, like: Tensor, layout: str) -> Tensor:
    """Back from (k, m, r) to the stored shape of B."""
    if layout == "experts":
        d = d.permute(1, 2, 0)
    return d.reshape(like.shape)


@dataclass(frozen=True)
class Pairing:
    """The pairs of a model and what could not be paired.

    Attributes:
        pairs: every trainable pair, each factor in one pair only.
        unaligned: (name, reason) of trainable adapter layers that no pair describes.
    """

    pairs: tuple[LoraPair, ...]
    unaligned: tuple[tuple[str, str], ...]


def find_pairs(model: nn.Module, adapter: str | None = None) -> Pairing:
    """Find every trainable pair of a PEFT model, each with its own scaling.

    Args:
        model: a model with LoRA layers (``PeftModel``, or a model with injected adapters).
        adapter: name of one adapter; ``None`` takes all that are trainable.

    Returns:
        A :class:`Pairing`, in the order of ``model.named_modules()``. A pair has the path of its
        layer as name, ``path[adapter]`` where several adapters of one layer are asked for.

    An ``Embedding`` with ``padding_idx``: PEFT lets the padding token's gradient reach B and not A.
    The two then belong to slightly different g, unless padding has no part in the loss.

    Raises:
        ValueError: the model has no adapter of that name, or does not train it.

    >>> from peft import LoraConfig, get_peft_model
    >>> net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> model = get_peft_model(net, LoraConfig(r=2, lora_alpha=8, target_modules=["0"]))
    >>> [(p.name, p.rank, p.shape, p.scaling) for p in find_pairs(model).pairs]
    [('base_model.model.0', 2, (4, 6), 4.0)]
    """
    found: list[LoraPair] = []
    unaligned: list[tuple[str, str]] = []
    names: set[str] = set()
    for path, module in model.named_modules():
        if not is_tuner_layer(module):
            continue
        names.update(adapters_of(module))
        if type(module).__name__ in _PLAIN_TUNERS:
            continue
        asked = [key for key in adapters_of(module) if adapter in (None, key)]
        trained = [k for k in asked if any(p.requires_grad for p in adapter_parameters(module, k))]
        for key in trained:
            name = path if len(trained) == 1 else f"{path}[{key}]"
            _refuse_flat(name, adapter_parameters(module, key))
            try:
                found += _pairs_of(name, module, key)
            except ValueError as error:
                unaligned.append((name, str(error)))
    if adapter is not None and adapter not in names:
        raise ValueError(
            f"the model has no adapter {adapter!r}; found {sorted(names) or 'no adapter at all'}."
        )
    if adapter is not None and not found and not unaligned:
        raise ValueError(
            f"adapter {adapter!r} is not trained: no factor of it requires a gradient; call "
            f"model.set_adapter({adapter!r}) before, or load it with is_trainable=True."
        )
    pairs, shared = _without_shared_factors(found)
    return Pairing(tuple(pairs), (*unaligned, *shared))


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's adapter layers, of any method."""
    return hasattr(module, "adapter_layer_names") and hasattr(module, "base_layer")


def _holders(module: nn.Module) -> Iterator[Any]:
    for attribute in getattr(module, "adapter_layer_names", ()):
        holder = getattr(module, attribute, None)
        if isinstance(holder, (nn.ModuleDict, nn.ParameterDict)):
            yield holder


def adapters_of(module: nn.Module) -> list[str]:
    """Names of the adapters that a tuner layer holds."""
    return list(dict.fromkeys(key for holder in _holders(module) for key in holder))


def adapter_parameters(module: nn.Module, key: str) -> Iterator[nn.Parameter]:
    """Every parameter one adapter holds in one layer."""
    for holder in _holders(module):
        if key in holder:
            held = holder[key]
            yield from held.parameters() if isinstance(held, nn.Module) else (held,)


def memory_of(p: Tensor) -> int:
    """Identity of the memory behind a parameter: PEFT ties adapters by two views of one storage.

    Parameters without an address of their own (meta device, DTensor, empty) are told by object.
    """
    return p.data_ptr() or id(p)


def _pairs_of(name: str, module: Any, key: str) -> list[LoraPair]:
    """The pair of one adapter of one layer; none if only a magnitude or a bias is trained.

    Raises:
        ValueError: there is no pair ``s·B·A``; the message is the reason.
    """
    obstacle = _obstacle(module, key)
    if obstacle:
        raise UnalignableLayerError(obstacle)
    layout, blocks = "matrix", 1
    if key in module.lora_embedding_A:
        A, B = module.lora_embedding_A[key], module.lora_embedding_B[key]
    else:
        A, B = module.lora_A[key].weight, module.lora_B[key].weight
        if getattr(module, "num_experts", 1) > 1:
            layout, blocks = "experts", int(module.num_experts)
        elif getattr(module.lora_B[key], "groups", 1) > 1:
            layout, blocks = "groups", int(module.lora_B[key].groups)
    if not (A.requires_grad or B.requires_grad):
        return []
    scaling = float(module.scaling[key])
    live = Live(key, module.scaling, getattr(module, "merged_adapters", []))
    return [LoraPair(name, A, B, scaling, layout, blocks, _base_weight(module), live)]


def _refuse_flat(name: str, held: Iterable[nn.Parameter]) -> None:
    """Refuse factors of which other frameworks keep a flat piece.

    Raises:
        ValueError: in one sentence, which pair and what to use instead.
    """
    for p in held:
        if getattr(p, "_fsdp_flattened", False):
            raise ValueError(
                f"the factors of {name!r} are flattened by FSDP1; FSDP1 is deprecated and not "
                "supported: shard with FSDP2 (fully_shard)."
            )
        if hasattr(p, "ds_id") and p.dim() < 2:
            raise ValueError(
                f"the factors of {name!r} are in pieces, as ZeRO-3 keeps them: for efficient mode "
                "call lorapro.align_gradients(engine, model) before DeepSpeed's own optimizer; for "
                "other modes use DDP or FSDP2."
            )


def _obstacle(module: Any, key: str) -> str | None:
    """Why an adapter of a layer has no pair ``s·B·A`` that follows its gradients, if so."""
    kind = f"{type(module).__module__.split('.')[-2:][0]}.{type(module).__name__}"
    if hasattr(module, "lora_E"):
        return f"{kind} (AdaLoRA) trains singular values between A and B, W is not W0 + s·B·A"
    if not all(hasattr(module, a) for a in ("lora_A", "lora_B", "lora_embedding_A", "scaling")):
        return f"{kind} is not a LoRA layer"
    variant = getattr(module, "lora_variant", {}).get(key)
    if variant is not None and type(variant).__name__ not in _ALIGNABLE_VARIANTS:
        return f"the LoRA variant {type(variant).__name__} does not train W = W0 + s·B·A"
    mixer = type(getattr(module.forward, "__self__", module)).__name__
    if mixer.startswith("XLora"):
        return f"{mixer} (X-LoRA) scales the adapter anew for every token, W is not W0 + s·B·A"
    if module.merged:
        return "it is merged into its base weight and gets no gradient; unmerge it first"
    if module.disable_adapters:
        return "its adapters are disabled and get no gradient; enable them first"
    if key not in module.lora_embedding_A:
        plain = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        for factor in (module.lora_A[key], module.lora_B[key]):
            if not (isinstance(factor, plain) and isinstance(factor.weight, nn.Parameter)):
                return f"one of its factors is a {type(factor).__name__}"
    return None


def _base_weight(module: Any) -> nn.Parameter | None:
    """W0 if it is one parameter, in a precision that bears scaling in place."""
    base = module.get_base_layer()
    if isinstance(base, (nn.MultiheadAttention, NonDynamicallyQuantizableLinear)):
        return None  # PEFT makes these parameters anew in every forward pass
    weight: Any = getattr(base, getattr(module, "parameter_name", "weight"), None)
    if type(weight) is nn.Parameter or hasattr(weight, "placements"):  # the latter: DTensor
        return weight if weight.is_floating_point() and weight.element_size() >= 2 else None
    return None


def _without_shared_factors(
    found: Iterable[LoraPair],
) -> tuple[list[LoraPair], list[tuple[str, str]]]:
    """Pairs that own their factors, and (name, reason) of those that do not.

    Layers that share both factors and the scaling are one pair: its gradients add up by themselves.
    """
    unique: dict[tuple[int, int, float], LoraPair] = {}
    for pair in found:
        identity = (id(pair.A), id(pair.B), pair.scaling)
        first = unique.setdefault(identity, pair)
        if first.base is not pair.base:
            unique[identity] = replace(first, base=None)  # several weights, none of them W0 alone
    holders: dict[int, set[str]] = {}
    for pair in unique.values():
        for p in (pair.A, pair.B):
            holders.setdefault(memory_of(p), set()).add(pair.name)
    pairs, shared = [], []
    for pair in unique.values():
        others = (holders[memory_of(pair.A)] | holders[memory_of(pair.B)]) - {pair.name}
        if others:
            reason = f"shares a factor with {', '.join(sorted(others))}: a step of one moves both"
            shared.append((pair.name, reason))
        else:
            pairs.append(pair)
    return pairs, shared
