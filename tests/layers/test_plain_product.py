"""Unquantized products over two ranks: those of one, in values and gradients, with and without sequence parallelism."""

import pytest
import torch
import torch.distributed as dist

from bitmoe.layers.plain_product import PlainColumnProduct, PlainRowProduct

# Shapes: S = sequence, B = batch, I = inputs, O = outputs.

SEQUENCE, BATCH, INPUTS, OUTPUTS = 6, 2, 10, 8


def make_case():
    generator = torch.Generator().manual_seed(0)
    shapes = (SEQUENCE, BATCH, INPUTS), (OUTPUTS, INPUTS), (SEQUENCE, BATCH, OUTPUTS)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)


def own_part(tensor, dim):
    return tensor.chunk(dist.get_world_size(), dim)[dist.get_rank()].clone()


def backward(product, x, w, grad, *options):
    x.requires_grad_()
    w.requires_grad_()
    y = product.apply(x, w, dist.group.WORLD, *options)
    y.backward(grad)
    return y.detach(), x.grad, w.grad


def run_column(sequence_parallel):
    x_SBI, w_OI, grad_SBO = make_case()
    x_SBI = own_part(x_SBI, 0) if sequence_parallel else x_SBI
    return backward(PlainColumnProduct, x_SBI, own_part(w_OI, 0), own_part(grad_SBO, 2), sequence_parallel)


def run_row(sequence_parallel, deterministic):
    x_SBI, w_OI, grad_SBO = make_case()
    grad_SBO = own_part(grad_SBO, 0) if sequence_parallel else grad_SBO
    return backward(PlainRowProduct, own_part(x_SBI, 2), own_part(w_OI, 1), grad_SBO, sequence_parallel, deterministic)


def wanted():
    """The product and the gradients of input and weight on one rank."""
    x_SBI, w_OI, grad_SBO = make_case()
    return x_SBI @ w_OI.T, grad_SBO @ w_OI, grad_SBO.flatten(0, 1).T @ x_SBI.flatten(0, 1)


def whole(parts, dim):
    """The parts of both ranks put together, or the copy that both must have."""
    if dim is None:
        assert torch.equal(*parts)
        return parts[0]
    return torch.cat(parts, dim)


def assert_equals_one_rank(results, dims):
    got = [whole(parts, dim) for parts, dim in zip(zip(*results, strict=True), dims, strict=True)]
    torch.testing.assert_close(got, list(wanted()))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_column(sequence_parallel, ranks):
    assert_equals_one_rank(ranks(2).run(run_column, sequence_parallel), (2, 0 if sequence_parallel else None, 0))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_row(sequence_parallel, deterministic, ranks):
    results = ranks(2).run(run_row, sequence_parallel, deterministic)
    assert_equals_one_rank(results, (0 if sequence_parallel else None, 2, 1))
