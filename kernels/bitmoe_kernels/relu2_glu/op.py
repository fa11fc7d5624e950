"""Public squared-ReLU gated linear unit: check the arguments, then run the reference."""

# Shapes: T = tokens (any leading dimensions), F = features of the feed-forward.

import torch

from bitmoe_kernels.relu2_glu.reference import relu2_glu_reference
from bitmoe_kernels.validation import check_floating


def relu2_glu(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    """Return ``relu(gate)^2 * up`` (BitNet a4.8, eq. 5), differentiable in both.

    Args:
        gate_TF: gate projection [..., F].
        up_TF: up projection, same shape and dtype.

    Returns:
        [..., F] in the dtype of the inputs, computed in fp32 (fp64 for fp64) and rounded to it at the end.
        NaN and Inf pass through: the quantizer that takes the result reports them.

    Raises:
        TypeError: not floating-point tensors of one dtype.
        ValueError: shapes that differ.
    """
    check_floating(gate_TF, "gate")
    check_floating(up_TF, "up")
    if gate_TF.dtype != up_TF.dtype:
        raise TypeError(f"gate is {gate_TF.dtype} and up is {up_TF.dtype}: cast one of them")
    if gate_TF.shape != up_TF.shape:
        raise ValueError(f"gate has shape {list(gate_TF.shape)}, up {list(up_TF.shape)}: they must be equal")
    return relu2_glu_reference(gate_TF, up_TF)
