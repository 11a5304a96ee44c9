"""Methods: an adapter, a start and an optimizer, each from its own catalogue.

:data:`METHODS` gives names to the combinations that tables print, each with the learning rate to
begin with. Any other combination is written with ``+`` between names of parts, in any order:
``lora-ga+lora-pro-muon``, ``dora+lora-pro``, ``pissa+lora+``. A part that is left out is the usual
one: start ``zero``, AdamW, and the adapter of the optimizer (rsLoRA for LoRA-Pro).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from lorapro.experiments.errors import UserError, nearest_hint
from lorapro.experiments.methods.adapters import ADAPTERS, Adapter
from lorapro.experiments.methods.optimizers import OPTIMIZERS, OptimizerPart
from lorapro.experiments.methods.starts import STARTS, Start

__all__ = ["METHODS", "Method", "check_method", "find_method", "option_classes"]


@dataclass(frozen=True)
class Method:
    """A way to fine-tune."""

    name: str
    adapter: Adapter
    start: Start
    optimizer: OptimizerPart
    learning_rate: float

    @property
    def about(self) -> str:
        """One line for tables and help."""
        if not self.adapter.trains:
            return self.adapter.about
        parts = [self.adapter.about, self.optimizer.about]
        if self.start.name != "zero":
            parts.insert(1, self.start.about)
        return ", ".join(parts)

    @property
    def trains_all(self) -> bool:
        """Whether there is no adapter."""
        return self.adapter.config is None

    def options(self) -> tuple[type, type, type]:
        """Options dataclasses of adapter, start and optimizer."""
        return self.adapter.options, self.start.options, self.optimizer.options


def _method(
    name: str,
    learning_rate: float,
    adapter: str = "lora",
    start: str = "zero",
    optimizer: str = "adamw",
) -> Method:
    parts = ADAPTERS[adapter], STARTS[start], OPTIMIZERS[optimizer]
    return Method(name, *parts, learning_rate)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        _method("zero-shot", 1e-4, "untrained"),
        _method("full", 1e-4, "full"),
        _method("full-muon", 2e-4, "full", optimizer="muon"),
        _method("lora", 1e-3),
        _method("rslora", 6e-4, "rslora"),
        _method("lora+", 2e-4, optimizer="lora+"),
        _method("pissa", 5e-4, start="pissa"),
        _method("dora", 1e-3, "dora"),
        _method("adalora", 2e-3, "adalora"),
        _method("lora-ga", 1e-4, "rslora", "lora-ga"),
        _method("lora-fa", 1e-3, optimizer="lora-fa"),
        _method("riemannian", 2e-3, optimizer="riemannian"),
        _method("lora-muon", 2e-3, optimizer="muon"),
        *(
            _method(part.name, part.learning_rate, part.adapter, optimizer=part.name)
            for part in OPTIMIZERS.values()
            if part.name.startswith("lora-pro")
        ),
        # Efficient mode wants a smaller rate from LoRA-GA's start.
        _method("lora-ga+lora-pro", 1e-4, "rslora", "lora-ga", "lora-pro"),
    )
}

# What a name of several parts may be made of. LoRA-GA's own table rests on rsLoRA's scaling.
_PARTS: dict[str, Adapter | Start | OptimizerPart] = {**ADAPTERS, **STARTS, **OPTIMIZERS}


def _splits(name: str) -> Iterator[tuple[str, ...]]:
    """Ways to read a name as parts with ``+`` between them (``lora+`` is itself a part)."""
    for part in _PARTS:
        if name == part:
            yield (part,)
        elif name.startswith(f"{part}+"):
            for rest in _splits(name[len(part) + 1 :]):
                yield (part, *rest)


@functools.cache
def find_method(name: str) -> Method:
    """Return the method of that name, or the combination that it describes.

    Raises:
        UserError: no such name, with the nearest; two parts of one kind.

    >>> find_method("lora-ga+lora-pro-muon").optimizer.name
    'lora-pro-muon'
    >>> find_method("dora+lora-pro").adapter.name
    'dora'
    """
    if name in METHODS:
        return METHODS[name]
    for parts in _splits(name):
        kinds = [
            [part for part in parts if part in catalogue]
            for catalogue in (ADAPTERS, STARTS, OPTIMIZERS)
        ]
        if all(len(found) <= 1 for found in kinds):
            adapter, start, optimizer = (found[0] if found else None for found in kinds)
            rule = OPTIMIZERS[optimizer or "adamw"]
            usual = "rslora" if start == "lora-ga" else rule.adapter
            return Method(
                name,
                ADAPTERS[adapter or usual],
                STARTS[start or "zero"],
                rule,
                rule.learning_rate,
            )
        raise UserError(
            f"method {name!r} names two parts of one kind: an adapter ({', '.join(ADAPTERS)}), a "
            f"start ({', '.join(STARTS)}) and an optimizer ({', '.join(OPTIMIZERS)}) are what a "
            "method is made of"
        )
    known = [*METHODS, *_PARTS]
    raise UserError(
        f"unknown method {name!r}{_nearest(name, known)}; known: {', '.join(METHODS)}, and parts "
        "joined with '+', such as dora+lora-pro"
    )


def _nearest(name: str, known: list[str]) -> str:
    """Hint for a mistyped name, part by part where it has several."""
    if "+" not in name.strip("+"):
        return nearest_hint(name, known)
    wrong = [part for part in name.split("+") if part not in _PARTS]
    return nearest_hint(wrong[0], _PARTS) if wrong else ""


def check_method(name: str) -> str:
    """Return ``name`` if it is a method's.

    Raises:
        UserError: it is not.
    """
    return find_method(name).name


def option_classes() -> list[type]:
    """Every options dataclass of the catalogues, each once."""
    return list(dict.fromkeys(part.options for part in _PARTS.values()))
