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

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

__all__ = [
    "LoraPair",
    "Pairing",
    "UnalignableLayerError",
    "adapter_parameters",
    "find_pairs",
]

LAYOUTS = ("matrix", "experts", "groups")

# LoRA variants of PEFT whose trained delta is s·B·A itself (DoRA's magnitude is trained plainly,
# MiCA freezes one factor, activated LoRA masks tokens).
_ALIGNABLE_VARIANTS = (
    "DoraLinearVariant",
    "DoraEmbeddingVariant",
    "DoraConv1dVariant",
    "DoraConv2dVariant",
    "DoraConv3dVariant",
    "ALoraLinearVariant",
    "MiCALinearVariant",
    "MiCAEmbeddingVariant",
)
# Tuner layers without factors, whose parameters any optimizer may train plainly beside LoRA.
_PLAIN_TUNERS = ("TrainableTokensLayer",)


class UnalignableLayerError(ValueError):
    """A trainable adapter layer has no pair ``s·B·A`` that could be aligned."""


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
            that could be scaled (a quantized one, say).

    Raises:
        ValueError: shapes that do not make a pair, or a scaling that is not a positive number.

    >>> import torch
    >>> A, B = nn.Parameter(torch.zeros(2, 5)), nn.Parameter(torch.zeros(3, 2))
    >>> pair = LoraPair("projection", A, B, scaling=2.0)
    >>> pair.rank, pair.shape
    (2, (3, 5))
    """

    name: str
    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    layout: str = "matrix"
    blocks: int = 1
    base: nn.Parameter | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"pair {self.name!r}: layout {self.layout!r} is not one of {LAYOUTS}.")
        if not self.scaling > 0:
            raise ValueError(
                f"pair {self.name!r} has scaling {self.scaling!r}, expected a positive number."
            )
        try:
            A, B = self.matrices(self.A.detach(), self.B.detach())
        except RuntimeError as error:
            raise ValueError(
                f"pair {self.name!r}: A {tuple(self.A.shape)} and B {tuple(self.B.shape)} do not "
                f"fit the layout {self.layout!r} with {self.blocks} block(s)."
            ) from error
        if A.shape[-2] != B.shape[-1]:
            raise ValueError(
                f"pair {self.name!r}: A {tuple(self.A.shape)} and B {tuple(self.B.shape)} differ "
                "in rank; expected A (r, n) and B (m, r)."
            )

    @property
    def rank(self) -> int:
        """Rank r of each block."""
        return self.A.shape[0] // (1 if self.layout == "matrix" else self.blocks)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of each adapted block."""
        A, B = self.matrices(self.A.detach(), self.B.detach())
        return B.shape[-2], A.shape[-1]

    def matrices(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """See A-like and B-like tensors (factors, gradients) as (k, r, n) and (k, m, r)."""
        return as_A(A, self.layout, self.blocks), as_B(B, self.layout, self.blocks)


def as_A(A: Tensor, layout: str, blocks: int) -> Tensor:
    """View of an A-shaped tensor as (k, r, n)."""
    return A.reshape(1 if layout == "matrix" else blocks, -1, A[0].numel())


def as_B(B: Tensor, layout: str, blocks: int) -> Tensor:
    """View of a B-shaped tensor as (k, m, r)."""
    if layout == "experts":
        return B.reshape(B.shape[0], -1, blocks).permute(2, 0, 1)
    return B.reshape(1 if layout == "matrix" else blocks, -1, B[0].numel())


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
        pairs: every trainable pair, each parameter in one pair only.
        unaligned: (name, reason) of adapter layers that no pair describes.
    """

    pairs: tuple[LoraPair, ...]
    unaligned: tuple[tuple[str, str], ...]


def find_pairs(model: nn.Module, adapter: str | None = None) -> Pairing:
    """Find every trainable pair of a PEFT model, each with its own scaling.

    Args:
        model: a model with LoRA layers (``PeftModel``, or a model with injected adapters).
        adapter: name of one adapter; ``None`` takes all that are trainable.

    Returns:
        A :class:`Pairing`, in the order of ``model.named_modules()``.

    Raises:
        ValueError: the model has no adapter of that name.

    >>> from peft import LoraConfig, get_peft_model
    >>> net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> model = get_peft_model(net, LoraConfig(r=2, lora_alpha=8, target_modules=["0"]))
    >>> [(p.name, p.rank, p.shape, p.scaling) for p in find_pairs(model).pairs]
    [('base_model.model.0', 2, (4, 6), 4.0)]
    """
    pairs: list[LoraPair] = []
    unaligned: list[tuple[str, str]] = []
    seen: dict[int, LoraPair] = {}
    names: set[str] = set()
    for path, module in model.named_modules():
        if not is_tuner_layer(module):
            continue
        names.update(adapters_of(module))
        for key in adapters_of(module):
            if adapter is not None and key != adapter:
                continue
            found = _pair_of(path, module, key)
            if isinstance(found, str):
                unaligned.append((path, found))
            elif found is not None and _is_new(found, seen, unaligned):
                pairs.append(found)
    if adapter is not None and adapter not in names:
        raise ValueError(
            f"the model has no adapter {adapter!r}; found {sorted(names) or 'no adapter at all'}."
        )
    several = {n for n in (p.name for p in pairs) if sum(p.name == n for p in pairs) > 1}
    if several:
        pairs = [_with_adapter_name(p, model) if p.name in several else p for p in pairs]
    return Pairing(tuple(pairs), tuple(unaligned))


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


def _pair_of(path: str, module: Any, key: str) -> LoraPair | str | None:
    """The pair of one adapter of one layer, why there is none, or None if nothing is trained."""
    if not any(p.requires_grad for p in adapter_parameters(module, key)):
        return None
    kind = type(module).__name__
    if kind in _PLAIN_TUNERS:
        return None
    if hasattr(module, "lora_E"):
        return f"{kind} (AdaLoRA) trains singular values between A and B, W is not W0 + s·B·A"
    if not (hasattr(module, "lora_A") and hasattr(module, "lora_B") and hasattr(module, "scaling")):
        return f"{kind} is not a LoRA layer"
    variant = getattr(module, "lora_variant", {}).get(key)
    if variant is not None and type(variant).__name__ not in _ALIGNABLE_VARIANTS:
        return f"the LoRA variant {type(variant).__name__} does not train W = W0 + s·B·A"
    if key in getattr(module, "lora_embedding_A", {}):
        A, B = module.lora_embedding_A[key], module.lora_embedding_B[key]
    else:
        lora_A, lora_B = module.lora_A[key], module.lora_B[key]
        plain = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        if not (isinstance(lora_A, plain) and isinstance(lora_B, plain)):
            return f"its factors are {type(lora_A).__name__} and {type(lora_B).__name__}"
        A, B = lora_A.weight, lora_B.weight
    if not (A.requires_grad or B.requires_grad):
        return None  # only a magnitude or a bias is trained
    layout, blocks = "matrix", 1
    if getattr(module, "num_experts", 1) > 1 and hasattr(module, "parameter_name"):
        layout, blocks = "experts", int(module.num_experts)
    elif key in module.lora_B and getattr(module.lora_B[key], "groups", 1) > 1:
        layout, blocks = "groups", int(module.lora_B[key].groups)
    try:
        return LoraPair(
            path,
            A,
            B,
            float(module.scaling[key]),
            layout,
            blocks,
            _base_weight(module),
        )
    except ValueError as error:
        return str(error)


def _base_weight(module: Any) -> nn.Parameter | None:
    base = module.get_base_layer()
    for name in (getattr(module, "parameter_name", None), "weight", "in_proj_weight"):
        weight = getattr(base, name, None) if name else None
        if isinstance(weight, nn.Parameter):
            quantized = type(weight) is not nn.Parameter or not weight.dtype.is_floating_point
            return None if quantized else weight
    return None


def _is_new(pair: LoraPair, seen: dict[int, LoraPair], unaligned: list[tuple[str, str]]) -> bool:
    """False for a pair met before (tied modules); a factor shared by two pairs is unalignable."""
    other = seen.get(_storage(pair.A)) or seen.get(_storage(pair.B))
    if other is None:
        seen[_storage(pair.A)] = seen[_storage(pair.B)] = pair
        return True
    if other.A is pair.A and other.B is pair.B:
        if other.scaling != pair.scaling:
            reason = f"shares both factors with {other.name}, but with another scaling"
            unaligned.append((pair.name, reason))
        return False
    unaligned.append(
        (
            pair.name,
            f"shares a factor with {other.name}; a step of one would move the other as well",
        )
    )
    return False


def _storage(p: Tensor) -> int:
    """Identity of the memory behind a parameter: PEFT ties adapters by views of one storage."""
    pointer = p.data_ptr() if p.device.type != "meta" else 0
    return pointer or id(p)


def _with_adapter_name(pair: LoraPair, model: nn.Module) -> LoraPair:
    module: Any = model.get_submodule(pair.name)
    for key in adapters_of(module):
        if any(p is pair.A for p in adapter_parameters(module, key)):
            return LoraPair(
                f"{pair.name}[{key}]",
                pair.A,
                pair.B,
                pair.scaling,
                pair.layout,
                pair.blocks,
                pair.base,
            )
    return pair
