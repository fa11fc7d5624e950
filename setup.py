"""The list of packages; everything else about the distribution stands in pyproject.toml.

In pyproject.toml setuptools can find packages or be told of one that lives elsewhere, not both. Here the
Hydra tree of a checkout, ``conf/``, becomes ``bitmoe/conf`` in the wheel, and ``kernels/`` is a second root.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["bitmoe*"]),
        *find_packages("kernels", include=["bitmoe_kernels*"]),
        "bitmoe.conf",
    ],
    package_dir={"bitmoe_kernels": "kernels/bitmoe_kernels", "bitmoe.conf": "conf"},
    package_data={"bitmoe.conf": ["**/*.yaml"]},
)
