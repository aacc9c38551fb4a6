"""Memory that a machine does not have: told in one line, before hours are spent on filling what would be swapped."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import nn

AT_LEAST = 2  # copies of a weight that training holds: itself and its gradient; most optimizers hold more
BYTES = 4  # of a number in float32
CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: str = "cpu") -> float:
    """Bytes that this process may still take: of the GPU, else of the machine, its control group and its own limit."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    free = float(psutil.virtual_memory().available)

    # A container sees the whole machine's memory and may use a part of it.
    try:
        most = int((CGROUP / "memory.max").read_text())
        free = min(free, most - int((CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # no such limit, or none at all ("max")
        pass

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free = min(free, limit - psutil.Process().memory_info().vms)
    return max(free, 0.0)


def check_memory(parameters: int) -> None:
    """Raises ValueError where so many trained parameters, with their gradients, are more than the free memory."""
    free = free_memory()
    needed = AT_LEAST * BYTES * parameters
    if needed > free:
        raise ValueError(
            f"the model would have {parameters / 1e6:,.0f} million parameters, which need more than "
            f"{needed / 2**30:,.1f} GiB in training: {free / 2**30:,.1f} GiB are free; choose smaller sizes"
        )


def check_model(build: Callable[[], nn.Module]) -> None:
    """As `check_memory`, for the model that `build` makes; it is made without memory, and draws no random numbers."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = build()
    check_memory(sum(parameter.numel() for parameter in model.parameters()))


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, of the machine or of the GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
