"""Make the model known to transformers' Auto classes, under ``model_type: bitmoe``."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from bitmoe.infer.configuration import BitmoeConfig
from bitmoe.infer.modeling import BitmoeForCausalLM, BitmoeModel


def register() -> None:
    """Register config and models; calling it again changes nothing."""
    AutoConfig.register(BitmoeConfig.model_type, BitmoeConfig, exist_ok=True)
    AutoModel.register(BitmoeConfig, BitmoeModel, exist_ok=True)
    AutoModelForCausalLM.register(BitmoeConfig, BitmoeForCausalLM, exist_ok=True)
