"""Diagnostics against dense computation: g of the full weight, matrix_rank, cond, projections."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lorapro
from lorapro.diagnostics import measure, watch
from lorapro.factors import find_pairs
from reference.dense import projection
from small_models import llama, lora, net, randomise

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def language_model(**config):
    options = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS, **config}
    return get_peft_model(llama(num_hidden_layers=2), LoraConfig(**options))


def tokens(seed=0, rows=3, length=7):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 11, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids}


def full_gradients(model, run):
    """∂L/∂W of every pair's base weight, by autograd."""
    pairs = find_pairs(model).pairs
    weights = {p.name: p.base for p in pairs}
    for w in weights.values():
        w.requires_grad_(True)
    run(model)
    found = {name: w.grad.clone() for name, w in weights.items()}
    for w in weights.values():
        w.requires_grad_(False)
        w.grad = None
    for p in model.parameters():
        p.grad = None
    return found


def check(records, pairs, full, tolerance=1e-4, transpose=False):
    assert [r.name for r in records] == [p.name for p in pairs]
    for record, pair in zip(records, pairs, strict=True):
        A, B = (t[0].detach().double() for t in pair.matrices(pair.A, pair.B))
        g = full[pair.name].double()
        g = g.T if transpose else g.reshape(B.shape[0], A.shape[1])
        s = pair.scaling
        raw = s * B @ (s * B.T @ g) + s * (s * g @ A.T) @ A
        aligned = torch.from_numpy(projection(A.numpy(), B.numpy(), g.numpy()))
        size = float(g.norm())
        expected = {
            "gradient_norm": size,
            "lora_norm": float(raw.norm()),
            "lora_distance": float((raw - g).norm()),
            "aligned_norm": float(aligned.norm()),
            "aligned_distance": float((aligned - g).norm()),
        }
        for name, value in expected.items():
            bound = tolerance * max(value, 1e-3 * size)
            assert abs(getattr(record, name) - value) <= bound, (record.name, name)
        assert record.predicted_decrease == pytest.approx(float(aligned.norm()) ** 2, rel=1e-4)
        assert record.rank_A == int(torch.linalg.matrix_rank(A.float()))
        assert record.rank_B == int(torch.linalg.matrix_rank(B.float()))
        if record.rank_B == pair.rank:
            assert record.condition_B == pytest.approx(float(torch.linalg.cond(B)), rel=1e-4)
        else:
            assert record.condition_B == float("inf")
        assert record.condition_A == pytest.approx(float(torch.linalg.cond(A)), rel=1e-4)


def run(model, seed=0, **options):
    model(**tokens(seed, **options)).loss.backward()


@pytest.mark.parametrize("start", ["B = 0", "trained"])
@pytest.mark.parametrize("rows", [1, 30])  # the Gram matrices of tokens, and rows of g
def test_a_tiny_llama_as_dense_computation_has_it(start, rows):
    model = language_model(lora_dropout=0.0)
    if start == "trained":
        randomise(model)
    full = full_gradients(model, lambda m: run(m, rows=rows))
    with watch(model):
        run(model, rows=rows)
        records = measure(model, step=3)
    check(records, find_pairs(model).pairs, full)
    assert {r.step for r in records} == {3}


@pytest.mark.parametrize("rows", [1, 30])
def test_micro_batches_add_up(rows):
    model = randomise(language_model())

    def both(m):
        for seed in (0, 1):
            (m(**tokens(seed, rows=rows)).loss / 2).backward()

    full = full_gradients(model, both)
    with watch(model, micro_batches=2):
        both(model)
        records = measure(model)
    check(records, find_pairs(model).pairs, full)


def test_more_backward_passes_than_announced_are_refused():
    model = randomise(language_model())
    with watch(model):
        run(model)
        run(model, 1)
        with pytest.raises(ValueError, match="2 backward passes and one was announced.*micro_batc"):
            measure(model)
    with pytest.raises(ValueError, match="zero_grad"), watch(model):
        pass


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model = randomise(language_model())
    full = full_gradients(model, run)
    model.enable_input_require_grads()
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    with watch(model):
        run(model)
        records = measure(model)
    check(records, find_pairs(model).pairs, full)


class Twice(nn.Module):
    """One layer called twice in a pass, and one not at all."""

    def __init__(self):
        super().__init__()
        self.again, self.never = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.again(torch.tanh(self.again(x))))


def test_a_layer_called_twice_and_one_never_called():
    torch.manual_seed(0)
    model = get_peft_model(Twice(), LoraConfig(r=2, target_modules=["again", "never"]))
    randomise(model)
    x = torch.randn(5, 6)
    again, _ = find_pairs(model).pairs
    again.base.requires_grad_(True)
    model(x).square().sum().backward()
    full = {again.name: again.base.grad.clone()}
    again.base.grad = None
    again.base.requires_grad_(False)
    model.zero_grad()
    with watch(model):
        model(x).square().sum().backward()
        records = measure(model)
    check(records[:1], [again], full)
    assert (records[1].lora_norm, records[1].predicted_decrease) == (0.0, 0.0)


