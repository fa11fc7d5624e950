"""Products of a ternary linear on one rank: exact forwards, and both backwards against formulas in fp64."""

import pytest
import torch

from bitmoe.layers.code_product import gradients, scaled_product
from bitmoe.layers.grouped_code_product import RowCodes, grouped_gradients, grouped_scaled_product
from bitmoe.quant.ternary_codes import WeightOperands
from bitmoe_kernels.weight_quant import ternary_operands

# Shapes: T = tokens, I = inputs, O = outputs, G = groups of inputs, E = experts, R = rows sorted by expert.

INPUTS, OUTPUTS = 48, 40
# What experts have: none, one, a few and many rows.
COUNTS = [37, 0, 1, 90]
NUM_ROWS = sum(COUNTS)
ENDS_E = torch.tensor(COUNTS).cumsum(0).int()
EXPERT_R = torch.arange(len(COUNTS), dtype=torch.int32).repeat_interleave(torch.tensor(COUNTS))

# Scales of the weight: one for each output, or one for each group of inputs.
KINDS = {"column": (True, 1), "row G=1": (False, 1), "row G=4": (False, 4)}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
# e4m3 codes are of whole rows, in front of column-parallel linears.
CASES = [(kind, torch.int8) for kind in KINDS] + [("column", torch.float8_e4m3fn)]
EACH_CASE = pytest.mark.parametrize(("kind", "code_dtype"), CASES, ids=str)


