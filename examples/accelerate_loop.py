"""LoRA-Pro under accelerate, on one process or many.

    accelerate launch examples/accelerate_loop.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Needs: pip install 'lorapro[hf]'
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorapro

TEXTS = [f"The square of {n} is {n * n}, and twice {n} is {2 * n}." for n in range(2, 66)]


def main(argv: list[str] | None = None) -> None:
    """Train an adapter and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--output", default="accelerated")
    args = parser.parse_args(argv)

    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(args.model), config)

    def collate(texts: list[str]) -> dict[str, torch.Tensor]:
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {**batch, "labels": labels}

    loader = DataLoader(TEXTS, batch_size=4, shuffle=True, collate_fn=collate)
    optimizer = lorapro.create_lorapro_optimizer(model, mode="factored")
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    model.train()
    done = 0
    while done < args.steps:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            done += accelerator.sync_gradients
            if done == args.steps:
                break
    accelerator.print(f"loss {loss.item():.3f}")
    accelerator.unwrap_model(model).save_pretrained(
        args.output, is_main_process=accelerator.is_main_process
    )


if __name__ == "__main__":
    main()
