"""FSDP2 as others set it up: accelerate, Trainer, SFTTrainer; clipping, half precision, FSDP1."""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

import lorapro
from distributed.curves import KINDS, batch, curve, model_of, shard
from distributed.spawned import said
from distributed.trainer_runs import trained, trained_by_trl
from quantized_models import in_bits
from small_models import llama, randomise

CLIP = 0.3
BLOCK = "LlamaDecoderLayer"
FSDP = {
    "use_cpu": False,
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": [BLOCK]},
}


def take_the_cpu_for_an_accelerator():
    """Accelerate has FSDP for accelerators only; of the CPU it would silently make DDP."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def accelerator_of():
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[BLOCK],
        cpu_ram_efficient_loading=False,
    )
    return Accelerator(fsdp_plugin=plugin)


def losses_of(model, optimizer, rank, world, steps, data=batch, clip=None):
    """Losses of the global batch, gradients clipped."""
    assert world == 1 or all(isinstance(p, DTensor) for p in model.parameters())
    clip = clip or torch.nn.utils.clip_grad_norm_
    clipped = functools.partial(clip, max_norm=CLIP)
    return curve(model, optimizer, steps, rank, world, data=data, clip=clipped)[0]


def plain_adamw(model):
    options = {"lr": KINDS["efficient"]["lr"], "weight_decay": 0.01}
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **options)


def by_accelerate(rank, world, kind, sizes):
    accelerator, model = accelerator_of(), model_of(**sizes)
    optimizer = lorapro.create_lorapro_optimizer(model, **KINDS[kind])
    model, optimizer = accelerator.prepare(model, optimizer)
    clip = accelerator.clip_grad_norm_
    return losses_of(model, optimizer, rank, world, 20, clip=clip)


def aligned_by_accelerate(rank, world, sizes, when):
    accelerator, model = accelerator_of(), model_of(**sizes)
    optimizer = plain_adamw(model)
    if when == "before":
        lorapro.align_gradients(optimizer, model, damping=3.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    if when == "after":
        lorapro.align_gradients(optimizer, model, damping=3.0)
    return losses_of(model, optimizer, rank, world, 20, clip=accelerator.clip_grad_norm_)


def descent(model, aligned=True):
    """Gradient descent on one batch, where alignment shows in a step or two."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=3.0)
    if aligned:
        lorapro.align_gradients(optimizer, model, damping=3e-3)
    return optimizer


def in_half(rank, world, sizes):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(model_of(**sizes), world, mp_policy=policy)
    return losses_of(model, descent(model), rank, world, 3, lambda step: batch(0))


def by_hand(rank, world, kind, sizes):
    model = shard(model_of(**sizes), world)
    optimizer = lorapro.create_lorapro_optimizer(model, **KINDS[kind])
    return losses_of(model, optimizer, rank, world, 20)


def on_four_bits(rank, world, kind):
    """QLoRA: a base of bitsandbytes, which FSDP2 shards as stored."""
    net = in_bits(llama(hidden_size=64, intermediate_size=64, tie_word_embeddings=False), 4)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    model = randomise(get_peft_model(net, config))
    if world > 1:
        shard(model, world)
    optimizer = lorapro.create_lorapro_optimizer(model, **KINDS[kind])
    return losses_of(model, optimizer, rank, world, 5)


def refused(rank, world, sizes):
    heard = {}
    model = model_of(**sizes)
    early = lorapro.create_lorapro_optimizer(model, lr=1e-3)
    shard(model, world)
    heard["optimizer before"] = said(lambda: losses_of(model, early, rank, world, 1))

    model = model_of(**sizes)
    early = plain_adamw(model)
    lorapro.align_gradients(early, model)
    shard(model, world)
    heard["hook before"] = said(lambda: losses_of(model, early, rank, world, 1))

    whole = FullyShardedDataParallel(
        model_of(**sizes), use_orig_params=True, device_id=torch.device("cpu")
    )
    heard["fsdp1"] = said(lambda: lorapro.create_lorapro_optimizer(whole, lr=1e-3))
    return heard


def everything(rank, world, folder, sizes):
    """All of this in one start of the processes."""
    take_the_cpu_for_an_accelerator()
    found = {"accelerate": {k: by_accelerate(rank, world, k, sizes) for k in KINDS}}
    found["clipped"] = {k: by_hand(rank, world, k, sizes) for k in KINDS}
    found["aligned"] = {
        w: aligned_by_accelerate(rank, world, sizes, w) for w in ("before", "after")
    }
    found["half"] = in_half(rank, world, sizes)
    options = {"damping": 3.0}
    found["trainer"] = trained(rank, world, folder, sizes, options, **FSDP)
    found["trl"] = trained_by_trl(rank, world, folder, sizes, options, **FSDP)
    if find_spec("bitsandbytes"):
        found["4 bits"] = {k: on_four_bits(rank, world, k) for k in ("efficient", "muon")}
    found["refused"] = refused(rank, world, sizes)
    return found
