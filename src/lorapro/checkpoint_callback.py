"""The Trainer callback of ``lorapro.checkpoints``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lorapro.checkpoints import set_aside

__all__ = ["CompleteCheckpoints"]


class CompleteCheckpoints(TrainerCallback):
    """Let ``resume_from_checkpoint=True`` take the last complete checkpoint, whatever happened.

    ::

        trainer = Trainer(…, callbacks=[lorapro.checkpoints.CompleteCheckpoints()])
        trainer.train(resume_from_checkpoint=True)

    When the trainer is built, checkpoints in its ``output_dir`` that a kill or a full disk left
    incomplete are renamed to ``incomplete-checkpoint-N``. When training begins, those with more
    steps than it begins with, of an earlier run in the same folder, are renamed to
    ``replaced-checkpoint-N``: a kill while they are being overwritten would leave a mixture of two
    runs. Renamed folders may be removed. Only one run may use the folder.

    >>> isinstance(CompleteCheckpoints(), TrainerCallback)
    True
    """

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set incomplete checkpoints aside."""
        self._set_aside(args, None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set checkpoints of another run aside."""
        self._set_aside(args, state.global_step)

    def _set_aside(self, args: Any, after: int | None) -> None:
        # The others wait: they would look for the same checkpoint to go on from.
        with args.main_process_first(local=args.save_on_each_node, desc="checkpoints"):
            if args.should_save and args.output_dir:
                set_aside(Path(args.output_dir), after)
