"""Silences warnings of libraries that a user of bitmoe can do nothing about.

megatron-core warns at import for every optional accelerator that is missing (``bitmoe doctor`` names them once) and
torch for names that megatron-core still uses.
"""

import logging
import warnings


def quiet_libraries() -> None:
    """Call before megatron-core is imported."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", message=".*is deprecated.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r".*\.grad attribute of a Tensor that is not a leaf.*")
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
