"""Squared-ReLU gated linear unit in plain torch: the truth for every other implementation.

Computes in fp32 (fp64 for fp64 input) and rounds to the input dtype once, at the end; torch derives the
gradient. Arguments are not validated here: op.py does that.
"""

# Shapes: T = tokens (any leading dimensions), F = features of the feed-forward.

import torch


def relu2_glu_reference(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    """``relu(gate)^2 * up`` [T, F] in the dtype of ``gate_TF``, differentiable."""
    dtype = gate_TF.dtype
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return (gate_TF.to(compute_dtype).relu().square() * up_TF.to(compute_dtype)).to(dtype)
