"""One flat YAML, plus ``--flag value`` overrides, checked and turned into dataclasses.

A key is either one of ours (:class:`ExperimentArguments`) or any field of
``transformers.TrainingArguments``, as users of TRL and of the Hugging Face examples know it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from lorapro.experiments.errors import UserError, check_name, nearest_hint
from lorapro.experiments.methods import METHODS
from lorapro.experiments.yaml_file import read_yaml

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["Config", "ExperimentArguments", "build_config", "load_config"]

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

# Keys that do not change what is learned: two runs that differ here only are the same run.
NOT_PART_OF_THE_RUN = {
    "output_dir",
    "overwrite",
    "save_full_model",
    "generation_samples",
    "generation_batch_size",
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

COMPARE_ONLY = ("methods", "seeds", "strategy")

_POSITIVE = ("rank", "max_length", "image_size", "max_new_tokens", "generation_batch_size")


@dataclass
class ExperimentArguments:
    """Our own keys; everything else is ``transformers.TrainingArguments``."""

    task: str = field(
        default="tweets", metadata={"help": "tweets, classification, gsm8k or images"}
    )
    model: str | None = field(
        default=None, metadata={"help": "asset, hub id or folder; default: the task's own"}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "type of the model's weights"}
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "asset, local CSV/JSONL file or folder, folder of IDX files, or hub id; "
            "default: the task's"
        },
    )
    data_config: str | None = field(
        default=None, metadata={"help": "configuration name of a hub data set"}
    )
    text_column: str = field(default="text", metadata={"help": "classification: the text"})
    label_column: str | None = field(
        default=None,
        metadata={"help": "classification and images: the label (default: the task's)"},
    )
    image_column: str = field(default="image", metadata={"help": "images: the image"})
    image_size: int = field(
        default=28,
        metadata={"help": "images: height and width in pixels, a multiple of the model's patch"},
    )
    train_samples: int = field(default=0, metadata={"help": "training examples; 0 is all"})
    validation_samples: int = field(
        default=500, metadata={"help": "validation examples, cut from train if there is no split"}
    )
    test_samples: int = field(default=1000, metadata={"help": "test examples; 0 is all there are"})
    split_seed: int = field(
        default=0, metadata={"help": "draws the splits; apart from seed, so all seeds share them"}
    )
    max_length: int = field(default=128, metadata={"help": "longest sequence, in tokens"})
    calculator_annotations: bool = field(
        default=False, metadata={"help": "gsm8k: keep <<48/2=24>> in the answers"}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "gsm8k: longest generated answer"})
    generation_samples: int = field(
        default=0, metadata={"help": "gsm8k: test questions answered after training; 0 is none"}
    )
    generation_batch_size: int = field(default=16, metadata={"help": "gsm8k: answers at a time"})

    method: str = field(default="lora-pro", metadata={"help": ", ".join(METHODS)})
    x: str = field(default="sylvester", metadata={"help": "LoRA-Pro: zero, sylvester, symmetric"})
    rank: int = field(default=8, metadata={"help": "rank of the adapters"})
    alpha: float = field(default=16.0, metadata={"help": "LoRA's alpha"})
    gamma: float = field(
        default=16.0, metadata={"help": "LoRA-GA's gamma: larger is a smaller start"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the adapters"})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "module names, or all-linear"},
    )
    exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "module names that get no adapter"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules trained in full beside the adapters"}
    )
    save_full_model: bool = field(
        default=True, metadata={"help": "full fine-tuning: save the model's weights"}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "replace another run that lies in output_dir"}
    )

    def check(self) -> None:
        """Raise :class:`UserError` for the first value that cannot be meant."""
        from lorapro.experiments.tasks import TASKS
        from lorapro.functional import X_CHOICES

        check_name("task", self.task, TASKS)
        check_name("method", self.method, METHODS)
        check_name("x", self.x, X_CHOICES)
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("train_samples", "validation_samples", "test_samples", "generation_samples"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, found {getattr(self, name)}")
        if self.validation_samples == 0:
            raise UserError(
                "validation_samples must be at least 1: learning rates are picked there"
            )
        for name in ("alpha", "gamma"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, found {getattr(self, name):g}")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout must lie in [0, 1), found {self.lora_dropout:g}")


@dataclass(frozen=True)
class Config:
    """A checked configuration: our arguments, Trainer's, and the keys that were given."""

    experiment: ExperimentArguments
    training: TrainingArguments
    given: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return Path(str(self.training.output_dir))

    def with_values(self, **changes: Any) -> Config:
        """Return the configuration with these keys changed, checked again."""
        return build_config({**self.given, **changes})

    def identity(self) -> dict[str, Any]:
        """Return what makes this run this run: given keys that differ from their defaults."""
        defaults = _defaults()
        learned = {"learning_rate": self.training.learning_rate, **self.given}
        return {
            key: value
            for key, value in sorted(learned.items())
            if key not in NOT_PART_OF_THE_RUN and (key not in defaults or value != defaults[key])
        }

    def fingerprint(self) -> str:
        """Return a hash of :meth:`identity`."""
        text = json.dumps(self.identity(), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _defaults() -> dict[str, Any]:
    from transformers import TrainingArguments

    values: dict[str, Any] = {}
    for cls in (TrainingArguments, ExperimentArguments):
        for item in dataclasses.fields(cls):
            if item.default is not dataclasses.MISSING:
                values[item.name] = item.default
            elif item.default_factory is not dataclasses.MISSING:
                values[item.name] = item.default_factory()
    values.pop("learning_rate")  # the method's own, never TrainingArguments'
    return values


@functools.cache
def _parser() -> Any:
    from transformers import HfArgumentParser, TrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(message.replace("argument --", "").replace("\n", " "))

    types: Any = [ExperimentArguments, TrainingArguments]
    parser = Parser(types, add_help=False, allow_abbrev=False)
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # the namespace then holds what was given
        action.required = False
    return parser


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
            if value:
                flags += [f"--{key}", *map(str, value)]
        else:
            flags.append(f"--{key}={value}")
    return flags


_AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)


