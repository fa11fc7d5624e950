"""Checks of tensor arguments that the public functions of every operator share.

They raise TypeError or ValueError that names the value and the fix. A look at the values would make a GPU
wait, so non-finite input raises on CPU only; on other devices the references carry it as a NaN scale.
"""

import torch


def check_floating(x: torch.Tensor, name: str) -> None:
    """Raise TypeError unless ``x`` is a floating-point tensor."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}: use torch.as_tensor")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}: cast it with .float()")


def check_features(x: torch.Tensor, name: str) -> None:
    """Raise unless ``x`` is floating point and [..., D] with D >= 1."""
    check_floating(x, name)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {list(x.shape)}: it needs at least one feature (last dimension)")


def check_groups(groups: int, size: int, name: str) -> None:
    """Raise unless ``groups`` is a positive integer that divides ``size``, the number of ``name``."""
    if not isinstance(groups, int):
        raise TypeError(f"groups must be an int, got {groups!r} of type {type(groups).__name__}")
    if groups < 1 or size % groups:
        raise ValueError(f"groups={groups} does not cut {size} {name} into equal parts: use a divisor")


def raise_on_nonfinite(result: torch.Tensor, source: torch.Tensor, name: str) -> None:
    """On CPU, raise ValueError where ``result``, computed from ``source``, holds NaN or Inf.

    Args:
        result: tensor that is non-finite somewhere whenever ``source`` is; a small one is checked fast.
        source: tensor the message is about; its non-finite values are counted only when there is an error.
        name: what the caller's signature calls ``source``.

    Raises:
        ValueError: with the number of non-finite values and the shape.
    """
    if result.device.type != "cpu" or bool(result.isfinite().all()):
        return
    count = int(source.numel() - source.isfinite().sum())
    where = f"{name} of shape {list(source.shape)} and type {source.dtype}"
    if count:
        raise ValueError(f"{where} holds {count} non-finite values (NaN or Inf): fix the step that made them")
    raise ValueError(f"{where} is finite but so large that its scale overflows: rescale it")
