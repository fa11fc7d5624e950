"""Top-K mask by magnitude in plain torch: the truth for every other implementation.

The K-th largest magnitude is a threshold; of the values that tie with it, those of the lowest indices fill
the places left. So the mask has exactly K entries and is the same on every run and device. Arguments are not
validated here: op.py does that.
"""

# Shapes: T = tokens (any leading dimensions), D = features, G groups of d = D / G features.

import torch


def topk_mask_reference(x_TD: torch.Tensor, keep: float = 0.5, groups: int = 1) -> torch.Tensor:
    """Bool [T, D]: the ``round(keep * d)`` largest |x| of each token and group."""
    magnitude_TGd = x_TD.abs().unflatten(-1, (groups, x_TD.shape[-1] // groups))
    num_kept = round(keep * magnitude_TGd.shape[-1])
    threshold_TG1 = magnitude_TGd.topk(num_kept, sorted=False).values.amin(dim=-1, keepdim=True)
    above_TGd = magnitude_TGd > threshold_TG1
    tied_TGd = magnitude_TGd == threshold_TG1
    places_TG1 = num_kept - above_TGd.sum(dim=-1, keepdim=True)
    return (above_TGd | (tied_TGd & (tied_TGd.cumsum(dim=-1) <= places_TG1))).flatten(-2)
