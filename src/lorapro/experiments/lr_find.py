"""A learning rate for own data: a few short runs, each at another rate, on validation loss."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorapro.experiments import folders
from lorapro.experiments.config import from_values
from lorapro.experiments.errors import UserError
from lorapro.experiments.plan import Comparison, load_comparison
from lorapro.experiments.sweep import compare, validation_loss

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["find_rate", "plot_rates"]

RATIO, AROUND = 2.0, 3  # rates on each side of the method's own, each so many times the other
EXTENSIONS = 4  # further rates tried, one at a time, while the best is the last of its side

# Keys that a sweep sets itself.
_OWN = ("method", "learning_rate", "seed", "output_dir", "max_steps", "num_train_epochs")
_SHORT = {
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "save_full_model": False,
    "score_test": False,
    "overwrite": False,
}


def find_rate(
    given: Mapping[str, Any],
    *,
    steps: int = 30,
    rates: Sequence[float] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train a few steps at several rates; return the losses and the rate to take.

    Every run sees the same batches; one that diverges is stopped. Where the best of the rates is
    the smallest or the largest, the next one beyond is tried too. Runs that are finished already
    are not repeated.

    Args:
        given: keys of a config, with their types.
        steps: steps of each run; the schedule of the config is run through in them.
        rates: rates to try; ``None``: the method's own and three on each side, a factor of two
            apart.
        console: where to say what happens.

    Returns:
        ``{"rate": best or None, "losses": {rate: validation loss}, "method", "steps", "edge"}``,
        also in ``lr_find.json`` in the folder; ``edge`` says that a better one may lie beyond.

    Raises:
        UserError: bad input, before anything is written.
    """
    config = from_values(dict(given))
    if steps < 2:
        raise UserError(f"steps must be at least 2, found {steps}")
    if not config.method.adapter.trains:
        raise UserError(f"method {config.method.name!r} trains nothing, so it has no learning rate")
    method, seed = config.method.name, config.training.seed
    folder = Path(given.get("output_dir") or f"runs/lr-find-{config.entry.name}-{method}")
    tried = sorted(rates) if rates else _around(config.method.learning_rate)
    losses: dict[float, float] = {}
    for _ in range(1 if rates else EXTENSIONS + 1):
        comparison = _comparison(given, folder, method, tried, seed, steps)
        found = compare(comparison, console)
        losses = {rate: validation_loss(result) for (_, rate, _), result in found.items()}
        losses = dict(sorted(losses.items()))
        beyond = _beyond(losses)
        if beyond is None:
            break
        tried = sorted([*tried, beyond])
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    answer = {
        "rate": min(finite, key=finite.__getitem__) if finite else None,
        "losses": {f"{rate:g}": loss for rate, loss in losses.items()},
        "method": method,
        "steps": steps,
        "edge": _beyond(losses) is not None,
    }
    folders.write_json(folder / "lr_find.json", answer)
    plot_rates(losses, folder / "lr_find.png", f"{method}, {steps} steps")
    return {**answer, "losses": losses, "folder": folder}


def _around(rate: float) -> list[float]:
    return [float(f"{rate * RATIO**k:.3g}") for k in range(-AROUND, AROUND + 1)]


def _beyond(losses: Mapping[float, float]) -> float | None:
    """The next rate on the side where the best one is the last; ``None`` if it lies inside.

    >>> _beyond({0.1: 3.0, 0.2: 1.0, 0.4: 2.0}) is None
    True
    >>> _beyond({0.1: 3.0, 0.2: 1.0})
    0.4
    """
    rates = sorted(losses)
    best = min(rates, key=losses.__getitem__)
    if not math.isfinite(losses[best]):
        return float(f"{rates[0] / RATIO**2:.3g}")
    if best == rates[0]:
        return float(f"{best / RATIO:.3g}")
    return float(f"{best * RATIO:.3g}") if best == rates[-1] else None


def _comparison(
    given: Mapping[str, Any],
    folder: Path,
    method: str,
    rates: Sequence[float],
    seed: int,
    steps: int,
) -> Comparison:
    import yaml

    kept = {key: value for key, value in given.items() if key not in _OWN}
    kept |= {**_SHORT, "max_steps": steps, "logging_steps": max(1, steps // 10)}
    for key in ("generation_samples", "diagnostics_every"):
        if key in kept:
            kept[key] = 0
    recipe = {**kept, "methods": {method: [float(r) for r in rates]}, "seeds": [seed]}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
        comparison = load_comparison(path, folder=folder)
    return dataclasses.replace(comparison, recipe="lorapro lr-find")


def plot_rates(losses: Mapping[float, float], path: Path, title: str) -> None:
    """Draw validation loss against the rate; rates that diverged are crosses at the top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.4), layout="constrained")
    axes: Any = figure.subplots()
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    diverged = [rate for rate in losses if rate not in finite]
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if finite:
        axes.plot(list(finite), list(finite.values()), "o-", color="#1f5fa8")
        best = min(finite, key=finite.__getitem__)
        axes.plot([best], [finite[best]], "o", markersize=11, fillstyle="none", color="#c0392b")
        axes.annotate(
            f"{best:g}", (best, finite[best]), (0, -16), textcoords="offset points", ha="center"
        )
        axes.margins(y=0.2)
    for rate in diverged:
        axes.plot([rate], [0.97], "x", color="#c0392b", transform=axes.get_xaxis_transform())
    figure.savefig(path, dpi=150)
