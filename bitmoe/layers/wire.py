"""What travels between ranks in place of a linear's input: its codes, in as few bytes as hold them or as wide as bf16.

A quantized input is exactly its codes and scales, so nothing is lost in either form. Scales travel beside the codes, in
a collective of their own.
"""

from dataclasses import dataclass

import torch

from bitmoe.config.choices import ActFormat, Wire
from bitmoe_kernels.act_pack import pack_codes, unpack_codes

# Shapes: T = tokens of this rank, R = rows that arrive, D = features, W = elements of a row on the wire.

_FOUR_BITS = (ActFormat.int4, ActFormat.fp4)


@dataclass(frozen=True)
class CodeWire:
    """How the input of one linear travels; unquantized values travel as they are."""

    wire: Wire
    """What the run asks for (``parallel.wire``)."""
    act_format: ActFormat
    """Format of the codes."""

    def sent(self, x_TD: torch.Tensor) -> torch.Tensor:
        """What collectives carry of codes (or unquantized values) [..., D]: [..., W]."""
        if self.act_format is ActFormat.none:
            return x_TD
        if self.wire is Wire.bf16:
            return x_TD.to(torch.bfloat16)
        return pack_codes(x_TD, self.act_format.value) if self.act_format in _FOUR_BITS else x_TD

    def received(self, sent_RW: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        """What arrived, [..., W], as [..., D] of the type and width that ``x_TD`` had before it was sent."""
        if self.wire is Wire.codes and self.act_format in _FOUR_BITS:
            return unpack_codes(sent_RW, x_TD.shape[-1], self.act_format.value, x_TD.dtype)
        return sent_RW.to(x_TD.dtype)
