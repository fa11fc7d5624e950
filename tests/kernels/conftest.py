"""Where the Triton kernels run: on the GPU if there is one, else on CPU in Triton's interpreter."""

import pytest
import torch


@pytest.fixture
def triton_device():
    """Device of tensors that a Triton function is called with directly."""
    pytest.importorskip("triton")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poison(monkeypatch):
    """New memory holds garbage, so that a test of equality proves that every element was written."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_({torch.bool: True, torch.int8: -77, torch.uint8: 77}.get(tensor.dtype, 12345))

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
