"""Captured gradients under checkpointing, autocast, repeated and tied modules, several ranks."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lorapro import lora_ga
from lorapro.factors import find_pairs
from lorapro.lora_ga.decompose import gradient_objective

PREFIX = "base_model.model."


def excess(pair, G, rank):
    """How far above the best residual the factors are, relative to ‖G‖²."""
    best = torch.linalg.svdvals(G.double())[2 * rank :].square().sum()
    reached = gradient_objective(pair.A.detach(), pair.B.detach(), G)
    return float((reached - best) / G.double().square().sum())


@pytest.mark.filterwarnings("ignore:`use_cache=True` is incompatible")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("estimator", ["exact", "sketch"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tiny, reentrant, estimator):
    base, batches = tiny.llama(), tiny.batches()
    model = tiny.adapted(copy.deepcopy(base), lora_dropout=0.3)
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    if reentrant:  # as for training with it
        model.enable_input_require_grads()
    model.train(reentrant)  # checkpointing must be at work in either mode
    recomputed = []
    layer = model.base_model.model.model.layers[0].self_attn
    layer.register_forward_hook(lambda *_: recomputed.append(torch.is_grad_enabled()))
    report = lora_ga.initialize(model, batches, scale="unit", estimator=estimator, oversampling=40)
    # Each pass runs the layer once forward and once again in the backward pass.
    assert len(recomputed) == 2 * len(batches) * report.passes
    for pair in find_pairs(model).pairs:
        name = pair.name.removeprefix(PREFIX)
        if name != "lm_head":
            assert excess(pair, tiny.gradient(base, f"{name}.weight", batches), 4) < 1e-3, name


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
def test_autocast(tiny, estimator):
    base, batches = tiny.llama(), tiny.batches()
    model = tiny.adapted(copy.deepcopy(base))

    def loss(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**batch).loss

    report = lora_ga.initialize(model, batches, loss, scale="unit", estimator=estimator)
    for pair, row in zip(find_pairs(model).pairs, report.layers, strict=True):
        G = tiny.gradient(base, f"{pair.name.removeprefix(PREFIX)}.weight", batches)
        assert pair.A.dtype == torch.float32
        assert row.gradient_norm == pytest.approx(float(G.norm()), rel=0.1)
        assert excess(pair, G, 4) < 0.1, pair.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(tiny, dtype):
    base, batches = tiny.llama().to(dtype), tiny.batches()
    for kind in ("subtract", "frozen"):
        model = get_peft_model(
            copy.deepcopy(base),
            LoraConfig(r=4, target_modules="all-linear"),
            autocast_adapter_dtype=False,
        )
        before = model(**batches[0]).logits.detach()
        report = lora_ga.initialize(model, batches, base=kind)
        change = (model(**batches[0]).logits - before).abs().max() / before.abs().max()
        if dtype == torch.float64:
            assert change < 1e-12
        elif kind == "frozen":
            assert change == 0
        else:
            assert change < 0.2  # bfloat16 has 8 bits, and the report says so
            assert "base='frozen'" in str(report)
        assert find_pairs(model).pairs[0].A.dtype == dtype


class Looped(nn.Module):
    """The same layers applied several times, and a layer applied twice to different inputs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.block = nn.Linear(12, 12)

    def forward(self, x):
        h = self.embed(x).tanh() + self.embed(2 * x).sin()
        for _ in range(3):
            h = h + self.block(h).tanh()
        return h


