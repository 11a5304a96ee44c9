"""Fine-tuning with low-rank adapters that follows full fine-tuning: LoRA-Pro and LoRA-GA.

Names are loaded when they are first used, so that the command line starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorapro import checkpoints as checkpoints
    from lorapro import diagnostics as diagnostics
    from lorapro import distributed as distributed
    from lorapro import functional as functional
    from lorapro import lora_ga as lora_ga
    from lorapro.export import save_merged as save_merged
    from lorapro.export import save_portable as save_portable
    from lorapro.optim.adamw import LoraProAdamW as LoraProAdamW
    from lorapro.optim.create import create_lorapro_optimizer as create_lorapro_optimizer
    from lorapro.optim.hook import align_gradients as align_gradients
    from lorapro.optim.muon import LoraProMuon as LoraProMuon
    from lorapro.optim.sgd import LoraProSGD as LoraProSGD
    from lorapro.param_groups import lora_param_groups as lora_param_groups
    from lorapro.trainer import trainer_optimizer as trainer_optimizer
    from lorapro.trainer import use_lorapro as use_lorapro

__version__ = "0.1.0"

_PLACES = {
    "LoraProAdamW": "lorapro.optim.adamw",
    "LoraProMuon": "lorapro.optim.muon",
    "LoraProSGD": "lorapro.optim.sgd",
    "align_gradients": "lorapro.optim.hook",
    "create_lorapro_optimizer": "lorapro.optim.create",
    "lora_param_groups": "lorapro.param_groups",
    "save_merged": "lorapro.export",
    "save_portable": "lorapro.export",
    "trainer_optimizer": "lorapro.trainer",
    "use_lorapro": "lorapro.trainer",
}
_MODULES = (
    "checkpoints",
    "diagnostics",
    "distributed",
    "export",
    "factors",
    "functional",
    "lora_ga",
    "optim",
    "param_groups",
    "trainer",
)

__all__ = [*_PLACES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        value = getattr(importlib.import_module(_PLACES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"lorapro.{name}")
    else:
        raise AttributeError(f"module 'lorapro' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
