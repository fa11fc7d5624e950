"""Public rotary position embedding: check the arguments, then run Triton's kernel on a GPU, else the reference."""

# Shapes: S = sequence, B = batch, K = key/value heads, Q = query heads per key/value head, N = K * Q, D = width of a
#         head, P = D / 2 pairs, E = K * (Q + 2) * D.

import torch

from bitmoe_kernels.dispatch import runs_triton
from bitmoe_kernels.rope.reference import rope_qkv_reference
from bitmoe_kernels.validation import check_floating


@torch.no_grad()
def rope_tables(angles_S11D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of each position and pair, for :func:`rope_qkv`.

    Args:
        angles_S11D: [S, 1, 1, D] or [S, D] in radians, both halves of D the same, as megatron-core's RotaryEmbedding
            gives them (rotary_interleaved=False).

    Returns:
        cos [S, P] and sin [S, P] in the dtype of the angles.

    Raises:
        TypeError: angles that are not floating point.
        ValueError: an odd number of features, angles that differ within a position, or (on CPU) halves that differ.
    """
    check_floating(angles_S11D, "angles")
    shape = list(angles_S11D.shape)
    if len(shape) < 2 or shape[-1] % 2 or any(size != 1 for size in shape[1:-1]):
        raise ValueError(f"angles have shape {shape}: pass [S, 1, 1, D] with an even D")
    first, second = angles_S11D.reshape(shape[0], shape[-1]).chunk(2, dim=-1)
    if first.device.type == "cpu" and not torch.equal(first, second):
        raise ValueError("the two halves of the angles differ: interleaved rotation is not supported")
    return first.cos(), first.sin()


def rope_qkv(
    qkv_SBE: torch.Tensor, cos_SP: torch.Tensor, sin_SP: torch.Tensor, num_kv_heads: int, queries_per_kv: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut fused projections into heads and rotate queries and keys (README eq. 1, 2), differentiable in ``qkv_SBE``.

    Args:
        qkv_SBE: [S, B, K * (Q + 2) * D], stored per key/value head as [q ... q, k, v].
        cos_SP: from :func:`rope_tables`, [S, D / 2].
        sin_SP: likewise.
        num_kv_heads: K.
        queries_per_kv: Q.

    Returns:
        q [S, B, K * Q, D], k [S, B, K, D] and v [S, B, K, D], contiguous, in the dtype of ``qkv_SBE``. Computed in fp32
        (fp64 for fp64) and rounded once; v is a copy.

    Raises:
        TypeError: tensors that are not floating point.
        ValueError: shapes that do not fit, such as tables that cover only a part of each head.
    """
    for tensor, name in ((qkv_SBE, "qkv"), (cos_SP, "cos"), (sin_SP, "sin")):
        check_floating(tensor, name)
    _check_shapes(qkv_SBE, cos_SP, sin_SP, num_kv_heads, queries_per_kv)
    if runs_triton(qkv_SBE):
        return _RopeQkv.apply(qkv_SBE, cos_SP, sin_SP, num_kv_heads, queries_per_kv)
    return rope_qkv_reference(qkv_SBE, cos_SP, sin_SP, num_kv_heads, queries_per_kv)


def _check_shapes(qkv_SBE, cos_SP, sin_SP, num_kv_heads: int, queries_per_kv: int) -> None:
    if num_kv_heads < 1 or queries_per_kv < 1:
        raise ValueError(f"num_kv_heads={num_kv_heads}, queries_per_kv={queries_per_kv}: both must be 1 or more")
    num_heads = num_kv_heads * (queries_per_kv + 2)
    if qkv_SBE.dim() != 3 or qkv_SBE.shape[-1] == 0 or qkv_SBE.shape[-1] % (2 * num_heads):
        raise ValueError(
            f"qkv has shape {list(qkv_SBE.shape)}: {num_kv_heads} key/value heads with {queries_per_kv} queries each "
            f"need [S, B, {num_heads} * D] with an even D"
        )
    wanted = [qkv_SBE.shape[0], qkv_SBE.shape[-1] // (2 * num_heads)]
    if list(cos_SP.shape) != wanted or list(sin_SP.shape) != wanted:
        raise ValueError(
            f"cos has shape {list(cos_SP.shape)}, sin {list(sin_SP.shape)}: both must be {wanted} "
            "(rotation of a part of each head, rotary_percent < 1, is not supported)"
        )


class _RopeQkv(torch.autograd.Function):
    """Triton's kernel in both directions: the gradient is the rotation by minus the angle (README eq. 3)."""

    @staticmethod
    def forward(ctx, qkv_SBE, cos_SP, sin_SP, num_kv_heads, queries_per_kv):
        ctx.save_for_backward(cos_SP, sin_SP)
        return _triton_kernels().rope_qkv_fwd(qkv_SBE, cos_SP, sin_SP, num_kv_heads, queries_per_kv)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_q_SBND, grad_k_SBKD, grad_v_SBKD):
        grad_SBE = _triton_kernels().rope_qkv_bwd(grad_q_SBND, grad_k_SBKD, grad_v_SBKD, *ctx.saved_tensors)
        return grad_SBE, None, None, None, None


def _triton_kernels():
    # Imported at the first use: not every machine has Triton.
    from bitmoe_kernels.rope import triton_kernels

    return triton_kernels
