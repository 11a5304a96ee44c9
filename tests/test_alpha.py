"""The rules on the tangent space have no alpha, and no rank-stabilized scaling: W alone counts."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lorapro
from lorapro.factors import find_pairs

STEPS = 12


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 14), nn.Tanh(), nn.Linear(14, 6))


def trained(
    optimizer: str, alpha: float, rslora: bool = False, dtype=torch.float32, **options
) -> list[torch.Tensor]:
    """Changes s·B·A after some steps on a regression."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 10, generator=generator).to(dtype)
    y = torch.randn(64, 6, generator=generator).to(dtype)
    config = LoraConfig(r=3, lora_alpha=alpha, use_rslora=rslora, target_modules=["0", "2"])
    torch.manual_seed(2)
    model = get_peft_model(network(), config).to(dtype)
    made = lorapro.create_lorapro_optimizer(model, optimizer, lr=0.05, **options)
    for _ in range(STEPS):
        made.zero_grad()
        (model(x) - y).square().mean().backward()
        made.step()
    return [p.scaling * (p.B @ p.A).detach() for p in find_pairs(model).pairs]


RULES = [
    ("muon", {}),
    ("muon", {"damping": 0.0}),
    ("adamw", {"mode": "factored"}),
]


@pytest.mark.parametrize(("optimizer", "options"), RULES)
def test_alpha_8_and_128_give_one_run(optimizer, options):
    small, large = (trained(optimizer, alpha, **options) for alpha in (8, 128))
    for one, two in zip(small, large, strict=True):
        assert one.norm() > 0.1
        assert (one - two).norm() < 1e-5 * one.norm()


@pytest.mark.parametrize(("optimizer", "options"), RULES)
@pytest.mark.parametrize(("alpha", "rslora"), [(100, False), (8, True)])
def test_nor_does_a_ratio_that_is_no_power_of_two_matter(optimizer, options, alpha, rslora):
    # In float64: in float32 training amplifies what rounding makes of such a ratio.
    options = {**options, "dtype": torch.float64}
    plain, stabilized = (
        trained(optimizer, 8, **options),
        trained(optimizer, alpha, rslora, **options),
    )
    for one, two in zip(plain, stabilized, strict=True):
        assert (one - two).norm() < 1e-5 * one.norm()


def test_plain_lora_does_depend_on_alpha():
    # What the tests above would not see if alpha did not reach the model.
    small, large = (trained("adamw", alpha, mode="efficient") for alpha in (8, 128))
    assert (small[0] - large[0]).norm() > 0.1 * small[0].norm()
