"""Public squared-ReLU gated linear unit, alone or with sub-norm and quantizer: check the arguments and dispatch.

The unit alone is differentiable and runs the reference. The fused functions run Triton's kernels on a GPU; they know no
autograd, which belongs to the layer that multiplies the codes. On CPU, NaN or Inf raises ValueError; on other devices
such a token (or group) gets a NaN scale and codes 0.
"""

# Shapes: T = tokens (any leading dimensions), F = features of the feed-forward, G = groups of features, E = experts,
# R = tokens sorted by expert.

import torch

from bitmoe_kernels.dispatch import runs_triton_by_row
from bitmoe_kernels.grouped_ternary_gemm.backward import grouped_quantize_grad
from bitmoe_kernels.relu2_glu.reference import (
    ends_of_experts,
    relu2_glu_quantize_backward_reference,
    relu2_glu_quantize_reference,
    relu2_glu_reference,
)
from bitmoe_kernels.ternary_gemm.backward import quantize_grad
from bitmoe_kernels.validation import check_features, check_floating, check_groups, raise_on_nonfinite

_FORMATS = ("int4", "int8", "fp4")


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


@torch.no_grad()
def relu2_glu_quantize(
    gate_up_T2F: torch.Tensor,
    gain: torch.Tensor | None,
    eps: float,
    num_format: str = "int8",
    groups: int = 1,
    expert_R: torch.Tensor | None = None,
    weight_T1: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Multiply gate and up, normalize each group of features, quantize it and weigh each token (README eq. 1-6).

    Args:
        gate_up_T2F: both projections [..., 2F]: F features of gate, then F of up.
        gain: sub-norm's gain [F], or [E, F] with ``expert_R``, any floating dtype; None leaves the sub-norm out.
        eps: added to the mean square.
        num_format: int4, int8 or fp4.
        groups: number G of equal contiguous blocks of the F features.
        expert_R: int32 or int64, one entry a token, in ascending order: whose gain it takes.
        weight_T1: floating, [..., 1], what each token is multiplied by (a routing probability); 1 where not given.

    Returns:
        codes: int8 [..., F].
        scale: [..., G], fp32 (fp64 for fp64 input), the weight included.
        rstd: [..., G], likewise, for the backward; None without a gain.

    Raises:
        TypeError: tensors that are not floating point, experts that are not integers.
        ValueError: an odd number of features, ``groups`` not a divisor of F, a gain or experts that do not fit, an
            unknown format, or (on CPU) NaN or Inf.
    """
    _check(gate_up_T2F, gain, groups, expert_R, weight_T1)
    if num_format not in _FORMATS:
        raise ValueError(f"num_format={num_format!r}: use one of {', '.join(_FORMATS)}")
    if runs_triton_by_row(gate_up_T2F, 2 * groups):
        run = _triton_kernels().relu2_glu_quantize_triton
        return run(gate_up_T2F, gain, eps, num_format, groups, expert_R if gain is not None else None, weight_T1)
    result = relu2_glu_quantize_reference(gate_up_T2F, gain, eps, num_format, groups, expert_R, weight_T1)
    raise_on_nonfinite(result[1], gate_up_T2F, "gate_up")
    return result


@torch.no_grad()
def relu2_glu_quantize_backward(
    dy_TF: torch.Tensor,
    gate_up_T2F: torch.Tensor,
    gain: torch.Tensor | None,
    rstd_TG: torch.Tensor | None,
    expert_R: torch.Tensor | None = None,
    weight_T1: torch.Tensor | None = None,
    ends_E: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of :func:`relu2_glu_quantize`, whose quantizer passes them straight through (eq. 7-11).

    Args:
        dy_TF: gradient of the weighted activations [..., F].
        gate_up_T2F: as in the forward.
        gain: as in the forward.
        rstd_TG: what the forward returned.
        expert_R: as in the forward.
        weight_T1: as in the forward.
        ends_E: int32 [E], where each expert's tokens end, if the caller knows; else found in ``expert_R``.

    Returns:
        dgate_up: [..., 2F] in the dtype of gate_up.
        dgain: fp32 (fp64 for fp64 input) in the shape of the gain, the same bits in every run; zeros for an expert
            without tokens. None without a gain.
        dweight: fp32 (fp64 for fp64 input) [..., 1]; None without a weight.

    Raises:
        TypeError: as :func:`relu2_glu_quantize`.
        ValueError: shapes that do not fit.
    """
    _check_backward(dy_TF, gate_up_T2F, gain, rstd_TG, expert_R, weight_T1)
    groups = 1 if rstd_TG is None else rstd_TG.shape[-1]
    if runs_triton_by_row(gate_up_T2F, 2 * groups):
        run = _triton_backward().relu2_glu_quantize_backward_triton
        return run(dy_TF, gate_up_T2F, gain, rstd_TG, expert_R if gain is not None else None, weight_T1, ends_E)
    return relu2_glu_quantize_backward_reference(dy_TF, gate_up_T2F, gain, rstd_TG, expert_R, weight_T1)


@torch.no_grad()
def relu2_glu_quantize_backward_codes(
    dy_TF: torch.Tensor,
    gate_up_T2F: torch.Tensor,
    gain: torch.Tensor | None,
    rstd_T1: torch.Tensor | None,
    w_scale: torch.Tensor,
    x_scale_T1: torch.Tensor,
    expert_R: torch.Tensor | None = None,
    weight_T1: torch.Tensor | None = None,
    ends_E: torch.Tensor | None = None,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None, torch.Tensor | None]:
    """:func:`relu2_glu_quantize_backward` for one group, with dgate_up rounded for 8-bit products (README eq. 12).

    Args:
        dy_TF: gradient of the weighted activations [T, F].
        gate_up_T2F: [T, 2F].
        gain: as in the forward.
        rstd_T1: what the forward returned.
        w_scale: fp32, the scales of the weights of gate and of up, [2], or [E, 2] with ``expert_R``.
        x_scale_T1: fp32, the token scales of the input that those weights multiplied.
        expert_R: as in the forward.
        weight_T1: as in the forward.
        ends_E: as in :func:`relu2_glu_quantize_backward`.

    Returns:
        The fields of ``ternary_gemm.QuantizedGrad``, or of ``grouped_ternary_gemm.GroupedQuantizedGrad``; dgain and
        dweight as there.

    Raises:
        TypeError: as :func:`relu2_glu_quantize`.
        ValueError: shapes that do not fit.
    """
    _check_backward(dy_TF, gate_up_T2F, gain, rstd_T1, expert_R, weight_T1)
    num_tokens, size = dy_TF.shape
    if x_scale_T1.shape != (num_tokens, 1) or (rstd_T1 is not None and rstd_T1.shape[1] != 1):
        raise ValueError(f"x_scale of shape {list(x_scale_T1.shape)} and rstd must be [{num_tokens}, 1]: one group")
    if w_scale.shape[-1] != 2 or w_scale.dim() != (1 if expert_R is None else 2):
        raise ValueError(f"w_scale has shape {list(w_scale.shape)}: pass {'[2]' if expert_R is None else '[E, 2]'}")
    w_scale_E2 = w_scale.view(-1, 2)
    if runs_triton_by_row(gate_up_T2F, 2) and gate_up_T2F.dtype == torch.bfloat16:
        run = _triton_backward().relu2_glu_rounded_backward_triton
        return run(dy_TF, gate_up_T2F, gain, rstd_T1, expert_R, w_scale_E2, x_scale_T1, weight_T1, ends_E)
    ends_E = ends_E if expert_R is None or ends_E is not None else ends_of_experts(expert_R, len(w_scale))
    dgate_up_T2F, *others = relu2_glu_quantize_backward(dy_TF, gate_up_T2F, gain, rstd_T1, expert_R, weight_T1, ends_E)
    w_scale_EO = w_scale_E2.repeat_interleave(size, dim=1)
    if expert_R is None:
        return tuple(quantize_grad(dgate_up_T2F, w_scale_EO[0], x_scale_T1)), *others
    return tuple(grouped_quantize_grad(dgate_up_T2F, ends_E, w_scale_EO, x_scale_T1)), *others


def _check_backward(dy_TF, gate_up_T2F, gain, rstd_TG, expert_R, weight_T1) -> None:
    """Raise unless the gradient fits what the forward took and returned."""
    if (gain is None) != (rstd_TG is None):
        raise ValueError("gain and rstd come together: pass the rstd that the forward returned for this gain, or None")
    groups = 1 if rstd_TG is None else rstd_TG.shape[-1]
    _check(gate_up_T2F, gain, groups, expert_R, weight_T1)
    check_floating(dy_TF, "dy")
    lead, size = gate_up_T2F.shape[:-1], gate_up_T2F.shape[-1] // 2
    if dy_TF.shape != (*lead, size):
        raise ValueError(f"dy has shape {list(dy_TF.shape)}, gate_up {list(gate_up_T2F.shape)}: pass {[*lead, size]}")
    if rstd_TG is not None and rstd_TG.shape != (*lead, groups):
        raise ValueError(f"rstd of shape {list(rstd_TG.shape)} does not fit gate_up of {list(gate_up_T2F.shape)}")


def _check(gate_up_T2F, gain, groups: int, expert_R, weight_T1) -> None:
    """Raise unless both projections, groups, gain, experts and weights fit together."""
    check_features(gate_up_T2F, "gate_up")
    if gate_up_T2F.shape[-1] % 2:
        raise ValueError(f"gate_up has {gate_up_T2F.shape[-1]} features: half of an even number is gate, half is up")
    size = gate_up_T2F.shape[-1] // 2
    check_groups(groups, size, "features")
    if expert_R is not None:
        if expert_R.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"expert_R is {expert_R.dtype}: pass the expert's number of each token as int32")
        if expert_R.shape != (gate_up_T2F.numel() // (2 * size),):
            raise ValueError(
                f"expert_R of shape {list(expert_R.shape)} does not fit gate_up of shape {list(gate_up_T2F.shape)}: "
                "pass one expert a token"
            )
    if weight_T1 is not None:
        check_floating(weight_T1, "weight")
        if weight_T1.shape != (*gate_up_T2F.shape[:-1], 1):
            wanted = [*gate_up_T2F.shape[:-1], 1]
            raise ValueError(f"weight of shape {list(weight_T1.shape)} does not fit gate_up: pass {wanted}")
    if gain is None:
        return
    check_floating(gain, "gain")
    expected = "[F]" if expert_R is None else "[E, F] with expert_R"
    if gain.dim() != (1 if expert_R is None else 2) or gain.shape[-1] != size:
        raise ValueError(f"gain of shape {list(gain.shape)} does not fit {size} features: pass {expected}")


def _triton_kernels():
    # Imported at the first use: not every machine has Triton.
    from bitmoe_kernels.relu2_glu import triton_kernels

    return triton_kernels


def _triton_backward():
    from bitmoe_kernels.relu2_glu import triton_backward

    return triton_backward