def test_convolutions_and_embeddings():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(9, 12, padding_idx=0), nn.Unflatten(-1, (3, 4)))
    base.append(nn.Conv2d(5, 4, (2, 3), stride=(1, 2), padding=1))
    config = LoraConfig(r=2, target_modules=["0", "2"])
    model = randomise(get_peft_model(base, config))
    ids = torch.tensor([[1, 2, 3, 4, 5], [5, 5, 6, 7, 8]])

    def forward(m, ids=ids):
        m(ids).square().mean().backward()

    full = full_gradients(model, forward)
    embedding, convolution = find_pairs(model).pairs
    for micro_batches in (1, 2):
        model.zero_grad()
        with watch(model, micro_batches=micro_batches):
            for rows in ids.chunk(micro_batches):
                (model(rows).square().mean() / micro_batches).backward()
            records = measure(model)
        check(records[:1], [embedding], full, transpose=True)
        check(records[1:], [convolution], full)


def test_dropout_scaling_patterns_and_frozen_factors():
    model = randomise(
        lora(net(), r=3, target_modules=["0", "2", "4"], rank_pattern={"2": 2}, use_rslora=True)
    )
    first = find_pairs(model).pairs[0]
    first.A.requires_grad_(False)
    x = torch.randn(9, 8)
    full = full_gradients(model, lambda m: m(x).square().mean().backward())
    with watch(model):
        model(x).square().mean().backward()
        records = measure(model)
    check(records[1:], find_pairs(model).pairs[1:], full)
    A, B, g, s = first.A.double(), first.B.detach().double(), full[first.name].double(), 3**0.5
    s = first.scaling
    best = g @ torch.linalg.pinv(A) @ A  # A frozen: rows of A are all there is
    assert records[0].aligned_distance == pytest.approx(float((best - g).norm()), rel=1e-4)
    raw = s * s * g @ A.T @ A
    assert records[0].lora_distance == pytest.approx(float((raw - g).norm()), rel=1e-4)
    assert B.shape[1] == 3


def test_with_dropout_g_is_that_of_the_adapters_own_path():
    """‖g̃ − g‖² = ‖g‖² − ‖g̃‖² holds for the g that the factors' gradients come from."""
    model = randomise(lora(net(), r=2, lora_dropout=0.5)).train()
    (pair,) = find_pairs(model).pairs
    layer = model.get_submodule(pair.name)
    seen = {}
    layer.lora_A["default"].register_forward_hook(lambda m, a, out: seen.update(x=a[0].detach()))

    def keep_output_gradient(module, args, out):
        out.register_hook(lambda d: seen.update(d=d))

    layer.register_forward_hook(keep_output_gradient)
    with watch(model):
        model(torch.randn(16, 8)).square().mean().backward()
        records = measure(model)
    check(records, [pair], {pair.name: seen["d"].T @ seen["x"]})


def test_clipped_gradients_are_measured_as_the_optimizer_gets_them():
    model = randomise(language_model())
    with watch(model):
        run(model)
        before = measure(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        after = measure(model)
    share = 0.01 / float(norm)
    for a, b in zip(before, after, strict=True):
        assert b.gradient_norm == pytest.approx(share * a.gradient_norm, rel=1e-4)
        assert b.lora_distance == pytest.approx(share * a.lora_distance, rel=1e-4)


def test_without_a_watch_the_norm_is_that_of_the_weights_gradient_or_unknown():
    model = randomise(language_model())
    run(model)
    records = measure(model)
    assert all(np.isnan(r.gradient_norm) and np.isnan(r.aligned_distance) for r in records)
    assert all(r.aligned_norm > 0 for r in records)
    model.zero_grad()
    for pair in find_pairs(model).pairs:
        pair.base.requires_grad_(True)
    run(model)
    full = {p.name: p.base.grad for p in find_pairs(model).pairs}
    check(measure(model), find_pairs(model).pairs, full)


def test_a_part_of_the_layers_and_bad_input():
    model = randomise(language_model())
    with watch(model, layers=r"layers\.1\..*(q|v)_proj"):
        run(model)
        assert [r.name.rpartition(".")[2] for r in measure(model)] == ["q_proj", "v_proj"]
        model.zero_grad()
        with pytest.raises(ValueError, match="watched already"), watch(model):
            pass
    with pytest.raises(ValueError, match="call measure after loss.backward"):
        measure(model)
    with pytest.raises(ValueError, match="no trainable LoRA pair whose name matches.*named like"):
        measure(model, layers="nothing")
    with pytest.raises(ValueError, match="no regular expression"):
        measure(model, layers="(")
    with pytest.raises(ValueError, match="micro_batches is 0"), watch(model, micro_batches=0):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert lorapro.diagnostics.measure is measure
