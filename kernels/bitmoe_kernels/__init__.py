"""The operators BitNet a4.8 needs: quantizers, top-K masks and activations, one folder an operator.

Each folder holds ``reference.py`` (plain torch, the truth), ``op.py`` (the public function) and a README
with the equations. Imports torch only, so it is usable without megatron and without the rest of bitmoe.
``scale`` always means ``x ~ codes * scale``; rounding is half to even.
"""
