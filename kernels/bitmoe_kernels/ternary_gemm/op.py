"""Public entry of the code product: checks its input and picks an exact way for the device.

A float32 sum of integers is exact below 2**24, so K up to 131,072 int8 codes of magnitude 127 multiply exactly in
float32 (CPU) and in bfloat16 with float32 accumulation (GPU: codes of 8 bits are bfloat16 numbers).
"""

import torch

# Shapes: B = batch (optional), T = tokens, K = contracted features, N = output features.

MAX_CONTRACTED = 2**24 // 128


def code_matmul(x_BTK: torch.Tensor, w_BNK: torch.Tensor) -> torch.Tensor:
    """Multiply activation codes with weight codes, exactly.

    Args:
        x_BTK: activation codes, int8 [T, K] or [B, T, K].
        w_BNK: weight codes in {-1, 0, 1}, int8 [N, K] or [B, N, K].

    Returns:
        The integer sums as float32, [T, N] or [B, T, N].

    Raises:
        TypeError: codes that are not int8.
        ValueError: K differs, or is too large for exact float32 sums.
    """
    if x_BTK.dtype != torch.int8 or w_BNK.dtype != torch.int8:
        raise TypeError(f"codes must be int8, got {x_BTK.dtype} and {w_BNK.dtype}")
    if x_BTK.shape[-1] != w_BNK.shape[-1] or x_BTK.shape[-1] > MAX_CONTRACTED:
        raise ValueError(
            f"contracted sizes {x_BTK.shape[-1]} and {w_BNK.shape[-1]} must agree and not exceed {MAX_CONTRACTED}"
        )
    if x_BTK.is_cuda:
        product = torch.mm if x_BTK.dim() == 2 else torch.bmm
        w_BKN = w_BNK.bfloat16().transpose(-1, -2)
        return product(x_BTK.bfloat16(), w_BKN, out_dtype=torch.float32)
    return torch.matmul(x_BTK.float(), w_BNK.float().transpose(-1, -2))
