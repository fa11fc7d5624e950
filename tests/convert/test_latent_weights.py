"""Latent weights made from codes and a scale give back both, to the last bit."""

import pytest
import torch

from bitmoe.convert.latent_weights import latent_weights
from bitmoe_kernels.weight_quant import ternarize

# Shares of zeros among the codes; a third is what trained matrices have.
ZEROS = (0.0, 0.02, 0.33, 0.9, 0.999)
SHAPES = [(1, 1), (2, 2), (3, 5), (4, 64), (33, 7), (128, 96), (300, 301)]


def draw(shape, zeros, generator):
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    codes = (signs * (torch.rand(shape, generator=generator) >= zeros)).to(torch.int8)
    scale = 10 ** (torch.rand((), generator=generator, dtype=torch.float64) * 4.9 - 4.9)
    return codes, float(scale.float())


def check(codes, scale, dtype):
    weights = latent_weights(codes, scale, dtype)
    found_codes, found_scale = ternarize(weights)
    assert weights.dtype == dtype
    assert torch.equal(found_codes, codes)
    assert float(found_scale) == (scale if codes.any() else torch.tensor(1e-5).item())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_scale_in_fp32(shape):
    generator = torch.Generator().manual_seed(sum(shape))
    for zeros in ZEROS:
        for _ in range(20):
            check(*draw(shape, zeros, generator), torch.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_scale_in_bf16_where_two_codes_are_zero(shape):
    generator = torch.Generator().manual_seed(sum(shape))
    for zeros in ZEROS:
        for _ in range(20):
            codes, scale = draw(shape, zeros, generator)
            if (codes == 0).sum() >= 2:
                check(codes, scale, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_zeros_and_a_scale_of_that_dtype(dtype):
    codes = torch.ones(8, 8, dtype=torch.int8)
    check(codes, 0.0234375, dtype)
    assert latent_weights(codes, 0.0234375, dtype).unique().tolist() == [0.0234375]


def test_magnitudes_are_neighbours():
    codes, _ = draw((64, 64), 0.33, torch.Generator().manual_seed(0))
    magnitudes = latent_weights(codes, torch.tensor(0.03).item(), torch.float32).abs()
    low, *high = magnitudes[codes != 0].unique().tolist()
    assert high in ([], [torch.tensor(low).nextafter(torch.tensor(1.0)).item()])
    assert (magnitudes[codes == 0] > 0).sum() <= 2


def test_all_zero_codes_have_zero_weights():
    assert not latent_weights(torch.zeros(4, 4, dtype=torch.int8), 0.02, torch.float32).any()


def test_scale_that_no_weights_have_is_refused():
    codes = torch.ones(4, 4, dtype=torch.int8)
    with pytest.raises(ValueError, match="bfloat16"):
        latent_weights(codes, 1 / 3, torch.bfloat16)
    with pytest.raises(ValueError, match="1e-06"):
        latent_weights(codes, 1e-6, torch.float32)
