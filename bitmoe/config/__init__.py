"""Typed configuration: one dataclass per Hydra group, their defaults, their documentation and their checks.

This package imports neither torch nor megatron nor any other part of bitmoe, so that a config error is
reported within a second or two of the command.
"""
