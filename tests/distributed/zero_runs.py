"""A tiny Llama under DeepSpeed ZeRO; only this module imports DeepSpeed."""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist
from transformers import TrainingArguments

import lorapro
from distributed.curves import BATCH, batch, model_of
from distributed.spawned import Wire, said
from distributed.trainer_runs import arguments, trained, trained_by_trl

# What DeepSpeed would compile at its first use on a CPU, and does without.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

OPTIONS = {"lr": 3e-3, "weight_decay": 0.01}
DAMPING, CLIP = 3.0, 0.3
HALF = {"lr": 3.0, "damping": 3e-3, "steps": 3}  # of plain gradient descent in bfloat16


def config_of(stage, **options):
    zero = {"stage": stage, "stage3_param_persistence_threshold": 40}
    sizes = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
    return {"zero_optimization": zero, "gradient_clipping": CLIP, **sizes, **options}


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def freeze_A(model):
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    return model


def engine_of(model, config, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(trainable(model), **OPTIONS)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine, rank, world, steps, parts=1, data=batch):
    """Losses of the global batch; ``parts`` passes a step."""
    losses, size = [], BATCH // world // parts
    for step in range(steps):
        total = torch.zeros(())
        for part in range(parts):
            first = (rank * parts + part) * size
            ids = data(step)[first : first + size]
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach() / parts
        dist.all_reduce(total)
        losses.append(total.item() / world)
    return losses


def in_half(rank, world, stage, sizes):
    model = model_of(**sizes)
    descent = torch.optim.SGD(trainable(model), lr=HALF["lr"])
    engine = engine_of(model, config_of(stage, bf16={"enabled": True}), descent)
    lorapro.align_gradients(engine, model, damping=HALF["damping"])
    losses = train(engine, rank, world, HALF["steps"], data=lambda step: batch(0))
    engine.destroy()
    return losses


def offloaded(rank, world, stage, sizes):
    model = model_of(**sizes)
    config = config_of(stage, zero_force_ds_cpu_optimizer=False)
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    engine = engine_of(model, config)
    lorapro.align_gradients(engine, model, damping=DAMPING)
    losses = train(engine, rank, world, 5)
    engine.destroy()
    return losses


def by_hand(rank, world, stage, sizes, steps=20, prepare=lambda model: model, **options):
    model = prepare(model_of(**sizes))
    engine = engine_of(model, config_of(stage, **options))
    handle = lorapro.align_gradients(engine, model, damping=DAMPING)
    losses = train(engine, rank, world, steps, options.get("gradient_accumulation_steps", 1))
    handle.remove()
    engine.destroy()
    return losses


def sent(rank, world, sizes, aligned):
    """Bytes that all-reduces of one engine step take."""
    model = model_of(**sizes)
    engine = engine_of(model, config_of(2))
    if aligned:
        lorapro.align_gradients(engine, model)
    ids = batch(0)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    wire = Wire()
    with wire:
        engine.step()
    engine.destroy()
    return wire.bytes["allreduce_"]


def refused(rank, world, folder, sizes):
    """What is said of uses that cannot work."""
    heard = {}
    for mode in ("efficient", "factored"):
        model = model_of(**sizes)
        own = lorapro.create_lorapro_optimizer(model, mode=mode, lr=1e-3)
        engine = engine_of(model, config_of(2), own)
        heard[f"client {mode}"] = said(lambda: train(engine, rank, world, 1))  # noqa: B023
        engine.destroy()

    model = model_of(**sizes)
    adamw = torch.optim.AdamW(trainable(model), lr=1e-3)
    lorapro.align_gradients(adamw, model)
    engine = engine_of(model, config_of(1), adamw)
    heard["aligned before"] = said(lambda: train(engine, rank, world, 1))
    engine.destroy()

    model = model_of(**sizes)
    groups = [[], []]
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups["lora_B" in name].append(p)
    apart = torch.optim.AdamW([{"params": g} for g in groups], lr=1e-3)
    engine = engine_of(model, config_of(2), apart)
    heard["apart"] = said(lambda: lorapro.align_gradients(engine, model))
    engine.destroy()

    config = config_of(2, train_micro_batch_size_per_gpu="auto")
    args = arguments(TrainingArguments, folder, world, deepspeed=config)
    heard["trainer_optimizer"] = said(lambda: lorapro.trainer_optimizer(args))
    heard["muon"] = said(lambda: lorapro.trainer_optimizer(args, "muon"))
    heard["full"] = said(lambda: lorapro.trainer_optimizer(args, mode="full"))
    return heard


def everything(rank, world, folder, sizes):
    """All of this in one start of the processes."""
    found = {"hand": {s: by_hand(rank, world, s, sizes) for s in (0, 1, 2, 3)}}
    found["frozen A"] = {s: by_hand(rank, world, s, sizes, 5, freeze_A) for s in (2, 3)}
    found["accumulated"] = {
        s: by_hand(rank, world, s, sizes, 5, gradient_accumulation_steps=2) for s in (1, 2, 3)
    }
    found["offloaded"] = {s: offloaded(rank, world, s, sizes) for s in (2, 3)}
    found["bf16"] = {s: in_half(rank, world, s, sizes) for s in (1, 2, 3)}
    found["sent"] = sent(rank, world, sizes, True) - sent(rank, world, sizes, False)
    found["refused"] = refused(rank, world, folder, sizes)
    found["trainer"], found["trl"] = {}, {}
    for stage in (1, 2, 3):
        for name, run in (("trainer", trained), ("trl", trained_by_trl)):
            config = config_of(stage, train_micro_batch_size_per_gpu="auto")
            options = {"damping": DAMPING}
            found[name][stage], _ = run(rank, world, folder, sizes, options, deepspeed=config)
    return found


def every_stage(rank, world, sizes):
    """By hand, in a start of its own: for other numbers of processes."""
    return {s: by_hand(rank, world, s, sizes) for s in (1, 2, 3)}
