"""Models, batches and measures shared by the LoRA-GA benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorapro.experiments.assets import asset_path
from lorapro.experiments.data import load_rows
from lorapro.lora_ga.capture import Accumulator, capture, quiet
from lorapro.lora_ga.decompose import gradient_objective
from lorapro.lora_ga.layers import adapted_layers

MODELS = ("minilm-l6", "smollm2-135m-instruct")
TARGETS = {
    "minilm-l6": ["query", "key", "value", "attention.output.dense", "intermediate.dense"],
    "smollm2-135m-instruct": "all-linear",
}
TARGETS["minilm-l6"] = [*TARGETS["minilm-l6"], "output.dense"]


def load(name: str, count: int, size: int, length: int, start: int = 0) -> tuple[Any, list[dict]]:
    """A pretrained model in float32 and ``count`` batches of tweets, padded as they come."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        logging,
    )

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = asset_path(name)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = load_rows("tweets")["train"]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [rows[i] for i in order[start * size : (start + count) * size]]
    labels = sorted({"negative", "neutral", "positive"})
    torch.manual_seed(0)
    if name == "minilm-l6":
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batches = []
    for i in range(0, len(rows), size):
        part = rows[i : i + size]
        batch = dict(
            tokenizer(
                [r["text"] for r in part],
                padding=True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            )
        )
        if name == "minilm-l6":
            batch["labels"] = torch.tensor([labels.index(r["sentiment"]) for r in part])
        else:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batches.append(batch)
    return model, batches


def with_lora(model: Any, name: str, rank: int, **config: Any) -> Any:
    """A PEFT model with LoRA (alpha 16, rank-stabilised) on every linear layer of the blocks."""
    from peft import LoraConfig, get_peft_model

    options = {"r": rank, "lora_alpha": 16, "use_rslora": True, "target_modules": TARGETS[name]}
    if name == "minilm-l6":
        options["modules_to_save"] = ["classifier"]
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**{**options, **config}))


def with_peft_lora_ga(model: Any, name: str, rank: int, batches: list[dict], **config: Any) -> Any:
    """The same adapter initialised by PEFT's ``lora_ga`` from the same batches."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    options = {"r": rank, "lora_alpha": 16, "use_rslora": True, "target_modules": TARGETS[name]}
    if name == "minilm-l6":
        options["modules_to_save"] = ["classifier"]
    lora_config = LoraConfig(
        **{**options, **config},
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=16),
    )
    if lora_config.target_modules == "all-linear":  # preprocess_loraga matches names only
        from torch import nn

        lora_config.target_modules = {
            n.rpartition(".")[2]
            for n, m in model.named_modules()
            if isinstance(m, nn.Linear) and n != "lm_head"
        }

    def train_step() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    torch.manual_seed(0)
    preprocess_loraga(model, lora_config, train_step)
    return get_peft_model(model, lora_config)


def gradients(model: Any, batches: list[dict]) -> dict[str, Tensor]:
    """Every adapted weight's gradient, all held at once."""
    layers, _ = adapted_layers(model, "default")
    sinks = [Accumulator(layer) for layer in layers]
    with quiet(model):
        capture(model, batches, None, sinks)
    return {s.layer.name: s.value[0].mT for s in sinks}


def captured(A: Tensor, B: Tensor, G: Tensor) -> float:
    """Share of ``‖G‖²`` that ``B·Bᵀ·G + G·Aᵀ·A`` gives back, A and B made orthonormal."""
    A = torch.linalg.qr(A.double().mT).Q.mT
    B = torch.linalg.qr(B.double()).Q
    return 1 - float(gradient_objective(A, B, G) / G.double().square().sum())


def factors(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every adapted layer."""
    layers, _ = adapted_layers(model, "default")
    return {x.name: (x.pair.A.detach(), x.pair.B.detach()) for x in layers}
