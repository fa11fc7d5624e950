"""Routed experts in fp64, one expert after the other: what every contender is held against before it is timed.

``ternary_truth`` computes from codes: inputs and weights are those integers times their scales that the public
quantizers make, products and sums are fp64, and gradients pass quantizers straight through. The one thing it takes
over from the layer's arithmetic is where values are rounded to the layer's dtype before they are quantized.
"""

from collections.abc import Callable

import torch
from moe_inputs import Inputs
from torch.nn.functional import silu

from bench.harness import Closeness, closeness, require
from bitmoe_kernels.act_quant import quantize_int4
from bitmoe_kernels.relu2_glu import relu2_glu_quantize
from bitmoe_kernels.weight_quant import ternarize

# Shapes: T = tokens, E = experts, R = rows of one expert, H = hidden, F = inner features, O = 2F, G = groups.

MIN_COSINE = 0.999
MAX_FORWARD_ERROR = 0.01
"""Relative; rounding to bf16 in three places is a fifth of it, a wrong scale or code much more."""

Truth = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""The output [T, H] and gradients by name, fp64."""


def swiglu_truth(inputs: Inputs) -> Truth:
    """What the bf16 baselines compute; gradients of x, probs [T, E], w1 [E, 2, F, H], w2."""
    leaves = _leaves(inputs, ("x", "probs", "w1", "w2"))

    def expert(index: int, x_RH: torch.Tensor, weight_R1: torch.Tensor) -> torch.Tensor:
        gate_RF, up_RF = (x_RH @ w_FH.T for w_FH in leaves["w1"][index])
        return (silu(gate_RF) * up_RF * weight_R1) @ leaves["w2"][index].T

    return _with_gradients(inputs, leaves, leaves["x"], expert)


def ternary_truth(inputs: Inputs, num_groups: int, eps: float) -> Truth:
    """What bitmoe's experts compute; gradients of x, probs [T, E], w1 [E, 2, F, H], w2 and gain."""
    leaves = _leaves(inputs, ("x", "probs", "w1", "w2", "gain"))
    codes, scale = quantize_int4(inputs.x_TH)
    x_TH = straight_through(codes * scale.double(), leaves["x"])
    w1_dq = _blocks_scaled(*ternarize(inputs.w1_E2FH.flatten(1, 2), 2 * num_groups, dim=0), dim=1)
    w1_EOH = straight_through(w1_dq, leaves["w1"].flatten(1, 2))
    w2_dq = _blocks_scaled(*ternarize(inputs.w2_EHF, num_groups, dim=1), dim=2)
    w2_EHF = straight_through(w2_dq, leaves["w2"])

    def expert(index: int, x_RH: torch.Tensor, weight_R1: torch.Tensor) -> torch.Tensor:
        exact_RO = x_RH @ w1_EOH[index].T
        gate_up = exact_RO.detach().to(inputs.x_TH.dtype)
        codes, scale, _ = relu2_glu_quantize(gate_up, inputs.gain_EF[index], eps, "int8", num_groups)
        gate_RF, up_RF = straight_through(gate_up.double(), exact_RO).chunk(2, dim=1)
        h_RGf = (gate_RF.relu().square() * up_RF).unflatten(1, (num_groups, -1))
        unit_RGf = h_RGf * (h_RGf.square().mean(2, keepdim=True) + eps).rsqrt()
        normed_RF = unit_RGf.flatten(1) * leaves["gain"][index]
        codes_dq = _blocks_scaled(codes, scale * weight_R1.detach(), dim=1)
        return straight_through(codes_dq, normed_RF * weight_R1) @ w2_EHF[index].T

    return _with_gradients(inputs, leaves, x_TH, expert)


def straight_through(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``value``, with the gradient of ``x``."""
    return value + (x - x.detach())


def _leaves(inputs: Inputs, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    fields = {"x": "x_TH", "probs": "probs_TE", "w1": "w1_E2FH", "w2": "w2_EHF", "gain": "gain_EF"}
    return {name: getattr(inputs, fields[name]).double().requires_grad_() for name in names}


def _blocks_scaled(codes: torch.Tensor, scale: torch.Tensor, dim: int) -> torch.Tensor:
    """codes * scale in fp64; the last dimension of ``scale`` belongs to equal blocks of ``dim``."""
    blocks = codes.double().movedim(dim, -1).unflatten(-1, (scale.shape[-1], -1))
    lead = [*scale.shape[:-1], *[1] * (codes.dim() - scale.dim())]
    return (blocks * scale.double().view(*lead, scale.shape[-1], 1)).flatten(-2).movedim(-1, dim)


def _with_gradients(
    inputs: Inputs, leaves: dict[str, torch.Tensor], x_TH: torch.Tensor, expert: Callable[..., torch.Tensor]
) -> Truth:
    """Add the experts' outputs, whose second input is weighted by the probabilities, and differentiate."""
    y_TH = torch.zeros_like(x_TH)
    for index in range(inputs.layer.num_experts):
        tokens = inputs.routing_map_TE[:, index].nonzero().squeeze(1)
        weight_R1 = leaves["probs"][tokens, index, None]
        y_TH = y_TH.index_add(0, tokens, expert(index, x_TH[tokens], weight_R1))
    gradients = torch.autograd.grad(y_TH, list(leaves.values()), inputs.dy_TH.double())
    return y_TH.detach(), dict(zip(leaves, gradients, strict=True))


def compare(y_TH: torch.Tensor, gradients: dict[str, torch.Tensor], truth: Truth) -> dict[str, Closeness]:
    """Output and gradients against fp64."""
    true_y, true_gradients = truth
    pairs = {"y": (y_TH, true_y)} | {f"d{name}": (gradients[name], true_gradients[name]) for name in true_gradients}
    return {what: closeness(actual.view_as(true), true) for what, (actual, true) in pairs.items()}


def require_close(title: str, found: dict[str, Closeness]) -> None:
    """Stop without a number unless output and gradients are those of fp64."""
    error = found["y"].relative_error
    require(error < MAX_FORWARD_ERROR, f"forward of {title}: relative error {error:.4f}")
    for what, (cosine, _) in found.items():
        require(cosine > MIN_COSINE, f"{what} of {title}: cosine {cosine:.6f}")


def require_idle(title: str, gradients: dict[str, torch.Tensor], expert: int) -> None:
    """Stop unless an expert without tokens has gradients of zero."""
    for name in ("w1", "w2", "gain"):
        require(not gradients[name][expert].any(), f"d{name} of {title}: not zero for an expert without tokens")
