"""Which implementation takes a tensor: Triton's kernels on a GPU where Triton is there, else the torch reference."""

from importlib.util import find_spec

import torch

_HAS_TRITON = find_spec("triton") is not None
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

LONGEST_ROW = 32768
"""Features that one program's registers hold; longer rows go to the reference."""


def runs_triton(x: torch.Tensor) -> bool:
    """Whether Triton's kernels take numbers like these; fp64 is for tests and goes to the reference."""
    return on_triton_device(x) and x.dtype in _TRITON_DTYPES


def runs_triton_by_row(x_TD: torch.Tensor, groups: int = 1) -> bool:
    """The same for kernels that hold a whole row, or group of its features, at once."""
    return runs_triton(x_TD) and x_TD.shape[-1] // groups <= LONGEST_ROW


def on_triton_device(x: torch.Tensor) -> bool:
    """Whether Triton's kernels can run where the tensor lies."""
    return _HAS_TRITON and x.is_cuda
