"""LoRA-Pro in a loop of your own, and what alignment does on the way.

    python examples/own_loop.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Needs: pip install 'lorapro[hf]'
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorapro

TEXTS = [f"The square of {n} is {n * n}, and twice {n} is {2 * n}." for n in range(2, 66)]


def main(argv: list[str] | None = None) -> None:
    """Train an adapter and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--output", default="own-loop")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model)
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)

    # The line that is different: pairs A, B aligned, everything else trained plainly. Without lr
    # the mode's own is taken and logged; mode="factored" or optimizer="muon" are the others.
    optimizer = lorapro.create_lorapro_optimizer(model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.steps)

    model.train()
    path = f"{args.output}/diagnostics.jsonl"
    with lorapro.diagnostics.follow(model, optimizer, every=10, path=path) as following:
        for step in range(args.steps):
            texts = [TEXTS[(4 * step + i) % len(TEXTS)] for i in range(4)]
            batch = tokenizer(texts, return_tensors="pt", padding=True)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            loss = model(**batch, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 10 == 0 or step == args.steps - 1:
                print(f"step {step + 1}: loss {loss.item():.3f}")
    seen = lorapro.diagnostics.summary(following.records)
    print(
        "distance to the full gradient, as a share of it: "
        f"LoRA's step {seen['alignment/lora_distance']:.2f}, "
        f"the aligned one {seen['alignment/aligned_distance']:.2f}"
    )
    model.save_pretrained(args.output)


if __name__ == "__main__":
    main()
