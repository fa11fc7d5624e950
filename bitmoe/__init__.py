"""bitmoe: pretraining of BitNet a4.8 mixture-of-experts language models on megatron-core.

Importing this package imports nothing heavy; the work happens in its sub-packages.
"""

__version__ = "0.1.0"
