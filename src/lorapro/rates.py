"""Where each optimizer begins if nothing is said: one table, read by code and docs.

``"lora-pro"`` is the same everywhere, in the library, under ``Trainer`` and on the command line:
the paper's Algorithm 2, undamped. Damping (in steps) is ours: the default of the rules on the
tangent space, which need it (how much: docs/decisions.md), and an option of the others.

Each learning rate is the middle, on a logarithmic scale, of those that were best on validation data
in the committed comparisons (``results/``: tweets, BBC news, Fashion-MNIST, GSM8K; rank 8 to 64,
adapters scaled by α/√r). The best rate of one task is up to four times away, and ``lorapro
lr-find`` looks for it.
"""

from __future__ import annotations

import logging

from lorapro.choices import check_choice

__all__ = ["DAMPING", "RATES", "chosen_rate", "default_rate"]

logger = logging.getLogger(__name__)


RATES: dict[str, float] = {
    "efficient": 1e-3,
    "full": 3e-4,
    "factored": 3e-4,
    "muon": 1e-3,
    "sgd": 1e-1,  # not measured
}
DAMPING: dict[str, float] = {
    "efficient": 0.0,
    "full": 0.0,
    "factored": 3.0,
    "muon": 3.0,
    "sgd": 0.0,
}


def default_rate(optimizer: str = "adamw", mode: str = "efficient") -> float:
    """The learning rate to begin with.

    Args:
        optimizer: ``"adamw"``, ``"sgd"`` or ``"muon"``.
        mode: AdamW's mode.

    Raises:
        ValueError: there is no such optimizer or mode.

    >>> default_rate("muon"), default_rate("adamw", "full")
    (0.001, 0.0003)
    """
    check_choice("optimizer", optimizer, ("adamw", "sgd", "muon"))
    modes = ("efficient", "full", "factored")
    return RATES[check_choice("mode", mode, modes) if optimizer == "adamw" else optimizer]


def chosen_rate(name: str, scale: float = 1.0, instead_of: str = "lr was not given") -> float:
    """The learning rate of a row of the table, logged."""
    rate = RATES[name] * scale
    logger.warning(
        "%s: lr = %g, where %s begins (lorapro.rates); pass lr= for another", instead_of, rate, name
    )
    return rate
