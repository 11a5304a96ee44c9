"""Every optimizer and mode on a small model, for tests of what goes wrong."""

from __future__ import annotations

import pytest

import lorapro
from helpers import loss_of, mlp, randomise_B

KINDS = {
    "efficient": {},
    "full": {"mode": "full"},
    "factored": {"mode": "factored"},
    "muon": {"optimizer": "muon"},
    "sgd": {"optimizer": "sgd", "momentum": 0.9},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def create(model, kind):
    return lorapro.create_lorapro_optimizer(model, lr=1e-2, **KINDS[kind])


def trained(seed=0):
    model = randomise_B(mlp())
    loss_of(model, seed=seed).backward()
    return model
