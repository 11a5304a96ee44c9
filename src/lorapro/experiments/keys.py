"""Every key a config may hold: who reads it, its default, and its type.

Ours are declared in options dataclasses (:mod:`~lorapro.experiments.options`); all others are
fields of ``transformers.TrainingArguments``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from lorapro.experiments import methods, tasks
from lorapro.experiments.errors import UserError, nearest_hint
from lorapro.experiments.options import RunOptions, union
from lorapro.experiments.tasks import catalogue

__all__ = [
    "COMPARE_ONLY",
    "default_of",
    "option_defaults",
    "our_keys",
    "owners",
    "parse_values",
    "relevant",
    "training_defaults",
]

# What others call our keys and Trainer's.
ALIASES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "model_name": "model",
    "model_name_or_path": "model",
    "base_model": "model",
    "dataset": "data",
    "dataset_name": "data",
    "train_file": "data",
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "scheduler": "lr_scheduler_type",
    "warmup_ratio": "warmup_steps",
    "evaluation_strategy": "eval_strategy",
}

COMPARE_ONLY = (
    *("title", "paper", "columns", "target"),
    *("tasks", "grid", "methods", "seeds", "strategy"),
)


def default_of(item: Any) -> Any:
    """Return the default of a dataclass field."""
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


@functools.cache
def training_defaults() -> dict[str, Any]:
    """Every field of ``TrainingArguments`` with its default."""
    from transformers import TrainingArguments

    return {
        item.name: default_of(item) for item in dataclasses.fields(TrainingArguments) if item.init
    }


def our_keys() -> set[str]:
    """Every key of ours, whoever reads it."""
    return set(option_defaults())


@functools.cache
def option_defaults() -> dict[str, Any]:
    """Every key of ours with the default of the dataclass that declares it first."""
    found: dict[str, Any] = {}
    for cls in _option_classes():
        for item in dataclasses.fields(cls):
            found.setdefault(item.name, default_of(item))
    return found


def _option_classes() -> list[type]:
    return [RunOptions, *catalogue.option_classes(), *methods.option_classes()]


@functools.cache
def _parser() -> Any:
    from transformers import HfArgumentParser, TrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(message.replace("argument --", "").replace("\n", " "))

    types: Any = [union(_option_classes()), TrainingArguments]
    parser = Parser(types, add_help=False, allow_abbrev=False)
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # the namespace then holds what was given
        action.required = False
    return parser


@functools.cache
def _takes_lists(key: str) -> bool:
    """Whether a key's value may be a list."""
    actions = {action.dest: action for action in _parser()._actions}
    return key not in actions or actions[key].nargs in ("+", "*")


@functools.cache
def _text_keys() -> frozenset[str]:
    """Keys of ours whose value is a text or a list of such."""
    texts = (str, str | None, list[str], list[str] | None)
    hints = typing.get_type_hints(union(_option_classes()))
    return frozenset(key for key, hint in hints.items() if hint in texts)


def _may_be_none(key: str) -> bool:
    """Whether a key is ours and has no value unless it is given one: then null takes it away."""
    return key in our_keys() and option_defaults()[key] is None


def _as_flags(values: Mapping[str, Any]) -> list[str]:
    """Write a mapping as flags, so that YAML values get the types and checks flags get."""
    flags: list[str] = []
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool):
            flags.append(f"--{key}={str(value).lower()}")
        elif isinstance(value, Mapping):
            flags.append(f"--{key}={json.dumps(value)}")
        elif isinstance(value, list | tuple):
            if not value:
                raise UserError(f"{key} is an empty list; leave the key out or give it a value")
            if not _takes_lists(key):
                raise UserError(f"{key} takes one value, found {list(value)}")
            flags += [f"--{key}", *map(str, value)]
        else:
            flags.append(f"--{key}={value}")
    return flags


def parse_values(values: Mapping[str, Any], flags: Sequence[str] = ()) -> dict[str, Any]:
    """Return ``values`` overridden by ``flags``, each with the type of its key.

    Raises:
        UserError: a key or flag that no task or method has, with the nearest; a value of the wrong
            type.
    """
    known = {*our_keys(), *training_defaults()}
    for key, value in values.items():
        if key in COMPARE_ONLY:
            raise UserError(f"{key!r} belongs to 'lorapro compare'; 'lorapro train' is one run")
        if key not in known:
            raise UserError(f"unknown config key {key!r}{_hint(key, known)}")
        if key in _text_keys() and isinstance(value, bool | Mapping):
            found = "a mapping" if isinstance(value, Mapping) else str(value).lower()
            raise UserError(f"{key} must be a text, found {found}; put quotes around a word")
    parser = _parser()
    from_file, _ = parser.parse_known_args(_as_flags(values))
    from_flags, unknown = parser.parse_known_args(list(flags))
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        if not unknown[0].startswith("--"):
            raise UserError(f"unexpected argument {unknown[0]!r}")
        raise UserError(f"unknown flag --{name}{_hint(name.replace('-', '_'), known)}")
    nothing = {key: None for key in values if values[key] is None and _may_be_none(key)}
    given = {**nothing, **vars(from_file), **vars(from_flags)}
    for key, value in given.items():
        if isinstance(value, str) and value.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):  # a template is no mapping
                given[key] = json.loads(value)
    return given


def _hint(key: str, known: Collection[str]) -> str:
    meant = ALIASES.get(key)
    return f" (did you mean {meant!r}?)" if meant else nearest_hint(key, known)


def relevant(values: Mapping[str, Any]) -> set[str]:
    """Return our keys that the task and the method named in ``values`` read."""
    run = RunOptions()
    entry = tasks.find_task(str(values.get("task", run.task)))
    method = methods.find_method(str(values.get("method", run.method)))
    classes = (RunOptions, tasks.FAMILIES[entry.family].options, *method.options())
    return {item.name for cls in classes for item in dataclasses.fields(cls)}


def owners(key: str) -> str:
    """Say which tasks or methods read one of our keys.

    >>> owners("gamma")
    "methods with 'lora-ga'"
    """
    families = [
        name
        for name, family in tasks.FAMILIES.items()
        if key in {item.name for item in dataclasses.fields(family.options)}
    ]
    if families:
        names = [entry.name for entry in tasks.TASKS.values() if entry.family in families]
        return f"tasks {', '.join(names)}"
    parts: dict[str, Any] = {**methods.ADAPTERS, **methods.STARTS, **methods.OPTIMIZERS}
    found = [
        repr(name)
        for name, part in parts.items()
        if key in {item.name for item in dataclasses.fields(part.options)}
    ]
    return f"methods with {', '.join(found)}"
