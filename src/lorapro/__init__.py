"""Fine-tuning with low-rank adapters that follows full fine-tuning: LoRA-Pro and LoRA-GA."""

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

__version__ = "0.1.0"
