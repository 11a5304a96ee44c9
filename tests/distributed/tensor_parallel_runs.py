"""Base weights split by torch's tensor parallelism; factors whole, or split where a step cannot."""

from __future__ import annotations

from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import AutoModelForCausalLM

import lorapro
from distributed.curves import KINDS, batch, model_of
from distributed.spawned import said

BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def split(model, world, part="base_layer"):
    """The base layers over their outputs, the last of each block over its inputs."""
    plan = {}
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            by_rows = name.endswith(BY_ROWS)
            style = ColwiseParallel if by_rows else RowwiseParallel
            options = {} if by_rows else {"input_layouts": Replicate()}
            plan[f"{name}.{part}"] = style(output_layouts=Replicate(), **options)
    return parallelize_module(model, init_device_mesh("cpu", (world,)), plan)


def decayed(rank, world, kinds, sizes, steps=20):
    """{kind: (losses, whole base weights, whether they were split)}; all processes see all data."""
    found = {}
    for kind in kinds:
        model = model_of(**sizes)
        if world > 1:
            split(model, world)
        optimizer = lorapro.create_lorapro_optimizer(model, **KINDS[kind])
        losses = []
        for step in range(steps):
            ids = batch(step)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        bases = {n: p for n, p in model.named_parameters() if n.endswith("proj.base_layer.weight")}
        whole = {n: p.full_tensor() if world > 1 else p for n, p in bases.items()}
        parts = all(isinstance(p, DTensor) for p in bases.values())
        found[kind] = losses, {n: p.detach().clone() for n, p in whole.items()}, parts
    return found


def everything(rank, world, sizes, folder):
    found = decayed(rank, world, ["full", "efficient"], sizes)
    by_hand = split(model_of(**sizes), world, "lora_B.default")
    # With PEFT, tp_plan splits one factor of each pair as it splits the base weight.
    base = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    planned = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj", "o_proj"]))
    heard = {
        name: said(lambda: lorapro.create_lorapro_optimizer(model, mode="full", lr=1e-3))  # noqa: B023
        for name, model in {"by hand": by_hand, "tp_plan": planned}.items()
    }
    return found, heard
