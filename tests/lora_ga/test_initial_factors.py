"""The frozen copy in PEFT's machinery; resuming from checkpoints."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel

from lorapro import lora_ga
from lorapro.factors import find_pairs


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def train(model, batches, steps=4):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()


def close(a, b, tolerance=1e-4):
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def test_frozen_base_is_bit_identical_and_trains_as_subtract_does(tiny):
    base, batches = tiny.llama(), tiny.batches()
    found = {}
    for kind in ("subtract", "frozen"):
        model = tiny.adapted(copy.deepcopy(base))
        lora_ga.initialize(model, batches, base=kind)
        weights = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
        same = [
            torch.equal(weights[f"base_model.model.{n}"], p) for n, p in base.named_parameters()
        ]
        assert all(same) == (kind == "frozen")
        train(model, batches)
        found[kind] = logits(model, batches[0])
        same = [
            torch.equal(weights[f"base_model.model.{n}"], p) for n, p in base.named_parameters()
        ]
        assert all(same) == (kind == "frozen")
    assert close(found["frozen"], found["subtract"])
    assert not close(found["frozen"], logits(base, batches[0]), 0.01)


@pytest.mark.parametrize("kind", ["subtract", "frozen"])
def test_peft_operations_on_a_trained_model(tiny, kind):
    base, batches = tiny.llama(), tiny.batches()
    model = tiny.adapted(copy.deepcopy(base), use_rslora=True)
    lora_ga.initialize(model, batches, base=kind)
    train(model, batches)
    model.eval()
    trained = logits(model, batches[0])

    assert close(logits(copy.deepcopy(model), batches[0]), trained, 1e-6)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert close(logits(merged, batches[0]), trained)
    model.merge_adapter()
    assert close(logits(model, batches[0]), trained)
    model.unmerge_adapter()
    assert close(logits(model, batches[0]), trained)
    assert close(logits(pickle.loads(pickle.dumps(model)), batches[0]), trained, 1e-6)
    # Initial factors are in no checkpoint.
    assert set(model.state_dict()) == set(tiny.adapted(tiny.llama()).state_dict())
    if kind == "frozen":
        with model.disable_adapter():
            assert close(logits(model, batches[0]), logits(base, batches[0]), 1e-5)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
        model.set_adapter("other")
        assert close(logits(model, batches[0]), logits(base, batches[0]), 1e-5)
        model.set_adapter("default")
        assert close(logits(model, batches[0]), trained, 1e-6)
        halved = copy.deepcopy(model).to(torch.bfloat16)
        assert close(logits(halved, batches[0]).float(), trained, 0.1)


def test_frozen_copy_sees_the_input_without_dropout(tiny):
    batches = tiny.batches()
    found = {}
    for kind in ("subtract", "frozen"):
        model = tiny.adapted(tiny.llama(), lora_dropout=0.5)
        lora_ga.initialize(model, batches, base=kind)
        model.train()
        torch.manual_seed(5)
        found[kind] = logits(model, batches[0])
    assert close(found["frozen"], found["subtract"])


@pytest.mark.parametrize("kind", ["subtract", "frozen"])
def test_resuming_from_a_checkpoint(tiny, kind, tmp_path):
    batches = tiny.batches()
    model = tiny.adapted(tiny.llama(), use_rslora=True)
    lora_ga.initialize(model, batches, base=kind)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    path = lora_ga.save_initial(model, tmp_path)
    assert path.name == "lora_ga_initial.safetensors"
    train(model, batches)
    model.eval()
    model.save_pretrained(tmp_path / "checkpoint")
    trained = logits(model, batches[0])

    # The checkpoint is a plain LoRA for the original base.
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "checkpoint").eval()
    assert close(logits(loaded, batches[0]), trained)
    with pytest.raises(ValueError, match="another rank"):
        lora_ga.load_initial(loaded, tmp_path)
    with pytest.raises(ValueError, match="initialised already"):
        lora_ga.load_initial(model, tmp_path)

    # A fresh adapter gets the initial factors; loading a checkpoint into it resumes, bit for bit.
    for place in (path, tmp_path / "checkpoint"):
        fresh = tiny.adapted(tiny.llama(), use_rslora=True)
        lora_ga.load_initial(fresh, place)
        for name, p in fresh.named_parameters():
            assert torch.equal(p, start[name]), name
        fresh.load_adapter(tmp_path / "checkpoint", "default", is_trainable=True)
        for name, p in fresh.named_parameters():
            assert torch.equal(p, model.get_parameter(name)), name
            assert p.requires_grad == model.get_parameter(name).requires_grad

    # A fresh adapter without its start, or trained already, is refused.
    plain = tiny.adapted(tiny.llama(), use_rslora=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        plain.load_adapter(tmp_path / "checkpoint", "default", is_trainable=True)
    train(plain, batches)
    with pytest.raises(ValueError, match="the adapter is trained; expected a fresh one"):
        lora_ga.load_initial(plain, tmp_path)


def test_loading_initial_factors_that_do_not_fit(tiny, tmp_path):
    batches = tiny.batches()
    model = tiny.adapted(tiny.llama())
    with pytest.raises(ValueError, match="no initial factors"):
        lora_ga.save_initial(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="lora_ga_initial"):
        lora_ga.load_initial(model, tmp_path)
    lora_ga.initialize(model, batches)
    lora_ga.save_initial(model, tmp_path)
    for match, config in (
        ("another rank", {"r": 2}),
        ("scaling", {"lora_alpha": 4}),
        ("another model", {"target_modules": ["q_proj"]}),
    ):
        other = tiny.adapted(tiny.llama(), **config)
        weights = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=match):
            lora_ga.load_initial(other, tmp_path)
        for name, value in other.state_dict().items():
            assert torch.equal(value, weights[name])


def test_remember_initial(tiny):
    model = tiny.adapted(tiny.llama(), init_lora_weights="pissa")
    assert lora_ga.remember_initial(model) == 14
    with pytest.raises(ValueError, match="kept already"):
        lora_ga.remember_initial(model)
    assert lora_ga.remember_initial(tiny.adapted(tiny.llama())) == 0


def test_pairs_of_a_frozen_start_are_found(tiny):
    model = tiny.adapted(tiny.llama())
    names = [p.name for p in find_pairs(model).pairs]
    lora_ga.initialize(model, tiny.batches(), base="frozen")
    found = find_pairs(model)
    assert [p.name for p in found.pairs] == names
    assert not found.unaligned