class Alias(nn.Module):
    """PEFT wraps ``block``, while the forward pass also calls the bare layer in ``again``."""

    def __init__(self):
        super().__init__()
        self.block = nn.Linear(6, 6)
        self.again = nn.ModuleList([self.block])

    def forward(self, x):
        return self.again[0](self.block(x).tanh())


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
@pytest.mark.parametrize("base", ["subtract", "frozen"])
def test_repeated_modules_add_up_all_their_calls(tiny, base, estimator):
    torch.manual_seed(0)
    net = Looped()
    batches = [torch.randn(7, 6), torch.randn(3, 6)]
    loss = lambda m, x: m(x).square().mean()  # noqa: E731
    model = get_peft_model(copy.deepcopy(net), LoraConfig(r=2, target_modules=["embed", "block"]))
    before = model(batches[0])
    lora_ga.initialize(
        model, batches, loss, scale="unit", base=base, estimator=estimator, oversampling=8
    )
    torch.testing.assert_close(model(batches[0]), before, rtol=1e-5, atol=1e-5)
    pairs = find_pairs(model).pairs
    assert len(pairs) == 2
    for pair in pairs:
        name = pair.name.removeprefix(PREFIX)
        assert excess(pair, tiny.gradient(net, f"{name}.weight", batches, loss), 2) < 1e-4


def test_a_layer_also_called_without_its_adapter(tiny):
    torch.manual_seed(0)
    net = Alias()
    batches = [torch.randn(7, 6)]
    loss = lambda m, x: m(x).square().mean()  # noqa: E731
    model = get_peft_model(copy.deepcopy(net), LoraConfig(r=2, target_modules=["block"]))
    before = model(batches[0])
    with pytest.raises(ValueError, match="block: its base weight is tied to .*again.0"):
        lora_ga.initialize(model, batches, loss)
    lora_ga.initialize(model, batches, loss, scale="unit", base="frozen")
    torch.testing.assert_close(model(batches[0]), before)
    # The adapter acts on the first call only, and so does the gradient it starts from.
    apart = copy.deepcopy(net)
    apart.again = nn.ModuleList([copy.deepcopy(net.block)])
    (pair,) = find_pairs(model).pairs
    assert excess(pair, tiny.gradient(apart, "block.weight", batches, loss), 2) < 1e-4


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_tied_base_weights_need_a_frozen_base(tiny):
    net, batches = tiny.llama(tie_word_embeddings=True), tiny.batches()
    assert net.lm_head.weight is net.model.embed_tokens.weight
    model = tiny.adapted(net, target_modules=["lm_head", "q_proj"])
    before = model(**batches[0]).logits.detach()
    with pytest.raises(ValueError, match="lm_head: its base weight is tied to .*embed_tokens"):
        lora_ga.initialize(model, batches)
    lora_ga.initialize(model, batches, base="frozen")
    assert torch.equal(model(**batches[0]).logits, before)


def test_padding_and_ignored_labels_count_as_in_the_loss(tiny):
    batch = tiny.batches()[0]
    longer = {
        k: torch.nn.functional.pad(v, (0, 6), value=-100 if k == "labels" else 0)
        for k, v in batch.items()
    }
    longer["attention_mask"][:, 17:] = 0
    found = []
    for data in (batch, longer):
        model = tiny.adapted(tiny.llama())
        found.append(lora_ga.initialize(model, [data]))
    for a, b in zip(found[0].layers, found[1].layers, strict=True):
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-4)
        assert a.energy == pytest.approx(b.energy, abs=1e-4)


def test_sketch_keeps_the_energy_and_depends_on_the_seed_only(tiny):
    base, batches = tiny.llama(), tiny.batches()
    found = []
    for seed in (0, 0, 1):
        model = tiny.adapted(copy.deepcopy(base), r=2)
        report = lora_ga.initialize(model, batches, estimator="sketch", scale="unit", seed=seed)
        assert report.passes == 4
        found.append([p.A.detach().clone() for p in find_pairs(model).pairs])
        for pair, row in zip(find_pairs(model).pairs, report.layers, strict=True):
            G = tiny.gradient(base, f"{pair.name.removeprefix(PREFIX)}.weight", batches).double()
            A, B = pair.A.detach().double(), pair.B.detach().double()
            sigma2 = torch.linalg.svdvals(G).square()
            inside = G.square().sum() - gradient_objective(A, B, G)
            assert inside >= 0.99 * sigma2[:4].sum(), pair.name
            assert row.energy == pytest.approx(float(sigma2[:4].sum() / sigma2.sum()), abs=0.05)
        torch.manual_seed(torch.seed() % 1000)  # the global generator plays no part
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))
