"""From a task and a method to the model that is trained, checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lorapro.experiments.config import Config
from lorapro.experiments.errors import UserError
from lorapro.experiments.methods import METHODS
from lorapro.experiments.tasks import Task

if TYPE_CHECKING:
    from torch import nn

__all__ = ["add_adapter", "build_model", "check_optimizer", "count_parameters"]


def build_model(config: Config, task: Task) -> Any:
    """Return the model of ``config``: pretrained weights, fresh head and adapter, initialised.

    Seeded twice, before the head and before the adapter: a seed gives the same head to every method
    and the same adapter to every adapter method.

    Raises:
        UserError: no module to adapt, a rank above min(m, n), nothing to train.
    """
    from transformers import set_seed

    method = METHODS[config.experiment.method]
    seed = config.training.seed
    set_seed(seed)
    model: Any = task.load_model()
    if method.adapter is not None:
        set_seed(seed)
        model = add_adapter(model, config, task, method.adapter)
        check_ranks(model)
        if method.init is not None:
            batches = init_batches(config, task, method.init_batches)
            try:
                method.init(model, batches, config.experiment)
            except ValueError as error:
                raise UserError(" ".join(str(error).split())) from error
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"method {method.name!r} leaves no trainable parameter in the model")
    return model


def add_adapter(model: Any, config: Config, task: Task, extra: Mapping[str, Any]) -> Any:
    """Wrap ``model`` in the PEFT adapter that the config and the method describe."""
    from peft import LoraConfig, get_peft_model

    args = config.experiment
    targets: Any = args.target_modules
    in_full = list(args.modules_to_save or [])
    if task.head is not None and task.head not in in_full:
        in_full.append(task.head)
    options = {
        "r": args.rank,
        "lora_alpha": args.alpha,
        "lora_dropout": args.lora_dropout,
        "target_modules": targets[0] if targets == ["all-linear"] else targets,
        "exclude_modules": args.exclude_modules,
        "modules_to_save": in_full or None,
        "task_type": task.peft_task_type,
    }
    try:
        return get_peft_model(model, LoraConfig(**{**options, **extra}))
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot add the adapter: {reason}") from error


def check_ranks(model: nn.Module) -> None:
    """Raise for the first pair whose rank exceeds what its weight can have."""
    from lorapro.factors import find_pairs

    found = find_pairs(model)
    for pair in found.pairs:
        m, n = pair.shape
        if pair.rank > min(m, n):
            raise UserError(
                f"rank {pair.rank} is above min(m, n) = {min(m, n)} of {pair.name} "
                f"({m} x {n}); lower 'rank' or leave the layer out with exclude_modules"
            )
    if not found.pairs:
        raise UserError(
            "the model has no trainable LoRA pair; check target_modules and exclude_modules"
        )


def check_optimizer(config: Config, model: nn.Module) -> Any:
    """Return Trainer's ``optimizer_cls_and_kwargs``, tried once on the model.

    The trial shows what the optimizer has against the model or the options while nothing has been
    written yet.
    """
    from torch.optim import Optimizer

    method = METHODS[config.experiment.method]
    if method.optimizer is None:
        return None
    try:
        maker, kwargs = method.optimizer(config.training, config.experiment)
        if not issubclass(maker, Optimizer):  # a factory: Trainer calls it in the same way
            maker()(model, **kwargs)
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from error
    return maker, kwargs


def init_batches(config: Config, task: Task, count: int) -> Iterator[dict[str, Any]]:
    """Yield ``count`` seeded training batches of the training batch size."""
    import random

    size = config.training.per_device_train_batch_size
    order = list(range(len(task.train)))
    random.Random(config.training.seed).shuffle(order)
    collate = task.collator()
    for start in range(0, min(count * size, len(order)), size):
        yield collate([task.train[i] for i in order[start : start + size]])


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, all) parameter counts."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters())
