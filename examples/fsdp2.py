"""LoRA-Pro under FSDP2: every process holds a part of the model and of the adapter.

    torchrun --nproc_per_node 2 examples/fsdp2.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Needs: pip install 'lorapro[hf]'
"""

import argparse
import os

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorapro

TEXTS = [f"The square of {n} is {n * n}, and twice {n} is {2 * n}." for n in range(2, 66)]


def main(argv: list[str] | None = None) -> None:
    """Train an adapter and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--output", default="sharded")
    args = parser.parse_args(argv)

    if "RANK" in os.environ:  # torchrun's
        dist.init_process_group()
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, world = dist.get_rank(), dist.get_world_size()
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())

    torch.manual_seed(0)  # the same adapter everywhere
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model)
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)

    # Where factors are cut: A over its columns, B over its rows. Then the sums that the optimizer
    # makes over processes are small, (r, r) a pair.
    place = lorapro.distributed.shard_placement
    for layer in base.model.layers:
        fully_shard(layer, shard_placement_fn=place)
    fully_shard(model, shard_placement_fn=place)
    # After fully_shard: the optimizer holds the parameters that the model trains.
    optimizer = lorapro.create_lorapro_optimizer(model)

    model.train()
    device = next(model.parameters()).device
    for step in range(args.steps):
        texts = [TEXTS[(4 * (world * step + rank) + i) % len(TEXTS)] for i in range(4)]
        batch = tokenizer(texts, return_tensors="pt", padding=True).to(device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step % 10 == 0 or step == args.steps - 1):
            print(f"step {step + 1}: loss {loss.item():.3f} of this process's texts")

    whole = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if rank == 0:
        model.save_pretrained(args.output, state_dict=whole)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
