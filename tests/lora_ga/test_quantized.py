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

bnb = pytest.importorskip("bitsandbytes")

# Said by libraries about their own insides.
pytestmark = pytest.mark.filterwarnings(
    "ignore:MatMul8bitLt:UserWarning",
    "ignore:Failed to load CPU gemm",
    "ignore:.*MatMul.*:UserWarning",
    "ignore::FutureWarning:bitsandbytes",
)


def quantized(model, bits):
    """Replace every linear layer but the head by its quantized twin, as transformers does."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name == "lm_head":
            continue
        shape = (module.in_features, module.out_features)
        if bits == 4:
            twin = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=torch.float32)
            twin.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False)
        else:
            twin = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=0.0)
            twin.weight = bnb.nn.Int8Params(
                module.weight.data, requires_grad=False, has_fp16_weights=False
            )
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, twin.to("cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model.eval()


def adapted(model):
    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    return get_peft_model(model, config).eval()


@pytest.fixture
def base(tiny):
    return tiny.llama(hidden_size=64, intermediate_size=128)


@pytest.mark.parametrize("bits", [4, 8])
def test_sketch_of_a_quantized_base_is_the_gradient_of_what_it_computes(tiny, base, bits):
    batches = tiny.batches()
    small = quantized(base, bits)
    model = adapted(copy.deepcopy(small))
    kinds = {type(m).__name__ for m in model.modules() if hasattr(m, "lora_A")}
    assert kinds == {f"Linear{bits}bit" if bits == 4 else "Linear8bitLt"}
    before = model(**batches[0]).logits.detach()
    with pytest.raises(ValueError, match="quantized .* use base='frozen'"):
        lora_ga.initialize(model, batches, estimator="sketch")
    report = lora_ga.initialize(model, batches, estimator="sketch", base="frozen")
    assert torch.equal(model(**batches[0]).logits, before)
    assert all(row.relative_size > 0 for row in report.layers)
    exact = adapted(copy.deepcopy(small))
    expected = lora_ga.initialize(exact, batches, base="frozen")
    for a, b in zip(report.layers, expected.layers, strict=True):
        assert a.energy == pytest.approx(b.energy, abs=0.05)
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=0.05)


def test_4_bit_train_export_and_reload(tiny, base, tmp_path):
    batches = tiny.batches()
    small = quantized(base, 4)
    model = adapted(copy.deepcopy(small))
    lora_ga.initialize(model, batches, estimator="sketch", base="frozen")
    start = model(**batches[0]).logits.detach()
    model.train()
    optimizer = lorapro.create_lorapro_optimizer(model, lr=3e-3)
    for step in range(20):
        optimizer.zero_grad()
        model(**batches[step % 3]).loss.backward()
        optimizer.step()
    model.eval()
    trained = model(**batches[0]).logits.detach()
    assert (trained - start).abs().max() > 0.05 * start.abs().max()

    report = save_portable(model, tmp_path)
    assert report.rank == 8
    loaded = PeftModel.from_pretrained(copy.deepcopy(small), tmp_path).eval()
    out = loaded(**batches[0]).logits.detach()
    assert (out - trained).abs().max() <= 1e-4 * trained.abs().max()
    with pytest.raises(ValueError, match="quantized"):
        save_merged(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
