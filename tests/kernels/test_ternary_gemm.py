"""Code products are exact: against 64-bit integers, at sizes and values that would show a rounded sum."""

import pytest
import torch

from bitmoe_kernels.grouped_ternary_gemm import grouped_code_matmul, grouped_matmul, grouped_outer
from bitmoe_kernels.ternary_gemm import code_matmul
from bitmoe_kernels.ternary_gemm.op import MAX_CONTRACTED
from bitmoe_kernels.ternary_gemm.reference import code_matmul_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def codes(*shape: int, low: int, high: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("tokens", "features", "outputs"), [(1, 1, 1), (0, 8, 8), (63, 100, 17), (32, 4096, 64)])
def test_code_matmul_is_exact(device, tokens, features, outputs):
    x = codes(tokens, features, low=-128, high=127, device=device)
    w = codes(outputs, features, low=-1, high=1, device=device)
    y = code_matmul(x, w)
    assert y.dtype == torch.float32
    assert torch.equal(y.cpu().long(), code_matmul_reference(x.cpu(), w.cpu()))


@pytest.mark.parametrize("device", DEVICES)
def test_code_matmul_is_exact_at_the_largest_sum(device):
    x = torch.full((2, MAX_CONTRACTED), -128, dtype=torch.int8, device=device)
    w = torch.full((3, MAX_CONTRACTED), -1, dtype=torch.int8, device=device)
    w[1, :1] = 0
    assert code_matmul(x, w).tolist() == [[2.0**24, 2.0**24 - 128, 2.0**24]] * 2


def test_code_matmul_batches():
    x, w = codes(3, 5, 7, low=-8, high=7, device="cpu"), codes(3, 4, 7, low=-1, high=1, device="cpu")
    assert torch.equal(code_matmul(x, w).long(), code_matmul_reference(x, w))


def test_code_matmul_refuses():
    w = codes(4, 8, low=-1, high=1, device="cpu")
    with pytest.raises(TypeError, match="codes must be int8, got torch.float32"):
        code_matmul(torch.ones(2, 8), w)
    with pytest.raises(ValueError, match="contracted sizes 7 and 8"):
        code_matmul(codes(2, 7, low=0, high=1, device="cpu"), w)
    with pytest.raises(ValueError, match="must agree and not exceed"):
        code_matmul(*(torch.zeros(1, MAX_CONTRACTED + 1, dtype=torch.int8) for _ in range(2)))


def ends(counts: list[int], device: str) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0, dtype=torch.int32).to(device)


COUNTS = [[3, 0, 5, 1], [0, 0, 0, 0], [0, 0, 0, 9]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_grouped_code_matmul_is_exact(device, counts):
    x = codes(sum(counts), 100, low=-128, high=127, device=device)
    w = codes(4, 17, 100, low=-1, high=1, device=device)
    y = grouped_code_matmul(x, w, ends(counts, device)).cpu().long()
    parts = zip(x.cpu().split(counts), w.cpu(), strict=True)
    assert torch.equal(y, torch.cat([code_matmul_reference(rows, expert) for rows, expert in parts]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_grouped_products_are_each_experts_own(device, dtype, counts):
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(sum(counts), width, generator=generator).to(device, dtype) for width in (16, 24))
    w = torch.randn(4, 16, 24, generator=generator).to(device, dtype)
    product, outer = grouped_matmul(x, w, ends(counts, device)), grouped_outer(x, y, ends(counts, device))
    close = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    rows = zip(x.float().split(counts), y.float().split(counts), strict=True)
    for expert, (x_e, y_e) in enumerate(rows):
        start = sum(counts[:expert])
        torch.testing.assert_close(product[start : start + counts[expert]].float(), x_e @ w[expert].float(), **close)
        torch.testing.assert_close(outer[expert].float(), x_e.T @ y_e, **close)
        if counts[expert] == 0:
            assert outer[expert].abs().max() == 0
