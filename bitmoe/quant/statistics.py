"""Health of a quantized model: zeros and clipping of activation codes by role, zeros and flips of ternary codes.

Counting activations costs reductions over every code tensor, so it runs only while ``recording`` (the trainer switches
it on for the steps it logs). Counts stay on the device until ``collect``.
"""

from collections import defaultdict

import torch
import torch.distributed as dist

from bitmoe.config.schema import ActFormat

# Largest code magnitude of each format; codes at or beyond it were clipped or are the maximum itself.
_LARGEST_CODE = {ActFormat.int4: 7, ActFormat.int8: 127, ActFormat.fp4: 12}


class QuantStatistics:
    """Counts over all layers since the last ``collect``."""

    def __init__(self):
        self.recording = False
        self._counts: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))

    def add_activations(self, role: str, codes: torch.Tensor, act_format: ActFormat) -> None:
        """Count zeros and codes at the edge of the range in the int8 codes of one linear's input."""
        if self.recording and act_format is not ActFormat.none:
            edge = (codes >= _LARGEST_CODE[act_format]) | (codes < -_LARGEST_CODE[act_format])
            self._add(f"act/{role}", codes == 0, edge)

    def add_weights(self, role: str, codes: torch.Tensor, former: torch.Tensor | None) -> None:
        """Count zeros of ternary codes, and how many differ from the codes of the former parameter value.

        Counted whenever codes are made, once a step: an evaluation that makes them must not hide them.
        """
        self._add(f"weight/{role}", codes == 0, codes != (codes if former is None else former))

    def _add(self, key: str, zeros: torch.Tensor, others: torch.Tensor) -> None:
        total = torch.tensor(float(zeros.numel()), dtype=torch.float64, device=zeros.device)
        counts = torch.stack([zeros.sum().double(), others.sum().double(), total])
        self._counts[key] = self._counts[key].to(counts.device) + counts

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
        counts = torch.stack([self._counts[key].to(device) for key in keys])
        if dist.is_initialized():
            dist.all_reduce(counts)
        self._counts.clear()
        names = {"act": ("sparsity", "clipped"), "weight": ("zeros", "flips")}
        shares = {}
        for key, (zeros, others, total) in zip(keys, counts.tolist(), strict=True):
            kind, role = key.split("/")
            if total:
                shares |= {f"{names[kind][0]}/{role}": zeros / total, f"{names[kind][1]}/{role}": others / total}
        return shares
