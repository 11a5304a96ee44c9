"""How to train: adapter x start x optimizer. See :mod:`.catalogue`."""

from __future__ import annotations

from lorapro.experiments.methods.adapters import ADAPTERS
from lorapro.experiments.methods.catalogue import METHODS, Method, find_method, option_classes
from lorapro.experiments.methods.optimizers import OPTIMIZERS
from lorapro.experiments.methods.starts import STARTS

__all__ = [
    "ADAPTERS",
    "METHODS",
    "OPTIMIZERS",
    "STARTS",
    "Method",
    "find_method",
    "option_classes",
]
