"""The optimizers are ordinary torch optimizers: resuming, copying, closures, AMP, clipping, …"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import lorapro
from helpers import (
    clone,
    feed_dense_gradient,
    loss_of,
    mlp,
    optimizer_on,
    pairs_of,
    patterned,
    randomise_B,
    through_a_file,
    trainable,
)
from lorapro.factors import LoraPair

KINDS = {
    "sgd": {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "efficient": {"mode": "efficient", "lr": 1e-2, "weight_decay": 0.01, "damping": 0.0},
    "damped": {"lr": 1e-2, "weight_decay": 0.01, "damping": 3.0},
    "full": {"mode": "full", "lr": 1e-2},
    "full+decay": {"mode": "full", "lr": 1e-2, "weight_decay": 0.1},
    "factored": {"mode": "factored", "lr": 1e-2, "weight_decay": 0.01},
    "muon": {"optimizer": "muon", "lr": 1e-2, "weight_decay": 0.01},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def create(model, kind, **options):
    return lorapro.create_lorapro_optimizer(model, **{**KINDS[kind], **options})


def train(model, optimizer, steps, first=0, dtype=torch.float32):
    for t in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, seed=t, dtype=dtype).backward()
        optimizer.step()


def same(one, other):
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_from_a_file_continues_bit_for_bit(kind, dtype):
    whole = patterned(dtype)
    halved = clone(whole)
    untouched = clone(whole)
    optimizer = create(whole, kind)
    train(whole, optimizer, 10, dtype=dtype)
    first = create(halved, kind)
    train(halved, first, 5, dtype=dtype)
    saved = through_a_file(first.state_dict())
    # a new process: the base as it was loaded, the trained parameters from their own file
    untouched.load_state_dict({n: p.detach() for n, p in trainable(halved).items()}, strict=False)
    second = create(untouched, kind)
    second.load_state_dict(saved)
    same(halved, untouched)
    train(untouched, second, 5, first=5, dtype=dtype)
    same(whole, untouched)


@every_kind
def test_copies_and_pickles_go_on_as_the_original(kind):
    model = patterned(torch.float32)
    optimizer = create(model, kind)
    train(model, optimizer, 3)
    copies = {
        "deepcopy": copy.deepcopy((model, optimizer)),
        "pickle": pickle.loads(pickle.dumps((model, optimizer))),
    }
    train(model, optimizer, 3, first=3)
    for other_model, other in copies.values():
        train(other_model, other, 3, first=3)
        same(model, other_model)


@every_kind
def test_a_closure_is_run_with_gradients_and_its_loss_returned(kind):
    model = mlp(torch.float32)
    by_hand = clone(model)
    optimizer, other = create(model, kind), create(by_hand, kind)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, dtype=torch.float32)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    other.zero_grad()
    expected = loss_of(by_hand, dtype=torch.float32)
    expected.backward()
    assert other.step() is None
    assert torch.equal(loss.detach(), expected.detach())
    same(model, by_hand)


@every_kind
def test_accumulated_and_clipped_gradients_are_those_of_the_whole_batch(kind):
    whole = randomise_B(mlp())
    parts = clone(whole)
    one, two = create(whole, kind), create(parts, kind)
    for _ in range(3):
        one.zero_grad()
        two.zero_grad()
        (loss_of(whole, seed=1) + loss_of(whole, seed=2)).backward()
        loss_of(parts, seed=1).backward()
        loss_of(parts, seed=2).backward()
        for model, optimizer in ((whole, one), (parts, two)):
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@every_kind
def test_step_leaves_gradients_alone(kind):
    model = mlp(torch.float32)
    optimizer = create(model, kind)
    loss_of(model, dtype=torch.float32).backward()
    before = {n: p.grad.clone() for n, p in trainable(model).items()}
    optimizer.step()
    for name, p in trainable(model).items():
        assert torch.equal(p.grad, before[name])


@every_kind
def test_a_grad_scaler_changes_nothing_and_skips_overflow(kind):
    model = mlp(torch.float32)
    scaled = clone(model)
    one, two = create(model, kind), create(scaled, kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    train(model, one, 3)
    for t in range(3):
        two.zero_grad()
        scaler.scale(loss_of(scaled, seed=t, dtype=torch.float32)).backward()
        scaler.unscale_(two)
        scaler.step(two)
        scaler.update()
    same(model, scaled)
    next(iter(trainable(scaled).values())).grad[0, 0] = float("inf")
    scaler.unscale_(two)
    scaler.step(two)
    scaler.update()
    same(model, scaled)


@every_kind
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_gradient_reaches_its_own_pair_only(kind, bad):
    torch.manual_seed(0)
    pairs = [
        LoraPair(
            str(i), nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(4, 2)), scaling=2.0
        )
        for i in range(3)
    ]
    optimizer = optimizer_on(pairs, **{**KINDS[kind], "weight_decay": 0.0})
    for step in range(3):
        for i, pair in enumerate(pairs):
            feed_dense_gradient(pair, torch.randn(4, 5))
            if i == 1 and step == 0:
                pair.A.grad[0, 0] = bad
        optimizer.step()
    for i in (0, 2):
        assert torch.isfinite(pairs[i].A).all()
        assert torch.isfinite(pairs[i].B).all()
    assert not torch.isfinite(pairs[1].A).all()


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_adapters_keep_their_dtype_and_learn(kind, dtype):
    model = mlp(dtype)
    optimizer = create(model, kind)
    before = float(loss_of(model, dtype=dtype).detach())
    for _ in range(30):
        optimizer.zero_grad()
        loss_of(model, dtype=dtype).backward()
        optimizer.step()
    assert all(p.dtype == dtype for p in model.parameters())
    assert float(loss_of(model, dtype=dtype).detach()) < before - 0.1


def test_efficient_state_is_that_of_loras_adamw():
    model = patterned(torch.float32)
    optimizer = create(model, "efficient")
    adamw = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
    train(model, optimizer, 1)
    adamw.step()

    def size(opt):
        return sum(t.numel() * t.element_size() for s in opt.state.values() for t in s.values())

    assert size(optimizer) == size(adamw)


def test_what_is_no_pair_gets_plain_adamw():
    model = mlp(torch.float32)
    head = [p for n, p in trainable(model).items() if "modules_to_save" in n]
    twins = [nn.Parameter(p.detach().clone()) for p in head]
    optimizer = create(model, "efficient")
    adamw = torch.optim.AdamW(twins, lr=1e-2, weight_decay=0.01)
    for t in range(5):
        optimizer.zero_grad()
        loss_of(model, seed=t, dtype=torch.float32).backward()
        for p, twin in zip(head, twins, strict=True):
            twin.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
    for p, twin in zip(head, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-7)


def test_groups_can_be_added_and_scheduled_apart():
    model = mlp(torch.float32)
    optimizer = create(model, "efficient")
    extra = nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [extra], "lr": 1.0})
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [lambda t: 1.0, lambda t: 0.0, lambda t: 0.5]
    )
    assert [g["lr"] for g in optimizer.param_groups] == [1e-2, 0.0, 0.5]
    head = {n: p.detach().clone() for n, p in trainable(model).items() if "modules_to" in n}
    extra.grad = torch.ones(3)
    loss_of(model, dtype=torch.float32).backward()
    optimizer.step()
    scheduler.step()
    torch.testing.assert_close(extra.detach(), torch.full((3,), -0.5))
    for name, before in head.items():
        assert torch.equal(trainable(model)[name], before)


def test_a_second_adapter_can_join_later():
    first, second = mlp(torch.float32), mlp(torch.float32, seed=5)
    optimizer = create(first, "full")
    for group in lorapro.lora_param_groups(second, lr=3e-3):
        optimizer.add_param_group(group)
    loss_of(second, dtype=torch.float32).backward()
    before = [p.B.detach().clone() for p in pairs_of(second)]
    optimizer.step()
    for pair, B in zip(pairs_of(second), before, strict=True):
        assert not torch.equal(pair.B, B)


@pytest.mark.parametrize("kind", ["efficient", "damped"])
def test_align_gradients_makes_adamw_the_efficient_mode(kind):
    model = patterned()
    hooked = clone(model)
    optimizer = create(model, kind, weight_decay=0.0)
    adamw = torch.optim.AdamW(trainable(hooked).values(), lr=1e-2, weight_decay=0.0)
    handle = lorapro.align_gradients(adamw, hooked, damping=3.0 * (kind == "damped"))
    train(model, optimizer, 3, dtype=torch.float64)
    train(hooked, adamw, 3, dtype=torch.float64)
    for a, b in zip(model.parameters(), hooked.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    handle.remove()
    raw = clone(hooked)
    plain = torch.optim.AdamW(trainable(raw).values(), lr=1e-2, weight_decay=0.0)
    plain.load_state_dict(copy.deepcopy(adamw.state_dict()))
    train(hooked, adamw, 1, first=9, dtype=torch.float64)
    train(raw, plain, 1, first=9, dtype=torch.float64)
    same(hooked, raw)


def test_align_gradients_works_around_a_closure():
    model = randomise_B(mlp())
    by_hand = clone(model)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    lorapro.align_gradients(optimizer, model)
    reference = lorapro.create_lorapro_optimizer(by_hand, "sgd", lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    train(by_hand, reference, 1, dtype=torch.float64)
    for a, b in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_frozen_factor_stays_and_its_partner_takes_the_whole_answer():
    torch.manual_seed(0)
    A = nn.Parameter(torch.randn(2, 5, dtype=torch.float64), requires_grad=False)
    B = nn.Parameter(torch.randn(4, 2, dtype=torch.float64))
    pair = LoraPair("w", A, B, scaling=3.0)
    optimizer = lorapro.LoraProSGD(lorapro.lora_param_groups(None, pairs=[pair]), lr=1.0)
    G = torch.randn(4, 5, dtype=torch.float64)
    B.grad = 3.0 * G @ A.T
    W, kept = (3.0 * B @ A).detach(), A.detach().clone()
    optimizer.step()
    P_A = torch.linalg.pinv(A) @ A
    torch.testing.assert_close((3.0 * B @ A).detach(), W - G @ P_A)
    assert torch.equal(A, kept)


def test_bad_arguments_are_told_at_once():
    model = mlp(torch.float32)
    groups = lorapro.lora_param_groups(model)
    for lr in (0.0, -1e-3, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="lr is"):
            lorapro.LoraProAdamW(groups, lr=lr)
    with pytest.raises(ValueError, match="'ful'.*did you mean 'full'"):
        lorapro.LoraProAdamW(groups, mode="ful")
    with pytest.raises(ValueError, match="'sylveste'.*did you mean 'sylvester'"):
        lorapro.LoraProSGD(groups, x="sylveste")
    with pytest.raises(ValueError, match="'adam'.*did you mean 'adamw'"):
        lorapro.create_lorapro_optimizer(model, "adam")
    with pytest.raises(ValueError, match="betas"):
        lorapro.LoraProAdamW(groups, betas=(1.0, 0.9))
    with pytest.raises(ValueError, match="momentum"):
        lorapro.LoraProSGD(groups, momentum=1.0)
    with pytest.raises(ValueError, match="lora_param_groups"):
        lorapro.LoraProAdamW(model.parameters())
    with pytest.raises(ValueError, match="no trainable LoRA pair"):
        lorapro.create_lorapro_optimizer(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="does not hold factor A"):
        lorapro.align_gradients(torch.optim.SGD([nn.Parameter(torch.ones(1))]), model)


def test_a_state_for_other_pairs_is_refused():
    saved = create(mlp(torch.float32), "efficient").state_dict()
    other = create(mlp(torch.float32, target_modules=["0", "2", "4"], modules_to_save=None), "sgd")
    with pytest.raises(ValueError, match="belongs to other parameters"):
        other.load_state_dict(saved)


def test_a_state_of_another_rule_is_refused_and_torchs_adamw_is_taken_on():
    model = mlp(torch.float32)
    optimizer = create(model, "efficient")
    train(model, optimizer, 1)
    for kind in ("full", "factored", "muon", "sgd"):
        with pytest.raises(ValueError, match="AdamW, mode 'efficient', this optimizer runs"):
            create(model, kind).load_state_dict(optimizer.state_dict())
    for kind in ("factored", "muon"):  # saved when its rule was another
        optimizer = create(model, kind)
        train(model, optimizer, 1)
        saved = optimizer.state_dict()
        create(model, kind).load_state_dict(saved)
        del saved["param_groups"][0]["momenta"]
        with pytest.raises(ValueError, match="of a rule that is gone"):
            create(model, kind).load_state_dict(saved)
    optimizer = create(model, "efficient")
    groups = [g["params"] for g in optimizer.param_groups]
    adamw = torch.optim.AdamW([{"params": params} for params in groups], lr=1e-3)
    train(model, adamw, 1)
    resumed = create(model, "efficient")
    resumed.load_state_dict(adamw.state_dict())
    train(model, resumed, 1)
    assert int(resumed.state[groups[0][0]]["step"]) == 2


def test_decay_of_a_base_that_cannot_be_scaled_is_refused():
    A, B = nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(4, 2))
    groups = lorapro.lora_param_groups(None, pairs=[LoraPair("w", A, B, 1.0)])
    with pytest.raises(ValueError, match=r"Eq\. 58.*'w'"):
        lorapro.LoraProAdamW(groups, mode="full", weight_decay=0.1)
