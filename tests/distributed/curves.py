"""Twenty steps of a tiny Llama, on one process or several, with the same global batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lorapro
from distributed.spawned import Wire
from small_models import llama, randomise

KINDS = {
    "efficient": {"lr": 3e-3, "damping": 3.0, "weight_decay": 0.01},
    "full": {"mode": "full", "lr": 1e-2, "weight_decay": 0.1},
    "factored": {"mode": "factored", "lr": 1e-2, "weight_decay": 0.01},
    "muon": {"optimizer": "muon", "lr": 1e-2, "weight_decay": 0.01},
    "sgd": {"optimizer": "sgd", "lr": 1e-1, "momentum": 0.9, "damping": 1.0},
}
BATCH = 8


def model_of(rank=3, hidden=16, wide=10):
    """Seven adapted layers and a head trained whole; r = 3 is cut unevenly, or to nothing."""
    net = llama(hidden_size=hidden, intermediate_size=wide, tie_word_embeddings=False)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers)
    config.modules_to_save = ["lm_head"]
    return randomise(get_peft_model(net, config))


def batch(step):
    return torch.randint(1, 11, (BATCH, 6), generator=torch.Generator().manual_seed(step))


def curve(model, optimizer, steps, rank=0, world=1, first=0, data=batch, clip=None):
    """Losses of the global batch; Wire of the last optimizer step."""
    losses, wire = [], Wire()
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    for step in range(first, first + steps):
        ids = data(step)[share]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if clip is not None:
            clip(model.parameters())
        if step == first + steps - 1:
            with wire:
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses, wire


def shard(model, world, ours=True, hybrid=False, **options):
    if hybrid:
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (world,))
    options["mesh"] = mesh
    if ours:
        options["shard_placement_fn"] = lorapro.distributed.shard_placement
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def of_one_process(kinds, steps=20, **sizes):
    torch.set_num_threads(1)
    found = {}
    for kind in kinds:
        model = model_of(**sizes)
        optimizer = lorapro.create_lorapro_optimizer(model, **KINDS[kind])
        found[kind] = curve(model, optimizer, steps)[0]
    return found


def fsdp2(rank, world, kinds, layouts, sizes, steps=20):
    """{(kind, layout): (losses, calls, bytes)}."""
    found = {}
    for layout in layouts:
        for kind in kinds:
            model = shard(model_of(**sizes), world, layout != "default", layout == "hybrid")
            optimizer = lorapro.create_lorapro_optimizer(model, **KINDS[kind])
            losses, wire = curve(model, optimizer, steps, rank, world)
            found[kind, layout] = (losses, dict(wire.calls), dict(wire.bytes))
    return found


def ddp(rank, world, kinds, sizes, steps=20):
    found = {}
    for kind in kinds:
        model = model_of(**sizes)
        optimizer = lorapro.create_lorapro_optimizer(model, **KINDS[kind])
        wrapped = DistributedDataParallel(model)
        found[kind] = curve(wrapped, optimizer, steps, rank, world)[0]
    return found


def ddp_and_fsdp2(rank, world, kinds, layouts, sizes):
    """Both in one start of the processes."""
    return ddp(rank, world, kinds, sizes), fsdp2(rank, world, kinds, layouts, sizes)


def saved(rank, world, kind, folder, sizes):
    """Ten steps, then a checkpoint through torch.distributed.checkpoint."""
    model = shard(model_of(**sizes), world) if world > 1 else model_of(**sizes)
    optimizer = lorapro.create_lorapro_optimizer(model, **KINDS[kind])
    losses, _ = curve(model, optimizer, 10, rank, world)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    return losses


def resumed(rank, world, kind, folder, sizes):
    """Ten more, from that checkpoint."""
    model = shard(model_of(**sizes), world) if world > 1 else model_of(**sizes)
    optimizer = lorapro.create_lorapro_optimizer(model, **KINDS[kind])
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return curve(model, optimizer, 10, rank, world, first=10)[0]


def assert_same(losses, expected, tolerance=1e-5):
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
