"""Optimizer state of every method, measured after one step on a real model.

    python benchmarks/optimizer_state.py                       # SmolLM2-135M, r = 8
    python benchmarks/optimizer_state.py --rank 32

Prints a table: bytes of all state tensors, and their ratio to LoRA's own AdamW.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import lorapro
from lorapro.experiments.assets import asset_path

METHODS = {
    "efficient": {"mode": "efficient"},
    "factored": {"mode": "factored"},
    "muon": {"optimizer": "muon"},
    "sgd, momentum": {"optimizer": "sgd", "momentum": 0.9},
    "full": {"mode": "full"},
}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [t for s in optimizer.state.values() for t in s.values()]
    return sum(t.numel() * t.element_size() for t in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()
    base = AutoModelForCausalLM.from_pretrained(asset_path(args.model))
    config = LoraConfig(r=args.rank, target_modules="all-linear", use_rslora=True)
    model = get_peft_model(base, config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.grad = torch.randn_like(p)
    adamw = torch.optim.AdamW(trainable, lr=1e-4)
    adamw.step()
    lora = state_bytes(adamw)
    full = 8 * sum(p.numel() for n, p in model.named_parameters() if "lora" not in n)
    print(f"{args.model}, rank {args.rank}, {len(trainable) // 2} pairs")
    print(f"{'AdamW, every weight':20} {full / 1e6:10.2f} MB {full / lora:8.2f}")
    print(f"{'LoRA, AdamW':20} {lora / 1e6:10.2f} MB {1:8.2f}")
    for name, options in METHODS.items():
        optimizer = lorapro.create_lorapro_optimizer(model, lr=1e-4, **options)
        optimizer.step()
        size = state_bytes(optimizer)
        print(f"{name:20} {size / 1e6:10.2f} MB {size / lora:8.2f}")


if __name__ == "__main__":
    main()
