"""Rewards and TRL's GRPOTrainer, which takes no optimizer of its own: use_lorapro sets it.

    python examples/grpo.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Needs: pip install 'lorapro[hf]' trl
"""

import argparse
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import GRPOConfig, GRPOTrainer

import lorapro


def brief(completions: list[Any], **_: Any) -> list[float]:
    """Reward: the fewer letters, the better."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [-len(text) / 100 for text in texts]


def questions() -> Dataset:
    """What is asked."""
    asked = [f"What is {n} plus {n}?" for n in range(2, 34)]
    return Dataset.from_list([{"prompt": [{"role": "user", "content": q}]} for q in asked])


def main(argv: list[str] | None = None) -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", default="brief")
    args = parser.parse_args(argv)

    set_seed(0)
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(args.model),
        reward_funcs=brief,
        args=GRPOConfig(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=32,
            learning_rate=5e-5,
            logging_steps=5,
            report_to="none",
            bf16=False,
        ),
        train_dataset=questions(),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    lorapro.use_lorapro(trainer, mode="efficient")
    trainer.train()
    trainer.save_model(args.output)


if __name__ == "__main__":
    main()
