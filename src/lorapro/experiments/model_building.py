"""From a task and a method to the model that is trained, checked before anything is written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lorapro.experiments.errors import UserError, check_name
from lorapro.experiments.head_rate import new_among

if TYPE_CHECKING:
    from torch import nn

    from lorapro.experiments.config import RunConfig
    from lorapro.experiments.tasks import Family

__all__ = [
    "add_adapter",
    "build_model",
    "check_run",
    "count_parameters",
    "is_measured",
    "total_steps",
]


def build_model(config: RunConfig, family: Family, *, initialize: bool = True) -> Any:
    """Return the model of ``config``: pretrained weights, fresh head and adapter, initialised.

    Without ``initialize`` what the start computes from training batches is left out.

    Seeded twice, before the head and before the adapter: a seed gives the same head to every method
    and the same adapter to every adapter method.

    Raises:
        UserError: no module to adapt, a rank above min(m, n), nothing to train.
    """
    from transformers import set_seed

    method = config.method
    seed = config.training.seed
    set_seed(seed)
    model: Any = family.load_model()
    if not method.trains_all:
        set_seed(seed)
        model = add_adapter(model, config, family)
        if method.start.initialize is not None and initialize:
            try:
                method.start.initialize(model, start_batches(config, family), config.start)
            except ValueError as error:
                raise UserError(" ".join(str(error).split())) from error
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"method {method.name!r} leaves no trainable parameter in the model")
    return model


def add_adapter(model: Any, config: RunConfig, family: Family) -> Any:
    """Wrap ``model`` in the PEFT adapter that the config and the method describe."""
    from peft import get_peft_model

    adapter, options = config.method.adapter, config.adapter
    assert adapter.config is not None
    in_full = list(options.modules_to_save or [])
    names = sorted({name.rpartition(".")[2] for name, _ in model.named_modules()} - {""})
    for key, given in (
        ("modules_to_save", in_full),
        ("exclude_modules", options.exclude_modules or []),
        # One name that fits nothing is PEFT's error; among several it would be passed over.
        ("target_modules", options.target_modules if len(options.target_modules) > 1 else []),
    ):
        for name in given:
            check_name(f"module in {key}:", name.rpartition(".")[2], names)
    if family.head is not None and family.head not in in_full:
        in_full.append(family.head)
    options = _without_heads(options, model, family)
    more = {
        "modules_to_save": in_full or None,
        "task_type": family.peft_task_type,
        **config.method.start.peft(config.start),
    }
    try:
        made = get_peft_model(model, adapter.config(options, more, total_steps(config, family)))
    except (ValueError, TypeError) as error:
        check_rank(model, config)
        reason = " ".join(str(error).split())
        raise UserError(f"cannot add the adapter: {_shortened(reason)}") from error
    check_ranks(made, options.rank)
    return made


def _without_heads(options: Any, model: nn.Module, family: Family) -> Any:
    """Options whose ``all-linear`` leaves out layers that PEFT trains in full for their name.

    A classifier's head is any module whose name ends so, as DistilBERT's ``pre_classifier``; PEFT
    would put an adapter into that and then fail to train it in full.
    """
    if family.peft_task_type != "SEQ_CLS" or options.target_modules != ["all-linear"]:
        return options
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    found = {n for n in names - {"classifier", "score"} if n.endswith(("classifier", "score"))}
    excluded = sorted({*(options.exclude_modules or []), *found})
    return dataclasses.replace(options, exclude_modules=excluded or None)


def _shortened(reason: str, most: int = 240) -> str:
    return reason if len(reason) <= most else f"{reason[:most]} ..."


def check_rank(model: nn.Module, config: RunConfig) -> None:
    """Raise for a rank that no weight of the model can have: starts by SVD would fail on it."""
    shapes = [tuple(p.shape) for p in model.parameters() if p.dim() >= 2]
    most = max((min(shape[0], math.prod(shape[1:])) for shape in shapes), default=0)
    if config.adapter.rank > most:
        raise UserError(
            f"rank {config.adapter.rank} is above min(m, n) of every weight of the model, at most "
            f"{most}; lower 'rank'"
        )


def check_ranks(model: nn.Module, wanted: int) -> None:
    """Raise for the first pair whose rank exceeds what its weight can have.

    Starts by SVD make pairs of a smaller rank than was ``wanted`` without a word.
    """
    from lorapro.factors import find_pairs

    found = find_pairs(model)
    for pair in found.pairs:
        m, n = pair.shape
        rank = max(pair.rank, wanted)
        if rank > min(m, n):
            raise UserError(
                f"rank {rank} is above min(m, n) = {min(m, n)} of {pair.name} "
                f"({m} x {n}); lower 'rank' or leave the layer out with exclude_modules"
            )
    if not found.pairs and not found.unaligned:
        raise UserError(
            "the model has no trainable LoRA pair; check target_modules and exclude_modules"
        )


def check_run(config: RunConfig, model: nn.Module, family: Family) -> Any:
    """Try whatever may fail of a run while nothing has been written yet.

    Returns:
        Trainer's ``optimizer_cls_and_kwargs``.

    Raises:
        UserError: what the run could not do.
    """
    optimizer = check_optimizer(config, model)
    if getattr(config.task, "head_learning_rate", None) is not None:
        new_among(model, family.new_parameters)
    check_scheduler(config, family)
    check_positions(model, family)
    check_diagnostics(config, model)
    return optimizer


def check_optimizer(config: RunConfig, model: nn.Module) -> Any:
    """Return Trainer's ``optimizer_cls_and_kwargs``, tried once on the model.

    The trial shows what the optimizer has against the model or the options.
    """
    from torch.optim import Optimizer

    make = config.method.optimizer.make
    if make is None:
        return None
    try:
        maker, kwargs = make(config.training, config.optimizer)
        if not (isinstance(maker, type) and issubclass(maker, Optimizer)):
            maker()(model, **kwargs)  # a factory: Trainer calls it in the same way
    except (ValueError, TypeError) as error:
        raise UserError(" ".join(str(error).split())) from error
    return maker, kwargs


def check_scheduler(config: RunConfig, family: Family) -> None:
    """Try once what Trainer makes of ``lr_scheduler_type`` and ``lr_scheduler_kwargs``."""
    import torch
    from torch import nn
    from transformers import get_scheduler

    training = config.training
    steps = total_steps(config, family)
    try:
        get_scheduler(
            training.lr_scheduler_type,
            torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0),
            training.get_warmup_steps(steps),
            steps,
            training.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )
    except (TypeError, ValueError) as error:
        given = {k: v for k, v in config.given.items() if k.startswith("lr_scheduler")}
        raise UserError(f"{given}: {' '.join(str(error).split())}") from error


def check_positions(model: nn.Module, family: Family) -> None:
    """Refuse examples longer than a model with learned positions has positions."""
    from torch import nn

    examples = [*family.train, *family.validation, *family.test]
    longest = max((len(e["input_ids"]) for e in examples if "input_ids" in e), default=0)
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and kind in ("position_embeddings", "wpe"):
            # RoBERTa's begin behind the padding's.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            most = module.num_embeddings - first
            if longest > most:
                raise UserError(
                    f"the longest example has {longest} tokens, but model {family.model_name!r} "
                    f"has {most} positions; set max_length to {most} or less"
                )


def total_steps(config: RunConfig, family: Family) -> int:
    """Return how many optimizer steps the run has (of one process)."""
    training = config.training
    if training.max_steps > 0:
        return training.max_steps
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return math.ceil(math.ceil(len(family.train) / batch) * training.num_train_epochs)


def start_batches(config: RunConfig, family: Family) -> Iterator[dict[str, Any]]:
    """Yield the training batches that the start asks for: drawn with the seed, or the first."""
    import random

    options = config.start
    count = getattr(options, "lora_ga_batches", 0)
    size = getattr(options, "lora_ga_batch_size", 0) or config.training.per_device_train_batch_size
    order = list(range(len(family.train)))
    if not getattr(options, "lora_ga_first_rows", False):
        random.Random(config.training.seed).shuffle(order)
    collate = family.collator()
    for start in range(0, min(count * size, len(order)), size):
        yield collate([family.train[i] for i in order[start : start + size]])


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, all) parameter counts."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters())


def is_measured(config: RunConfig) -> bool:
    """Whether the alignment of the run's adapters is measured."""
    method = config.method
    return bool(config.run.diagnostics_every) and method.adapter.trains and not method.trains_all


def check_diagnostics(config: RunConfig, model: nn.Module) -> None:
    """Refuse to measure what is not there.

    Raises:
        UserError: no pair, or none that ``diagnostics_layers`` finds.
    """
    if is_measured(config):
        from lorapro.diagnostics.watching import chosen_pairs

        try:
            chosen_pairs(model, layers=config.run.diagnostics_layers)
        except ValueError as error:
            reason = str(error).replace("layers=", "diagnostics_layers ")
            raise UserError(
                f"diagnostics_every {config.run.diagnostics_every}: {reason}"
            ) from error
