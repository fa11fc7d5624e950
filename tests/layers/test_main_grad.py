"""Weight gradients in the sum over micro-batches: added once, and only where a parameter has one."""

import torch

from bitmoe.layers.main_grad import into_main_grad


def test_without_a_sum_the_gradient_is_returned():
    weight, grad = torch.nn.Parameter(torch.ones(2, 3, 4)), torch.randn(6, 4)
    assert torch.equal(into_main_grad(weight, grad), grad.view(2, 3, 4))
    assert not hasattr(weight, "grad_added_to_main_grad")


def test_it_joins_the_sum_and_says_so():
    weight = torch.nn.Parameter(torch.ones(6, 4, dtype=torch.bfloat16))
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(6, 4), False
    grads = torch.randn(2, 6, 4).bfloat16()
    for grad in grads:
        assert into_main_grad(weight, grad).dtype == torch.bfloat16
    assert torch.equal(weight.main_grad, 1 + grads[0].float() + grads[1].float())
    assert weight.grad_added_to_main_grad
