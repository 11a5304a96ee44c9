"""save_pretrained and Trainer's checkpoints of adapters that did not start at B·A = 0."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import lorapro
from lorapro import lora_ga
from lorapro.export_guard import guard_saving
from test_export import batches, close, llama, logits, started, train
from test_trainer import arguments

STARTS = {"subtract": {"base": "subtract"}, "frozen": {"base": "frozen"}}


def rows():
    ids = torch.cat([b["input_ids"] for b in batches()])
    return [{"input_ids": x, "labels": x} for x in ids for _ in range(2)]


def run(folder, start, resume=None, initial=None, seed=2, **options):
    torch.manual_seed(seed)
    model = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    if initial is not None:
        lora_ga.load_initial(model, initial)
    else:
        lora_ga.initialize(model, batches(), **start)
    args = arguments(TrainingArguments, folder, **options)
    trainer = Trainer(
        model,
        args=args,
        train_dataset=rows(),
        eval_dataset=rows()[:2],
        optimizer_cls_and_kwargs=lorapro.trainer_optimizer(args, mode="factored"),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def reloaded(folder):
    return PeftModel.from_pretrained(llama(), folder).eval()


@pytest.mark.parametrize("start", STARTS)
def test_what_trainer_saves_is_the_trained_model_on_the_original_base(start, tmp_path):
    trainer = run(tmp_path, STARTS[start])
    trained = logits(trainer.model.eval())
    trainer.save_model(str(tmp_path / "saved"))
    assert not close(trained, logits(llama()), 0.01)
    for folder in (tmp_path / "saved", get_last_checkpoint(str(tmp_path))):
        assert close(logits(reloaded(folder)), trained)
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    assert (tmp_path / "checkpoint-3" / "README.md").is_file()


@pytest.mark.parametrize("start", STARTS)
def test_trainer_resumes_bit_for_bit(start, tmp_path):
    whole = run(tmp_path / "whole", STARTS[start])
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    expected = whole.model.state_dict()
    # With LoRA-GA run once more, or with its start read from the checkpoint.
    for number, initial in enumerate((None, checkpoint)):
        again = run(tmp_path / str(number), STARTS[start], str(checkpoint), initial, seed=2)
        assert again.state.global_step == 6
        for name, value in again.model.state_dict().items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("start", STARTS)
def test_a_start_that_came_out_otherwise_is_exchanged(start, tmp_path):
    """Gradients taken again need not give the same bits, or the same factors at all."""
    whole = run(tmp_path / "whole", STARTS[start])
    other = {**STARTS[start], "direction": "ArBr"}
    again = run(tmp_path / "again", other, str(tmp_path / "whole" / "checkpoint-3"))
    assert close(logits(again.model.eval()), logits(whole.model.eval()))
    again.save_model(str(tmp_path / "saved"))
    assert close(logits(reloaded(tmp_path / "saved")), logits(whole.model.eval()))


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    trainer = run(tmp_path, STARTS["frozen"], **options, save_total_limit=1)
    best = trainer.state.best_model_checkpoint
    assert close(logits(trainer.model.eval()), logits(reloaded(best)))


def test_copies_other_names_and_remembered_starts(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]), "first")
    model.add_adapter("second", LoraConfig(r=4, target_modules=["v_proj"]))
    model.set_adapter("second")
    lora_ga.initialize(model, batches(), base="frozen", adapter="second")
    copied = train(copy.deepcopy(model))
    copied.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "first" / "adapter_config.json").read_text())["r"] == 4
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "second", "second").eval()
    assert close(logits(loaded), logits(copied))
    assert not close(logits(model.eval()), logits(copied), 1e-3)
    assert pickle.loads(pickle.dumps(copied.save_pretrained.model.peft_config))
    guard_saving(copied)  # twice is once
    assert copied.save_pretrained.model is copied

    pissa = train(started("pissa"))
    pissa.save_pretrained(tmp_path / "pissa")
    assert close(logits(reloaded(tmp_path / "pissa")), logits(pissa))


def test_a_state_dict_given_is_what_is_saved(tmp_path):
    """FSDP and DeepSpeed gather a state dict and hand it on."""
    model = started("frozen")
    state = {k: v.clone() for k, v in train(copy.deepcopy(model)).state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    model.load_state_dict(state)
    assert close(logits(reloaded(tmp_path)), logits(model))


def test_a_zero_start_is_saved_as_ever(tmp_path):
    model = train(started("plain"))
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "lora_ga_initial.safetensors").exists()


def by_hand(model, **options):
    return lorapro.LoraProAdamW(lorapro.lora_param_groups(model), **options)


def by_hand_group_by_group(model, **options):
    groups = lorapro.lora_param_groups(model, lr=1e-2)
    groups[0] |= {"mode": options["mode"], "weight_decay": options["weight_decay"]}
    return lorapro.LoraProAdamW(groups)


def wrapped(model, **options):
    class Wrapper(torch.nn.Module):  # as DistributedDataParallel, without its processes
        def __init__(self):
            super().__init__()
            self.module = model

    return lorapro.create_lorapro_optimizer(Wrapper(), **options)


@pytest.mark.parametrize(
    "make", [lorapro.create_lorapro_optimizer, by_hand, by_hand_group_by_group, wrapped]
)
def test_saving_beside_a_decayed_base_warns_and_names_save_merged(make, tmp_path):
    model = started("plain")
    optimizer = make(model, mode="full", lr=1e-2, weight_decay=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "before")
    model(**batches()[0]).loss.backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"decayed during training.*save_merged\(model, path\)"):
        model.save_pretrained(tmp_path / "after")
    assert (tmp_path / "after" / "adapter_model.safetensors").is_file()

    started_elsewhere = started("frozen")
    for p in started_elsewhere.parameters():
        if not p.requires_grad:
            p.lorapro_decayed = True
    with pytest.warns(UserWarning, match="no adapter holds"):
        started_elsewhere.save_pretrained(tmp_path / "both")
    started_elsewhere.load_adapter(tmp_path / "both", "default")


def test_what_no_plain_lora_holds_is_saved_with_a_warning(tmp_path):
    model = started("pissa", remember=False, use_dora=True)
    lora_ga.remember_initial(model)
    with pytest.warns(UserWarning, match=r"cannot be saved for the original base.*save_merged"):
        model.save_pretrained(tmp_path)
    expected = {n: p.clone() for n, p in model.named_parameters()}
    train(model, steps=2)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    for name, p in model.named_parameters():
        assert torch.equal(p, expected[name]), name


def test_a_transformers_model_with_its_own_adapter_warns(tmp_path):
    model = llama()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    lora_ga.initialize(model, batches(), loss=lambda m, b: m(**b).loss)
    with pytest.warns(UserWarning, match=r"did not start at B·A = 0.*save_portable"):
        model.save_pretrained(tmp_path)
