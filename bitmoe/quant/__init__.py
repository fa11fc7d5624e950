"""Quantization policy: which format each linear role uses, in which groups, and from which step on.

The quantizers themselves and their straight-through gradients live in ``bitmoe_kernels`` alone; this package
decides when and where they are applied and knows nothing of layers, models or process groups.
"""
