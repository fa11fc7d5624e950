"""Instructions on two bf16 numbers at once, for either of the two: denormals, -0, the largest numbers, Inf and NaN."""

# Shapes: N = numbers.

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from bitmoe_kernels.act_quant.triton_kernels import round_to
from bitmoe_kernels.act_quant.triton_pieces import larger_magnitude
from bitmoe_kernels.norm_quant.triton_kernels import times_gain
from bitmoe_kernels.relu2_glu.triton_kernels import relu_float32

# 0, the smallest and the largest denormal, the smallest normal number, 1, its neighbour, the largest number, Inf, NaN.
_BITS = [0, 0x0001, 0x007F, 0x0080, 0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0x7FC0]
BLOCK = 256


@triton.jit
def _apply_kernel(a_ptr, b_ptr, relu_ptr, larger_ptr, product_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + offs), tl.load(b_ptr + offs)
    tl.store(relu_ptr + offs, round_to(relu_float32(a), tl.bfloat16))
    tl.store(larger_ptr + offs, larger_magnitude(tl.abs(a), b))
    tl.store(product_ptr + offs, times_gain(a, b))


def special_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Every special number of either sign beside and times every other, in even and in odd places."""
    numbers = torch.tensor([*_BITS, *(bits | 0x8000 for bits in _BITS)], dtype=torch.int32).to(torch.int16)
    a_N, b_N = (x.flatten() for x in torch.meshgrid(numbers, numbers, indexing="ij"))
    return torch.cat([a_N, b_N.new_zeros(1), a_N]), torch.cat([b_N, b_N.new_zeros(1), b_N])


def random_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """All bf16 numbers, each times another one."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    return numbers, numbers[torch.randperm(2**16, generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("make_pairs", [special_pairs, random_pairs])
def test_each_number_of_a_pair_is_right(triton_device, make_pairs):
    a_N, b_N = (torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(torch.bfloat16) for x in make_pairs())
    relu_N, larger_N, product_N = (torch.full_like(a_N, 77.0, device=triton_device) for _ in range(3))
    grid = (len(a_N) // BLOCK,)
    _apply_kernel[grid](
        a_N.to(triton_device), b_N.to(triton_device), relu_N, larger_N, product_N, BLOCK=BLOCK, num_warps=2
    )
    # A zero may have either sign: it is squared.
    torch.testing.assert_close(relu_N.cpu(), a_N.relu(), rtol=0, atol=0, equal_nan=True)
    assert_same_bits(larger_N, torch.maximum(a_N.abs(), b_N.abs()))
    # Rounded once: a product has 16 bits at most, so one that fp32 cuts off below 2^-149 is far below bf16's 2^-133.
    assert_same_bits(product_N, (a_N.float() * b_N.float()).to(torch.bfloat16))


def assert_same_bits(got_N: torch.Tensor, expected_N: torch.Tensor) -> None:
    """The sign of zero, too; NaN where NaN is expected, whichever."""
    got_N, is_number = got_N.cpu(), ~expected_N.isnan()
    assert torch.equal(got_N.isnan(), ~is_number)
    assert torch.equal(got_N[is_number].view(torch.int16), expected_N[is_number].view(torch.int16))
