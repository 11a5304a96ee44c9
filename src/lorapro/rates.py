"""The learning rate of each optimizer where none is given: one table, read by code and docs.

Each is the middle, on a logarithmic scale, of the rates that were best on validation data in the
committed comparisons (``results/``: tweets, BBC news, Fashion-MNIST, GSM8K; rank 8 to 64, adapters
scaled by α/√r). They are where to begin: the best rate of one task is up to four times away, and
``lorapro lr-find`` looks for it.
"""

from __future__ import annotations

import logging

from lorapro.choices import check_choice

__all__ = ["RATES", "default_rate"]

logger = logging.getLogger(__name__)

RATES: dict[str, float] = {
    "efficient": 1e-3,
    "full": 3e-4,
    "factored": 3e-4,
    "muon": 2e-3,
    "sgd": 1e-1,  # not measured
}


def default_rate(optimizer: str = "adamw", mode: str = "efficient") -> float:
    """The learning rate to begin with.

    Args:
        optimizer: ``"adamw"``, ``"sgd"`` or ``"muon"``.
        mode: AdamW's mode.

    Raises:
        ValueError: there is no such optimizer or mode.

    >>> default_rate("muon"), default_rate("adamw", "full")
    (0.002, 0.0003)
    """
    check_choice("optimizer", optimizer, ("adamw", "sgd", "muon"))
    return RATES[check_choice("mode", mode, RATES) if optimizer == "adamw" else optimizer]


def chosen_rate(optimizer: str, mode: str, instead_of: str = "lr was not given") -> float:
    """:func:`default_rate`, logged."""
    rate = default_rate(optimizer, mode)
    name = mode if optimizer == "adamw" else optimizer
    logger.warning("%s: lr = %g, where %s begins; see lorapro.rates", instead_of, rate, name)
    return rate
