"""Cross-entropy of both implementations against torch's in fp64, over slices and ranks, in place, bad input."""

# Shapes: T = tokens, V = vocabulary or a slice of it.

import math

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from bitmoe_kernels.cross_entropy import op, vocab_parallel_cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=["reference", "triton"])
def device(request, monkeypatch):
    """Where the public function runs the named implementation; Triton's on CPU means its interpreter."""
    if request.param == "reference":
        return "cpu"
    request.getfixturevalue("poison")
    monkeypatch.setattr(op, "runs_triton", lambda x: True)
    return request.getfixturevalue("triton_device")


@pytest.fixture
def kernels(triton_device, poison):
    """Triton's functions, imported when the interpreter has been chosen; new memory holds garbage."""
    from bitmoe_kernels.cross_entropy import triton_kernels

    return triton_kernels


def gaussian(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same normal tensor on every call, of the size of real logits."""
    return (4 * torch.randn(*shape, generator=torch.Generator().manual_seed(4))).to(dtype)


def labels_of(*shape: int, vocab_size: int) -> torch.Tensor:
    """The same labels on every call: the first and the last id, then random ones."""
    labels = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(5))
    labels.view(-1)[:2] = torch.tensor([0, vocab_size - 1])[: labels.numel()]
    return labels


def exact(logits_TV, labels_T, grad_loss_T):
    """torch's loss and gradient in fp64, on CPU."""
    logits_TV = logits_TV.detach().cpu().double().requires_grad_()
    loss_T = cross_entropy(logits_TV, labels_T.cpu(), reduction="none")
    return loss_T.detach(), torch.autograd.grad(loss_T, logits_TV, grad_loss_T.cpu().double())[0]


def loss_and_grad(logits_TV, labels_T, grad_loss_T, **kwargs):
    """Of the function under test. The logits are the result of another operation, as in a model."""
    leaf_TV = logits_TV.detach().clone().requires_grad_()
    loss_T = vocab_parallel_cross_entropy(leaf_TV.clone(), labels_T, **kwargs)
    return loss_T.detach(), torch.autograd.grad(loss_T, leaf_TV, grad_loss_T)[0]


def assert_close_to_exact(loss_T, grad_TV, exact_T, exact_TV, device):
    """fp32 arithmetic; the gradient is rounded to its dtype on top: half a unit in its last place."""
    torch.testing.assert_close(loss_T.cpu().double(), exact_T, rtol=5e-7, atol=2e-6, equal_nan=True)
    # Triton's interpreter cuts fp32 off to bf16 instead of rounding.
    ulps = 1.0 if device == "cpu" and grad_TV.dtype == torch.bfloat16 else 0.5
    rtol = 4e-6 + ulps * torch.finfo(grad_TV.dtype).eps
    # The smallest fp16 number is 6e-8.
    torch.testing.assert_close(grad_TV.cpu().double(), exact_TV, rtol=rtol, atol=3e-7, equal_nan=True)


@each_dtype
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (9, 1000), (3, 4096), (3, 33003)], ids=str)
def test_loss_and_gradient(device, dtype, size):
    logits, labels = gaussian(*size, dtype=dtype), labels_of(size[0], vocab_size=size[1])
    grad_loss = torch.linspace(-1, 2, size[0])
    loss, grad = loss_and_grad(logits.to(device), labels.to(device), grad_loss.to(device))
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    assert_close_to_exact(loss, grad, *exact(logits, labels, grad_loss), device)


