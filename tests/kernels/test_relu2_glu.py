"""Squared-ReLU GLU: hand-computed values and gradients, precision and bad input."""

# Shapes: T = tokens, F = features.

import math

import pytest
import torch

from bitmoe_kernels.relu2_glu import relu2_glu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gaussian(*shape: int, seed: int = 4) -> torch.Tensor:
    """The same standard normal tensor on every call with the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_relu2_glu_hand_values_and_gradients(dtype):
    """y = relu(g)^2 u, dg = 2 relu(g) u dy, du = relu(g)^2 dy."""
    gate = torch.tensor([[2.0, -3.0, 0.0, 0.5]], dtype=dtype, requires_grad=True)
    up = torch.tensor([[-1.5, 4.0, 5.0, 8.0]], dtype=dtype, requires_grad=True)
    y = relu2_glu(gate, up)
    assert y.dtype == dtype
    assert y.tolist() == [[-6.0, 0.0, 0.0, 2.0]]
    y.backward(torch.tensor([[1.0, 1.0, 1.0, 2.0]], dtype=dtype))
    assert gate.grad.dtype == up.grad.dtype == dtype
    assert gate.grad.tolist() == [[-6.0, 0.0, 0.0, 16.0]]
    assert up.grad.tolist() == [[4.0, 0.0, 0.0, 0.5]]


def test_relu2_glu_gradcheck():
    gate, up = (gaussian(3, 5, seed=seed).double().requires_grad_() for seed in (1, 2))
    assert torch.autograd.gradcheck(relu2_glu, (gate, up))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_relu2_glu_rounds_once(dtype):
    """The exact value (in fp64) rounded to the dtype, which stepwise rounding misses."""
    gate, up = (gaussian(64, 63, seed=seed).to(dtype) for seed in (1, 2))
    exact = gate.double().relu().square() * up.double()
    assert torch.equal(relu2_glu(gate, up), exact.to(dtype))
    assert not torch.equal(gate.relu().square() * up, exact.to(dtype))


def test_relu2_glu_fp64_is_not_narrowed():
    gate, up = (gaussian(4, 7, seed=seed).double() * (1 + 1e-12) for seed in (1, 2))
    torch.testing.assert_close(relu2_glu(gate, up), gate.clamp(min=0) ** 2 * up, rtol=1e-15, atol=0)


def test_relu2_glu_zeros_where_the_gate_is_not_positive():
    gate, up = gaussian(2, 3, 101, seed=1), gaussian(2, 3, 101, seed=2)
    assert torch.equal(relu2_glu(gate, up) == 0, gate <= 0)
    assert relu2_glu(gate[:0], up[:0]).shape == (0, 3, 101)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_relu2_glu_passes_nonfinite_values_on(bad):
    """So that the quantizer behind it reports them."""
    gate, up = torch.ones(1, 3), torch.ones(1, 3)
    gate[0, 0] = up[0, 1] = bad
    assert relu2_glu(gate, up).isfinite().tolist() == [[False, False, True]]


def test_relu2_glu_bad_input_raises():
    with pytest.raises(ValueError, match=r"\[2, 3\], up \[3\]"):
        relu2_glu(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(TypeError, match=r"gate is torch\.float32 and up is torch\.bfloat16"):
        relu2_glu(torch.ones(2), torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="gate must be"):
        relu2_glu(torch.ones(2, dtype=torch.int8), torch.ones(2))
    with pytest.raises(TypeError, match="up must be"):
        relu2_glu(torch.ones(2), [1.0, 2.0])
