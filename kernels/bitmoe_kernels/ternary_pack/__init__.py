"""Ternary codes in bytes: four a byte for computing (2bit), five a byte for storing (1.6bit)."""

from bitmoe_kernels.ternary_pack.op import pack, packed_width, unpack

__all__ = ["pack", "packed_width", "unpack"]
