"""What a run can be told: small dataclasses of keys, each owned by the module that reads them.

This module is a leaf. It holds :class:`RunOptions`, the keys of every run, and the means to declare
keys. A family of tasks (:mod:`~lorapro.experiments.tasks`), an adapter, a start and an optimizer
(:mod:`~lorapro.experiments.methods`) each declare a dataclass of their own beside the code that
reads it; :mod:`~lorapro.experiments.config` puts together those that a run's task and method need.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from lorapro.experiments.errors import UserError, check_name

__all__ = ["NoOptions", "RunOptions", "check_options", "option", "union"]


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Iterable[str] | None = None,
    learned: bool = True,
) -> Any:
    """Declare a key of an options dataclass.

    Args:
        default: value of a config that does not give the key; lists are copied.
        help: one line for ``--help``.
        least: smallest value allowed.
        above: exclusive lower bound.
        below: exclusive upper bound.
        choices: names allowed.
        learned: whether two runs that differ here only are different runs.

    Numbers must be finite, whatever the bounds.
    """
    metadata = {
        "help": help,
        "least": least,
        "above": above,
        "below": below,
        "choices_of": None if choices is None else tuple(choices),
        "learned": learned,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class NoOptions:
    """Of a part that has none."""


@dataclass
class RunOptions:
    """Keys of every run; all the others belong to its task, its method or to Trainer."""

    task: str = option(
        "tweets", "what to train on, one of the tasks below; the command asks for it"
    )
    method: str = option("lora-pro-muon", "how to train, see the catalogue of methods")
    model: str | None = option(None, "asset, hub id or folder; default: the task's own")
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "type of the model's weights"
    )
    data: str | None = option(
        None, "asset, CSV/TSV/JSON/JSONL/Parquet file, folder of such, or hub id; default: task's"
    )
    data_config: str | None = option(None, "configuration name of a hub data set")
    train_samples: int = option(0, "training examples; 0 is all", least=0)
    validation_samples: int = option(
        500, "validation examples, cut from train if there is no such split", least=1
    )
    test_samples: int = option(1000, "test examples; 0 is all there are", least=0)
    split_seed: int = option(
        0, "draws the splits; apart from seed, so all seeds share them", least=0
    )
    divergence: float = option(
        2.0,
        "stop when the training loss is this many times the first one plus one; 0: only if not "
        "finite",
        least=0,
    )
    diagnostics_every: int = option(
        0,
        "measure ranks and alignment of the adapters every so many steps, into diagnostics.jsonl; "
        "0 is never",
        least=0,
        learned=False,
    )
    diagnostics_layers: str | None = option(
        None, "regular expression: only adapters whose name it finds something in", learned=False
    )
    allow_code_execution: bool = option(
        False, "run programs that the model wrote (HumanEval), in a sandbox", learned=False
    )
    save_full_model: bool = option(
        True, "full fine-tuning: save the model's weights", learned=False
    )
    score_test: bool = option(True, "score the test set after training", learned=False)
    save_items: bool = option(
        True, "keep loss and correctness of every test example", learned=False
    )
    overwrite: bool = option(False, "replace another run in output_dir", learned=False)


def check_options(options: Any) -> None:
    """Check every value of an options dataclass against what its keys were declared with.

    A dataclass that declares keys which must fit one another has a method ``check`` for that.

    Raises:
        UserError: naming the first key that is out of range, and the range.

    >>> check_options(RunOptions(validation_samples=0))
    Traceback (most recent call last):
        ...
    lorapro.experiments.errors.UserError: validation_samples must be at least 1, found 0
    """
    for item in dataclasses.fields(options):
        value, rule = getattr(options, item.name), item.metadata
        if isinstance(value, str) and not value.strip() and value != item.default:
            raise UserError(f"{item.name} is empty; leave it out or give it a value")
        if rule.get("choices_of") is not None and value is not None:
            for name in value if isinstance(value, list) else [value]:
                check_name(item.name, str(name), rule["choices_of"])
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise UserError(f"{item.name} must be finite, found {value:g}")
        if rule.get("least") is not None and value < rule["least"]:
            raise UserError(f"{item.name} must be at least {rule['least']:g}, found {value:g}")
        if rule.get("above") is not None and value <= rule["above"]:
            raise UserError(f"{item.name} must be above {rule['above']:g}, found {value:g}")
        if rule.get("below") is not None and value >= rule["below"]:
            raise UserError(f"{item.name} must be below {rule['below']:g}, found {value:g}")
    if hasattr(options, "check"):
        options.check()


def union(classes: Iterable[type]) -> type:
    """One dataclass with the keys of all of them, each once, for parsing.

    Two families may share a key, each with a default of its own; its type must then be the same.

    Raises:
        TypeError: one key with two types.
    """
    import typing

    found: dict[str, Any] = {}
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for item in dataclasses.fields(cls):
            kind = hints[item.name]
            if item.name in found and found[item.name][0] != kind:
                raise TypeError(f"option {item.name!r} of {cls.__name__} has another type already")
            found.setdefault(item.name, (kind, item))
    made = []
    for name, (kind, item) in found.items():
        shown = {"help": item.metadata.get("help", "")}  # argparse takes no more of it
        made.append((name, kind, dataclasses.field(default=None, metadata=shown)))
    return dataclasses.make_dataclass("AllOptions", made)
