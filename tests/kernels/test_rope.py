"""Rotary embedding: the reference against megatron-core and complex numbers, Triton against the same, bad input."""

# Shapes: S = sequence, B = batch, K = key/value heads, Q = query heads per key/value head, N = K * Q, D = width of a
#         head, P = D / 2 pairs, E = K * (Q + 2) * D.

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from bitmoe_kernels.rope import op, rope_qkv, rope_tables
from bitmoe_kernels.rope.reference import rope_qkv_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (S, B, K, Q, D): grouped, multi-query, one token, one pair, several blocks of tokens.
SIZES = [(5, 2, 2, 3, 16), (7, 3, 1, 4, 10), (1, 1, 3, 1, 2), (40, 1, 2, 1, 128), (33, 2, 3, 1, 66)]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_size = pytest.mark.parametrize("size", SIZES, ids=str)


@pytest.fixture(params=["reference", "triton"])
def device(request, monkeypatch):
    """Where the public functions run the named implementation; Triton's on CPU means its interpreter."""
    if request.param == "reference":
        return "cpu"
    request.getfixturevalue("poison")
    monkeypatch.setattr(op, "runs_triton", lambda x: True)
    return request.getfixturevalue("triton_device")


def gaussian(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same standard normal tensor on every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def angles(num_positions: int, head_dim: int) -> torch.Tensor:
    """Angles [S, 1, 1, D] as megatron-core lays them out."""
    frequency_P = 10000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    return (torch.arange(num_positions)[:, None] * frequency_P).repeat(1, 2)[:, None, None, :]


def exact_qkv(qkv_SBE, angles_S11D, num_kv_heads, queries_per_kv, sign=1):
    """q, k and v in fp64: pairs are complex numbers, multiplied with exp(i * angle)."""
    heads = qkv_SBE.double().unflatten(-1, (num_kv_heads, queries_per_kv + 2, 2, -1))
    numbers = torch.complex(heads[..., 0, :], heads[..., 1, :])
    cos_SP, sin_SP = (table.double() for table in rope_tables(angles_S11D))
    rotated = numbers * torch.complex(cos_SP, sign * sin_SP)[:, None, None, None, :]
    rotated = torch.cat((rotated.real, rotated.imag), dim=-1)
    return rotated[..., :-2, :].flatten(2, 3), rotated[..., -2, :], heads[..., -1, :, :].flatten(-2)


def assert_rounded_once(got: torch.Tensor, want: torch.Tensor, device: str):
    """Within half a unit in the last place of the dtype, and the error of fp32 products of numbers up to 5."""
    # Triton's interpreter cuts fp32 off to bf16 instead of rounding.
    ulps = 1.0 if device == "cpu" and got.dtype == torch.bfloat16 else 0.501
    torch.testing.assert_close(got.detach().cpu().double(), want, rtol=ulps * torch.finfo(got.dtype).eps, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reference_has_the_bits_of_megatron(dtype):
    """Forward and gradient of the path that the attention layer had before."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    size_SBE, angles_S11D = (33, 2, 3 * 4 * 32), angles(33, 32)
    qkv = gaussian(*size_SBE, dtype=dtype).requires_grad_()
    heads = qkv.unflatten(-1, (3, 4, 32))
    q, k = heads[..., :-2, :].flatten(2, 3), heads[..., -2, :]
    wanted = (*(_apply_rotary_pos_emb_bshd(x, angles_S11D) for x in (q, k)), heads[..., -1, :])
    result = rope_qkv(qkv, *rope_tables(angles_S11D), 3, 2)
    grads = [gaussian(*part.shape, dtype=dtype) for part in result]
    for got, want in zip(result, wanted, strict=True):
        assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(parts, qkv, grads)[0] for parts in (result, wanted)))


def test_tables_are_cosine_and_sine_of_one_half():
    angles_S11D = angles(50, 16)
    cos_SP, sin_SP = rope_tables(angles_S11D)
    assert torch.equal(cos_SP, angles_S11D[:, 0, 0, 8:].cos())
    assert torch.equal(sin_SP, angles_S11D[:, 0, 0, 8:].sin())
    for from_matrix, table in zip(rope_tables(angles_S11D[:, 0, 0]), (cos_SP, sin_SP), strict=True):
        assert torch.equal(from_matrix, table)


@each_dtype
@each_size
def test_rotation_equals_complex_product(device, dtype, size):
    num_positions, batch, num_kv_heads, queries_per_kv, head_dim = size
    qkv = gaussian(num_positions, batch, num_kv_heads * (queries_per_kv + 2) * head_dim, dtype=dtype)
    angles_S11D = angles(num_positions, head_dim)
    q, k, v = rope_qkv(qkv.to(device), *rope_tables(angles_S11D.to(device)), num_kv_heads, queries_per_kv)
    q_exact, k_exact, v_exact = exact_qkv(qkv, angles_S11D, num_kv_heads, queries_per_kv)
    assert q.dtype == k.dtype == v.dtype == dtype
    assert all(part.is_contiguous() for part in (q, k, v))
    assert_rounded_once(q, q_exact, device)
    assert_rounded_once(k, k_exact, device)
    assert torch.equal(v.cpu().double(), v_exact)


@each_size
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, "SBND"), (torch.float32, "BNSD"), (torch.bfloat16, "BSND"), (torch.float16, "NSBD")],
    ids=str,
)
def test_gradient_rotates_back(device, dtype, size, layout):
    """The rotation is orthogonal: its gradient is the inverse. Gradients come in any memory layout."""
    num_positions, batch, num_kv_heads, queries_per_kv, head_dim = size
    order = ["SBND".index(axis) for axis in layout]
    back = [layout.index(axis) for axis in "SBND"]
    grads = [
        gaussian(num_positions, batch, heads, head_dim, dtype=dtype).permute(order).contiguous().permute(back)
        for heads in (num_kv_heads * queries_per_kv, num_kv_heads, num_kv_heads)
    ]
    angles_S11D = angles(num_positions, head_dim)
    num_features = num_kv_heads * (queries_per_kv + 2) * head_dim
    qkv = torch.zeros(num_positions, batch, num_features, dtype=dtype, device=device, requires_grad=True)
    parts = rope_qkv(qkv, *rope_tables(angles_S11D.to(device)), num_kv_heads, queries_per_kv)
    (grad_qkv,) = torch.autograd.grad(parts, qkv, [grad.to(device) for grad in grads])

    grad_q = grads[0].unflatten(2, (num_kv_heads, queries_per_kv))
    packed = torch.cat((grad_q, grads[1].unsqueeze(3), grads[2].unsqueeze(3)), dim=3).flatten(2)
    exact = exact_qkv(packed, angles_S11D, num_kv_heads, queries_per_kv, sign=-1)
    got = grad_qkv.unflatten(-1, (num_kv_heads, queries_per_kv + 2, head_dim))
    assert_rounded_once(got[..., :-2, :].flatten(2, 3), exact[0], device)
    assert_rounded_once(got[..., -2, :], exact[1], device)
    assert torch.equal(got[..., -1, :].cpu().double(), exact[2])


def test_through_attention(device):
    """Strides that attention takes and gives back, against the whole in fp64; the output's way back is a view."""
    (num_positions, batch, num_kv_heads, queries_per_kv, head_dim), angles_S11D = (12, 2, 2, 2, 16), angles(12, 16)
    num_features = num_kv_heads * (queries_per_kv + 2) * head_dim
    results = []
    for where, dtype, rotate in ((device, torch.float32, rope_qkv), ("cpu", torch.float64, rope_qkv_reference)):
        qkv = gaussian(num_positions, batch, num_features, dtype=dtype).to(where).requires_grad_()
        parts = rotate(qkv, *rope_tables(angles_S11D.to(where)), num_kv_heads, queries_per_kv)
        q, k, v = (part.permute(1, 2, 0, 3) for part in parts)
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        (grad,) = torch.autograd.grad(out.square().sum(), qkv)
        results.append((out.cpu().double(), grad.cpu().double()))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_gradient_of_a_sum_and_of_one_part(device):
    """A sum's gradient has strides of 0; parts that are not used have none."""
    qkv = gaussian(6, 2, 2 * 3 * 8).to(device).requires_grad_()
    q, k, v = rope_qkv(qkv, *rope_tables(angles(6, 8).to(device)), 2, 1)
    (grad,) = torch.autograd.grad(k.sum(), qkv)
    packed = torch.zeros(6, 2, 2, 3, 8)
    packed[..., 1, :] = 1
    wanted = exact_qkv(packed.flatten(2), angles(6, 8), 2, 1, sign=-1)[1]
    got = grad.unflatten(-1, (2, 3, 8)).cpu()
    assert_rounded_once(got[..., 1, :], wanted, device)
    assert not got[..., 0, :].any()
    assert not got[..., 2, :].any()


@pytest.mark.parametrize(("num_positions", "batch"), [(0, 2), (3, 0)])
def test_no_tokens(device, num_positions, batch):
    qkv = torch.zeros(num_positions, batch, 2 * 3 * 8, device=device, requires_grad=True)
    q, k, v = rope_qkv(qkv, *rope_tables(angles(num_positions, 8).to(device)), 2, 1)
    assert q.shape == k.shape == v.shape == (num_positions, batch, 2, 8)
    assert torch.autograd.grad((q, k, v), qkv, [q, k, v])[0].shape == qkv.shape


def test_strided_input(device):
    qkv, tables = gaussian(4, 3, 48).to(device), [table.to(device) for table in rope_tables(angles(4, 16))]
    strided = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    strided_tables = [table.T.contiguous().T for table in tables]
    for got, want in zip(rope_qkv(strided, *strided_tables, 1, 1), rope_qkv(qkv, *tables, 1, 1), strict=True):
        assert torch.equal(got, want)


TABLE = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rope_qkv(torch.ones(3, 1, 47), TABLE, TABLE, 2, 1), r"qkv has shape \[3, 1, 47\]"),
        (lambda: rope_qkv(torch.ones(3, 48), TABLE, TABLE, 2, 1), r"qkv has shape \[3, 48\]"),
        (lambda: rope_qkv(torch.ones(3, 1, 30), TABLE, TABLE, 2, 1), "an even D"),
        (lambda: rope_qkv(torch.ones(3, 1, 0), TABLE, TABLE, 2, 1), r"qkv has shape \[3, 1, 0\]"),
        (lambda: rope_qkv(torch.ones(3, 1, 48), TABLE[:, :2], TABLE[:, :2], 2, 1), r"\[3, 4\] .* rotary_percent"),
        (lambda: rope_qkv(torch.ones(2, 1, 48), TABLE, TABLE, 2, 1), r"both must be \[2, 4\]"),
        (lambda: rope_qkv(torch.ones(3, 1, 48), TABLE, TABLE[:2], 2, 1), r"sin \[2, 4\]"),
        (lambda: rope_qkv(torch.ones(3, 1, 48), TABLE, TABLE, 0, 1), "num_kv_heads=0"),
        (lambda: rope_tables(torch.ones(3, 1, 1, 5)), r"\[3, 1, 1, 5\]"),
        (lambda: rope_tables(torch.ones(3, 2, 1, 4)), r"\[3, 2, 1, 4\]"),
        (lambda: rope_tables(torch.ones(4)), r"shape \[4\]"),
        (lambda: rope_tables(torch.arange(8.0).view(2, 1, 1, 4)), "interleaved"),
    ],
)
def test_bad_values_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_types_raise():
    with pytest.raises(TypeError, match="qkv must be"):
        rope_qkv(torch.ones(3, 1, 48, dtype=torch.int8), TABLE, TABLE, 2, 1)
    with pytest.raises(TypeError, match="cos must be"):
        rope_qkv(torch.ones(3, 1, 48), TABLE.int(), TABLE, 2, 1)
    with pytest.raises(TypeError, match="angles must be"):
        rope_tables(TABLE.int())


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("size", [(2048, 2, 16, 1, 128), (1024, 1, 8, 4, 128), (512, 3, 32, 1, 100)], ids=str)
def test_public_function_on_a_gpu(dtype, size):
    """The heads of real models."""
    num_positions, batch, num_kv_heads, queries_per_kv, head_dim = size
    qkv = gaussian(num_positions, batch, num_kv_heads * (queries_per_kv + 2) * head_dim, dtype=dtype)
    angles_S11D = angles(num_positions, head_dim)
    result = rope_qkv(qkv.cuda(), *rope_tables(angles_S11D.cuda()), num_kv_heads, queries_per_kv)
    for got, want in zip(result, exact_qkv(qkv, angles_S11D, num_kv_heads, queries_per_kv), strict=True):
        assert_rounded_once(got, want, "cuda")
