"""Public top-K mask: check the arguments, then run Triton's kernel on a GPU, else the reference.

Not here: the straight-through gradient (the backward pass ignores the mask), which belongs to the linear.
"""

# Shapes: T = tokens (any leading dimensions), D = features.

import torch

from bitmoe_kernels.dispatch import runs_triton_by_row
from bitmoe_kernels.sparsify.reference import topk_mask_reference
from bitmoe_kernels.validation import check_features, check_groups, raise_on_nonfinite


@torch.no_grad()
def topk_mask(x_TD: torch.Tensor, keep: float = 0.5, groups: int = 1) -> torch.Tensor:
    """Mark the largest magnitudes of each token and group (BitNet a4.8, eq. 1).

    Args:
        x_TD: activations [..., D].
        keep: share to keep, in (0, 1]; exactly ``round(keep * D / groups)`` features of a group are kept,
            rounded half to even.
        groups: number of equal contiguous blocks of features, each with its own selection.

    Returns:
        bool [..., D], True where kept; of equal magnitudes the lower index is kept.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: no feature, ``keep`` out of range or so small that nothing is kept, ``groups`` not a
            divisor of D, or (on CPU) NaN or Inf. On other devices a token with NaN gets a mask of no use; the
            quantizer of the same input reports it.
    """
    check_features(x_TD, "x")
    check_groups(groups, x_TD.shape[-1], "features")
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep}: the share of features to keep must be above 0 and at most 1")
    if round(keep * (x_TD.shape[-1] // groups)) == 0:
        raise ValueError(f"keep={keep} of {x_TD.shape[-1] // groups} features keeps none: raise it")
    raise_on_nonfinite(x_TD, x_TD, "x")
    if runs_triton_by_row(x_TD, groups):
        # Imported at the first use: not every machine has Triton.
        from bitmoe_kernels.sparsify.triton_kernels import topk_mask_triton

        return topk_mask_triton(x_TD, keep, groups)
    return topk_mask_reference(x_TD, keep, groups)
