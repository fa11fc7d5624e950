"""BitLinear as it is usually trained: quantize and dequantize in eager torch, then a product in bf16.

Ternary weights with one scale a matrix, made anew in every forward; inputs in the format of their role, per token;
straight-through gradients; a sub-norm (torch's own) in front of o and down. Nothing is compiled.
"""

import math

import torch
from torch.nn.functional import linear, rms_norm

from bitmoe.config.choices import ActFormat
from bitmoe.config.schema import BitStage
from bitmoe.parallel.process_groups import local_device

# Shapes: T = tokens (any leading dims), I = inputs, O = outputs.

ROLES = {"qkv": "qkv", "proj": "o", "fc1": "gate_up", "fc2": "down"}
"""Roles of linears by the name megatron-core gives them."""

MIN_SCALE = 1e-5


class FakeQuantLinear(torch.nn.Module):
    """A linear of a megatron-core layer spec, for a single rank.

    Args:
        num_inputs: I.
        num_outputs: O.
        config: megatron-core's TransformerConfig.
        init_method: initializes the weight in place.
        tp_comm_buffer_name: megatron-core's name of the linear.
        stage: formats by role.
    """

    def __init__(
        self, num_inputs: int, num_outputs: int, *, config, init_method, tp_comm_buffer_name, stage: BitStage, **unused
    ):
        super().__init__()
        role = ROLES[tp_comm_buffer_name]
        self.act_format, self.eps = getattr(stage, role), config.layernorm_epsilon
        self.keep = stage.o_keep if role == "o" else 1.0
        where = {"dtype": config.params_dtype, "device": local_device()}
        self.weight = torch.nn.Parameter(torch.empty(num_outputs, num_inputs, **where))
        init_method(self.weight)
        self.gain = torch.nn.Parameter(torch.ones(num_inputs, **where)) if role in ("o", "down") else None

    def forward(self, x_TI: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[T, I] to [T, O]; there is no bias."""
        if self.gain is not None:
            x_TI = rms_norm(x_TI, x_TI.shape[-1:], self.gain, self.eps)
        x_dq_TI = _straight_through(fake_quantize(x_TI, self.act_format, self.keep), x_TI)
        return linear(x_dq_TI, _straight_through(fake_ternarize(self.weight), self.weight)), None


def _straight_through(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The value of ``value``, the gradient of ``x``."""
    return x + (value - x).detach()


@torch.no_grad()
def fake_ternarize(w_OI: torch.Tensor) -> torch.Tensor:
    """Absmean ternary codes times their scale, in the dtype of ``w_OI``."""
    scale = w_OI.abs().mean().clamp(min=MIN_SCALE)
    return (w_OI / scale).round().clamp(-1, 1) * scale


@torch.no_grad()
def fake_quantize(x_TI: torch.Tensor, act_format: ActFormat, keep: float = 1.0) -> torch.Tensor:
    """Codes times their scale, in the dtype of ``x_TI``; of each token only the share ``keep`` of largest magnitude.

    Raises:
        ValueError: a format other than int8 and int4.
    """
    magnitude_TI = x_TI.abs()
    if act_format is ActFormat.int8:
        scale_T1, low, high = magnitude_TI.amax(-1, keepdim=True) / 127, -128, 127
    elif act_format is ActFormat.int4:
        scale_T1, low, high = magnitude_TI.mean(-1, keepdim=True) / math.sqrt(7), -8, 7
    else:
        raise ValueError(f"{act_format.value} is not fake-quantized here: use int8 or int4")
    scale_T1 = scale_T1.clamp(min=MIN_SCALE)
    x_dq_TI = (x_TI / scale_T1).round().clamp(low, high) * scale_T1
    if keep == 1:
        return x_dq_TI
    kept_TK = magnitude_TI.topk(round(keep * x_TI.shape[-1]), sorted=False).values
    return x_dq_TI * (magnitude_TI >= kept_TK.amin(-1, keepdim=True))
