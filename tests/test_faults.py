"""What goes wrong while a model trains: followed, kept to the pair it happens in, or named."""

from __future__ import annotations

import copy
import multiprocessing
import os
import sys
import threading

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

import lorapro
import lorapro.functional as F
from fault_cases import KINDS, create, every_kind, trained
from helpers import (
    clone,
    feed_dense_gradient,
    loss_of,
    mlp,
    optimizer_on,
    pairs_of,
    randomise_B,
)
from lorapro.factors import LoraPair
from small_models import llama


@every_kind
def test_a_step_without_any_gradient_names_a_pair(kind):
    model = mlp()
    with pytest.raises(ValueError, match=r"none of 2 pairs has a gradient .*base_model\.model\.0"):
        create(model, kind).step()
    for p in model.parameters():
        p.grad = None
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    lorapro.align_gradients(optimizer, model)
    with pytest.raises(ValueError, match="none of 2 pairs has a gradient"):
        optimizer.step()


@every_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_one_pair_stays_in_it(kind, value):
    model, twin = trained(), trained()
    pairs_of(model)[0].A.grad[0, 0] = value
    create(model, kind).step()
    create(twin, kind).step()
    one, other = pairs_of(model)[1], pairs_of(twin)[1]
    torch.testing.assert_close((one.A, one.B), (other.A, other.B), rtol=1e-12, atol=0)


@every_kind
def test_zero_and_missing_gradients_move_nothing(kind):
    model = trained()
    first, second = pairs_of(model)
    before = [p.detach().clone() for p in (first.A, first.B, second.A, second.B)]
    first.A.grad = first.B.grad = None
    for p in (second.A, second.B):
        p.grad.zero_()
    create(model, kind).step()
    after = [p.detach() for p in (first.A, first.B, second.A, second.B)]
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-14)


def by_hand(kind, pairs, lr=1e-2, **more):
    return optimizer_on(pairs, **{"lr": lr, **KINDS[kind], **more})


def written(A, B, dtype, name="w", scaling=2.0):
    return LoraPair(name, nn.Parameter(A.to(dtype)), nn.Parameter(B.to(dtype)), scaling)


def factors(pairs):
    return [p.detach().clone() for pair in pairs for p in (pair.A, pair.B)]


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("of_A", "of_B", "of_g"),
    [
        (1, 0, 1e-20),
        (1, 0, 1e20),
        (1, 1, 1e-20),
        (1, 1, 1e20),
        (1, 1e-20, 1),
        (1, 1e20, 1),
        (1e-20, 1, 1),
        (1e20, 1, 1),
    ],
)
def test_steps_are_finite_at_any_magnitude(kind, dtype, of_A, of_B, of_g):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    pair = written(of_A * normal(3, 8), of_B * normal(6, 3), dtype)
    lr = 1e-2 / max(1, of_g) if kind == "sgd" else 1e-2  # the others' steps know no size of g
    optimizer = by_hand(kind, [pair], lr)
    for _ in range(3):
        feed_dense_gradient(pair, (of_g * normal(6, 8)).to(dtype))
        optimizer.step()
    assert all(p.isfinite().all() for p in (pair.A, pair.B))


@every_kind
def test_what_a_step_does_is_that_of_the_product_where_rows_are_duplicated(kind):
    """A and B with each row or column twice: the product of rank 2 moves as from (A, 2B)."""
    ends = []
    for copies in (1, 2):
        generator = torch.Generator().manual_seed(0)
        A = torch.randn(2, 9, generator=generator, dtype=torch.float64)
        B = torch.randn(7, 2, generator=generator, dtype=torch.float64)
        pair = written(A.repeat(copies, 1), B.repeat(1, copies) / copies, torch.float64)
        longer = copies**0.5 if kind == "muon" else 1.0  # its step is as long at every rank
        optimizer = by_hand(kind, [pair], lr=1e-7 * longer)
        before = (pair.B @ pair.A).detach()
        G = torch.randn(7, 9, generator=generator, dtype=torch.float64)
        feed_dense_gradient(pair, G)
        if kind == "efficient":  # Adam goes by what is in each factor: its gradients are compared
            grads = F.align(pair.A, pair.B, pair.A.grad, pair.B.grad, 2.0)
            ends.append(F.equivalent_gradient(pair.A, pair.B, *grads, 2.0).detach())
            optimizer.step()
            assert all(p.isfinite().all() for p in (pair.A, pair.B))
        else:
            optimizer.step()
            ends.append((pair.B @ pair.A).detach() - before)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-3 * float(ends[0].abs().max()))


# With the damping that the documentation gives to each; the paper's own two modes have none.
FEW_TOKENS = {
    "efficient": {"damping": 3.0},
    "full": {"damping": 3.0},
    "sgd": {"damping": 3.0, "momentum": 0.0},
    "factored": {},
    "muon": {},
}


