"""Every optimizer on a quantized base: the steps it takes on the same weights in full precision."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lorapro
from fault_cases import create, every_kind
from helpers import trainable
from quantized_models import in_bits, written_out
from small_models import llama

# Said by libraries about their own insides.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*MatMul.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Failed to load CPU gemm"),
    pytest.mark.filterwarnings("ignore::FutureWarning:bitsandbytes"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao"),
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated:UserWarning"),
]

TARGETS = ["q_proj", "v_proj", "down_proj"]
STORAGE = ["bitsandbytes 4 bits", "bitsandbytes 8 bits", "torchao 8 bits", "torchao 4 bits"]
every_storage = pytest.mark.parametrize("storage", STORAGE)


def quantized(model, storage):
    """The model with linear layers stored as given; the head stays."""
    library, bits, _ = storage.split()
    if library == "bitsandbytes":
        return in_bits(model, int(bits))
    pytest.importorskip(library)
    from torchao.quantization import IntxWeightOnlyConfig, quantize_

    model = copy.deepcopy(model)
    quantize_(
        model,
        IntxWeightOnlyConfig(weight_dtype=torch.int4 if bits == "4" else torch.int8),
        filter_fn=lambda layer, name: isinstance(layer, nn.Linear) and "lm_head" not in name,
    )
    return model


def adapted(model):
    torch.manual_seed(2)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)).train()


def steps(model, make):
    optimizer = make(model)
    ids = torch.arange(48).reshape(4, 12) * 7 % 64
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return [p.detach() for p in trainable(model).values()]


@pytest.fixture(scope="module")
def base():
    return llama(vocab_size=64, hidden_size=64, intermediate_size=128)


@every_storage
@every_kind
def test_a_step_on_a_quantized_base_is_that_on_its_weights_written_out(base, storage, kind):
    small = quantized(base, storage)
    found = steps(adapted(copy.deepcopy(small)), lambda model: create(model, kind))
    expected = steps(adapted(written_out(base, small)), lambda model: create(model, kind))
    assert any(p.any() for p in found[1::2])
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-4)


@every_storage
def test_decay_of_a_quantized_base_is_refused_by_name(base, storage):
    model = adapted(quantized(base, storage))
    with pytest.raises(ValueError, match=r"q_proj' cannot be scaled .*quantized"):
        lorapro.create_lorapro_optimizer(model, mode="full", lr=1e-3, weight_decay=0.1)


@pytest.mark.parametrize("storage", STORAGE[2:])  # bitsandbytes: tests/lora_ga/test_quantized.py
def test_torchao_bases_start_by_lora_ga_train_and_reload(base, storage, tmp_path):
    small = quantized(base, storage)
    model = adapted(copy.deepcopy(small))
    ids = torch.arange(48).reshape(4, 12) * 7 % 64
    batches = [{"input_ids": ids, "labels": ids}]
    with pytest.raises(ValueError, match="quantized .* use base='frozen'"):
        lorapro.lora_ga.initialize(model, batches, estimator="sketch")
    lorapro.lora_ga.initialize(model, batches, estimator="sketch", base="frozen")
    steps(model, lambda model: create(model, "muon"))
    lorapro.save_portable(model, tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(small), tmp_path)
    with torch.no_grad():
        have, want = (m.eval()(input_ids=ids).logits for m in (loaded, model))
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
