"""What has no pair, or none that follows its gradients, is refused by name and with its reason."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    PeftModel,
    TaskType,
    VeraConfig,
    XLoraConfig,
    get_peft_model,
)
from peft.tuners.lora import variants
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from torch import nn

import lorapro
from lorapro.factors import UnalignableLayerError, find_pairs
from small_models import llama, lora, net, randomise


def test_a_model_without_trainable_pairs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no trainable LoRA pair"):
        lorapro.lora_param_groups(net())
    with pytest.raises(ValueError, match="found no adapter at all"):
        lorapro.lora_param_groups(net(), adapter="default")
    lora().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path)
    with pytest.raises(ValueError, match="is_trainable=True"):
        lorapro.lora_param_groups(loaded)
    loaded = PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    assert len(lorapro.lora_param_groups(loaded)[0]["params"]) == 2
    loaded.base_model.disable_adapter_layers()  # freezes them
    with pytest.raises(ValueError, match="no trainable LoRA pair"):
        lorapro.lora_param_groups(loaded)
    with pytest.raises(ValueError, match="'skip', expected 'error' or 'plain'"):
        lorapro.lora_param_groups(lora(), on_unaligned="skip")


def test_adapters_that_would_get_no_gradient_are_refused():
    model = lora()
    model.merge_adapter()
    with pytest.raises(UnalignableLayerError, match=r"model\.0: it is merged .* unmerge it"):
        lorapro.lora_param_groups(model)
    model.unmerge_adapter()
    assert len(find_pairs(model).pairs) == 1
    with model.disable_adapter():
        model.base_model.model[0].lora_A.requires_grad_(True)
        with pytest.raises(UnalignableLayerError, match=r"model\.0: .* disabled .* enable them"):
            lorapro.lora_param_groups(model)


# What cannot be aligned

OTHER_METHODS = {
    "AdaLoRA": AdaLoraConfig(target_modules=["0"], total_step=10),
    "loha.Linear": LoHaConfig(target_modules=["0"], r=2),
    "lokr.Linear": LoKrConfig(target_modules=["0"], r=2),
    "ia3.Linear": IA3Config(target_modules=["0"], feedforward_modules=[]),
    "vera.Linear": VeraConfig(target_modules=["0"], r=2),
    "oft.Linear": OFTConfig(target_modules=["0"], oft_block_size=4, r=0),
}


def mixed(config):
    """Two halves of a model, LoRA in one and another method in the other."""
    return nn.Sequential(lora(), get_peft_model(nn.Sequential(nn.Linear(4, 4)), config))


@pytest.mark.parametrize("kind", OTHER_METHODS)
def test_other_methods_are_refused_by_name(kind):
    model = mixed(copy.deepcopy(OTHER_METHODS[kind]))
    with pytest.raises(
        UnalignableLayerError, match=rf"1\.base_model\.model\.0: .*{kind}.*on_unaligned='plain'"
    ):
        lorapro.lora_param_groups(model)
    with pytest.raises(UnalignableLayerError, match=kind):
        lorapro.create_lorapro_optimizer(model)


VARIANTS = {
    "VeloraLinearVariant": {"velora_config": VeloraConfig(num_groups=2)},
    "MontecloraLinearVariant": {"monteclora_config": MontecloraConfig()},
    "KasaLinearVariant": {"kasa_config": KasaConfig()},
    "BdLoraLinearVariant": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["0"], nblocks=2)},
}


@pytest.mark.parametrize("name", [*VARIANTS, "QALoraLinearVariant", "ArrowLinearVariant"])
def test_variants_with_another_forward_pass_are_refused_by_name(name):
    model = lora(**VARIANTS.get(name, {}))
    layer = model.base_model.model[0]
    if name not in VARIANTS:  # QALoRA wants a GPTQ base, Arrow a library of adapters
        layer.lora_variant["default"] = getattr(variants, name)()
    with pytest.raises(UnalignableLayerError, match=rf"model\.0: .*{name} does not train W = W0"):
        lorapro.lora_param_groups(model)


@pytest.mark.filterwarnings("ignore:.*`use_cache`:UserWarning")
def test_xlora_is_refused(tmp_path):
    lora(llama(), target_modules=["q_proj"], task_type=TaskType.CAUSAL_LM).save_pretrained(tmp_path)
    config = XLoraConfig(
        task_type=TaskType.CAUSAL_LM,
        hidden_size=8,
        xlora_depth=1,
        adapters={"0": str(tmp_path)},
        use_trainable_adapters=True,
    )
    base = llama()
    base.config.use_cache = False
    model = get_peft_model(base, config)
    with pytest.raises(UnalignableLayerError, match=r"q_proj: XLora.*for every token"):
        lorapro.lora_param_groups(model)


def test_a_parametrized_factor_is_refused():
    model = lora()
    nn.utils.parametrizations.weight_norm(model.base_model.model[0].lora_A["default"])
    with pytest.raises(
        UnalignableLayerError, match=r"model\.0: one of its factors is a ParametrizedLinear"
    ):
        lorapro.lora_param_groups(model)


def test_unaligned_layers_can_be_trained_plainly(caplog):
    model = mixed(LoHaConfig(target_modules=["0"], r=2, init_weights=False))
    with caplog.at_level(logging.WARNING):
        optimizer = lorapro.create_lorapro_optimizer(
            model, optimizer="sgd", lr=0.1, on_unaligned="plain"
        )
    assert "1.base_model.model.0: loha.Linear is not a LoRA layer" in caplog.text
    pairs, plain = optimizer.param_groups
    assert [p.name for p in pairs["pairs"]] == ["0.base_model.model.0"]
    assert plain["unaligned"] == ["1.base_model.model.0"]
    assert len(plain["params"]) == 4
    model(torch.randn(5, 8)).square().sum().backward()
    want = [(p - 0.1 * p.grad).detach() for p in plain["params"]]
    optimizer.step()
    torch.testing.assert_close(plain["params"], want)


# Shared factors


def shared(scale=1.0, both=True):
    """Two layers of one shape, the second with the factors of the first."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model = randomise(lora(model, target_modules=["0", "2"])).double()
    first, second = model.base_model.model[0], model.base_model.model[2]
    second.lora_A = first.lora_A
    if both:
        second.lora_B = first.lora_B
    second.scaling["default"] *= scale
    return model


