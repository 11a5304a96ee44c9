"""A comparison's YAML: a run's keys, and ``methods``, ``seeds`` and ``strategy`` beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapro.experiments.config import COMPARE_ONLY, Config, build_config
from lorapro.experiments.errors import UserError, check_name
from lorapro.experiments.methods import METHODS
from lorapro.experiments.yaml_file import read_yaml

__all__ = ["STRATEGIES", "Comparison", "Entry", "load_comparison"]

STRATEGIES = ("tune", "grid")


@dataclass(frozen=True)
class Entry:
    """One line of the table: a method, the learning rates to try, other keys of its own."""

    label: str
    learning_rates: tuple[float, ...]
    overrides: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Methods x learning rates x seeds over one base configuration.

    ``strategy`` is ``"tune"`` (pick each learning rate with the first seed's validation loss, run
    the other seeds at that rate only) or ``"grid"`` (run everything, pick by the mean).
    """

    base: Config
    entries: tuple[Entry, ...]
    seeds: tuple[int, ...]
    strategy: str

    @property
    def folder(self) -> Path:
        """Where all of it is written."""
        return self.base.folder

    def config(self, entry: Entry, rate: float, seed: int) -> Config:
        """Return the configuration of one run."""
        folder = self.folder / "runs" / entry.label / f"lr-{rate:g}" / f"seed-{seed}"
        return self.base.with_values(
            **entry.overrides, learning_rate=rate, seed=seed, output_dir=str(folder)
        )

    def most_runs(self) -> int:
        """Return how many runs there are in all."""
        tries = sum(len(entry.learning_rates) for entry in self.entries)
        if self.strategy == "grid":
            return tries * len(self.seeds)
        return tries + len(self.entries) * (len(self.seeds) - 1)


def _rates(label: str, value: Any, default: float) -> tuple[float, ...]:
    values = value if isinstance(value, list) else [value]
    try:
        rates = tuple(sorted({float(v) for v in values if v is not None})) or (default,)
    except (TypeError, ValueError):
        raise UserError(
            f"methods: {label}: learning rates must be numbers, found {value!r}"
        ) from None
    for rate in rates:
        if not (math.isfinite(rate) and rate > 0):
            raise UserError(f"methods: {label}: learning_rate must be positive, found {rate:g}")
    return rates


def _entry(label: str, value: Any) -> Entry:
    overrides = dict(value) if isinstance(value, Mapping) else {"learning_rate": value}
    method = overrides.setdefault("method", label)
    if not isinstance(value, Mapping) or "method" not in value:
        check_name("method", label, METHODS)
    check_name("method", str(method), METHODS)
    if set("/\\") & set(label) or label in (".", ".."):
        raise UserError(f"methods: {label!r} is used as a folder's name and cannot hold a slash")
    rates = _rates(label, overrides.pop("learning_rate", None), METHODS[method].learning_rate)
    return Entry(label, rates, overrides)


def _seeds(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    try:
        seeds = tuple(int(v) for v in values)
    except (TypeError, ValueError):
        raise UserError(f"seeds must be whole numbers, found {value!r}") from None
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds must be distinct whole numbers from 0 on, found {value!r}")
    return seeds


def _take_flags(flags: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Split off the flags of the comparison itself: ``--seeds 0 1``, ``--methods lora full``."""
    ours: dict[str, list[str]] = {}
    rest: list[str] = []
    target = rest
    for flag in flags:
        name, equals, value = flag.removeprefix("--").partition("=")
        if flag.startswith("--"):
            target = ours.setdefault(name, []) if name in COMPARE_ONLY else rest
            if target is not rest:
                target += [value] if equals else []
                continue
        target.append(flag)
    return ours, rest


def load_comparison(path: str | Path, flags: Sequence[str] = ()) -> Comparison:
    """Read and check a comparison.

    Flags are a run's, and ``--seeds 0 1 2``, ``--strategy grid`` and ``--methods lora full`` (a
    choice among the YAML's labels, or further methods at their usual learning rate).

    Raises:
        UserError: as :func:`lorapro.experiments.config.build_config` does; no or unknown methods.
    """
    values = read_yaml(path)
    own = {key: values.pop(key) for key in COMPARE_ONLY if key in values}
    given, rest = _take_flags(flags)
    methods = own.get("methods")
    if not isinstance(methods, dict) or not methods:
        raise UserError(f"{path} has no 'methods' (a mapping from method to learning rates)")
    if "methods" in given:
        for label in given["methods"]:
            check_name("method", label, [*methods, *(m for m in METHODS if m not in methods)])
        methods = {label: methods.get(label) for label in given["methods"]}
    strategy = (given.get("strategy") or [own.get("strategy", "tune")])[-1]
    check_name("strategy", str(strategy), STRATEGIES)
    seeds = _seeds(given.get("seeds") or own.get("seeds", [0]))
    for key in ("method", "learning_rate", "seed"):
        if key in values:
            raise UserError(f"{key!r} belongs under 'methods' and 'seeds' in a comparison")
    values.setdefault("output_dir", f"runs/{Path(path).stem}")
    values.setdefault("disable_tqdm", True)
    values.setdefault("save_full_model", False)
    comparison = Comparison(
        build_config(values, rest),
        tuple(_entry(str(label), value) for label, value in methods.items()),
        seeds,
        str(strategy),
    )
    for entry in comparison.entries:
        for rate in entry.learning_rates:
            comparison.config(entry, rate, seeds[0])
    return comparison
