"""Trainer with one way to evaluate: every example scored, on the way and at the end."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Trainer

from lorapro.experiments.head_rate import set_rate_of

if TYPE_CHECKING:
    from lorapro.experiments.config import RunConfig
    from lorapro.experiments.tasks import Family

__all__ = ["ItemTrainer", "make_trainer", "weighted_loss"]


def weighted_loss(items: Mapping[str, np.ndarray]) -> float:
    """Mean loss over all labels, and not over examples or batches.

    >>> weighted_loss({"loss": np.array([1.0, 4.0]), "weight": np.array([2.0, 1.0])})
    2.0
    """
    weight = items["weight"].sum()
    return float((items["loss"] * items["weight"]).sum() / weight) if weight else float("nan")


class ItemTrainer(Trainer):
    """Trainer whose evaluations score each example with the task's ``item_scores``.

    Examples of similar length share a batch; scores come back in the order of the data. Under
    several processes each scores its share. Its optimizer gives a new head ``head_rate``.
    """

    def __init__(self, *, family: Family, head_rate: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.family = family
        self.head_rate = head_rate

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's or the method's, with the head's own rate."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.head_rate is not None:
            held: Any = self.model if model is None else model
            set_rate_of(optimizer, held, self.family.new_parameters, self.head_rate)
        return optimizer

    def score(self, examples: Any) -> dict[str, np.ndarray]:
        """Return the scores of ``examples``, see :data:`lorapro.experiments.tasks.base.Items`."""
        lengths = [len(example.get("input_ids", ())) for example in examples]
        order = np.argsort(lengths, kind="stable")
        loader = self.get_eval_dataloader([examples[i] for i in order])  # type: ignore[arg-type]
        model, parts = self.model, []
        assert model is not None
        was_training = model.training
        model.eval()
        try:
            for batch in loader:
                inputs = self._prepare_inputs(batch)
                with torch.no_grad(), self.compute_loss_context_manager():
                    outputs = model(**inputs)
                    scores = self.family.item_scores(outputs, inputs)
                gathered = self.accelerator.gather_for_metrics(scores)
                parts.append({name: value.cpu().numpy() for name, value in gathered.items()})
        finally:
            model.train(was_training)
        back = np.argsort(order, kind="stable")
        return {name: np.concatenate([part[name] for part in parts])[back] for name in parts[0]}

    def summarize(self, items: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return loss, its standard error from the size of the set, and the task's metrics."""
        spread = float(np.std(items["loss"]) / len(items["loss"]) ** 0.5)
        return {
            "loss": weighted_loss(items),
            "loss_standard_error": spread,
            **self.family.metrics(items),
        }

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score the validation examples, log their metrics."""
        examples = self.eval_dataset if eval_dataset is None else eval_dataset
        found = self.summarize(self.score(examples))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class _ReadOnlyTrainer(ItemTrainer):
    """One that only evaluates, and makes no folder for it."""

    def __init__(self, **kwargs: Any) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            args = dataclasses.replace(kwargs.pop("args"), output_dir=scratch)
            super().__init__(args=args, **kwargs)


def make_trainer(
    config: RunConfig,
    family: Family,
    model: Any,
    optimizer: Any = None,
    callbacks: Any = None,
    *,
    create_folder: bool = True,
) -> ItemTrainer:
    """Return the Trainer of a run; without ``create_folder`` it can evaluate only."""
    return (ItemTrainer if create_folder else _ReadOnlyTrainer)(
        family=family,
        head_rate=getattr(config.task, "head_learning_rate", None),
        model=model,
        args=config.training,
        train_dataset=family.train,
        eval_dataset=family.validation,
        data_collator=family.collator(),
        processing_class=family.processor,
        optimizer_cls_and_kwargs=optimizer,
        callbacks=callbacks,
    )