def test_layers_that_share_both_factors_are_one_pair():
    model = shared()
    ((pair,), unaligned) = find_pairs(model).pairs, find_pairs(model).unaligned
    assert not unaligned
    assert pair.base is None  # there are two
    x = torch.randn(5, 6, dtype=torch.float64)
    model(x).square().sum().backward()
    dense = copy.deepcopy(model).merge_and_unload().requires_grad_()
    dense(x).square().sum().backward()
    g = dense[0].weight.grad + dense[2].weight.grad
    torch.testing.assert_close(pair.A.grad, pair.scaling * pair.B.detach().T @ g)
    torch.testing.assert_close(pair.B.grad, pair.scaling * g @ pair.A.detach().T)


@pytest.mark.parametrize("options", [{"both": False}, {"scale": 2.0}])
def test_a_factor_of_two_pairs_is_refused(options):
    model = shared(**options)
    with pytest.raises(
        UnalignableLayerError,
        match=r"model\.0: shares a factor with base_model\.model\.2.*model\.2: shares .*model\.0",
    ):
        lorapro.lora_param_groups(model)


def tied():
    """PEFT's tied adapters: the factors of lm_head are transposed views of the embedding's."""
    modules = ["embed_tokens", "lm_head", "q_proj"]
    model = llama(tie_word_embeddings=True)
    return lora(model, target_modules=modules, ensure_weight_tying=True)


def test_tied_adapters_are_refused():
    with pytest.raises(UnalignableLayerError, match=r"embed_tokens: shares .*lm_head: shares a"):
        lorapro.lora_param_groups(tied())


def test_tied_adapters_are_trained_plainly_on_both_sides():
    """Aligning one side only would move the other side's factors as well."""
    model = tied()
    pairs, plain = lorapro.lora_param_groups(model, on_unaligned="plain")
    assert [p.name for p in pairs["pairs"]] == ["base_model.model.model.layers.0.self_attn.q_proj"]
    layers = ["base_model.model.model.embed_tokens", "base_model.model.lm_head"]
    assert plain["unaligned"] == layers
    assert len(plain["params"]) == 4
