"""What this machine's processor is good at."""

from __future__ import annotations

import functools

import psutil
import torch

# Names in `torch.cpu.get_capabilities` of instructions that multiply bfloat16 matrices: x86 twice, then ARM.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16")


@functools.cache
def multiplies_bf16(device: str) -> bool:
    """Whether `device` (cpu, cuda or mps) multiplies bfloat16 natively; elsewhere float32 is several times as fast."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False

    instructions = torch.cpu.get_capabilities()
    return any(instructions.get(name, False) for name in BF16_INSTRUCTIONS)


def free_memory(device: str) -> int:
    """Bytes that are free on `device`: the GPU's own memory, else the machine's."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available