class Case:
    """Operands of one product, and the fp64 matrices they stand for.

    Args:
        kind: of KINDS.
        code_dtype: int8 or e4m3; e4m3 codes are 4-bit ones.
        with_columns: for the 8-bit backward.
        num_experts: leading dimension of the weight; None has none.
    """

    def __init__(self, kind, code_dtype=torch.int8, with_columns=False, num_experts=None):
        generator = torch.Generator().manual_seed(0)
        self.is_column, groups = KINDS[kind]
        lead = () if num_experts is None else (num_experts,)
        largest = 127 if code_dtype == torch.int8 else 7
        codes = torch.randint(-largest, largest + 1, (NUM_ROWS, INPUTS), generator=generator)
        self.x_codes, self.x_scale = codes.to(code_dtype), torch.rand(NUM_ROWS, groups, generator=generator) + 0.1
        w_scale = torch.rand(*lead, OUTPUTS if self.is_column else groups, generator=generator) + 0.1
        w = torch.randn(*lead, OUTPUTS, INPUTS, generator=generator)
        made = ternary_operands(w, w_scale, 0 if self.is_column else 1, code_dtype, with_columns)
        self.weight = WeightOperands(made.rows, made.columns, w_scale)
        self.dy = torch.randn(NUM_ROWS, OUTPUTS, generator=generator)
        self.x_hat = codes * self.x_scale.double().repeat_interleave(INPUTS // groups, 1)
        spread = (
            w_scale.unsqueeze(-1) if self.is_column else w_scale.repeat_interleave(INPUTS // groups, -1).unsqueeze(-2)
        )
        self.w_hat = made.rows.double() * spread.double()

    def to(self, dtype):
        """dY in another dtype; scales, too, are fp64 in fp64 models."""
        self.dy = self.dy.to(dtype)
        self.x_scale = self.x_scale.to(torch.promote_types(dtype, torch.float32))
        return self

    def wanted(self, dense):
        """Product, input gradient and weight gradient in fp64, of all rows with one weight or of each expert's."""
        dy = self.dy.double()
        if dense:
            return self.x_hat @ self.w_hat.T, dy @ self.w_hat, dy.T @ self.x_hat
        parts = zip(self.x_hat.split(COUNTS), dy.split(COUNTS), self.w_hat, strict=True)
        y, dx, dw = zip(*((x @ w.T, dy @ w, dy.T @ x) for x, dy, w in parts), strict=True)
        return torch.cat(y), torch.cat(dx), torch.stack(dw)


def dense_product(case, dtype):
    return scaled_product(case.x_codes, case.x_scale, case.weight, dtype)


def grouped_product(case, dtype):
    return grouped_scaled_product(case.x_codes, case.x_scale, case.weight, ENDS_E, EXPERT_R, dtype)


def dense_gradients(case):
    return gradients(case.dy, case.x_codes, case.x_scale, case.weight, case.is_column)


def all_grouped_gradients(case):
    return grouped_gradients(case.dy, RowCodes(case.x_codes, case.x_scale), case.weight, ENDS_E, case.is_column)


WAYS = {
    "dense": (None, dense_product, dense_gradients),
    "grouped": (len(COUNTS), grouped_product, all_grouped_gradients),
}
EACH_WAY = pytest.mark.parametrize("way", WAYS)
# Rounding of the result, and of the factors that scales are multiplied into.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}
# Codes are e4m3 in bf16 models alone.
EACH_CASE_AND_DTYPE = pytest.mark.parametrize(
    ("kind", "code_dtype", "dtype"),
    [(*case, dtype) for case in CASES for dtype in TOLERANCES if case[1] == torch.int8 or dtype == torch.bfloat16],
    ids=str,
)


def distance(got, wanted):
    """Relative Frobenius distance."""
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@EACH_CASE_AND_DTYPE
@EACH_WAY
def test_product(way, kind, code_dtype, dtype):
    num_experts, product, _ = WAYS[way]
    case = Case(kind, code_dtype, num_experts=num_experts).to(dtype)
    y = product(case, dtype)
    assert y.dtype == dtype
    assert distance(y, case.wanted(dense=way == "dense")[0]) < TOLERANCES[dtype]


@EACH_WAY
def test_groups_of_fp32_are_added_as_a_tree(way):
    """So that ranks that hold some of the groups can add theirs first."""
    num_experts, product, _ = WAYS[way]
    whole = Case("row G=4", num_experts=num_experts)
    y = product(whole, torch.float32)
    codes, scales = whole.x_codes.chunk(2, 1), whole.x_scale.chunk(2, 1)
    rows, weight_scales = whole.weight.rows.chunk(2, -1), whole.weight.scale.chunk(2, -1)
    halves = []
    for half in range(2):
        whole.x_codes, whole.x_scale = codes[half], scales[half]
        whole.weight = WeightOperands(rows[half], None, weight_scales[half])
        halves.append(product(whole, torch.float32))
    assert torch.equal(y, halves[0] + halves[1])


@EACH_CASE_AND_DTYPE
@EACH_WAY
def test_gradients(way, kind, code_dtype, dtype):
    num_experts, _, grads = WAYS[way]
    case = Case(kind, code_dtype, num_experts=num_experts).to(dtype)
    for got, wanted in zip(grads(case), case.wanted(dense=way == "dense")[1:], strict=True):
        assert (got.dtype, got.shape) == (dtype, wanted.shape)
        assert distance(got, wanted) < TOLERANCES[dtype]


@EACH_CASE_AND_DTYPE
@EACH_WAY
def test_gradients_8bit(way, kind, code_dtype, dtype):
    """Only dY is rounded: codes, scales and the sums over experts' rows are those of the other backward."""
    num_experts, _, grads = WAYS[way]
    case = Case(kind, code_dtype, with_columns=True, num_experts=num_experts).to(dtype)
    # The weight's gradient is not rounded for groups of INT8 codes: another test.
    num_rounded = 1 if KINDS[kind][1] > 1 else 2
    pairs = list(zip(grads(case), case.wanted(dense=way == "dense")[1:], strict=True))
    for got, wanted in pairs[:num_rounded]:
        assert (got.dtype, got.shape) == (dtype, wanted.shape)
        assert torch.cosine_similarity(got.double().flatten(), wanted.flatten(), 0) > 0.999
        assert 1e-4 < distance(got, wanted) < 0.06


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@EACH_WAY
def test_weight_gradient_of_groups_is_the_same_in_both_backwards(way, dtype):
    num_experts, _, grads = WAYS[way]
    plain, rounded = (grads(Case("row G=4", torch.int8, is_8bit, num_experts).to(dtype)) for is_8bit in (False, True))
    assert torch.equal(rounded[1], plain[1])
    assert not torch.equal(rounded[0], plain[0])


@pytest.mark.parametrize("with_columns", [False, True], ids=["bf16", "8bit"])
@EACH_CASE
def test_expert_without_rows(kind, code_dtype, with_columns):
    case = Case(kind, code_dtype, with_columns, num_experts=len(COUNTS))
    _, dw_EOI = all_grouped_gradients(case)
    assert [bool(dw_OI.any()) for dw_OI in dw_EOI] == [count > 0 for count in COUNTS]


@EACH_KIND
def test_tokens_of_very_different_size_8bit(kind):
    """A token whose gradient is a million times smaller keeps its input's gradient: rows have scales of their own."""
    case = Case(kind, with_columns=True)
    case.dy *= torch.logspace(0, -6, NUM_ROWS)[:, None]
    dx_TI, _ = dense_gradients(case)
    wanted_TI = case.wanted(dense=True)[1]
    assert (torch.cosine_similarity(dx_TI.double(), wanted_TI, 1) > 0.995).all()


@pytest.mark.parametrize("with_columns", [False, True], ids=["bf16", "8bit"])
@EACH_CASE
def test_no_rows_at_all(kind, code_dtype, with_columns):
    """A rank whose experts nobody chose."""
    case = Case(kind, code_dtype, with_columns, num_experts=len(COUNTS)).to(torch.bfloat16)
    ends_E, expert_R = torch.zeros_like(ENDS_E), EXPERT_R[:0]
    codes, scale, dy = case.x_codes[:0], case.x_scale[:0], case.dy[:0]
    y_RO = grouped_scaled_product(codes, scale, case.weight, ends_E, expert_R, dy.dtype)
    dx_RI, dw_EOI = grouped_gradients(dy, RowCodes(codes, scale), case.weight, ends_E, case.is_column)
    assert (y_RO.shape, dx_RI.shape) == ((0, OUTPUTS), (0, INPUTS))
    assert torch.equal(dw_EOI, torch.zeros(len(COUNTS), OUTPUTS, INPUTS, dtype=torch.bfloat16))
