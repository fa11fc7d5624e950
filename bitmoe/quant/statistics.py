"""Health of a quantized model: zeros and clipping of activation codes by role, zeros and flips of ternary codes.

Counting activations costs reductions over every code tensor, and flips a read of the former codes, so both run only
while ``recording`` (the trainer switches it on for the steps it logs). Counts stay on the device until ``collect``.
"""

import torch
import torch.distributed as dist

from bitmoe.config.choices import ActFormat

# Largest code magnitude of each format; codes at or beyond it were clipped or are the maximum itself.
_LARGEST_CODE = {ActFormat.int4: 7, ActFormat.int8: 127, ActFormat.fp4: 12}


class QuantStatistics:
    """Counts over all layers since the last ``collect``."""

    def __init__(self):
        self.recording = False
        self._counts: dict[str, torch.Tensor] = {}

    def add_activations(self, role: str, codes: torch.Tensor, act_format: ActFormat) -> None:
        """Count zeros and codes at the edge of the range in the int8 or e4m3 codes of one linear's input."""
        if self.recording and act_format is not ActFormat.none:
            # Torch does not compare float8 numbers; as bf16 codes of up to 8 bits are the same.
            codes = codes.bfloat16() if codes.is_floating_point() else codes
            edge = (codes >= _LARGEST_CODE[act_format]) | (codes < -_LARGEST_CODE[act_format])
            zeros = (codes == 0).sum()
            # The total is filled in on the device: a tensor copied there would make it wait.
            self._add(f"act/{role}", torch.stack([zeros, edge.sum(), torch.full_like(zeros, codes.numel())]))

    @property
    def counts_weights(self) -> bool:
        """Whether ternary codes that are made now are counted: an evaluation that makes them must not hide them."""
        return self.recording or not torch.is_grad_enabled()

    def add_weights(self, role: str, counts_3: torch.Tensor) -> None:
        """Add counts of the ternary codes of one weight: zeros, codes other than those of its former value, and all."""
        self._add(f"weight/{role}", counts_3)

    def _add(self, key: str, counts_3: torch.Tensor) -> None:
        # In place, at one address: recorded forward passes add to it.
        if key in self._counts:
            self._counts[key] += counts_3
        else:
            self._counts[key] = counts_3.clone()

    def collect(
        self, device: torch.device, roles: tuple[str, ...] = ("qkv", "o", "gate_up", "down")
    ) -> dict[str, float]:
        """Shares over all ranks since the last call, and start anew.

        Every rank must call it. Replicated tensors are counted on every rank that holds them, which leaves shares
        unchanged.

        Returns:
            ``sparsity/<role>``, ``clipped/<role>`` (activation codes) and ``zeros/<role>``, ``flips/<role>``
            (ternary codes), each in 0..1; roles never counted are left out.
        """
        keys = [f"{kind}/{role}" for kind in ("act", "weight") for role in roles]
        none = torch.zeros(3, dtype=torch.int64, device=device)
        counts = torch.stack([self._counts.get(key, none).to(device) for key in keys])
        if dist.is_initialized():
            dist.all_reduce(counts)
        for sums in self._counts.values():
            sums.zero_()
        names = {"act": ("sparsity", "clipped"), "weight": ("zeros", "flips")}
        shares = {}
        for key, (zeros, others, total) in zip(keys, counts.tolist(), strict=True):
            kind, role = key.split("/")
            if total:
                shares |= {f"{names[kind][0]}/{role}": zeros / total, f"{names[kind][1]}/{role}": others / total}
        return shares
