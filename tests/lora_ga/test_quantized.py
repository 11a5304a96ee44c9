"""Quantized bases: 4 and 8 bits of bitsandbytes, on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lorapro
from lorapro import lora_ga
from lorapro.export import save_merged, save_portable
from lorapro.factors import find_pairs
from lorapro.lora_ga.decompose import gradient_objective
from quantized_models import in_bits, written_out

pytest.importorskip("bitsandbytes")

# Said by libraries about their own insides.
pytestmark = pytest.mark.filterwarnings(
    "ignore:MatMul8bitLt:UserWarning",
    "ignore:Failed to load CPU gemm",
    "ignore:.*MatMul.*:UserWarning",
    "ignore::FutureWarning:bitsandbytes",
)


def adapted(model):
    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    return get_peft_model(model, config)


@pytest.fixture
def base(tiny):
    return tiny.llama(hidden_size=64, intermediate_size=128)


def logits(model, batch):
    """In training mode: in evaluation mode bitsandbytes repacks 4-bit weights on some CPUs."""
    training = model.training
    out = model.train()(**batch).logits.detach()
    model.train(training)
    return out


def stored(model):
    return {
        n: p.detach().clone() for n, p in model.named_parameters() if type(p) is not nn.Parameter
    }


@pytest.mark.parametrize("estimator", ["sketch", "exact"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_gives_the_gradient_of_what_it_computes(tiny, base, bits, estimator):
    batches = tiny.batches()
    small = in_bits(base, bits)
    model = adapted(copy.deepcopy(small))
    kinds = {type(m).__name__ for m in model.modules() if hasattr(m, "lora_A")}
    assert kinds == {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    before, weights = logits(model, batches[0]), stored(model)
    assert len(weights) == 14
    with pytest.raises(ValueError, match="quantized .* use base='frozen'"):
        lora_ga.initialize(model, batches, estimator=estimator)
    report = lora_ga.initialize(
        model, batches, estimator=estimator, base="frozen", scale="unit", oversampling=64
    )
    for name, p in model.named_parameters():
        assert name not in weights or torch.equal(p, weights[name])
    after = logits(model, batches[0])
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    assert all(row.relative_size > 0 for row in report.layers)

    # The same model with its weights written out in float32.
    plain = written_out(base, small)
    for pair in find_pairs(model).pairs:
        name = pair.name.removeprefix("base_model.model.")
        G = tiny.gradient(plain, f"{name}.weight", batches).double()
        best = torch.linalg.svdvals(G)[8:].square().sum()
        reached = gradient_objective(pair.A.detach(), pair.B.detach(), G)
        assert reached - best <= 1e-3 * G.square().sum(), name


def test_4_bit_weights_repacked_for_inference_still_give_gradients(tiny, base):
    """After a forward pass in evaluation mode bitsandbytes' kernel has no backward pass."""
    batches = tiny.batches()
    small = in_bits(base, 4)
    fresh, used = adapted(copy.deepcopy(small)), adapted(copy.deepcopy(small))
    with torch.no_grad():
        before = used.eval()(**batches[0]).logits
    expected = lora_ga.initialize(fresh, batches, estimator="sketch", base="frozen")
    found = lora_ga.initialize(used, batches, estimator="sketch", base="frozen")
    with torch.no_grad():
        assert torch.equal(used.eval()(**batches[0]).logits, before)
    for a, b in zip(found.layers, expected.layers, strict=True):
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=0.05), a.name
        assert a.energy == pytest.approx(b.energy, abs=0.05), a.name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_4_bit_train_export_and_reload(tiny, base, optimizer, tmp_path):
    batches = tiny.batches()
    small = in_bits(base, 4)
    model = adapted(copy.deepcopy(small))
    lora_ga.initialize(model, batches, estimator="sketch", base="frozen")
    start = logits(model, batches[0])
    model.train()
    optimizer = lorapro.create_lorapro_optimizer(model, optimizer, lr=3e-3)
    for step in range(20):
        optimizer.zero_grad()
        model(**batches[step % 3]).loss.backward()
        optimizer.step()
    trained = logits(model, batches[0])
    assert (trained - start).abs().max() > 0.05 * start.abs().max()

    report = save_portable(model, tmp_path)
    assert report.rank == 8
    loaded = PeftModel.from_pretrained(copy.deepcopy(small), tmp_path)
    out = logits(loaded, batches[0])
    assert (out - trained).abs().max() <= 1e-4 * trained.abs().max()
    with torch.no_grad():  # in evaluation mode too, up to bitsandbytes' bfloat16 kernel
        a, b = model.eval()(**batches[0]).logits, loaded.eval()(**batches[0]).logits
    assert (a - b).abs().max() <= 0.02 * a.abs().max()
    with pytest.raises(ValueError, match="quantized"):
        save_merged(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
