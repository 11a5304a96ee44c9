"""AdaLoRA's allocation of ranks, inside Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

__all__ = ["AllocateRanks"]

STATE = "adalora.pt"


class AllocateRanks(TrainerCallback):
    """Call PEFT's ``update_and_allocate`` after each optimizer step, before gradients are cleared.

    The running importances are not part of the model; they are kept in checkpoints, so that an
    interrupted run goes on to the same end.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the importances of the checkpoint that training goes on from."""
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
        if state.global_step and file.is_file():
            allocator = _tuner(kwargs["model"]).rankallocator
            for name, values in torch.load(file, weights_only=True).items():
                setattr(allocator, name, values)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update the importances and mask the least important singular values."""
        _tuner(kwargs["model"]).update_and_allocate(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the importances into the checkpoint."""
        allocator = _tuner(kwargs["model"]).rankallocator
        names = ("ipt", "exp_avg_ipt", "exp_avg_unc")
        values = {name: getattr(allocator, name) for name in names}
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            torch.save(values, folder / STATE)


def _tuner(model: Any) -> Any:
    return getattr(model, "module", model).base_model
