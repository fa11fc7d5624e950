"""Layers of the model: megatron-core modules of our own, put in by spec.

Every layer gets its process groups and its quantization policy through a ``LayerContext``; none reads global state.
"""
