"""Split and rotation of fused queries, keys and values in plain torch: the truth for every other implementation.

Computes in fp32 (fp64 for fp64 input) and rounds once; torch derives the gradient. Equation numbers are those of the
README. Arguments are not validated here: op.py does that.
"""

# Shapes: S = sequence, B = batch, K = key/value heads, Q = query heads per key/value head, N = K * Q, D = width of a
#         head, P = D / 2 pairs, E = K * (Q + 2) * D.

import torch


def rope_qkv_reference(
    qkv_SBE: torch.Tensor, cos_SP: torch.Tensor, sin_SP: torch.Tensor, num_kv_heads: int, queries_per_kv: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Equations 1 and 2: q [S, B, N, D], k and v [S, B, K, D], differentiable."""
    heads_SBKJD = qkv_SBE.unflatten(-1, (num_kv_heads, queries_per_kv + 2, -1))
    q_SBND = _rotate(heads_SBKJD[..., :-2, :].flatten(2, 3), cos_SP, sin_SP)
    k_SBKD = _rotate(heads_SBKJD[..., -2, :], cos_SP, sin_SP)
    return q_SBND, k_SBKD, heads_SBKJD[..., -1, :].contiguous()


def _rotate(x_SBND: torch.Tensor, cos_SP: torch.Tensor, sin_SP: torch.Tensor) -> torch.Tensor:
    """Equation 2 for every head."""
    dtype = torch.float64 if x_SBND.dtype == torch.float64 else torch.float32
    cos_S11P, sin_S11P = (table_SP.to(dtype)[:, None, None, :] for table_SP in (cos_SP, sin_SP))
    first, second = x_SBND.to(dtype).chunk(2, dim=-1)
    rotated = torch.cat((first * cos_S11P - second * sin_S11P, second * cos_S11P + first * sin_S11P), dim=-1)
    return rotated.to(x_SBND.dtype)
