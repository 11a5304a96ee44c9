"""Hugging Face Trainer and TRL's SFTTrainer: hyperparameters, schedules, resuming bit for bit."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import lorapro

# Checkpoints of full mode with weight decay.
pytestmark = pytest.mark.filterwarnings("ignore:the base weights were decayed")

MODES = {
    "efficient": {"mode": "efficient"},
    "full": {"mode": "full"},
    "sgd": {"optimizer": "sgd", "momentum": 0.9},
}
WORDS = ["<pad>", "<eos>", "one", "two", "three", "four", "five", "plus", "minus", "is"]


def arguments(cls, folder, **options):
    values = {
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    return cls(output_dir=str(folder), **{**values, **options})


def classifier():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
    )
    adapter = LoraConfig(
        r=4, task_type="SEQ_CLS", target_modules=["query", "value"], lora_dropout=0.1
    )
    return get_peft_model(BertForSequenceClassification(config), adapter)


def sequences():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 30, (32, 8), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 3).tolist()})


def language_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    return LlamaForCausalLM(config)


def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def run_trainer(folder, options, resume=None, **extra):
    args = arguments(TrainingArguments, folder, **extra)
    trainer = Trainer(
        classifier(),
        args=args,
        train_dataset=sequences(),
        optimizer_cls_and_kwargs=lorapro.trainer_optimizer(args, **options),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def run_sft(folder, options, resume=None, **extra):
    args = arguments(SFTConfig, folder, max_length=16, bf16=False, **extra)
    texts = [f"{a} plus {b} is {b}" for a in WORDS[2:7] for b in WORDS[2:7]]
    trainer = SFTTrainer(
        language_model(),
        args=args,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear"),
        optimizer_cls_and_kwargs=lorapro.trainer_optimizer(args, **options),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("run", [run_trainer, run_sft])
def test_an_interrupted_run_equals_the_uninterrupted_one(run, mode, tmp_path):
    whole = run(tmp_path / "whole", MODES[mode])
    again = run(tmp_path / "again", MODES[mode], resume=str(tmp_path / "whole/checkpoint-3"))
    assert again.state.global_step == 6
    expected = whole.model.state_dict()
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert whole.state.log_history[-2]["loss"] == again.state.log_history[-2]["loss"]


@pytest.mark.parametrize("mode", MODES)
def test_the_arguments_given_are_the_ones_used(mode, tmp_path):
    trainer = run_trainer(tmp_path, MODES[mode], adam_beta1=0.7, adam_beta2=0.95, adam_epsilon=1e-5)
    optimizer = trainer.optimizer.optimizer
    group = optimizer.param_groups[0]
    assert group["initial_lr"] == 1e-2
    assert group["weight_decay"] == 0.1
    assert group["lr"] == pytest.approx(0.0, abs=1e-12)  # the end of the cosine
    if mode == "sgd":
        assert isinstance(optimizer, lorapro.LoraProSGD)
        assert group["momentum"] == 0.9
    else:
        assert isinstance(optimizer, lorapro.LoraProAdamW)
        assert group["betas"] == (0.7, 0.95)
        assert group["eps"] == 1e-5
        assert group["mode"] == mode
    assert {g["role"] for g in optimizer.param_groups} >= {"pairs", "plain"}


def test_the_saved_adapter_gives_the_trained_logits(tmp_path):
    trainer = run_trainer(tmp_path / "run", MODES["efficient"])
    trainer.save_model(str(tmp_path / "adapter"))
    base = classifier().unload()
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ids = torch.tensor(sequences()["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits
        )


def test_training_follows_gradient_checkpointing_and_accumulation(tmp_path):
    plain = run_trainer(tmp_path / "a", MODES["efficient"], gradient_accumulation_steps=2)
    saving = run_trainer(
        tmp_path / "b",
        MODES["efficient"],
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    for a, b in zip(plain.model.parameters(), saving.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_bad_arguments_are_told_at_once(tmp_path):
    args = arguments(TrainingArguments, tmp_path)
    with pytest.raises(ValueError, match="'adamv'.*did you mean 'adamw'"):
        lorapro.trainer_optimizer(args, optimizer="adamv")
    args.learning_rate = 0.0
    with pytest.raises(ValueError, match="learning_rate is 0"):
        lorapro.trainer_optimizer(args)


def test_the_factory_takes_the_arguments_that_axolotl_hands_on(tmp_path):
    args = arguments(TrainingArguments, tmp_path)
    factory, kwargs = lorapro.trainer_optimizer(args, mode="efficient")
    optimizer = factory()(classifier(), args, **kwargs)
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert optimizer.param_groups[0]["mode"] == "efficient"
