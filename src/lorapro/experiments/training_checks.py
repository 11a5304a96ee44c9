"""What ``TrainingArguments`` lets pass and no run can mean."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from lorapro.experiments.errors import UserError, check_name

__all__ = ["check_training"]

# Trainer's keys that must be at least so much, and those that must be finite and not negative.
_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "seed": 0,
    "data_seed": 0,
    "dataloader_num_workers": 0,
}
_NOT_NEGATIVE = (
    *("max_grad_norm", "weight_decay", "adam_epsilon", "warmup_steps", "eval_delay"),
    "neftune_noise_alpha",
)
# Keys of Trainer that a run settles by itself, and how.
_SETTLED = {
    "resume_from_checkpoint": "a run goes on from its own folder: give its output_dir",
    "optim": "the method brings its optimizer: choose it with method",
    "optim_args": "options of the optimizer are keys of the method, or optimizer_options",
    "optim_target_modules": "the method brings its optimizer: choose modules with target_modules",
    "push_to_hub": "upload the folder of the adapter afterwards",
}
_MAPPINGS = ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "accelerator_config")
_POSITIVE = ("eval_steps", "logging_steps", "save_steps")
_BELOW_ONE = ("adam_beta1", "adam_beta2", "label_smoothing_factor")


def check_training(given: Mapping[str, Any], rate: float) -> None:
    """Check the keys of Trainer that were given, and the learning rate.

    Raises:
        UserError: naming the first that is out of range.
    """
    for key, instead in _SETTLED.items():
        if given.get(key):
            raise UserError(f"{key} is not read: {instead}")
    for key in _MAPPINGS:
        if given.get(key) is not None and not isinstance(given[key], Mapping):
            raise UserError(f"{key} must be a mapping, found {given[key]!r}")
    if given.get("fsdp") and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise UserError("fsdp is for several processes; start them with torchrun or accelerate")
    if not 0 < rate < math.inf:
        raise UserError(f"learning_rate must be positive and finite, found {rate:g}")
    for key, least in _LEAST.items():
        if not given.get(key, least) >= least:
            raise UserError(f"{key} must be at least {least}, found {given[key]}")
    for key in ("seed", "data_seed"):
        if given.get(key, 0) >= 2**32:  # what numpy takes
            raise UserError(f"{key} must be below 2**32, found {given[key]}")
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
