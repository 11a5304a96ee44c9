"""Optimizers on low-rank pairs, one a file."""

from lorapro.optim.adamw import LoraProAdamW as LoraProAdamW
from lorapro.optim.create import create_lorapro_optimizer as create_lorapro_optimizer
from lorapro.optim.hook import align_gradients as align_gradients
from lorapro.optim.muon import LoraProMuon as LoraProMuon
from lorapro.optim.sgd import LoraProSGD as LoraProSGD
