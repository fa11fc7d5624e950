"""Inference: the model class that transformers runs over packed ternary weights.

Importing this package registers it, so that ``AutoModelForCausalLM.from_pretrained`` reads what
``bitmoe convert to=bitmoe`` writes. It needs neither megatron-core nor code from the model's folder.
"""

from bitmoe.infer.cache import LowBitCache
from bitmoe.infer.configuration import BitmoeConfig
from bitmoe.infer.modeling import BitmoeForCausalLM, BitmoeModel
from bitmoe.infer.register import register

__all__ = ["BitmoeConfig", "BitmoeForCausalLM", "BitmoeModel", "LowBitCache"]

register()
