"""What the libraries read from the environment, set before torch loads; whatever the user has set there holds."""

from __future__ import annotations

import os

# Threads without work sleep. By default they spin for a while, and take the core of another thread or program.
#
# oneDNN makes a program for each product of bf16 matrices of other sizes, and torch keeps a second store of them. Each
# keeps 1,024 by default, about 0.3 MB apiece. Batches of many lengths fill both: gigabytes, where 128 are as fast.
DEFAULTS = {
    "OMP_WAIT_POLICY": "passive",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "128",
}


def prepare() -> None:
    """Sets `DEFAULTS`, as far as the user has not."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