@pytest.mark.parametrize("kind", FEW_TOKENS)
@pytest.mark.parametrize("tokens", [2, 3])
def test_a_step_from_few_tokens_is_no_longer_than_full_fine_tunings(kind, tokens):
    """At most 2.5 times γ·√(m·n), that of a step whose entries are all γ; γ·‖g‖ for SGD."""
    net = llama(hidden_size=32, intermediate_size=48, vocab_size=64)
    torch.manual_seed(0)
    model = get_peft_model(net, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    lr = 1e-3
    options = {**KINDS[kind], **FEW_TOKENS[kind]}
    optimizer = lorapro.create_lorapro_optimizer(model, lr=lr, **options)
    bases = [model.get_submodule(f"{pair.name}.base_layer").weight for pair in pairs_of(model)]
    for base in bases:
        base.requires_grad_(True)  # for its gradient alone: no optimizer holds it
    for step in range(10):
        ids = torch.randint(1, 64, (1, tokens), generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        products = [(p.scaling * p.B @ p.A).detach() for p in pairs_of(model)]
        optimizer.step()
        for pair, before, base in zip(pairs_of(model), products, bases, strict=True):
            moved = (pair.scaling * pair.B @ pair.A - before).norm()
            most = base.grad.norm() if kind == "sgd" else base.numel() ** 0.5
            assert moved <= 2.5 * lr * most, (step, pair.name)


@every_kind
def test_empty_groups_change_nothing(kind):
    model, twin = trained(), trained()
    optimizer, plain = create(model, kind), create(twin, kind)
    optimizer.add_param_group({"params": []})
    for each in (optimizer, plain):
        each.step()
    again = create(clone(model), kind)
    again.add_param_group({"params": []})
    again.load_state_dict(optimizer.state_dict())
    assert repr(again)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@every_kind
def test_two_optimizers_on_two_adapters_or_two_models_step_as_each_alone(kind):
    def two_adapters():
        model = mlp(modules_to_save=None)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["0", "4"]))
        model.double()
        model.base_model.set_adapter(["default", "second"])
        return randomise_B(model)

    both, apart = two_adapters(), [two_adapters(), two_adapters()]
    one, two = (optimizer_of(both, kind, name) for name in ("default", "second"))
    for model in (both, *apart):
        loss_of(model).backward()
    one.step()
    two.step()
    for model, name in zip(apart, ("default", "second"), strict=True):
        optimizer_of(model, kind, name).step()
        mine = {n: p for n, p in model.named_parameters() if f".{name}." in n}
        assert len(mine) == 4
        for n, p in both.named_parameters():
            assert n not in mine or torch.equal(p, mine[n])

    models, twins = [mlp(seed=s) for s in (0, 1)], [mlp(seed=s) for s in (0, 1)]
    optimizers = [create(m, kind) for m in models]
    for seed in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            one_step(model, optimizer, seed)
    for model, twin in zip(models, twins, strict=True):
        optimizer = create(twin, kind)
        for seed in range(3):
            one_step(twin, optimizer, seed)
        assert all(map(torch.equal, model.parameters(), twin.parameters()))


def optimizer_of(model, kind, name):
    return lorapro.create_lorapro_optimizer(model, lr=1e-2, adapter=name, **KINDS[kind])


def one_step(model, optimizer, seed):
    optimizer.zero_grad()
    loss_of(model, seed=seed).backward()
    optimizer.step()


@every_kind
def test_threads_with_an_optimizer_each_do_what_they_do_in_turn(kind):
    models, twins = [mlp(seed=s) for s in (0, 1)], [mlp(seed=s) for s in (0, 1)]
    meet, failed = threading.Barrier(2), []

    def run(model, wait):
        try:
            optimizer = create(model, kind)
            for seed in range(5):
                wait()
                one_step(model, optimizer, seed)
        except BaseException as error:
            failed.append(error)
            raise

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run, args=(m, meet.wait)) for m in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed
    for model, twin in zip(models, twins, strict=True):
        run(twin, lambda: None)
        assert all(map(torch.equal, model.parameters(), twin.parameters()))


