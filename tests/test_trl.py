"""use_lorapro on TRL's trainers: real tiny runs, resumed bit for bit; bad options told at once."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer, TrainingArguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

import lorapro
from lorapro import lora_ga
from lorapro.rates import RATES
from test_trainer import arguments, classifier, language_model, sequences, tokenizer

# Checkpoints of full mode with weight decay.
pytestmark = pytest.mark.filterwarnings("ignore:the base weights were decayed")

PROMPTS = ["one plus two is", "two plus two is", "two plus one is", "four minus one is"]
PREFERENCES = {
    "prompt": PROMPTS * 4,
    "chosen": [" three", " four", " three", " three"] * 4,
    "rejected": [" two", " five", " one", " five"] * 4,
}


def adapter(**options):
    return LoraConfig(r=4, target_modules="all-linear", **{"task_type": "CAUSAL_LM", **options})


def common(folder, config, model=None, **options):
    given = {"peft_config": adapter()} if model is None else {}
    return {
        "model": model or language_model(),
        "args": arguments(config, folder, bf16=False, **options),
        "processing_class": tokenizer(),
        **given,
    }


def length(completions, **_):
    return [float(len(c.split())) for c in completions]


def sft(folder, **options):
    texts = [f"{p}{c}" for p, c in zip(PREFERENCES["prompt"], PREFERENCES["chosen"], strict=True)]
    rows = Dataset.from_dict({"text": texts})
    return SFTTrainer(train_dataset=rows, **common(folder, SFTConfig, max_length=16, **options))


def dpo(folder, **options):
    rows = Dataset.from_dict(PREFERENCES)
    return DPOTrainer(train_dataset=rows, **common(folder, DPOConfig, max_length=16, **options))


def kto(folder, **options):
    columns = {"prompt": PROMPTS * 4, "completion": PREFERENCES["chosen"]}
    rows = Dataset.from_dict({**columns, "label": [True, False] * 8})
    return KTOTrainer(train_dataset=rows, **common(folder, KTOConfig, max_length=16, **options))


def online(trainer, config):
    def make(folder, **options):
        sampling = {"max_completion_length": 5, "num_generations": 2, **options}
        rows = Dataset.from_dict({"prompt": PROMPTS * 4})
        return trainer(
            reward_funcs=length, train_dataset=rows, **common(folder, config, **sampling)
        )

    return make


def reward(folder, **options):
    torch.manual_seed(0)
    base = language_model().config
    sizes = {k: getattr(base, k) for k in ("vocab_size", "hidden_size", "intermediate_size")}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0, "num_labels": 1}
    model = LlamaForSequenceClassification(LlamaConfig(**sizes, **heads))
    given = common(folder, RewardConfig, max_length=16, model=model, **options)
    return RewardTrainer(
        train_dataset=Dataset.from_dict(PREFERENCES),
        peft_config=adapter(task_type="SEQ_CLS", modules_to_save=["score"]),
        **given,
    )


TRAINERS = {
    "sft": sft,
    "dpo": dpo,
    "kto": kto,
    "grpo": online(GRPOTrainer, GRPOConfig),
    "rloo": online(RLOOTrainer, RLOOConfig),
    "reward": reward,
}
OPTIONS = {
    "sft": {"mode": "factored"},
    "dpo": {"mode": "full"},
    "kto": {"optimizer": "sgd", "momentum": 0.5},
    "grpo": {"optimizer": "muon"},
    "rloo": {"mode": "efficient", "x": "symmetric"},
    "reward": {"mode": "efficient"},
}


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_trains_and_resumes_bit_for_bit(name, tmp_path):
    def run(folder, resume=None):
        trainer = TRAINERS[name](folder)
        assert lorapro.use_lorapro(trainer, **OPTIONS[name]) is trainer
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    started = TRAINERS[name](tmp_path / "whole").model.state_dict()
    whole = run(tmp_path / "whole")
    optimizer = whole.optimizer.optimizer
    assert type(optimizer).__name__.startswith("LoraPro")
    assert optimizer.param_groups[0]["initial_lr"] == 1e-2  # given, so taken
    moved = whole.model.state_dict()
    assert any("lora_B" in n and not torch.equal(v, started[n]) for n, v in moved.items())
    assert all(torch.equal(v, started[n]) for n, v in moved.items() if "base_layer" in n) or (
        OPTIONS[name].get("mode") == "full"  # there weight decay reaches the base
    )
    again = run(tmp_path / "again", resume=str(tmp_path / "whole/checkpoint-3"))
    assert again.state.global_step == 6
    for parameter, value in again.model.state_dict().items():
        assert torch.equal(value, moved[parameter]), parameter


@pytest.mark.parametrize("base", ["subtract", "frozen"])
def test_the_reference_of_dpo_is_the_model_that_lora_ga_started_from(base, tmp_path):
    """TRL copies the adapter as its reference: before the first step both are the same model."""
    model = get_peft_model(language_model(), adapter())
    ids = torch.randint(2, 10, (4, 6), generator=torch.Generator().manual_seed(0))
    lora_ga.initialize(model, [{"input_ids": ids, "labels": ids}], base=base)
    trainer = lorapro.use_lorapro(dpo(tmp_path, model=model), mode="efficient")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0]


def test_a_rate_that_is_only_a_default_gives_way_to_the_modes_own(tmp_path, caplog):
    def chosen(cls, *given, **options):
        args = cls(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="lorapro"):
            _, kwargs = lorapro.trainer_optimizer(args, *given, **options)
        assert (args.learning_rate == kwargs["lr"]) or "lr" in options
        return kwargs["lr"], caplog.text

    lr, told = chosen(TrainingArguments, mode="full")
    assert lr == RATES["full"]
    assert "5e-05 is only the default of TrainingArguments: lr = 0.0003, where full" in told
    lr, told = chosen(SFTConfig, "muon")
    assert (lr, "2e-05 is only" in told) == (RATES["muon"], True)
    lr, told = chosen(DPOConfig)  # a twentieth of TRL's rate for supervised fine-tuning
    assert lr == pytest.approx(RATES["efficient"] / 20)
    lr, told = chosen(DPOConfig, lr=1e-6)
    assert (lr, told) == (1e-6, "")
    args = SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    lorapro.trainer_optimizer(args, mode="efficient")
    assert lorapro.trainer_optimizer(args, mode="full")[1]["lr"] == RATES["full"]


def test_bad_options_are_told_at_once(tmp_path):
    args = arguments(TrainingArguments, tmp_path)
    trainer = Trainer(classifier(), args=args, train_dataset=sequences())
    for match, options in (
        ("unknown option 'wieght_decay'.*did you mean 'weight_decay'", {"wieght_decay": 0.1}),
        ("unknown mode 'eficient'.*did you mean 'efficient'", {"mode": "eficient"}),
        ("unknown x 'silvester'.*did you mean 'sylvester'", {"x": "silvester"}),
        ("unknown optimizer 'adam'.*did you mean 'adamw'", {"optimizer": "adam"}),
        ("unknown on_unaligned 'plane'.*did you mean 'plain'", {"on_unaligned": "plane"}),
        ("unknown option 'mode' of LoraProSGD", {"optimizer": "sgd", "mode": "full"}),
        ("lr is -1", {"lr": -1.0}),
        ("LoraProAdamW.*'1e-3'", {"lr": "1e-3"}),
        ("weight_decay is -0.1", {"weight_decay": -0.1}),
        ("no adapter 'other'", {"adapter": "other"}),
    ):
        with pytest.raises(ValueError, match=match):
            lorapro.use_lorapro(trainer, **options)
        assert trainer.optimizer is None
        assert trainer.optimizer_cls_and_kwargs is None
    plain = Trainer(classifier().unload(), args=args, train_dataset=sequences())
    with pytest.raises(ValueError, match="no trainable LoRA pair"):
        lorapro.use_lorapro(plain)
    trainer.create_optimizer()
    with pytest.raises(ValueError, match="has a AdamW already; call use_lorapro before train"):
        lorapro.use_lorapro(trainer)
    with pytest.raises(ValueError, match="expected a transformers.Trainer, found a Linear"):
        lorapro.use_lorapro(torch.nn.Linear(2, 2))


def test_without_lr_create_takes_the_modes_own_and_says_so(caplog):
    with caplog.at_level(logging.WARNING, logger="lorapro"):
        optimizer = lorapro.create_lorapro_optimizer(classifier(), "muon")
    assert optimizer.param_groups[0]["lr"] == RATES["muon"]
    assert f"lr was not given: lr = {RATES['muon']:g}, where muon begins" in caplog.text
    with pytest.raises(ValueError, match="did you mean 'nesterov'"):
        lorapro.create_lorapro_optimizer(classifier(), "muon", nestrov=True)
