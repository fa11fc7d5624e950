"""Imports of large libraries, quicker.

Python's garbage collector searches what was imported so far again and again, and finds nothing: it takes 1.3 of the
4.4 seconds of processor time in which a rank imports torch and megatron-core.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports() -> Iterator[None]:
    """Within, the garbage collector is off; afterwards, what is there is not searched any more: modules stay."""
    was_enabled, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        if was_enabled:
            gc.enable()
