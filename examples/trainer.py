"""LoRA-Pro under transformers' Trainer: a classifier of short texts.

    python examples/trainer.py --model distilbert-base-uncased

Needs: pip install 'lorapro[hf]' datasets
"""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import lorapro

GOOD = ["bright", "calm", "clean", "clever", "fair", "fresh", "glad", "kind", "quick", "warm"]
BAD = ["broken", "cold", "cruel", "dirty", "dull", "late", "noisy", "poor", "rude", "slow"]


def sentences() -> Dataset:
    """Texts and labels."""
    nouns = ["room", "meal", "trip", "film", "host", "seat", "road", "town"]
    rows = [
        {"text": f"The {noun} was {word}.", "label": label}
        for noun in nouns
        for label, words in enumerate((BAD, GOOD))
        for word in words
    ]
    return Dataset.from_list(rows).shuffle(seed=0)


def main(argv: list[str] | None = None) -> None:
    """Train a classifier and save its adapter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="distilbert-base-uncased")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", default="classifier")
    args = parser.parse_args(argv)

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    base.config.pad_token_id = tokenizer.pad_token_id
    config = LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(base, config)
    rows = sentences().map(lambda row: tokenizer(row["text"]), remove_columns="text")
    rows = rows.train_test_split(test_size=32, seed=0)

    training = TrainingArguments(
        output_dir=args.output,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        warmup_steps=5,
        logging_steps=10,
        report_to="none",
    )
    trainer = Trainer(
        model,
        args=training,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        # The line that is different. Checkpoints, schedules, resuming work as ever.
        optimizer_cls_and_kwargs=lorapro.trainer_optimizer(training, mode="factored"),
        # And one that shows the alignment: in the log, and in diagnostics.jsonl.
        callbacks=[lorapro.diagnostics.AlignmentCallback(every=10)],
    )
    trainer.train()
    found = trainer.predict(rows["test"])
    right = torch.tensor(found.predictions).argmax(-1) == torch.tensor(found.label_ids)
    print(f"right on {right.float().mean():.0%} of {len(right)} new sentences")
    trainer.save_model(args.output)


if __name__ == "__main__":
    main()
