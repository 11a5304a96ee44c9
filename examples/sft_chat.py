"""Chat data and TRL's SFTTrainer.

    python examples/sft_chat.py --model HuggingFaceTB/SmolLM2-135M-Instruct

The same without a script: lorapro train --task sft --data chat.jsonl

Needs: pip install 'lorapro[hf]' trl
"""

import argparse

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

import lorapro


def conversations() -> Dataset:
    """A habit to learn: every answer begins with the captain."""
    things = [
        "apple",
        "bread",
        "river",
        "cloud",
        "horse",
        "garden",
        "winter",
        "lamp",
        "boat",
        "stone",
    ]
    rows = []
    for a in things:
        for b in things:
            if a != b:
                question = {"role": "user", "content": f"Which is nicer, a {a} or a {b}?"}
                answer = {"role": "assistant", "content": f"Ahoy! A {a}, says the captain."}
                rows.append({"messages": [question, answer]})
    return Dataset.from_list(rows).shuffle(seed=0)


def main(argv: list[str] | None = None) -> None:
    """Train, ask, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", default="captain")
    args = parser.parse_args(argv)

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(args.model),
        args=SFTConfig(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            max_length=256,
            logging_steps=10,
            report_to="none",
            bf16=False,
        ),
        train_dataset=conversations(),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    # The line that is different. SFTConfig's own 2e-5 is meant for full fine-tuning; without lr=
    # the optimizer's own rate is taken, and logged.
    lorapro.use_lorapro(trainer, "muon")
    trainer.train()
    trainer.save_model(args.output)

    asked = [{"role": "user", "content": "Which is nicer, a lamp or a boat?"}]
    batch = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(trainer.model.device)
    answer = trainer.model.generate(**batch, max_new_tokens=24, do_sample=False)
    print(tokenizer.decode(answer[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
