"""Triton's top-K mask against the reference: the same mask, ties included."""

# Shapes: T = tokens, D = features.

import pytest
import torch

from bitmoe_kernels.sparsify import topk_mask
from bitmoe_kernels.sparsify.reference import topk_mask_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture
def topk_mask_triton(triton_device):
    """The function under test on tensors moved to its device; imported when the interpreter has been chosen."""
    from bitmoe_kernels.sparsify import triton_kernels

    def on_device(x_TD, keep=0.5, groups=1):
        mask_TD = triton_kernels.topk_mask_triton(x_TD.to(triton_device), keep, groups)
        assert mask_TD.dtype == torch.bool
        return mask_TD.cpu()

    return on_device


def gaussian(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same standard normal tensor on every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6)).to(dtype)


@each_dtype
@pytest.mark.parametrize("keep", [0.03, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("shape", [(2, 33), (70, 63), (2, 3, 100), (2, 1000)], ids=str)
def test_topk_mask_equals_reference(topk_mask_triton, dtype, keep, shape):
    """Odd sizes, several programs; wide rows of bf16 hold many equal magnitudes."""
    x_TD = gaussian(*shape, dtype=dtype)
    mask_TD = topk_mask_triton(x_TD, keep)
    assert (mask_TD.sum(-1) == round(keep * shape[-1])).all()
    assert torch.equal(mask_TD, topk_mask_reference(x_TD, keep))


@each_dtype
def test_topk_mask_ties_keep_the_lower_index(topk_mask_triton, dtype):
    """Rows of few distinct magnitudes, of one, of zeros of both signs; fewer values above zero than places."""
    x_TD = (gaussian(8, 90) * 1.5).round().to(dtype)
    x_TD[0] = -2.0
    x_TD[1] = 0.0
    x_TD[1, ::2] = -0.0
    x_TD[2] = 0.0
    x_TD[2, 80] = 1.0
    assert torch.equal(topk_mask_triton(x_TD), topk_mask_reference(x_TD))
    assert topk_mask_triton(x_TD)[2].nonzero().flatten().tolist() == [*range(44), 80]


@each_dtype
def test_topk_mask_extreme_values(topk_mask_triton, dtype):
    """Denormals keep their order; the largest and the smallest float of the type."""
    limits = torch.finfo(dtype)
    smallest = torch.tensor(limits.smallest_normal, dtype=dtype) / 4
    x_TD = gaussian(3, 40, dtype=dtype)
    x_TD[0] = torch.arange(40).flip(0).to(dtype) * smallest
    x_TD[1, :20] = limits.max
    x_TD[1, 30] = limits.min
    x_TD[2, ::3] *= smallest
    assert torch.equal(topk_mask_triton(x_TD), topk_mask_reference(x_TD))


@each_dtype
@pytest.mark.parametrize(("shape", "groups"), [((7, 24), 4), ((3, 2, 35), 5), ((40, 128), 4), ((20, 256), 4)], ids=str)
def test_topk_mask_groups_equal_reference(topk_mask_triton, dtype, shape, groups):
    x_TD = gaussian(*shape, dtype=dtype)
    assert torch.equal(topk_mask_triton(x_TD, 0.5, groups), topk_mask_reference(x_TD, 0.5, groups))


def test_topk_mask_strided_empty_and_one_feature(topk_mask_triton):
    x_TD = gaussian(12, 10)
    assert torch.equal(topk_mask_triton(x_TD.t().contiguous().t()), topk_mask_reference(x_TD))
    assert topk_mask_triton(torch.zeros(0, 10), 0.5, 5).shape == (0, 10)
    assert topk_mask_triton(gaussian(3, 1, dtype=torch.bfloat16), 1.0).tolist() == [[True]] * 3


@each_dtype
def test_topk_mask_with_nan_still_keeps_k(topk_mask_triton, dtype):
    """A mask of no use, but of the right size; the other rows are untouched."""
    x_TD = gaussian(3, 50, dtype=dtype)
    x_TD[1, 7] = torch.nan
    mask_TD = topk_mask_triton(x_TD)
    assert mask_TD.sum(-1).tolist() == [25] * 3
    assert torch.equal(mask_TD[::2], topk_mask_reference(x_TD[::2]))


@pytest.mark.gpu
@each_dtype
def test_public_function_on_a_gpu_equals_cpu(dtype):
    """The rows of real models, and the longest."""
    for x_TD, groups in ((gaussian(64, 4096, dtype=dtype), 8), (gaussian(64, 5460, dtype=dtype), 1)):
        assert torch.equal(topk_mask(x_TD.cuda(), groups=groups).cpu(), topk_mask(x_TD, groups=groups))
    wide_TD = gaussian(2, 28672, dtype=dtype)
    assert torch.equal(topk_mask(wide_TD.cuda()).cpu(), topk_mask(wide_TD))
