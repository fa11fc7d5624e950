"""Rotary position embedding of fused queries, keys and values."""

from bitmoe_kernels.rope.op import rope_qkv, rope_tables

__all__ = ["rope_qkv", "rope_tables"]
