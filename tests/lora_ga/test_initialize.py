"""initialize: outputs, subspaces, scales, the state of the model, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lorapro import lora_ga
from lorapro.factors import find_pairs
from lorapro.lora_ga.decompose import DIRECTIONS, SCALES, gradient_objective

PREFIX = "base_model.model."


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def pairs_of(model):
    return {p.name.removeprefix(PREFIX): p for p in find_pairs(model).pairs}


def best_residual(G, rank):
    return torch.linalg.svdvals(G.double())[rank:].square().sum()


@pytest.mark.parametrize("base", ["subtract", "frozen"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_outputs_are_unchanged(tiny, direction, scale, base):
    model, batches = tiny.adapted(tiny.llama(), use_rslora=True), tiny.batches()
    before = logits(model, batches[0])
    lora_ga.initialize(model, batches, direction=direction, scale=scale, base=base)
    assert (logits(model, batches[0]) - before).abs().max() <= 1e-4 * before.abs().max()
    for module in model.modules():
        if hasattr(module, "lora_A"):
            assert module.lora_A["default"].weight.any()
            assert module.lora_B["default"].weight.any()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_unit_factors_reach_the_best_rank_2r_residual_of_the_true_gradient(tiny, direction):
    base, batches = tiny.llama(), tiny.batches()
    model = tiny.adapted(copy.deepcopy(base))
    lora_ga.initialize(model, batches, direction=direction, scale="unit")
    for name, pair in pairs_of(model).items():
        G = tiny.gradient(base, f"{name}.weight", batches)
        reached = gradient_objective(pair.A.detach(), pair.B.detach(), G)
        best = best_residual(G, 8)
        assert abs(reached - best) <= 1e-4 * G.double().square().sum(), name


def test_exact_factors_span_the_singular_subspaces(tiny):
    base, batches = tiny.llama(), tiny.batches()
    model = tiny.adapted(copy.deepcopy(base), r=3)
    lora_ga.initialize(model, batches)
    checked = 0
    for name, pair in pairs_of(model).items():
        G = tiny.gradient(base, f"{name}.weight", batches).double()
        U, sigma, Vh = torch.linalg.svd(G)
        if sigma[3] < 0.98 * sigma[2]:
            assert angle(pair.A.detach().mT, Vh[:3].mT) < 1e-3, name
            checked += 1
            if sigma[6] < 0.98 * sigma[5]:
                assert angle(pair.B.detach(), U[:, 3:6]) < 1e-3, name
                checked += 1
    assert checked > 14


def angle(X, Y):
    """Sine of the largest principal angle (its cosine rounds away small ones)."""
    X, Y = torch.linalg.qr(X.double()).Q, torch.linalg.qr(Y.double()).Q
    return torch.linalg.matrix_norm(Y - X @ (X.mT @ Y), ord=2)


def test_scales_are_the_papers(tiny):
    batches = tiny.batches()
    base = tiny.llama()
    for scale in SCALES:
        model = tiny.adapted(copy.deepcopy(base), use_rslora=True)
        report = lora_ga.initialize(model, batches, scale=scale, gamma=9.0)
        for (name, pair), row in zip(pairs_of(model).items(), report.layers, strict=True):
            m, s = pair.shape[0], pair.scaling
            W = base.get_parameter(f"{name}.weight").detach()
            expected = {
                "stable": m**0.25 / 3.0,
                "gd": 1 / s,
                "unit": 1.0,
                "weight": float((torch.linalg.svdvals(W)[:4] / s).sqrt().mean()),
            }[scale]
            assert row.scale == pytest.approx(expected, rel=1e-4)
            length = torch.full((4,), row.scale)
            torch.testing.assert_close(pair.A.detach().norm(dim=1), length, rtol=1e-4, atol=0)
            torch.testing.assert_close(pair.B.detach().norm(dim=0), length, rtol=1e-4, atol=0)
            delta = s * pair.B.detach() @ pair.A.detach()
            assert row.relative_size == pytest.approx(float(delta.norm() / W.norm()), rel=1e-3)


def test_report_counts_energy_and_prints(tiny):
    base, batches = tiny.llama(), tiny.batches()
    report = lora_ga.initialize(tiny.adapted(copy.deepcopy(base)), batches)
    for row in report.layers:
        name = row.name.removeprefix(PREFIX)
        G = tiny.gradient(base, f"{name}.weight", batches)
        sigma2 = torch.linalg.svdvals(G.double()).square()
        assert row.energy == pytest.approx(float(sigma2[:8].sum() / sigma2.sum()), abs=1e-4)
        assert row.gradient_norm == pytest.approx(float(G.norm()), rel=1e-4)
        assert row.peak_bytes > 0
        assert name in str(report)
    assert 0 < report.energy <= 1


def test_every_grouping_of_layers_gives_the_same_factors(tiny):
    found = []
    for per_pass in (None, 1, 5, 100):
        model = tiny.adapted(tiny.llama())
        report = lora_ga.initialize(model, tiny.batches(), layers_per_pass=per_pass)
        found.append({n: (p.A @ p.A.mT, p.B @ p.B.mT) for n, p in pairs_of(model).items()})
        assert report.passes == {None: 10, 1: 14, 5: 3, 100: 1}[per_pass]
    for other in found[1:]:
        for name, (_, BB) in found[0].items():
            torch.testing.assert_close(other[name][1], BB, rtol=0, atol=1e-4)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(tiny, estimator, fails):
    model, batches = tiny.adapted(tiny.llama(), lora_dropout=0.1), tiny.batches()
    model.train()
    model.base_model.model.model.layers[1].eval()
    model.base_model.model.lm_head.weight.requires_grad_(True)
    model.base_model.model.lm_head.weight.grad = torch.ones(97, 48)
    training = [m.training for m in model.modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    gradients = [p.grad for p in model.parameters()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    torch.manual_seed(7)
    random = torch.get_rng_state()
    calls = []

    def loss(model, batch):
        calls.append(batch)
        if fails and len(calls) == 5:
            raise Interrupted
        return model(**batch).loss

    if fails:
        with pytest.raises(Interrupted):
            lora_ga.initialize(model, batches, loss, estimator=estimator)
        for name, value in model.state_dict().items():
            assert torch.equal(value, weights[name]), name
        assert not any(hasattr(m, "initial_factors") for m in model.modules())
    else:
        lora_ga.initialize(model, batches, loss, estimator=estimator)
    new = {m for x in model.modules() for m in getattr(x, "initial_factors", nn.Module()).modules()}
    kept = [m for m in model.modules() if m not in new]
    assert [m.training for m in kept] == training
    assert [len(m._forward_hooks) for m in kept] == hooks
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(a is b for a, b in zip(gradients, (p.grad for p in model.parameters()), strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    if fails:  # and can be initialised as if nothing had happened
        lora_ga.initialize(model, batches, estimator=estimator)


def test_dropout_plays_no_part(tiny):
    found = []
    for dropout in (0.0, 0.5):
        model = tiny.adapted(tiny.llama(attention_dropout=dropout), lora_dropout=dropout)
        model.train()
        lora_ga.initialize(model, tiny.batches())
        found.append([p.A.detach() for p in find_pairs(model).pairs])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_generator_is_read_once_and_other_losses_work():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 6))
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "2"]))
    data = ((torch.randn(7, 12), torch.randn(7, 6)) for _ in range(3))
    report = lora_ga.initialize(
        model, data, lambda m, b: (m(b[0]) - b[1]).square().mean(), layers_per_pass=1
    )
    assert report.settings["batches"] == 3
    assert report.passes == 2


def test_get_lora_ga_model(tiny):
    from peft import LoraConfig

    base, batches = tiny.llama(), tiny.batches()
    before = logits(base, batches[0])
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match="batches is empty"):
        lora_ga.get_lora_ga_model(base, config, [])
    assert not any("lora" in name for name, _ in base.named_modules())
    model = lora_ga.get_lora_ga_model(base, config, batches, direction="A2rBr")
    assert len(model.lora_ga_report.layers) == 4
    assert (logits(model, batches[0]) - before).abs().max() <= 1e-4 * before.abs().max()
    with pytest.raises(ValueError, match="'pissa'"):
        lora_ga.get_lora_ga_model(tiny.llama(), LoraConfig(r=2, init_lora_weights="pissa"), batches)


@pytest.mark.parametrize("options", [{}, {"layers_per_pass": 1}, {"estimator": "sketch"}])
def test_a_layer_outside_the_loss_keeps_its_start(options):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = torch.nn.Linear(6, 5), torch.nn.Linear(6, 5)

        def forward(self, x):
            return self.used(x)

    torch.manual_seed(0)
    model = get_peft_model(Two(), LoraConfig(r=1, target_modules=["used", "idle"]))
    x = torch.randn(4, 6)
    report = lora_ga.initialize(model, [x], lambda m, b: m(b).square().mean(), **options)
    notes = {row.name.rsplit(".", 1)[-1]: row.note for row in report.layers}
    assert "no gradient reached it" in notes["idle"]
    assert notes["used"] == ""


def test_bad_input(tiny):
    batches = tiny.batches()
    model = tiny.adapted(tiny.llama())
    weights = copy.deepcopy(model.state_dict())

    def refused(match, *args, **options):
        with pytest.raises(ValueError, match=match):
            lora_ga.initialize(model, *(args or (batches,)), **options)
        for name, value in model.state_dict().items():
            assert torch.equal(value, weights[name]), name
        assert all(p.grad is None for p in model.parameters())

    refused("batches is a int", 3)
    refused("batches is empty", [])
    refused("batches is empty", iter(()))
    refused("did you mean 'ArB2r'", direction="ArB2")
    refused("did you mean 'stable'", scale="stabel")
    refused("did you mean 'gradient'", objective="gradients")
    refused("unknown estimator 'sketched'", estimator="sketched")
    refused("did you mean 'frozen'", base="froze")
    refused("gamma is 0", gamma=0)
    refused("layers_per_pass is 0", layers_per_pass=0)
    refused("needs every element", estimator="sketch", objective="sign")
    refused("no adapter 'other'", adapter="other")
    refused("gave no loss", [{"input_ids": batches[0]["input_ids"]}])
    refused("expected a dict", [batches[0]["input_ids"]])
    refused("no gradient", batches, lambda m, b: m(**b).loss.detach())
    refused("no gradient", batches, lambda m, b: torch.ones(()))
    refused("no scalar", batches, lambda m, b: m(**b).logits)
    refused("no scalar tensor: found float", batches, lambda m, b: 1.0)
    all_ignored = {**batches[1], "labels": torch.full_like(batches[1]["labels"], -100)}
    refused("is nan", [all_ignored])
    huge = lambda m, b: (m(**b).logits * 1e30).square().sum().sqrt()  # noqa: E731
    refused("inf|not finite", batches, huge)

    model.merge_adapter()
    weights = copy.deepcopy(model.state_dict())
    refused("merged")
    model.unmerge_adapter()
    lora_ga.initialize(model, batches)
    weights = copy.deepcopy(model.state_dict())
    refused("initialised already")

    model = tiny.adapted(tiny.llama(), init_lora_weights="pissa")
    weights = copy.deepcopy(model.state_dict())
    refused("fresh adapter")
    model = tiny.llama()
    weights = copy.deepcopy(model.state_dict())
    refused("no adapter layers")


def test_rank_too_large_falls_back_to_the_directions_that_exist(tiny):
    base, batches = tiny.llama(), tiny.batches()
    for direction in DIRECTIONS:
        for rank in (16, 30):  # k_proj and v_proj are 24 x 48
            model = tiny.adapted(copy.deepcopy(base), r=rank, target_modules=["k_proj", "v_proj"])
            before = logits(model, batches[0])
            report = lora_ga.initialize(model, batches, direction=direction, scale="unit")
            assert all(row.directions == 24 for row in report.layers)
            assert all("24 exist" in row.note for row in report.layers)
            assert (logits(model, batches[0]) - before).abs().max() <= 1e-4 * before.abs().max()
            for name, pair in pairs_of(model).items():
                G = tiny.gradient(base, f"{name}.weight", batches)
                reached = gradient_objective(pair.A.detach(), pair.B.detach(), G)
                assert reached <= 1e-6 * G.double().square().sum()
                alive = pair.A.detach().norm(dim=1) + pair.B.detach().norm(dim=0)
                assert (alive > 1e-3).all()  # no component with both factors at zero


def test_a_second_adapter_and_modules_to_save(tiny):
    from peft import LoraConfig

    batches = tiny.batches()
    model = tiny.adapted(tiny.llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj", "q_proj"]))
    with pytest.raises(ValueError, match="'second' is not active"):
        lora_ga.initialize(model, batches, adapter="second")
    model.set_adapter("second")
    before = logits(model, batches[0])
    report = lora_ga.initialize(model, batches, base="frozen")
    assert {row.rank for row in report.layers} == {2}
    assert torch.equal(logits(model, batches[0]), before)
