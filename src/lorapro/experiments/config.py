"""One flat YAML, plus ``--flag value`` overrides, checked and turned into dataclasses.

A key is one of ours (:class:`~lorapro.experiments.options.RunOptions`, or one that the run's task
or method owns) or any field of ``transformers.TrainingArguments``, as users of TRL and of the
Hugging Face examples know it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lorapro.experiments import methods, tasks
from lorapro.experiments.data import content_digest
from lorapro.experiments.errors import UserError, check_name, nearest_hint
from lorapro.experiments.options import RunOptions, check_options, union
from lorapro.experiments.tasks import catalogue
from lorapro.experiments.yaml_file import read_yaml

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = [
    "COMPARE_ONLY",
    "RunConfig",
    "build_config",
    "from_values",
    "load_config",
    "option_defaults",
    "our_keys",
    "owners",
    "parse_values",
    "relevant",
]

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

COMPARE_ONLY = ("title", "paper", "columns", "tasks", "grid", "methods", "seeds", "strategy")


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
        defaults = _training_defaults()
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
                if item.metadata.get("learned", True) and value != _default(item):
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


def _default(item: Any) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


@functools.cache
def _training_defaults() -> dict[str, Any]:
    from transformers import TrainingArguments

    return {
        item.name: _default(item) for item in dataclasses.fields(TrainingArguments) if item.init
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
            found.setdefault(item.name, _default(item))
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
    known = {*our_keys(), *_training_defaults()}
    for key in values:
        if key in COMPARE_ONLY:
            raise UserError(f"{key!r} belongs to 'lorapro compare'; 'lorapro train' is one run")
        if key not in known:
            raise UserError(f"unknown config key {key!r}{nearest_hint(key, known)}")
    parser = _parser()
    from_file, _ = parser.parse_known_args(_as_flags(values))
    from_flags, unknown = parser.parse_known_args(list(flags))
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        if not unknown[0].startswith("--"):
            raise UserError(f"unexpected argument {unknown[0]!r}")
        hint = nearest_hint(name.replace("-", "_"), known)
        raise UserError(f"unknown flag --{name}{hint}")
    given = {**vars(from_file), **vars(from_flags)}
    for key, value in given.items():
        if isinstance(value, str) and value.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):  # a template is no mapping
                given[key] = json.loads(value)
    return given


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


def _make(cls: type, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    names = {item.name for item in dataclasses.fields(cls)}
    values = {**defaults, **given}
    options = cls(**{name: value for name, value in values.items() if name in names})
    check_options(options)
    return options


# Trainer's keys that must be at least so much, and those that must be finite and not negative.
_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "seed": 0,
    "warmup_steps": 0,
}
_NOT_NEGATIVE = ("max_grad_norm", "weight_decay", "adam_epsilon")
_POSITIVE = ("eval_steps", "logging_steps", "save_steps")
_BELOW_ONE = ("adam_beta1", "adam_beta2", "label_smoothing_factor")


def _check_training(given: Mapping[str, Any], rate: float) -> None:
    if not 0 < rate < math.inf:
        raise UserError(f"learning_rate must be positive and finite, found {rate:g}")
    for key, least in _LEAST.items():
        if not given.get(key, least) >= least:
            raise UserError(f"{key} must be at least {least}, found {given[key]}")
    for key in _NOT_NEGATIVE:
        if not 0 <= given.get(key, 0) < math.inf:
            raise UserError(f"{key} must be finite and not negative, found {given[key]:g}")
    steps = given.get("max_steps", -1)
    if steps != -1 and steps < 1:
        raise UserError(f"max_steps must be at least 1 (or -1 for num_train_epochs), found {steps}")
    if steps == -1 and not 0 < given.get("num_train_epochs", 1) < math.inf:
        raise UserError(
            f"num_train_epochs must be positive and finite, found {given['num_train_epochs']:g}"
        )
    for key in _POSITIVE:
        if not 0 < given.get(key, 1) < math.inf:
            raise UserError(f"{key} must be positive and finite, found {given[key]:g}")
    for key in _BELOW_ONE:
        if not 0 <= given.get(key, 0) < 1:
            raise UserError(f"{key} must lie in [0, 1), found {given[key]:g}")
    _check_trackers(given.get("report_to", "none"))


def _check_trackers(value: Any) -> None:
    """Refuse a tracker that is unknown or not installed, which Trainer would find too late."""
    names = [value] if isinstance(value, str) else list(value)
    if set(names) <= {"none", "all"}:
        return
    from transformers.integrations import INTEGRATION_TO_CALLBACK
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    for name in names:
        check_name("report_to", name, [*INTEGRATION_TO_CALLBACK, "none", "all"])
        if name not in (*available, "none", "all"):
            raise UserError(
                f"report_to {name!r} needs a package that is not installed; run: pip install {name}"
            )


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

    used, ours, theirs = relevant(given), our_keys(), _training_defaults()
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
    _check_training(given, rate)
    arguments = {**TRAINING_DEFAULTS, **{k: v for k, v in given.items() if k in theirs}}
    arguments |= family.training_values(task, given)
    arguments.setdefault("data_seed", arguments.get("seed", 42))
    arguments.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    arguments.setdefault("output_dir", f"runs/{entry.name}-{method.name}")
    try:
        training = TrainingArguments(**arguments)
    except (ValueError, TypeError, ImportError) as error:
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