@every_kind
def test_gradients_made_in_threads_step_as_those_made_in_turn(kind):
    """What data parallelism in one process does: replicas in threads, gradients on one model."""
    model, twin = mlp(), mlp()
    optimizer, other = create(model, kind), create(twin, kind)
    for _ in range(3):
        replicas = [clone(model) for _ in range(2)]
        threads = [
            threading.Thread(target=lambda r=r, s=s: loss_of(r, seed=s).backward())
            for s, r in enumerate(replicas)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for p, *parts in zip(*(m.parameters() for m in (model, *replicas)), strict=True):
            p.grad = sum(q.grad for q in parts) if p.requires_grad else None
        optimizer.step()
        other.zero_grad()
        for seed in range(2):
            loss_of(twin, seed=seed).backward()
        other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


class Stepping(torch.utils.data.Dataset):
    """Steps its own copy of the optimizer where it is read: in a worker."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer

    def __len__(self):
        return 1

    def __getitem__(self, i):
        self.optimizer.step()
        return os.getpid(), [p.detach().numpy().copy() for p in self.model.parameters()]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@every_kind
def test_a_worker_forked_after_a_step_steps_alike_and_changes_nothing_here(kind):
    model = mlp()
    optimizer = create(model, kind)
    one_step(model, optimizer, 0)
    loader = DataLoader(
        Stepping(model, optimizer),
        batch_size=None,
        num_workers=1,
        multiprocessing_context="fork",
        timeout=120,
    )
    before = copy.deepcopy([p.detach() for p in model.parameters()])
    ((worker, found),) = list(loader)
    assert worker != os.getpid()
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.step()
    for p, q in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(p.detach(), torch.as_tensor(q), rtol=1e-12, atol=1e-14)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    r=st.integers(1, 6),
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    x=st.sampled_from(F.X_CHOICES),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_alignment_descends_and_never_lengthens_g(r, m, n, x, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    A, B, g = (torch.randn(s, generator=generator).to(dtype) for s in ((r, n), (m, r), (m, n)))
    s = 2.0
    wide = (A.double(), B.double(), g.double())
    d_A, d_B = F.align(A, B, (s * B.T @ g), (s * g @ A.T), s, x=x)
    assert (d_A.dtype, d_A.shape, d_B.shape) == (dtype, A.shape, B.shape)
    if dtype != torch.float64:
        assert d_A.isfinite().all()
        assert d_B.isfinite().all()
        return
    moved = F.equivalent_gradient(A, B, d_A, d_B, s)
    assert (moved * wide[2]).sum() >= -1e-6 * wide[2].square().sum()
    assert moved.norm() <= wide[2].norm() * (1 + 1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(list(KINDS)),
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    r=st.integers(1, 6),
    x=st.sampled_from(F.X_CHOICES),
    damping=st.sampled_from([0.0, 0.3, 3.0]),
    decay=st.sampled_from([0.0, 0.1]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    start=st.sampled_from(["B=0", "B random", "rows twice"]),
    missing=st.sampled_from([None, "A", "B", "both"]),
    seed=st.integers(0, 1000),
)
def test_a_pair_steps_beside_others_as_it_does_alone(
    kind, shapes, r, x, damping, decay, dtype, start, missing, seed
):
    """Any shapes, ranks above both sides, precision and start; one pair may lack gradients."""
    assume(damping or dtype != torch.float16)  # undamped a step from B = 0 has no bound
    generator = torch.Generator().manual_seed(seed)
    # A base to decay is what full mode asks for; by hand there is none.
    options = {"x": x, "damping": damping, "weight_decay": 0.0 if kind == "full" else decay}

    def made():
        pairs = []
        for i, (m, n) in enumerate([*shapes, (5, 4)]):
            A, B = torch.randn(r, n, generator=generator), torch.randn(m, r, generator=generator)
            if start == "rows twice" and r > 1:
                A[-1], B[:, -1] = A[0], B[:, 0]
            pairs.append(written(A, 0 * B if start == "B=0" else B, dtype, name=str(i)))
        return pairs

    pairs = made()
    alone = [copy.deepcopy(pair) for pair in pairs]
    optimizers = [by_hand(kind, pairs, 1e-3, **options)]
    optimizers += [by_hand(kind, [pair], 1e-3, **options) for pair in alone]
    for _ in range(2):
        for pair, twin in zip(pairs, alone, strict=True):
            feed_dense_gradient(pair, torch.randn(pair.shape, generator=generator).to(dtype))
            for p, q in ((pair.A, twin.A), (pair.B, twin.B)):
                q.grad = p.grad.clone()
        for held in (pairs, alone):
            if missing in ("A", "both"):
                held[0].A.grad = None
            if missing in ("B", "both"):
                held[0].B.grad = None
        for i, optimizer in enumerate(optimizers):
            if not (i == 1 and missing == "both"):  # alone it would be refused
                optimizer.step()
    assert all(p.isfinite().all() and p.dtype == dtype for p in factors(pairs))
    exact = {torch.float64: 1e-6, torch.float32: 1e-3}.get(dtype, 3e-2)
    torch.testing.assert_close(factors(pairs), factors(alone), rtol=exact, atol=exact)