@pytest.mark.parametrize("size", [(1, 1), (9, 1000)], ids=str)
def test_fp64_stays_fp64(size):
    logits, labels = gaussian(*size, dtype=torch.float64), labels_of(size[0], vocab_size=size[1])
    grad_loss = torch.linspace(-1, 2, size[0], dtype=torch.float64)
    result = loss_and_grad(logits, labels, grad_loss)
    for got, want in zip(result, exact(logits, labels, grad_loss), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


@each_dtype
def test_minus_infinity(device, dtype):
    """Ids that cannot be: a part of a row, whole blocks, all but the label, the label itself, everything."""
    logits, labels = gaussian(6, 9000, dtype=dtype), torch.tensor([0, 8500, 4242, 17, 5, 6])
    logits[0, 100:] = -math.inf
    logits[1, :8192] = -math.inf
    logits[2, torch.arange(9000) != 4242] = -math.inf
    logits[3, 17] = -math.inf
    logits[4] = -math.inf
    grad_loss = torch.ones(6)
    loss, grad = loss_and_grad(logits.to(device), labels.to(device), grad_loss.to(device))
    assert loss[2] == 0
    assert loss[3] == math.inf
    assert loss[4].isnan()
    assert not grad[2].any()
    assert_close_to_exact(loss, grad, *exact(logits, labels, grad_loss), device)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_logits_give_nan(device, bad):
    logits, labels = gaussian(3, 5000), torch.tensor([1, 2, 3])
    wanted, _ = exact(logits, labels, torch.ones(3))
    logits[1, 4500] = bad
    loss, grad = loss_and_grad(logits.to(device), labels.to(device), torch.ones(3, device=device))
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().any(-1).tolist() == [False, True, False]
    torch.testing.assert_close(loss[::2].cpu().double(), wanted[::2])


def test_large_logits_keep_their_differences(device):
    """At 1e4 the spacing of fp32 is 1e-3: the logarithm of the sum must not be added to the maximum."""
    logits = 1e4 + torch.arange(6.0).repeat(4, 1) / 4
    labels, grad_loss = torch.tensor([0, 1, 4, 5]), torch.ones(4)
    loss, grad = loss_and_grad(logits.to(device), labels.to(device), grad_loss.to(device))
    assert_close_to_exact(loss, grad, *exact(logits, labels, grad_loss), device)


def test_leading_dimensions_and_strides(device):
    """Labels [B, S] transposed, as a model has them; strided logits; one token; the gradient of a sum."""
    logits, labels = gaussian(5, 3, 40).to(device), labels_of(3, 5, vocab_size=40).to(device).T
    grad_loss = torch.ones(1, device=device).expand(5, 3)
    loss, grad = loss_and_grad(logits, labels, grad_loss)
    exact_T, exact_TV = exact(logits.flatten(0, 1), labels.flatten(), torch.ones(15))
    assert loss.shape == (5, 3)
    assert_close_to_exact(loss.flatten(), grad.flatten(0, 1), exact_T, exact_TV, device)
    strided = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    again = vocab_parallel_cross_entropy(strided, labels)
    assert torch.equal(again, loss)
    assert torch.equal(torch.autograd.grad(again.sum(), strided)[0], grad)
    assert torch.equal(vocab_parallel_cross_entropy(logits[1, 2], labels[1, 2]), loss[1, 2])


def test_no_tokens(device):
    logits = torch.zeros(0, 12, device=device, requires_grad=True)
    loss = vocab_parallel_cross_entropy(logits, torch.zeros(0, dtype=torch.int64, device=device))
    assert loss.shape == (0,)
    assert torch.autograd.grad(loss.sum(), logits)[0].shape == (0, 12)


@each_dtype
def test_inplace_backward_gives_the_same_gradient_in_the_memory_of_the_logits(device, dtype):
    hidden = gaussian(2, 3, 5001, dtype=dtype).to(device).requires_grad_()
    labels, grad_loss = labels_of(2, 3, vocab_size=5001).to(device), gaussian(2, 3).to(device)
    expected_loss, expected = loss_and_grad(hidden, labels, grad_loss)
    logits = hidden * 1
    loss = vocab_parallel_cross_entropy(logits, labels, inplace_backward=True)
    assert torch.equal(loss, expected_loss)
    (grad,) = torch.autograd.grad(loss, hidden, grad_loss)
    assert torch.equal(grad, expected)
    assert torch.equal(logits.detach(), expected)


def test_inplace_backward_raises_where_the_logits_are_needed_again(device):
    """By a second backward, and by another function that saved them."""
    hidden, labels = gaussian(2, 9).to(device).requires_grad_(), torch.tensor([1, 2], device=device)
    logits = hidden * 1
    square = logits.square().sum()
    loss = vocab_parallel_cross_entropy(logits, labels, inplace_backward=True).sum()
    torch.autograd.grad(loss, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, hidden)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(square, hidden)
    with pytest.raises(ValueError, match="leaf"):
        vocab_parallel_cross_entropy(hidden, labels, inplace_backward=True)


def test_backward_twice_without_inplace(device):
    hidden, labels = gaussian(2, 9).to(device).requires_grad_(), torch.tensor([1, 2], device=device)
    loss = vocab_parallel_cross_entropy(hidden, labels).sum()
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_triton_label_outside_the_vocabulary_gives_nan(kernels, triton_device):
    logits, labels = gaussian(4, 10).to(triton_device), torch.tensor([-100, 3, 25, 30], device=triton_device)
    stats = kernels.softmax_stats_triton(logits, labels, 20, 30)
    assert stats[2].isnan().tolist() == [True, False, False, True]
    assert stats[2, 1:3].tolist() == [0.0, logits[2, 5].item()]


def loss_of_slice(logits_TV, labels_T, grad_loss_T, inplace_backward):
    """This rank's slice: the loss, and the gradient of the slice."""
    logits_Tv = logits_TV.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]
    kwargs = {"group": dist.group.WORLD, "inplace_backward": inplace_backward}
    return loss_and_grad(logits_Tv, labels_T, grad_loss_T, **kwargs)


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_two_ranks_equal_one(ranks, dtype, inplace_backward):
    """Labels in either slice; rows where a slice is -inf alone; a slice 1e3 above the other."""
    logits, labels, grad_loss = gaussian(7, 50, dtype=dtype), labels_of(7, vocab_size=50), torch.linspace(-1, 2, 7)
    grad_loss = grad_loss.to(torch.float64 if dtype == torch.float64 else torch.float32)
    logits[2, :25], logits[3, 25:] = -math.inf, -math.inf
    logits[4, :25] += 1e3
    labels[2:5] = torch.tensor([40, 3, 10])
    (first_loss, first), (second_loss, second) = ranks(2).run(
        loss_of_slice, logits, labels, grad_loss, inplace_backward
    )
    assert torch.equal(first_loss, second_loss)
    loss, grad = loss_and_grad(logits, labels, grad_loss)
    torch.testing.assert_close(first_loss, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([first, second], dim=1), grad, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert_close_to_exact(first_loss, torch.cat([first, second], dim=1), *exact(logits, labels, grad_loss), "ranks")


def out_of_vocabulary():
    """The last id of the vocabulary is fine on both ranks, the next one on none."""
    logits = torch.zeros(1, 8)
    loss = vocab_parallel_cross_entropy(logits, torch.tensor([15]), dist.group.WORLD)
    with pytest.raises(ValueError, match="0 to 15"):
        vocab_parallel_cross_entropy(logits, torch.tensor([16]), dist.group.WORLD)
    return loss.item()


def test_two_ranks_know_the_whole_vocabulary(ranks):
    assert ranks(2).run(out_of_vocabulary) == pytest.approx([math.log(16)] * 2)


def test_bad_values_raise():
    with pytest.raises(ValueError, match=r"labels of shape \[3\]"):
        vocab_parallel_cross_entropy(torch.ones(2, 4), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"logits has shape \[2, 0\]"):
        vocab_parallel_cross_entropy(torch.ones(2, 0), torch.zeros(2, dtype=torch.int64))
    for label in (-1, 4):
        with pytest.raises(ValueError, match="outside the vocabulary, 0 to 3"):
            vocab_parallel_cross_entropy(torch.ones(2, 4), torch.tensor([0, label]))
    with pytest.raises(TypeError, match=r"labels must be int64, got torch\.int32"):
        vocab_parallel_cross_entropy(torch.ones(2, 4), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(TypeError, match="logits must be"):
        vocab_parallel_cross_entropy(torch.ones(2, 4).int(), torch.zeros(2, dtype=torch.int64))


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("size", [(300, 32000), (64, 50257), (16, 262144)], ids=str)
def test_public_function_on_a_gpu(dtype, size):
    """The vocabularies of real models; in place or not, and twice: the same bits."""
    logits, labels = gaussian(*size, dtype=dtype), labels_of(size[0], vocab_size=size[1])
    grad_loss = torch.linspace(-1, 2, size[0])
    arguments = [tensor.cuda() for tensor in (logits, labels, grad_loss)]
    loss, grad = loss_and_grad(*arguments)
    assert_close_to_exact(loss, grad, *exact(logits, labels, grad_loss), "cuda")
    for inplace_backward in (False, True):
        again_loss, again = loss_and_grad(*arguments, inplace_backward=inplace_backward)
        assert torch.equal(again_loss, loss)
        assert torch.equal(again, grad)
