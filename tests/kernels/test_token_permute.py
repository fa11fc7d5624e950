"""Tokens to rows of experts and back: the reference by hand and against autograd, Triton against the reference."""

# Shapes: T = tokens, E = experts, K = experts of each token, R = rows, H = features.

import pytest
import torch

from bitmoe_kernels.token_permute import combine, combine_backward, permute, plan_rows, reference, sum_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SIZES = [(37, 5, 2, 20), (37, 5, 1, 20), (37, 5, 5, 33), (1, 4, 3, 8), (0, 4, 2, 8), (130, 64, 6, 1), (3, 2, 1, 2500)]
each_size = pytest.mark.parametrize(("num_tokens", "num_experts", "topk", "num_features"), SIZES, ids=str)


@pytest.fixture
def kernels(triton_device, poison):
    """The functions under test, imported when the interpreter has been chosen; new memory holds garbage."""
    from bitmoe_kernels.token_permute import triton_kernels

    return triton_kernels


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> torch.Tensor:
    """The same standard normal tensor on every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def routing_map(num_tokens: int, num_experts: int, topk: int) -> torch.Tensor:
    """Random experts of each token; the second expert gets none where the others suffice."""
    scores_TE = gaussian(num_tokens, num_experts)
    if topk < num_experts:
        scores_TE[:, 1] = -torch.inf
    return torch.zeros(num_tokens, num_experts).scatter(1, scores_TE.topk(topk).indices, 1).bool()


def case(num_tokens: int, num_experts: int, topk: int, num_features: int, dtype: torch.dtype, device: str):
    """Rows, weights and gradients on CPU, and plans on CPU and on ``device``."""
    plan = reference.plan_rows_reference(routing_map(num_tokens, num_experts, topk), topk)
    y_RH = gaussian(num_tokens * topk, num_features, dtype=dtype)
    probs_TK = gaussian(num_tokens, topk, seed=4)
    dout_TH = gaussian(num_tokens, num_features, dtype=dtype, seed=5)
    return y_RH, probs_TK, dout_TH, plan, reference.RowPlan(*(part.to(device) for part in plan))


def assert_exact(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Every bit, the sign of zero too."""
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    assert torch.equal(result.cpu().contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def test_plan_by_hand():
    """Tokens 0 and 2 go to experts 0 and 3, token 1 to experts 2 and 3."""
    plan = plan_rows(torch.tensor([[1, 0, 0, 1], [0, 0, 1, 1], [1, 0, 0, 1]]).bool(), 2)
    assert plan.source_R.tolist() == [0, 2, 1, 0, 1, 2]
    assert plan.expert_R.tolist() == [0, 0, 2, 3, 3, 3]
    assert plan.row_TK.tolist() == [[0, 3], [2, 4], [1, 5]]
    assert plan.expert_TK.tolist() == [[0, 3], [2, 3], [0, 3]]
    assert plan.ends_E.tolist() == [2, 2, 3, 6]
    x_TH = torch.tensor([[1.0], [10.0], [100.0]])
    assert permute(x_TH, plan).flatten().tolist() == [1, 100, 10, 1, 10, 100]
    y_RH = torch.arange(6.0)[:, None]
    assert sum_rows(y_RH, plan).flatten().tolist() == [3, 6, 6]
    weights_TK = torch.tensor([[1.0, 2.0], [0.5, 0.25], [0.0, -1.0]])
    assert combine(y_RH, weights_TK, plan).flatten().tolist() == [6, 2, -5]


@pytest.mark.parametrize(("num_tokens", "num_experts", "topk", "num_features"), [s for s in SIZES if s[0]], ids=str)
def test_gradients_are_those_of_autograd(num_tokens, num_experts, topk, num_features):
    """In fp64, against torch's derivative of an einsum over one-hot rows."""
    y_RH, probs_TK, dout_TH, plan, _ = case(num_tokens, num_experts, topk, num_features, torch.float64, "cpu")
    one_hot_TKR = torch.nn.functional.one_hot(plan.row_TK.long(), len(y_RH)).double()
    y_RH.requires_grad_()
    probs_TK = probs_TK.double().requires_grad_()
    wanted_TH = torch.einsum("tkr,tk,rh->th", one_hot_TKR, probs_TK, y_RH)
    wanted_TH.backward(dout_TH)
    torch.testing.assert_close(combine(y_RH, probs_TK, plan), wanted_TH)
    dy_RH, dprobs_TK = combine_backward(dout_TH, y_RH, probs_TK, plan)
    torch.testing.assert_close(dy_RH, y_RH.grad)
    torch.testing.assert_close(dprobs_TK, probs_TK.grad)
    torch.testing.assert_close(permute(dout_TH, plan), torch.einsum("tkr,th->rh", one_hot_TKR, dout_TH))
    torch.testing.assert_close(sum_rows(y_RH, plan), torch.einsum("tkr,rh->th", one_hot_TKR, y_RH))


@pytest.mark.parametrize(("y_dtype", "probs_dtype"), [(torch.bfloat16, torch.float64), (torch.float64, torch.float32)])
def test_fp64_factor_computes_in_fp64(y_dtype, probs_dtype):
    y_RH, probs_TK, dout_TH, plan, _ = case(9, 5, 3, 4, y_dtype, "cpu")
    probs_TK = probs_TK.to(probs_dtype)
    wanted_TH = (y_RH.double()[plan.row_TK.long()] * probs_TK.double()[..., None]).sum(1).to(y_dtype)
    torch.testing.assert_close(combine(y_RH, probs_TK, plan), wanted_TH, rtol=1e-14, atol=1e-15)
    dy_RH, dprobs_TK = combine_backward(dout_TH, y_RH, probs_TK, plan)
    assert dy_RH.dtype == y_dtype
    assert dprobs_TK.dtype == torch.float64


@each_size
def test_triton_plan_equals_reference(kernels, triton_device, num_tokens, num_experts, topk, num_features):
    map_TE = routing_map(num_tokens, num_experts, topk)
    plan = kernels.plan_rows_triton(map_TE.to(triton_device), topk)
    for part, wanted in zip(plan, reference.plan_rows_reference(map_TE, topk), strict=True):
        assert_exact(part, wanted)


def test_triton_plan_of_a_map_with_other_strides(kernels, triton_device):
    map_TE = routing_map(6, 10, 3)
    plan = kernels.plan_rows_triton(map_TE.T.contiguous().to(triton_device).T, 3)
    for part, wanted in zip(plan, reference.plan_rows_reference(map_TE, 3), strict=True):
        assert_exact(part, wanted)


@pytest.mark.parametrize("topk", [1, 3])
def test_triton_plan_stays_inside_with_a_wrong_map(kernels, triton_device, topk):
    """Two experts a token instead of one or three: no index leaves its tensor, those of other kernels neither."""
    plan = kernels.plan_rows_triton(routing_map(40, 5, 2).to(triton_device), topk)
    for indices, bound in ((plan.source_R, 40), (plan.row_TK, 40 * topk), (plan.expert_TK, 5), (plan.expert_R, 5)):
        assert 0 <= indices.min() <= indices.max() < bound


@each_size
@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64, torch.bool],
    ids=str,
)
def test_triton_permute_moves_bytes(kernels, triton_device, num_tokens, num_experts, topk, num_features, dtype):
    *_, plan, device_plan = case(num_tokens, num_experts, topk, 1, torch.float32, triton_device)
    generator = torch.Generator().manual_seed(1)
    # All bit patterns, NaN among them.
    size = num_features * dtype.itemsize
    x_TH = torch.randint(0, 2 if dtype == torch.bool else 256, (num_tokens, size), generator=generator)
    x_TH = x_TH.to(torch.uint8).view(dtype)
    assert_exact(kernels.permute_triton(x_TH.to(triton_device), device_plan), reference.permute_reference(x_TH, plan))


