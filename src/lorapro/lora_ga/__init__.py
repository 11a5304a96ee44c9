"""LoRA-GA: adapters that start where their first step is closest to that of full fine-tuning."""

from lorapro.lora_ga.initial import remember_initial as remember_initial
from lorapro.lora_ga.initialize import get_lora_ga_model as get_lora_ga_model
from lorapro.lora_ga.initialize import initialize as initialize
from lorapro.lora_ga.report import LayerReport as LayerReport
from lorapro.lora_ga.report import LoraGaReport as LoraGaReport
from lorapro.lora_ga.saved import load_initial as load_initial
from lorapro.lora_ga.saved import save_initial as save_initial
