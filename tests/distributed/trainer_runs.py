"""Twenty steps of Trainer or SFTTrainer on a tiny Llama, alone or sharded."""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import lorapro
from distributed.curves import BATCH, batch, model_of

STEPS = 20


def arguments(cls, folder, world, **options):
    values = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH // world,
        "learning_rate": 3e-3,
        "weight_decay": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.3,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return cls(output_dir=str(folder), **{**values, **options})


def rows():
    return [{"input_ids": ids, "labels": ids} for s in range(STEPS) for ids in batch(s).tolist()]


class Recorded(Trainer):
    """Keeps the loss of every step."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        self.kinds = {type(p).__name__ for p in self.model.parameters() if p.requires_grad}
        return loss


def mean_over_processes(losses):
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return losses
    total = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def trained(rank, world, folder, sizes, options, **extra):
    """Losses of a Trainer run."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier run
    model = model_of(**sizes)  # before the arguments, which may ask for one made in pieces
    args = arguments(TrainingArguments, folder, world, **extra)
    trainer = Recorded(model, args, train_dataset=Dataset.from_list(rows()))
    lorapro.use_lorapro(trainer, **options)
    trainer.train()
    return mean_over_processes(trainer.losses), trainer.kinds


def adapters_only(model):
    """Without the head: under FSDP2, TRL's loss gives it another gradient, with any optimizer."""
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    return model


def tokenizer():
    words = Tokenizer(models.WordLevel({str(i): i for i in range(11)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")


def trained_by_trl(rank, world, folder, sizes, options, **extra):
    """Losses of a run of TRL's SFTTrainer."""
    from trl import SFTConfig, SFTTrainer

    class RecordedSFT(Recorded, SFTTrainer):
        pass

    AcceleratorState._reset_state(reset_partial_state=True)
    model = adapters_only(model_of(**sizes))
    args = arguments(SFTConfig, folder, world, gradient_checkpointing=False, **extra)
    trainer = RecordedSFT(
        model, args, train_dataset=Dataset.from_list(rows()), processing_class=tokenizer()
    )
    lorapro.use_lorapro(trainer, **options)
    trainer.train()
    return mean_over_processes(trainer.losses), trainer.kinds