def test_triton_permute_of_slices(kernels, triton_device):
    """Rows that lie at odd bytes, and rows that are not contiguous."""
    *_, plan, device_plan = case(10, 5, 2, 1, torch.float32, triton_device)
    bytes_N = torch.arange(12 * 8, dtype=torch.int8)
    for cut in (lambda x_N: x_N[3 : 3 + 80].view(10, 8), lambda x_N: x_N.view(12, 8)[1:11, ::2]):
        result = kernels.permute_triton(cut(bytes_N.to(triton_device)), device_plan)
        assert_exact(result, reference.permute_reference(cut(bytes_N), plan))


@each_size
@each_dtype
def test_triton_sums_equal_reference(kernels, triton_device, num_tokens, num_experts, topk, num_features, dtype):
    y_RH, probs_TK, _, plan, device_plan = case(num_tokens, num_experts, topk, num_features, dtype, triton_device)
    on_device = y_RH.to(triton_device)
    assert_exact(kernels.combine_triton(on_device, None, device_plan), reference.sum_rows_reference(y_RH, plan))
    for weights_TK in (probs_TK, probs_TK.bfloat16()):
        result = kernels.combine_triton(on_device, weights_TK.to(triton_device), device_plan)
        assert_exact(result, reference.combine_reference(y_RH, weights_TK, plan))


@each_size
@each_dtype
def test_triton_backward_equals_reference(kernels, triton_device, num_tokens, num_experts, topk, num_features, dtype):
    """dy exactly; dprobs, a sum of num_features products, to the rounding of fp32 against fp64."""
    y_RH, probs_TK, dout_TH, plan, device_plan = case(num_tokens, num_experts, topk, num_features, dtype, triton_device)
    tensors = (tensor.to(triton_device) for tensor in (dout_TH, y_RH, probs_TK))
    dy_RH, dprobs_TK = kernels.combine_backward_triton(*tensors, device_plan)
    assert_exact(dy_RH, reference.combine_backward_reference(dout_TH, y_RH, probs_TK, plan)[0])
    assert dprobs_TK.dtype == torch.float32
    products_TKH = dout_TH.double()[:, None] * y_RH.double()[plan.row_TK.long()]
    error_TK = (dprobs_TK.cpu() - products_TKH.sum(-1)).abs()
    assert (error_TK <= 1e-6 * products_TKH.abs().sum(-1)).all()


