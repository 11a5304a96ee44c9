"""Preferences and TRL's DPOTrainer, which takes no optimizer of its own: use_lorapro sets it.

    python examples/dpo.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Needs: pip install 'lorapro[hf]' trl
"""

import argparse

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer

import lorapro


def preferences() -> Dataset:
    """Short answers are preferred to long ones."""
    rows = []
    for n in range(2, 34):
        prompt = [{"role": "user", "content": f"What is {n} plus {n}?"}]
        short = [{"role": "assistant", "content": f"{2 * n}."}]
        long = [{"role": "assistant", "content": f"Well, {n} plus {n}, that makes {2 * n} in all."}]
        rows.append({"prompt": prompt, "chosen": short, "rejected": long})
    return Dataset.from_list(rows)


def main(argv: list[str] | None = None) -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", default="short-answers")
    args = parser.parse_args(argv)

    set_seed(0)
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(args.model),
        args=DPOConfig(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            learning_rate=5e-5,
            max_length=128,
            logging_steps=5,
            report_to="none",
            bf16=False,
        ),
        train_dataset=preferences(),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    lorapro.use_lorapro(trainer, mode="efficient")
    trainer.train()
    trainer.save_model(args.output)


if __name__ == "__main__":
    main()
