"""Diagnostics of whole runs: own loops, Trainer, what is logged and written."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import lorapro
from lorapro.diagnostics import AlignmentCallback, follow, measure, read_records, summary, watch
from small_models import llama, randomise


def model(**config):
    torch.manual_seed(0)
    options = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], **config}
    return randomise(get_peft_model(llama(), LoraConfig(**options)))


def rows():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 11, (24, 6), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def batch(seed):
    ids = torch.tensor(rows()["input_ids"])[seed : seed + 4]
    return {"input_ids": ids, "labels": ids}


def test_a_loop_is_measured_at_its_steps_and_not_changed(tmp_path):
    def train(steps, follower=None):
        net = model()
        optimizer = lorapro.LoraProAdamW(lorapro.lora_param_groups(net), lr=1e-3)
        with follower(net, optimizer) if follower else torch.enable_grad() as following:
            for step in range(steps):
                net(**batch(step)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return net, following

    seen = []
    path = tmp_path / "new" / "diagnostics.jsonl"
    net, following = train(7, lambda m, o: follow(m, o, 3, path, on_records=seen.append))
    plain, _ = train(7)
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [records[0].step for records in seen] == [1, 3, 6]
    assert following.steps == 7
    written = read_records(path)
    assert written == read_records(path.parent)
    assert [r.step for r in written] == [1] * 3 + [3] * 3 + [6] * 3
    assert written == [r for records in seen for r in records]
    assert all(math.isfinite(r.aligned_distance) for r in written)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_the_decrease_predicted_and_the_one_realised():
    """Aligned SGD: lr times Theorem 2.2; and, for a small step, what the loss itself did."""
    net = model().double()
    optimizer = lorapro.LoraProSGD(lorapro.lora_param_groups(net), lr=0.5)
    with torch.no_grad():
        before = net(**batch(0)).loss.double()
    with follow(net, optimizer) as following:
        net(**batch(0)).loss.backward()
        optimizer.step()
    for record in following.records:
        assert record.realised_decrease == pytest.approx(0.5 * record.predicted_decrease, rel=1e-4)
    with torch.no_grad():
        after = net(**batch(0)).loss.double()
    total = summary(following.records)["alignment/realised_decrease"]
    assert total == pytest.approx(float(before - after), rel=0.05)


def test_a_model_that_changes_between_two_measured_steps_is_looked_at_anew():
    """Another adapter, then another scaling: as a watch that begins then has it."""
    net = model()
    net.add_adapter("b", LoraConfig(r=3, target_modules=["q_proj"]))
    net.set_adapter("default")
    randomise(net)

    def rescale():
        for module in net.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("b", 2.0)

    optimizer = torch.optim.SGD([p for n, p in net.named_parameters() if "lora" in n], lr=0.0)
    sizes = []
    with follow(net, optimizer, every=2) as following:
        for change in (int, lambda: net.set_adapter("b"), rescale):
            change()
            with nullcontext() if following.steps == 0 else watch(net):
                net(**batch(0)).loss.backward()
                expected = measure(net)
            optimizer.step()
            optimizer.zero_grad()
            net(**batch(0)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            sizes.append(len(following.records))
            for record, other in zip(following.records, expected, strict=True):
                assert record.name == other.name
                assert record.lora_distance == pytest.approx(other.lora_distance, rel=1e-6)
    assert sizes == [3, 1, 1]


def test_gradients_are_measured_before_a_hook_aligns_them():
    net = model()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    lorapro.align_gradients(optimizer, net)
    with watch(net):
        net(**batch(0)).loss.backward()
        expected = measure(net)
    net.zero_grad()
    with follow(net, optimizer) as following:
        net(**batch(0)).loss.backward()
        optimizer.step()
    for a, b in zip(following.records, expected, strict=True):
        assert a.lora_norm == pytest.approx(b.lora_norm, rel=1e-6)
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-6)


class Tracker(TrainerCallback):
    """Stands where the trackers of report_to stand: ahead of the user's callbacks."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


def run(folder, callback, resume=None, **options):
    settings = {
        "output_dir": str(folder),
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.05,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
        **options,
    }
    args = TrainingArguments(**settings)
    trainer = Trainer(
        model(),
        args=args,
        train_dataset=rows(),
        optimizer_cls_and_kwargs=lorapro.trainer_optimizer(args),
        callbacks=[Tracker(), *([callback] if callback else [])],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_logs_and_writes_the_alignment(tmp_path):
    trainer = run(tmp_path / "a", AlignmentCallback(every=2), gradient_accumulation_steps=2)
    tracker = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Tracker))
    logged = {step: logs for step, logs in tracker.logs if "loss" in logs}
    assert set(logged) == {2, 4, 6}
    written = read_records(tmp_path / "a")
    assert [r.step for r in written[::3]] == [1, 2, 4, 6]
    for step, logs in logged.items():
        expected = summary([r for r in written if r.step == step])
        assert {k: logs[k] for k in expected} == expected
        assert 0 < logs["alignment/aligned_distance"] < 1
        assert (
            expected.items()
            <= next(h for h in trainer.state.log_history if h["step"] == step).items()
        )
    # The gradients of all layers together are clipped to 0.05, the pairs are all there is.
    assert all(r.lora_distance > r.aligned_distance for r in written)

    plain = run(tmp_path / "b", None, gradient_accumulation_steps=2)
    for a, b in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not any(m._forward_hooks for m in trainer.model.modules())


def test_a_resumed_run_has_each_step_once(tmp_path):
    whole = run(tmp_path, AlignmentCallback(every=1))
    expected = read_records(tmp_path)
    lines = (tmp_path / "diagnostics.jsonl").read_text().splitlines()
    (tmp_path / "diagnostics.jsonl").write_text("\n".join([*lines[:13], lines[13][:40]]) + "\n")
    again = run(tmp_path, AlignmentCallback(every=1), resume=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == whole.state.global_step
    assert read_records(tmp_path) == expected


def test_a_record_is_json_for_every_reader(tmp_path):
    net = model()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for p in net.parameters():
        if p.requires_grad and p.shape[1] == 2:
            torch.nn.init.zeros_(p)
    path = tmp_path / "d.jsonl"
    with follow(net, optimizer, path=path, listen=False):
        net(**batch(0)).loss.backward()
        optimizer.step()

    def no_constants(name):
        raise AssertionError(f"{name} is not JSON")

    rows = [json.loads(line, parse_constant=no_constants) for line in path.read_text().splitlines()]
    assert rows[0]["condition_B"] is None
    assert rows[0]["gradient_norm"] is None
    assert rows[0]["rank_B"] == 0
    assert math.isnan(read_records(path)[0].aligned_distance)


def test_bad_input_is_told_at_once(tmp_path):
    with pytest.raises(ValueError, match="every is 0"):
        AlignmentCallback(every=0)
    with pytest.raises(ValueError, match="layers='nothing'"):
        run(tmp_path, AlignmentCallback(layers="nothing"))
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with follow(net, optimizer):
        for seed in (0, 1):
            net(**batch(seed)).loss.backward()
        with pytest.raises(ValueError, match="one was announced"):
            optimizer.step()
    assert not any(m._forward_hooks for m in net.modules())
