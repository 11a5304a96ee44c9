"""Small models with adapters, for tests that ask which parameters go where."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def lora(model=None, **config):
    return get_peft_model(model or net(), LoraConfig(**{"r": 2, "target_modules": ["0"], **config}))


def llama(**config):
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**sizes, **heads, **config}))


def randomise(model, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.5 * torch.randn_like(p))
    return model
