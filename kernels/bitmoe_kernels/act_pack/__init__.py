"""4-bit activation codes, two a byte: what ranks send each other."""

from bitmoe_kernels.act_pack.op import pack_codes, unpack_codes

__all__ = ["pack_codes", "unpack_codes"]