def build_config(values: Mapping[str, Any], flags: Sequence[str] = ()) -> Config:
    """Check ``values`` overridden by command-line ``flags`` and build the dataclasses.

    Raises:
        UserError: an unknown key or flag (with the nearest valid one), a value of the wrong type,
            a value out of range.
    """
    import torch
    from transformers import TrainingArguments

    ours = {item.name for item in dataclasses.fields(ExperimentArguments)}
    theirs = {item.name for item in dataclasses.fields(TrainingArguments) if item.init}
    for key in values:
        if key in COMPARE_ONLY:
            raise UserError(f"{key!r} belongs to 'lorapro compare'; 'lorapro train' is one run")
        if key not in ours | theirs:
            raise UserError(f"unknown config key {key!r}{nearest_hint(key, ours | theirs)}")
    parser = _parser()
    from_file, _ = parser.parse_known_args(_as_flags(values))
    from_flags, unknown = parser.parse_known_args(list(flags))
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        if not unknown[0].startswith("--"):
            raise UserError(f"unexpected argument {unknown[0]!r}")
        hint = nearest_hint(name.replace("-", "_"), ours | theirs)
        raise UserError(f"unknown flag --{name}{hint}")
    given = {**vars(from_file), **vars(from_flags)}

    experiment = ExperimentArguments(**{k: v for k, v in given.items() if k in ours})
    experiment.check()
    rate = given.setdefault("learning_rate", METHODS[experiment.method].learning_rate)
    if not 0 < rate < float("inf"):
        raise UserError(f"learning_rate must be positive and finite, found {rate:g}")
    for key in _AT_LEAST_ONE:
        if given.get(key, 1) < 1:
            raise UserError(f"{key} must be at least 1, found {given[key]}")
    if given.get("max_steps", -1) == 0:
        raise UserError("max_steps must be at least 1 (or -1 for num_train_epochs), found 0")
    if (seed := given.get("seed", 0)) < 0:
        raise UserError(f"seed must not be negative, found {seed}")
    arguments = {**TRAINING_DEFAULTS, **{k: v for k, v in given.items() if k in theirs}}
    arguments.setdefault("data_seed", arguments.get("seed", 42))
    arguments.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    arguments.setdefault("output_dir", f"runs/{experiment.task}-{experiment.method}")
    try:
        training = TrainingArguments(**arguments)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error
    return Config(experiment, training, given)


def load_config(path: str | Path | None, flags: Sequence[str] = ()) -> Config:
    """Read a YAML (or none), override it with flags, check it. See :func:`build_config`."""
    return build_config({} if path is None else read_yaml(path), flags)
