"""Which parameters go where: pairs, plain parameters, several adapters, pairs by hand."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig
from torch import nn

import lorapro
from lorapro.factors import LoraPair, find_pairs
from small_models import llama, lora, net, randomise

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


def plain_names(model, **options):
    groups = lorapro.lora_param_groups(model, **options)
    assert [g["role"] for g in groups[1:]] in ([], ["plain"])
    return [name.removeprefix("base_model.model.") for g in groups[1:] for name in g["names"]]


def test_every_trainable_parameter_is_in_exactly_one_group():
    model = lora(
        target_modules=["0", "2"], modules_to_save=["4"], use_dora=True, rank_pattern={"2": 3}
    )
    groups = lorapro.lora_param_groups(model, lr=0.3, weight_decay=0.1)
    held = [p for g in groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len({id(p) for p in held}) == len(held)
    assert all(g["lr"] == 0.3 and g["weight_decay"] == 0.1 for g in groups)
    pairs, plain = groups
    assert [p.name for p in pairs["pairs"]] == ["base_model.model.0", "base_model.model.2"]
    assert [tuple(p.shape) for p in pairs["params"]] == [(2, 8), (6, 2), (3, 6), (8, 3)]
    assert [p.scaling for p in pairs["pairs"]] == [8 / 2, 8 / 3]
    assert [p.base.shape for p in pairs["pairs"]] == [(6, 8), (8, 6)]
    names = [n.removeprefix("base_model.model.") for n in plain["names"]]
    assert names == [
        "0.lora_magnitude_vector.default.weight",
        "2.lora_magnitude_vector.default.weight",
        "4.modules_to_save.default.weight",
        "4.modules_to_save.default.bias",
    ]
    assert plain["unaligned"] == []


def test_learning_rates_are_left_to_the_optimizer():
    (group,) = lorapro.lora_param_groups(lora())
    assert "lr" not in group
    assert "weight_decay" not in group


def test_biases_and_tokens_are_plain():
    assert plain_names(lora(lora_bias=True)) == ["0.lora_B.default.bias"]
    assert plain_names(lora(bias="lora_only")) == ["0.base_layer.bias"]
    model = lora(llama(tie_word_embeddings=True), target_modules=["q_proj"])
    assert plain_names(model) == []
    model = lora(
        llama(tie_word_embeddings=True), target_modules=["q_proj"], trainable_token_indices=[1, 2]
    )
    assert plain_names(model) == ["model.embed_tokens.token_adapter.trainable_tokens_delta.default"]


def test_a_frozen_factor_stays_beside_its_partner():
    model = lora(init_lora_weights="mica")
    (group,) = lorapro.lora_param_groups(model)
    assert [p.requires_grad for p in group["params"]] == [True, False]


def test_a_layer_that_trains_only_its_bias_is_no_pair():
    model = lora(target_modules=["0", "2"], lora_bias=True)
    layer = model.base_model.model[0]
    layer.lora_A.requires_grad_(False)
    layer.lora_B["default"].weight.requires_grad_(False)
    assert [p.name for p in find_pairs(model).pairs] == ["base_model.model.2"]
    assert plain_names(model) == ["0.lora_B.default.bias", "2.lora_B.default.bias"]


# Several adapters


def two_adapters():
    model = lora(lora_alpha=6)
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=3, target_modules=["0", "2"]))
    return randomise(model)


def test_several_adapters_are_pairs_of_their_own():
    model = two_adapters()
    assert [p.name for p in find_pairs(model).pairs] == ["base_model.model.0"]
    model.base_model.set_adapter(["default", "second"])
    pairs = find_pairs(model).pairs
    names = ["base_model.model.0[default]", "base_model.model.0[second]", "base_model.model.2"]
    assert [p.name for p in pairs] == names
    assert [(p.rank, p.scaling) for p in pairs] == [(2, 3.0), (3, 1.0), (3, 1.0)]

    model.double()
    x = torch.randn(5, 8, dtype=torch.float64)
    model(x).square().sum().backward()
    base = net().double()  # one weight under both: they share its gradient
    with torch.no_grad():
        for i, pair in zip((0, 0, 2), pairs, strict=True):
            base[i].weight += pair.scaling * pair.B @ pair.A
    base(x).square().sum().backward()
    for pair in pairs[:2]:
        g, A, B = base[0].weight.grad, pair.A.detach(), pair.B.detach()
        torch.testing.assert_close(pair.A.grad, pair.scaling * B.T @ g)
        torch.testing.assert_close(pair.B.grad, pair.scaling * g @ A.T)


def test_one_of_several_adapters():
    model = two_adapters()
    model.base_model.set_adapter(["default", "second"])
    groups = lorapro.lora_param_groups(model, adapter="second")
    assert [[p.name for p in g["pairs"]] for g in groups] == [
        ["base_model.model.0", "base_model.model.2"]
    ]
    assert [p.scaling for p in groups[0]["pairs"]] == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"no adapter 'secnd'; found \['default', 'second'\]"):
        lorapro.lora_param_groups(model, adapter="secnd")
    model.set_adapter("default")  # freezes the other one
    with pytest.raises(ValueError, match=r"not trained.*model\.set_adapter\('second'\)"):
        lorapro.lora_param_groups(model, adapter="second")


# Pairs by hand


def matrices():
    return nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(3, 2))


def test_pairs_by_hand_stand_beside_those_of_the_model():
    A, B = matrices()
    groups = lorapro.lora_param_groups(lora(), pairs=iter([LoraPair("w", A, B, 2.0)]))
    assert [[p.name for p in g["pairs"]] for g in groups] == [["w", "base_model.model.0"]]
    assert [p.scaling for p in groups[0]["pairs"]] == [2.0, 4.0]
    assert groups[0]["params"][0] is A
    (group,) = lorapro.lora_param_groups(None, pairs=[LoraPair("w", A, B, 2.0)])
    assert [p.base for p in group["pairs"]] == [None]
    module = nn.ParameterDict({"A": A, "B": B, "bias": nn.Parameter(torch.zeros(3))})
    pairs, plain = lorapro.lora_param_groups(module, pairs=[LoraPair("w", A, B, 2.0)])
    assert ([p.name for p in pairs["pairs"]], plain["names"]) == (["w"], ["bias"])


def test_a_parameter_in_two_pairs_by_hand_is_refused():
    A, B = matrices()
    other = nn.Parameter(torch.randn(3, 2))
    with pytest.raises(ValueError, match="'v' shares a parameter with pair 'w'"):
        lorapro.lora_param_groups(
            None, pairs=[LoraPair("w", A, B, 1.0), LoraPair("v", A, other, 1.0)]
        )
    turned = LoraPair("v", nn.Parameter(B.T), nn.Parameter(A.T), 1.0)  # views of the same memory
    with pytest.raises(ValueError, match="'v' shares a parameter with pair 'w'"):
        lorapro.lora_param_groups(None, pairs=[LoraPair("w", A, B, 1.0), turned])
    model = lora()
    (found,) = find_pairs(model).pairs
    with pytest.raises(ValueError, match=r"model\.0' shares a parameter with pair 'w'"):
        lorapro.lora_param_groups(model, pairs=[LoraPair("w", found.A, found.B, 1.0)])


# Where the parameters live


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantized_base_is_no_base(dtype):
    model = lora(target_modules=["0", "2"])
    base = model.base_model.model[0].base_layer
    base.weight = nn.Parameter(base.weight.detach().to(dtype), requires_grad=False)
    first, second = find_pairs(model).pairs
    assert first.base is None
    assert second.base is model.base_model.model[2].base_layer.weight
    with pytest.raises(ValueError, match=r"'base_model\.model\.0' cannot be scaled"):
        lorapro.create_lorapro_optimizer(model, mode="full", weight_decay=0.1)


def test_pairs_on_the_meta_device_are_told_apart():
    with torch.device("meta"):
        model = lora(target_modules=["0", "2"])
    pairing = find_pairs(model)
    assert [p.name for p in pairing.pairs] == ["base_model.model.0", "base_model.model.2"]
    assert not pairing.unaligned
    assert {p.A.device.type for p in pairing.pairs} == {"meta"}


def test_sharded_pairs_are_told_apart_and_keep_their_shape():
    """FSDP2's DTensors have no address of their own; shapes are those of the whole."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = lora(target_modules=["0", "2"])
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        pairing = find_pairs(model)
        assert not pairing.unaligned
        assert [(p.shape, p.rank) for p in pairing.pairs] == [((6, 8), 2), ((8, 6), 2)]
        assert all(isinstance(t, DTensor) for p in pairing.pairs for t in (p.A, p.B, p.base))
    finally:
        dist.destroy_process_group()


def test_decay_of_the_base_is_warned_of_once(caplog):
    with caplog.at_level(logging.WARNING):
        lorapro.create_lorapro_optimizer(
            lora(target_modules=["0"]), mode="full", lr=1e-3, weight_decay=0.1
        )
    assert sum("changes the base weights" in record.message for record in caplog.records) == 1
