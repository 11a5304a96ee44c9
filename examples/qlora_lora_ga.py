"""A 4-bit base (QLoRA), started by LoRA-GA, trained with Muon on the tangent space.

    python examples/qlora_lora_ga.py --model HuggingFaceTB/SmolLM2-135M-Instruct

The base stays as it is (base="frozen") and its gradient is never formed (estimator="sketch"). What
is saved is a plain LoRA for the original base: any PEFT or vLLM process loads it.

Needs: pip install 'lorapro[hf]' bitsandbytes
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

import lorapro

TEXTS = [f"The square of {n} is {n * n}, and twice {n} is {2 * n}." for n in range(2, 66)]


def main(argv: list[str] | None = None) -> None:
    """Initialise, train, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", default="qlora")
    args = parser.parse_args(argv)

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=quantized)
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)

    encoded = [tokenizer(text)["input_ids"][:32] for text in TEXTS]
    length = min(len(ids) for ids in encoded)
    rows = [{"input_ids": ids[:length], "labels": ids[:length]} for ids in encoded]

    batches = [
        {key: torch.tensor([row[key] for row in rows[i : i + 8]]) for key in rows[0]}
        for i in range(0, 32, 8)
    ]
    print(lorapro.lora_ga.initialize(model, batches, estimator="sketch", base="frozen"))

    trainer = Trainer(
        model,
        args=TrainingArguments(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            logging_steps=5,
            report_to="none",
        ),
        train_dataset=rows,
    )
    lorapro.use_lorapro(trainer, "muon")
    trainer.train()
    trainer.save_model(args.output)


if __name__ == "__main__":
    main()
