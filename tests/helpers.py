"""Small real models and dense gradients, shared by the tests."""

from __future__ import annotations

import copy
import io

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lorapro
from lorapro.factors import find_pairs
from lorapro.optim.create import OPTIMIZERS


def optimizer_on(pairs, optimizer="adamw", **options):
    """What ``create_lorapro_optimizer`` builds, on pairs without a model."""
    return OPTIMIZERS[optimizer](lorapro.lora_param_groups(None, pairs=pairs), **options)


def mlp(dtype=torch.float64, seed=0, **config):
    """A PEFT model of three Linear layers with adapters on the first two, head trained fully."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 3))
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["0", "2"], "modules_to_save": ["4"]}
    model = get_peft_model(net, LoraConfig(**{**options, **config}))
    return model.to(dtype)


def patterned(dtype=torch.float64, seed=0, **config):
    """rsLoRA with its own rank and alpha per layer."""
    return mlp(
        dtype,
        seed,
        use_rslora=True,
        rank_pattern={"2": 2},
        alpha_pattern={"0": 12},
        **config,
    )


def randomise_B(model, seed=1, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def loss_of(model, seed=0, dtype=torch.float64, rows=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 7, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(0, 3, (rows,), generator=generator)
    return nn.functional.cross_entropy(model(x), y)


def feed_dense_gradient(pair, G):
    """Give a pair the gradients that a dense gradient G on W makes."""
    A, B = pair.A.detach(), pair.B.detach()
    pair.A.grad, pair.B.grad = pair.scaling * B.T @ G, pair.scaling * G @ A.T


def through_a_file(state):
    """A state dict after torch.save and a safe load."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def clone(model):
    return copy.deepcopy(model)


def pairs_of(model):
    return find_pairs(model).pairs


def trainable(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}
