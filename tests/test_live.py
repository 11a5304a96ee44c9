"""Models and states that change between steps: followed, or refused by name; never stale."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import lorapro
from fault_cases import KINDS, create, every_kind, trained
from helpers import loss_of, mlp, optimizer_on, pairs_of, randomise_B
from lorapro.factors import LoraPair

ANEW = "is no longer what the model trains: it was made anew"


def step(model, optimizer, seed=0, dtype=torch.float64):
    optimizer.zero_grad()
    loss_of(model, seed=seed, dtype=dtype).backward()
    optimizer.step()


def hooked(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    lorapro.align_gradients(optimizer, model)
    return optimizer


BUILDERS = {**{kind: lambda m, k=kind: create(m, k) for kind in KINDS}, "hook": hooked}
every_builder = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


@every_kind
def test_a_scaling_changed_after_construction_is_followed(kind):
    ends = []
    for late in (False, True):
        model = mlp()
        layer = model.base_model.model[0]
        optimizer = create(model, kind) if late else None
        layer.set_scale("default", 3.0)
        optimizer = optimizer or create(model, kind)
        for seed in range(3):
            optimizer.zero_grad()
            loss_of(model, seed=seed).backward()
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


@every_kind
def test_an_adapter_merged_or_deleted_is_refused_by_name(kind):
    model = trained()
    optimizer = create(model, kind)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"'base_model\.model\.0': adapter 'default' is merged"):
        optimizer.step()
    model.unmerge_adapter()
    optimizer.step()
    for layer in (model.base_model.model[0], model.base_model.model[2]):
        layer.delete_adapter("default")
    with pytest.raises(ValueError, match="adapter 'default' was deleted"):
        optimizer.step()


@every_builder
def test_factors_made_anew_are_refused_by_name(build):
    model = trained()
    optimizer = build(model)
    optimizer.step()
    layer = model.base_model.model[2]
    layer.lora_A["default"] = copy.deepcopy(layer.lora_A["default"])
    with pytest.raises(ValueError, match=rf"factor A of pair 'base_model\.model\.2' {ANEW}"):
        step(model, optimizer)
    step(model, build(model))


def test_an_adapter_loaded_over_the_one_trained_is_followed_or_refused(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    optimizer = create(model, "efficient")
    step(model, optimizer)
    model.load_adapter(tmp_path, "default", is_trainable=True)  # in place
    other = trained()
    other.load_adapter(tmp_path, "default", is_trainable=True)
    step(model, optimizer)
    assert not torch.equal(pairs_of(model)[0].A, pairs_of(other)[0].A)
    model.load_adapter(tmp_path, "default", is_trainable=True, low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match=ANEW):
        step(model, optimizer)


@every_kind
def test_a_dtype_changed_after_a_step_is_refused_and_the_state_can_be_taken_on(kind):
    model = trained()
    early = create(model, kind)
    model.to(torch.float32)
    step(model, early, dtype=torch.float32)  # before the first step: followed
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"of pair .*float32 on cpu, the parameter .*bfloat16"):
        step(model, early, dtype=torch.bfloat16)
    late = create(model, kind)
    late.load_state_dict(early.state_dict())
    step(model, late, dtype=torch.bfloat16)


def test_parameters_exchanged_by_a_conversion_are_refused():
    model = trained()
    optimizer = create(model, "muon")
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(torch.float32)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    with pytest.raises(ValueError, match=ANEW):
        step(model, optimizer, dtype=torch.float32)


def test_a_head_or_a_decayed_base_made_anew_is_refused_by_name():
    model = trained()
    optimizer = create(model, "efficient")
    head = model.base_model.model[4].modules_to_save
    head["default"] = copy.deepcopy(head["default"])
    with pytest.raises(ValueError, match=rf"modules_to_save\.default\.weight' {ANEW}"):
        step(model, optimizer)

    model = trained()
    optimizer = lorapro.create_lorapro_optimizer(model, mode="full", lr=1e-2, weight_decay=0.1)
    base = model.base_model.model[0].base_layer
    base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
    with pytest.raises(ValueError, match=ANEW):
        step(model, optimizer)
    step(model, create(model, "full"))


@every_builder
def test_another_adapter_switched_to_is_refused(build):
    model = mlp()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0", "2"]))
    model.double()
    optimizer = build(model)
    step(model, optimizer)
    model.set_adapter("second")
    with pytest.raises(ValueError, match=r"none of 2 pairs has a gradient .*adapter .* active"):
        step(model, optimizer)


def test_wrappers_put_around_layers_change_nothing():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = mlp()
    optimizer = create(model, "efficient")
    layers = model.base_model.model
    layers[0] = checkpoint_wrapper(layers[0])
    step(model, optimizer)
    again = create(model, "efficient")
    layers[0] = layers[0]._checkpoint_wrapped_module
    step(model, again)


@every_builder
def test_an_adapter_that_no_optimizer_trains_is_named(build):
    model = mlp()
    optimizer = build(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"]))
    model.double()
    step(model, optimizer)  # added, and not trained: nothing has changed
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"lora_A\.second\.weight' is trained by no optimizer"):
        step(model, optimizer)
    second = create(model, "sgd")  # another optimizer of this package may have it
    for each in (optimizer, second):
        step(model, each)


def test_pairs_without_gradients_are_named_once(caplog):
    model = trained()
    first, _ = pairs_of(model)
    optimizers = create(model, "efficient"), hooked(model)
    for optimizer in optimizers:
        for _ in range(2):
            first.A.grad = first.B.grad = None
            with caplog.at_level(logging.WARNING):
                optimizer.step()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert all("1 of 2 pairs have no gradient" in s and "base_model.model.0" in s for s in said)


def pair(r, n, m=None):
    A, B = nn.Parameter(torch.ones(r, n)), nn.Parameter(torch.ones(m or n, r))
    A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
    return LoraPair("w", A, B, scaling=1.0)


def built(held, kind, **more):
    return optimizer_on([held], lr=1e-3, **{**KINDS[kind], **more})


@every_kind
def test_a_state_of_another_rank_shape_or_x_is_refused_when_it_is_loaded(kind):
    saved = built(pair(2, 8), kind)
    saved.step()
    state = saved.state_dict()
    # As many numbers; the same weight at another rank; another weight at the same rank.
    for r, n, m in ((4, 4, 4), (4, 8, 8), (2, 8, 6)):
        message = rf"pair 'w' is that of rank 2 on a weight of 8 × 8, here .* {r} on {m} × {n}"
        with pytest.raises(ValueError, match=message):
            built(pair(r, n, m), kind).load_state_dict(state)
    other = built(pair(2, 8), kind, x="zero")
    if kind in ("factored", "muon"):  # x changes nothing there
        other.load_state_dict(state)
    else:
        with pytest.raises(ValueError, match=r"x='sylvester', this optimizer has x='zero'"):
            other.load_state_dict(state)
    built(pair(2, 8), kind).load_state_dict(state)


@every_kind
def test_a_state_that_does_not_say_its_shape_is_refused_at_the_step(kind):
    saved = built(pair(2, 8), kind)
    saved.step()
    state = copy.deepcopy(saved.state_dict())
    del state["param_groups"][0]["shapes"]
    other = built(pair(4, 4), kind)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"of pair 'w' is .* expected .*another model, rank"):
        other.step()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sgd"])
def test_half_a_state_is_refused_at_the_step(kind):
    saved = built(pair(2, 8), kind)
    saved.step()
    whole = saved.state_dict()
    halves = [(1, key) for key in whole["state"][1]] + [(1, None)]
    if "momentum" in whole["state"][0]:
        halves += [(0, key) for key in whole["state"][0]]
    for entry, key in halves:
        state = copy.deepcopy(whole)
        if key is None:
            del state["state"][entry]
        else:
            del state["state"][entry][key]
        if key is None and kind not in ("factored", "muon"):
            continue  # a parameter without a state begins one
        other = built(pair(2, 8), kind)
        other.load_state_dict(state)
        with pytest.raises(ValueError, match=r"has no \w+ of factor [AB] of pair 'w'.*or a part"):
            other.step()


@every_kind
def test_torchs_get_and_set_state_dict_keep_every_state(kind):
    ends = []
    for reload in (False, True):
        model = randomise_B(mlp())
        optimizer = create(model, kind)
        step(model, optimizer)
        if reload:
            weights, state = copy.deepcopy(get_state_dict(model, optimizer))
            model = mlp(seed=4)
            optimizer = create(model, kind)
            kwargs = {"model_state_dict": weights, "optim_state_dict": state}
            set_state_dict(model, optimizer, **kwargs)
        for seed in (1, 2):
            step(model, optimizer, seed=seed)
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
