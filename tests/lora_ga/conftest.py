from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    options: dict = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        **changes,
    }
    model = LlamaForCausalLM(LlamaConfig(**options))
    with torch.no_grad():  # larger than its tiny default, so that every layer has a real gradient
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(4.0)
    return model.eval()


def text_batches() -> list[dict[str, torch.Tensor]]:
    """Three batches of several sizes, one with padding, all with ignored labels."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for rows, length in ((4, 17), (2, 9), (3, 23)):
        ids = torch.randint(0, 97, (rows, length), generator=generator)
        labels = ids.clone()
        labels[:, :3] = -100
        batches.append({"input_ids": ids, "labels": labels})
    mask = torch.ones_like(batches[0]["input_ids"])
    mask[1, 11:] = 0
    batches[0]["attention_mask"] = mask
    batches[0]["labels"][1, 11:] = -100
    return batches


def adapted(model: nn.Module, **config: object) -> nn.Module:
    torch.manual_seed(2)
    options: dict = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **config}
    return get_peft_model(model, LoraConfig(**options)).eval()


def loss_of(model: nn.Module, batch: dict, loss=None) -> torch.Tensor:
    return model(**batch).loss if loss is None else loss(model, batch)


def gradient(model: nn.Module, name: str, batches: list, loss=None) -> torch.Tensor:
    """Autograd's gradient of one parameter of a base model: the mean over the batches."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    parameter = model.get_parameter(name).requires_grad_(True)
    total = sum(loss_of(model, b, loss) for b in batches) / len(batches)
    return torch.autograd.grad(total, parameter)[0]


@pytest.fixture
def tiny() -> SimpleNamespace:
    return SimpleNamespace(llama=llama, batches=text_batches, adapted=adapted, gradient=gradient)