def test_triton_takes_any_strides(kernels, triton_device):
    """Gradients come expanded from sums, and transposed."""
    y_RH, probs_TK, _, plan, device_plan = case(10, 5, 2, 6, torch.float32, triton_device)
    dout_TH = torch.ones(1, 1).expand(10, 6)
    strided_RH = y_RH.T.contiguous().to(triton_device).T
    strided_TK = probs_TK.T.contiguous().to(triton_device).T
    result = kernels.combine_triton(strided_RH, strided_TK, device_plan)
    assert_exact(result, reference.combine_reference(y_RH, probs_TK, plan))
    grads = kernels.combine_backward_triton(dout_TH.to(triton_device), strided_RH, strided_TK, device_plan)
    wanted = reference.combine_backward_reference(dout_TH, y_RH, probs_TK, plan)
    assert_exact(grads[0], wanted[0])
    torch.testing.assert_close(grads[1].cpu(), wanted[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda plan: plan_rows(torch.ones(3, 4).bool(), 5), r"topk=5 .* \[3, 4\]"),
        (lambda plan: plan_rows(torch.ones(3, 4).bool(), 0), "topk=0"),
        (lambda plan: plan_rows(torch.ones(4).bool(), 1), r"shape \[4\]"),
        (lambda plan: plan_rows(torch.tensor([[True, False], [True, True]]), 1), "token 1 goes to 2 experts"),
        (lambda plan: plan_rows(torch.tensor([[True, False], [True, True]]), 2), "token 0 goes to 1 experts"),
        (lambda plan: permute(torch.ones(4, 2), plan), r"x has shape \[4, 2\]: .* \[3, H\]"),
        (lambda plan: permute(torch.ones(3), plan), r"x has shape \[3\]"),
        (lambda plan: permute(torch.ones(3, 0), plan), "H >= 1"),
        (lambda plan: sum_rows(torch.ones(3, 2), plan), r"dx has shape \[3, 2\]: .* \[6, H\]"),
        (lambda plan: combine(torch.ones(6, 2), torch.ones(3, 3), plan), r"probs have shape \[3, 3\]: .* \[3, 2\]"),
        (lambda plan: combine(torch.ones(5, 2), torch.ones(3, 2), plan), r"y has shape \[5, 2\]"),
        (
            lambda plan: combine_backward(torch.ones(3, 1), torch.ones(6, 2), torch.ones(3, 2), plan),
            r"dout of shape \[3, 1\]",
        ),
    ],
)
def test_bad_values_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call(plan_rows(routing_map(3, 4, 2), 2))


def test_bad_types_raise():
    plan = plan_rows(routing_map(3, 4, 2), 2)
    with pytest.raises(TypeError, match=r"routing map must be bool, got torch\.int64"):
        plan_rows(torch.ones(3, 4, dtype=torch.int64), 2)
    with pytest.raises(TypeError, match=r"dx must be .* torch\.int8"):
        sum_rows(torch.ones(6, 2, dtype=torch.int8), plan)
    with pytest.raises(TypeError, match="probs must be"):
        combine(torch.ones(6, 2), torch.ones(3, 2, dtype=torch.int32), plan)


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize(("num_experts", "topk", "num_features"), [(64, 6, 2048), (8, 2, 4096), (256, 8, 7168)])
def test_public_functions_on_a_gpu_equal_cpu(num_experts, topk, num_features, dtype):
    """Rows of real models, and nothing that makes the host wait."""
    map_TE = routing_map(1000, num_experts, topk)
    y_RH, probs_TK, dout_TH, plan, _ = case(1000, num_experts, topk, num_features, dtype, "cpu")
    on_gpu = [tensor.cuda() for tensor in (map_TE, dout_TH, y_RH, probs_TK)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu_plan = plan_rows(on_gpu[0], topk)
        copies_RH, sums_TH = permute(on_gpu[1], gpu_plan), sum_rows(on_gpu[2], gpu_plan)
        out_TH = combine(*on_gpu[2:], gpu_plan)
        dy_RH, dprobs_TK = combine_backward(*on_gpu[1:], gpu_plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for part, wanted in zip(gpu_plan, plan, strict=True):
        assert_exact(part, wanted)
    assert_exact(copies_RH, permute(dout_TH, plan))
    assert_exact(sums_TH, sum_rows(y_RH, plan))
    assert_exact(out_TH, combine(y_RH, probs_TK, plan))
    wanted_dy_RH, wanted_dprobs_TK = combine_backward(dout_TH, y_RH, probs_TK, plan)
    assert_exact(dy_RH, wanted_dy_RH)
    torch.testing.assert_close(dprobs_TK.cpu(), wanted_dprobs_TK, rtol=1e-4, atol=1e-3)
