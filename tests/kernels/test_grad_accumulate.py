"""Gradients added to an fp32 sum: torch's bits, whatever the size."""

import pytest
import torch

from bitmoe_kernels.grad_accumulate import accumulate_grad
from bitmoe_kernels.grad_accumulate.reference import accumulate_grad_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (0, 5), (3, 7), (2, 3, 1411), (4096,), (9000,)], ids=str)
def test_kernel_has_the_references_bits(shape, dtype):
    kernels = pytest.importorskip("bitmoe_kernels.grad_accumulate.triton_kernels")
    # A sum that lies in a larger buffer, as those of DDP do: what is around it stays.
    size = torch.Size(shape).numel()
    buffer, grad = gaussian(size + 6), gaussian(*shape, seed=1).to(dtype)
    expected = buffer.clone()
    accumulate_grad_reference(expected[3 : 3 + size].view(shape), grad)
    kernels.accumulate_grad(buffer[3 : 3 + size].view(shape), grad)
    assert torch.equal(buffer, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_it_adds_in_place_from_any_layout(dtype):
    total, grad = gaussian(40, 30), gaussian(30, 40, seed=1).to(dtype).T
    expected = total + grad
    accumulate_grad(total, grad)
    assert torch.equal(total, expected)


def test_refusals():
    with pytest.raises(ValueError, match=r"grad has shape \[2\], total \[3\]"):
        accumulate_grad(gaussian(3), gaussian(2))
    with pytest.raises(TypeError, match="grad must be a floating-point tensor"):
        accumulate_grad(gaussian(3), torch.ones(3, dtype=torch.int32, device=DEVICE))
