"""From text to deterministic training batches.

text -> tokenizer -> token files (``.bin``/``.idx``) -> windows -> batches. ``prepare.prepare`` does
everything up to the files, ``loader`` the rest. The package imports ``bitmoe.config`` and libraries, nothing
else of the project.
"""
