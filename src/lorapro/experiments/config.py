"""One flat YAML, plus ``--flag value`` overrides, checked and turned into dataclasses.

A key is one of ours (:class:`~lorapro.experiments.options.RunOptions`, or one that the run's task
or method owns) or any field of ``transformers.TrainingArguments``, as users of TRL and of the
Hugging Face examples know it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorapro.experiments import methods, tasks
from lorapro.experiments.data import content_digest
from lorapro.experiments.errors import UserError
from lorapro.experiments.keys import (
    default_of,
    our_keys,
    owners,
    parse_values,
    relevant,
    training_defaults,
)
from lorapro.experiments.options import RunOptions, check_options
from lorapro.experiments.training_checks import check_training
from lorapro.experiments.yaml_file import read_yaml

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["RunConfig", "build_config", "from_values", "load_config"]

# What differs from TrainingArguments' own defaults, unless the config says otherwise.
TRAINING_DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # a diverged run must look diverged
    "eval_strategy": "steps",
    "eval_steps": 0.1,  # ten evaluations a run
    "save_total_limit": 1,
    "per_device_eval_batch_size": 64,
}

# Trainer's keys that do not change what is learned: two runs that differ here only are the same.
NOT_LEARNED = {
    "output_dir",
    "disable_tqdm",
    "report_to",
    "run_name",
    "project",
    "log_level",
    "log_level_replica",
    "logging_steps",
    "logging_strategy",
    "logging_first_step",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
    "per_device_eval_batch_size",
    "eval_steps",
    "eval_strategy",
    "skip_memory_metrics",
    "resume_from_checkpoint",
}


@dataclass(frozen=True)
class RunConfig:
    """A checked configuration of one run.

    Attributes:
        run: keys of every run.
        entry: the task.
        task: options of the task's family.
        method: adapter x start x optimizer.
        adapter, start, optimizer: their options.
        training: Trainer's arguments.
        given: the keys that were given, with their types, but those in ``unread``.
        unread: keys that were given and that this method does not read.
    """

    run: RunOptions
    entry: tasks.TaskEntry
    task: Any
    method: methods.Method
    adapter: Any
    start: Any
    optimizer: Any
    training: TrainingArguments
    given: dict[str, Any]
    unread: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return Path(str(self.training.output_dir))

    def with_values(self, **changes: Any) -> RunConfig:
        """Return the configuration with these keys changed, checked again."""
        return build_config({**self.given, **changes})

    def family(self) -> tasks.Family:
        """Return the task's family instance, nothing read yet."""
        return tasks.make_family(self.entry, self.run, self.task)

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        defaults = training_defaults()
        found: dict[str, Any] = {
            key: value
            for key, value in self.given.items()
            if key in defaults and key not in NOT_LEARNED and value != defaults[key]
        }
        found["learning_rate"] = self.training.learning_rate
        found["max_steps"] = self.training.max_steps
        for options in (self.run, self.task, self.adapter, self.start, self.optimizer):
            for item in dataclasses.fields(options):
                value = getattr(options, item.name)
                if item.metadata.get("learned", True) and value != default_of(item):
                    found[item.name] = value
        family = self.family()
        found |= {
            "task": self.entry.name,
            "method": self.method.name,
            "model": family.model_name,
            "data": family.data_name,
            "data_content": content_digest(family.data_name),
        }
        return {key: value for key, value in sorted(found.items()) if value is not None}

    def identity(self) -> dict[str, Any]:
        """Return what makes this run this run: its keys that are not defaults, and its data.

        Keys that its task and method do not read are not part of it.
        """
        return dict(self._identity)

    def fingerprint(self) -> str:
        """Return a hash of :meth:`identity`."""
        text = json.dumps(self._identity, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _make(cls: type, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    names = {item.name for item in dataclasses.fields(cls)}
    values = {**defaults, **given}
    options = cls(**{name: value for name, value in values.items() if name in names})
    check_options(options)
    return options


def build_config(values: Mapping[str, Any], flags: Sequence[str] = ()) -> RunConfig:
    """Check ``values`` overridden by command-line ``flags`` and build the dataclasses.

    Raises:
        UserError: an unknown key or flag (with the nearest valid one), a key that belongs to
            another task or method, a value of the wrong type, a value out of range.
    """
    return from_values(parse_values(values, flags))


def from_values(given: Mapping[str, Any]) -> RunConfig:
    """Build a configuration from values that have their types already."""
    import torch
    from transformers import TrainingArguments

    used, ours, theirs = relevant(given), our_keys(), training_defaults()
    foreign = [key for key in given if key in ours and key not in used]
    for key in foreign:
        if owners(key).startswith("tasks"):
            raise UserError(f"{key!r} is not read by this task; it belongs to {owners(key)}")
    given = {key: value for key, value in given.items() if key not in foreign}
    entry = tasks.find_task(str(given.get("task", RunOptions.task)))
    method = methods.find_method(str(given.get("method", RunOptions.method)))
    family = tasks.FAMILIES[entry.family]
    run = _make(RunOptions, given, entry.values)
    task = _make(family.options, given, entry.values)
    adapter, start, optimizer = (_make(cls, given, {}) for cls in method.options())

    rate = given.setdefault("learning_rate", method.learning_rate)
    check_training(given, rate)
    arguments = {**TRAINING_DEFAULTS, **{k: v for k, v in given.items() if k in theirs}}
    arguments |= family.training_values(task, given)
    arguments.setdefault("data_seed", arguments.get("seed", 42))
    arguments.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    arguments.setdefault("output_dir", f"runs/{entry.name}-{method.name}")
    try:
        training = TrainingArguments(**arguments)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise UserError(" ".join(str(error).split())) from error
    parts = (adapter, start, optimizer)
    return RunConfig(run, entry, task, method, *parts, training, given, tuple(foreign))


def load_config(path: str | Path | None, flags: Sequence[str] = ()) -> RunConfig:
    """Read a YAML (or none), override it with flags, check it. See :func:`build_config`."""
    if path is not None and Path(path).is_dir():
        raise UserError(
            f"{path} is a folder, expected a config YAML; the config of a run is "
            f"{Path(path) / 'config.yaml'}"
        )
    return build_config({} if path is None else read_yaml(path), flags)
