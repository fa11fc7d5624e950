"""Sub-norm: values, gradients, groups, and a group that lies on several ranks."""

import pytest
import torch
import torch.distributed as dist

from bitmoe.layers.norm import sub_norm

EPS = 1e-5


def plain(x_TF, gain_F, num_groups):
    """RMSNorm of each group by torch's own operations."""
    x_TGF = x_TF.unflatten(-1, (num_groups, -1))
    return (x_TGF / (x_TGF.square().mean(-1, keepdim=True) + EPS).sqrt()).flatten(-2) * gain_F


def random_case(dtype=torch.float64, shape=(5, 24)):
    generator = torch.Generator().manual_seed(0)
    x_TF, gain_F, grad_TF = (torch.randn(*s, generator=generator).to(dtype) for s in (shape, shape[1:], shape))
    return x_TF.requires_grad_(), gain_F.requires_grad_(), grad_TF


@pytest.mark.parametrize("num_groups", [1, 4])
def test_agrees_with_plain_torch(num_groups):
    x_TF, gain_F, grad_TF = random_case()
    y_TF, wanted_TF = sub_norm(x_TF, gain_F, EPS, num_groups, None), plain(x_TF, gain_F, num_groups)
    torch.testing.assert_close(y_TF, wanted_TF, rtol=1e-13, atol=1e-13)
    grads, wanted = (torch.autograd.grad(y, (x_TF, gain_F), grad_TF) for y in (y_TF, wanted_TF))
    torch.testing.assert_close(grads, wanted, rtol=1e-12, atol=1e-13)


def test_gradient_by_finite_differences():
    x_TF, gain_F, _ = random_case()
    torch.autograd.gradcheck(lambda x, gain: sub_norm(x, gain, EPS, 2, None), (x_TF, gain_F))


def test_gain_may_differ_from_row_to_row():
    x_TF, gain_F, _ = random_case()
    gain_TF = gain_F * torch.arange(1.0, 6.0)[:, None]
    torch.testing.assert_close(sub_norm(x_TF, gain_TF, EPS, 4, None), plain(x_TF, gain_TF, 4))


def test_bf16_is_computed_in_fp32():
    x_TF, gain_F, _ = random_case(torch.bfloat16)
    y_TF = sub_norm(x_TF, gain_F, EPS, 4, None)
    unit_TF = plain(x_TF.float(), torch.ones(24), 4).bfloat16()
    assert y_TF.dtype == torch.bfloat16
    assert torch.equal(y_TF, unit_TF * gain_F)


def test_zero_rows_stay_zero_with_finite_gradients():
    x_TF = torch.zeros(2, 8, requires_grad=True)
    y_TF = sub_norm(x_TF, torch.ones(8), EPS, 2, None)
    y_TF.sum().backward()
    assert torch.equal(y_TF, torch.zeros(2, 8))
    assert x_TF.grad.isfinite().all()


def split_sub_norm(shape):
    x_TF, gain_F, grad_TF = random_case(torch.float32, shape)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x, gain, grad = (t.detach().chunk(ranks, -1)[rank] for t in (x_TF, gain_F, grad_TF))
    x.requires_grad_()
    y = sub_norm(x, gain, EPS, 1, dist.group.WORLD)
    y.backward(grad)
    return y.detach(), x.grad


@pytest.mark.parametrize("shape", [(200, 24), (200, 44), (200, 46)], ids=str)
def test_group_over_two_ranks_gives_the_same_bits(ranks, shape):
    """Neighbours whose squares are added in fp32 may lie on two ranks."""
    parts = ranks(2).run(split_sub_norm, shape)
    x_TF, gain_F, grad_TF = random_case(torch.float32, shape)
    y_TF = sub_norm(x_TF, gain_F, EPS, 1, None)
    y_TF.backward(grad_TF)
    assert torch.equal(torch.cat([y for y, _ in parts], -1), y_TF)
    assert torch.equal(torch.cat([grad for _, grad in parts], -1), x_TF.grad)
