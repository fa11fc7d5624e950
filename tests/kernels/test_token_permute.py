"""Tokens to rows of experts and back: the reference by hand and against autograd, Triton against the reference."""

# Shapes: T = tokens, E = experts, K = experts of each token, R = rows, H = features.

import pytest
import torch

from bitmoe_kernels.token_permute import (
    permute,
    permute_probs,
    permute_probs_backward,
    plan_rows,
    reference,
    sum_rows,
)

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
    """Tokens, rows, probabilities of pairs and of rows on CPU, and plans on CPU and on ``device``."""
    plan = reference.plan_rows_reference(routing_map(num_tokens, num_experts, topk), topk)
    x_TH = gaussian(num_tokens, num_features, dtype=dtype, seed=5)
    y_RH = gaussian(num_tokens * topk, num_features, dtype=dtype)
    probs = gaussian(num_tokens, num_experts, seed=4), gaussian(num_tokens * topk, 1, seed=6)
    return x_TH, y_RH, *probs, plan, reference.RowPlan(*(part.to(device) for part in plan))


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
    assert plan.ends_E.tolist() == [2, 2, 3, 6]
    x_TH = torch.tensor([[1.0], [10.0], [100.0]])
    assert permute(x_TH, plan).flatten().tolist() == [1, 100, 10, 1, 10, 100]
    y_RH = torch.arange(6.0)[:, None]
    assert sum_rows(y_RH, plan).flatten().tolist() == [3, 6, 6]
    probs_TE = torch.tensor([[1.0, 9.0, 9.0, 2.0], [9.0, 9.0, 0.5, 0.25], [0.0, 9.0, 9.0, -1.0]])
    assert permute_probs(probs_TE, plan).flatten().tolist() == [1, 0, 0.5, 2, 0.25, -1]
    assert permute_probs_backward(y_RH, plan).tolist() == [[0, 0, 0, 3], [0, 0, 2, 4], [1, 0, 0, 5]]


@pytest.mark.parametrize(("num_tokens", "num_experts", "topk", "num_features"), [s for s in SIZES if s[0]], ids=str)
def test_gradients_are_those_of_autograd(num_tokens, num_experts, topk, num_features):
    """In fp64, against torch's derivatives of sums over one-hot rows."""
    x_TH, y_RH, probs_TE, dprobs_R1, plan, _ = case(num_tokens, num_experts, topk, num_features, torch.float64, "cpu")
    one_hot_TKR = torch.nn.functional.one_hot(plan.row_TK.long(), len(y_RH)).double()
    torch.testing.assert_close(permute(x_TH, plan), torch.einsum("tkr,th->rh", one_hot_TKR, x_TH))
    torch.testing.assert_close(sum_rows(y_RH, plan), torch.einsum("tkr,rh->th", one_hot_TKR, y_RH))
    one_hot_RE = torch.nn.functional.one_hot(plan.expert_R.long(), num_experts).double()
    probs_TE = probs_TE.double().requires_grad_()
    rows_R1 = torch.einsum("tkr,te,re->r", one_hot_TKR, probs_TE, one_hot_RE)[:, None]
    rows_R1.backward(dprobs_R1.double())
    torch.testing.assert_close(permute_probs(probs_TE, plan), rows_R1)
    torch.testing.assert_close(permute_probs_backward(dprobs_R1.double(), plan), probs_TE.grad)


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
    for indices, bound in ((plan.source_R, 40), (plan.row_TK, 40 * topk), (plan.expert_R, 5)):
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
    _, y_RH, *_, plan, device_plan = case(num_tokens, num_experts, topk, num_features, dtype, triton_device)
    result = kernels.sum_rows_triton(y_RH.to(triton_device), device_plan)
    assert_exact(result, reference.sum_rows_reference(y_RH, plan))


@each_size
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_triton_probs_equal_reference(kernels, triton_device, num_tokens, num_experts, topk, num_features, dtype):
    *_, probs_TE, dprobs_R1, plan, device_plan = case(num_tokens, num_experts, topk, 1, dtype, triton_device)
    probs_TE, dprobs_R1 = probs_TE.to(dtype), dprobs_R1.to(dtype)
    result = kernels.permute_probs_triton(probs_TE.to(triton_device), device_plan)
    assert_exact(result, reference.permute_probs_reference(probs_TE, plan))
    result = kernels.permute_probs_backward_triton(dprobs_R1.to(triton_device), device_plan)
    assert_exact(result, reference.permute_probs_backward_reference(dprobs_R1, plan))


def test_triton_takes_any_strides(kernels, triton_device):
    """Gradients come transposed."""
    _, y_RH, probs_TE, _, plan, device_plan = case(10, 5, 2, 6, torch.float32, triton_device)
    strided_RH, strided_TE = (x.T.contiguous().to(triton_device).T for x in (y_RH, probs_TE))
    assert_exact(kernels.sum_rows_triton(strided_RH, device_plan), reference.sum_rows_reference(y_RH, plan))
    result = kernels.permute_probs_triton(strided_TE, device_plan)
    assert_exact(result, reference.permute_probs_reference(probs_TE, plan))


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
        (lambda plan: permute_probs(torch.ones(3, 2), plan), r"probs have shape \[3, 2\]: .* \[3, 4\]"),
        (lambda plan: permute_probs_backward(torch.ones(6), plan), r"dprobs have shape \[6\]: .* \[6, 1\]"),
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
        permute_probs(torch.ones(3, 4, dtype=torch.int32), plan)
    with pytest.raises(TypeError, match="dprobs must be"):
        permute_probs_backward(torch.ones(6, 1, dtype=torch.int32), plan)


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize(("num_experts", "topk", "num_features"), [(64, 6, 2048), (8, 2, 4096), (256, 8, 7168)])
def test_public_functions_on_a_gpu_equal_cpu(num_experts, topk, num_features, dtype):
    """Rows of real models, and nothing that makes the host wait."""
    map_TE = routing_map(1000, num_experts, topk)
    x_TH, y_RH, probs_TE, dprobs_R1, plan, _ = case(1000, num_experts, topk, num_features, dtype, "cpu")
    on_gpu = [tensor.cuda() for tensor in (map_TE, x_TH, y_RH, probs_TE, dprobs_R1)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu_plan = plan_rows(on_gpu[0], topk)
        copies_RH, sums_TH = permute(on_gpu[1], gpu_plan), sum_rows(on_gpu[2], gpu_plan)
        probs_R1, dprobs_TE = permute_probs(on_gpu[3], gpu_plan), permute_probs_backward(on_gpu[4], gpu_plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for part, wanted in zip(gpu_plan, plan, strict=True):
        assert_exact(part, wanted)
    assert_exact(copies_RH, permute(x_TH, plan))
    assert_exact(sums_TH, sum_rows(y_RH, plan))
    assert_exact(probs_R1, permute_probs(probs_TE, plan))
    assert_exact(dprobs_TE, permute_probs_backward(dprobs_R1, plan))
