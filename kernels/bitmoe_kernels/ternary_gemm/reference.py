"""Exact product of integer codes: the truth other implementations are tested against.

Codes first, scales after: integer products do not depend on the order of summation, so every layout and every
kernel gives the same numbers; scales are applied by the caller.
"""

import torch

# Shapes: B = batch (any leading dims), T = tokens, K = contracted features, N = output features.


def code_matmul_reference(x_BTK: torch.Tensor, w_BNK: torch.Tensor) -> torch.Tensor:
    """Multiply in 64-bit integers.

    Args:
        x_BTK: activation codes, int8 [..., T, K].
        w_BNK: weight codes in {-1, 0, 1}, int8 [..., N, K].

    Returns:
        Integer sums, int64 [..., T, N].
    """
    return torch.matmul(x_BTK.long(), w_BNK.long().transpose(-1, -2))
