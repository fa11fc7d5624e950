"""Test support that ships with the package: ranks on gloo, the reference model, the tolerance of comparisons.

Tests, and anybody who checks a change of their own, import from the modules; nothing else of bitmoe does.
"""
