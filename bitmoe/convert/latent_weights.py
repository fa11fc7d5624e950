"""Latent weights that a packed ternary matrix could come from.

A packed matrix has codes and a scale, and no latent weights any more. Training needs some, and ``ternarize`` of them
must give back the same codes and the same scale to the last bit. All nonzero codes get one magnitude m, so that the
mean over all weights, zeros included, is the scale. Rounding m to a float misses the scale, so the first k nonzero
weights get the next larger float. What then remains is less than one step of m, and goes into weights of code 0, which
may have any magnitude up to half the scale.
"""

# Shapes: O = output rows, I = input features.

import torch

from bitmoe_kernels.weight_quant import absmean_scale, ternarize

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


@torch.no_grad()
def latent_weights(codes_OI: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Weights whose ``ternarize`` gives these codes and this scale.

    Args:
        codes_OI: int8 [O, I] in {-1, 0, 1}. If all are zero, so are the weights: no others have such codes.
        scale: an fp32 number, at least 1e-5.
        dtype: fp32 or bf16.

    Returns:
        [O, I] of ``dtype``.

    Raises:
        ValueError: no weights of this dtype have that scale: it is below 1e-5, or in bf16 there are fewer than two
            codes 0, and so few weights that no sum of theirs hits it.
    """
    num_nonzero = int(codes_OI.count_nonzero())
    if num_nonzero == 0:
        return torch.zeros_like(codes_OI, dtype=dtype)
    # Exact in fp64: a scale of 24 bits times a count, and sums of floats of nearly the same size.
    total = scale * codes_OI.numel()
    lower = _at_most(total / num_nonzero, dtype)
    step = _next_up(lower, dtype) - lower
    num_raised = int((total - num_nonzero * lower) // step)
    w_OI = codes_OI.to(dtype) * lower
    _first_nonzero(codes_OI, num_raised, w_OI, lower + step)
    rest = total - num_nonzero * lower - num_raised * step
    _put_into_zeros(w_OI, rest, scale, total)
    found_OI, found_scale = ternarize(w_OI)
    if float(found_scale) != scale or not torch.equal(found_OI, codes_OI):
        raise ValueError(f"no {dtype} weights with these codes have a mean magnitude of {scale:g}")
    return w_OI


def _first_nonzero(codes_OI: torch.Tensor, count: int, w_OI: torch.Tensor, magnitude: float) -> None:
    """Give the first ``count`` weights of nonzero code another magnitude, in place."""
    until_O = codes_OI.count_nonzero(dim=1).cumsum(0)
    num_rows = int((until_O <= count).sum())
    w_OI[:num_rows] = codes_OI[:num_rows].to(w_OI.dtype) * magnitude
    left = count - (int(until_O[num_rows - 1]) if num_rows else 0)
    if left:
        columns = codes_OI[num_rows].nonzero().squeeze(1)[:left]
        w_OI[num_rows, columns] = codes_OI[num_rows, columns].to(w_OI.dtype) * magnitude


def _put_into_zeros(w_OI: torch.Tensor, rest: float, scale: float, total: float) -> None:
    """Spread what the sum of magnitudes lacks over weights that are zero, in place, until its mean is the scale."""
    for row in w_OI:
        for column in (row == 0).nonzero().squeeze(1).tolist():
            if _mean(total - rest, w_OI.numel()) == scale:
                return
            piece = _at_most(min(rest, scale / 2), w_OI.dtype)
            row[column] = piece
            rest -= piece


def _mean(total: float, count: int) -> float:
    return float(absmean_scale(torch.tensor([total], dtype=torch.float64), count))


def _at_most(value: float, dtype: torch.dtype) -> float:
    """The largest float of ``dtype`` that is not above ``value``, which is positive."""
    rounded = torch.tensor(value, dtype=torch.float64).to(dtype)
    return float(rounded) if float(rounded) <= value else _neighbour(rounded, -1)


def _next_up(value: float, dtype: torch.dtype) -> float:
    return _neighbour(torch.tensor(value, dtype=dtype), 1)


def _neighbour(value: torch.Tensor, distance: int) -> float:
    """The float some steps away from a positive one: its bits count them."""
    return float((value.view(_BITS[value.dtype]) + distance).view(value.dtype))
