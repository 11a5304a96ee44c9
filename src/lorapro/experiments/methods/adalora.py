"""AdaLoRA's allocation of ranks, inside Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

__all__ = ["AllocateRanks"]

STATE = "adalora.pt"
AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class AllocateRanks(TrainerCallback):
    """Call PEFT's ``update_and_allocate`` after each optimizer step, before gradients are cleared.

    Masked singular values are zeros in the saved adapter, whose tensors keep their first rank: PEFT
    would cut them to the ranks of the moment, and what was cut cannot come back after an
    interruption. For the same reason the running importances lie in the checkpoints.
    """

    def __init__(self) -> None:
        self._pattern: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the importances of the checkpoint that training goes on from."""
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
        if state.global_step and file.is_file():
            tuner = _tuner(kwargs["model"])
            held = torch.load(file, weights_only=True)
            self._pattern = held.pop("pattern")
            for name, values in held.items():
                setattr(tuner.rankallocator, name, values)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update the importances and mask the least important singular values."""
        tuner = _tuner(kwargs["model"])
        config = tuner.peft_config[tuner.trainable_adapter_name]
        config.rank_pattern = self._pattern
        # Trainer counts the step after this call; PEFT's own loop passes the same number.
        tuner.update_and_allocate(state.global_step)
        self._pattern, config.rank_pattern = config.rank_pattern, None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the importances into the checkpoint."""
        allocator = _tuner(kwargs["model"]).rankallocator
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            values = {name: getattr(allocator, name) for name in AVERAGES}
            scratch = folder / f"{STATE}.part"
            torch.save({**values, "pattern": self._pattern}, scratch)
            scratch.replace(folder / STATE)


def _tuner(model: Any) -> Any:
    return getattr(model, "module", model).base_model
