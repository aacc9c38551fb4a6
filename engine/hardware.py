"""What this machine's processor is good at."""

from __future__ import annotations

import functools
import os
import time

import torch

TRIALS = 8  # products that are timed with each number of threads, about a millisecond each
SIDE = 256  # of their matrices: about what a batch of the embedded LLM multiplies
WORTH = 1.2  # more threads must be so many times as fast as one: they take cores from others

# Names in `torch.cpu.get_capabilities` of instructions that multiply bfloat16 matrices: x86 twice, then ARM.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16")
# Limits that oneDNN, which multiplies, takes from the environment, as far as they leave it none of these.
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


@functools.cache
def multiplies_bf16(device: str) -> bool:
    """Whether `device` (cpu, cuda or mps) multiplies bfloat16 natively; elsewhere float32 is several times as fast."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False

    # What the processor can, and what the environment lets it do.
    limit = next((os.environ[name] for name in LIMITS if name in os.environ), "")
    if limit.upper() in WITHOUT_BF16:
        return False
    instructions = torch.cpu.get_capabilities()
    return any(instructions.get(name, False) for name in BF16_INSTRUCTIONS)


def best_threads() -> int:
    """The number of threads that multiplies fastest now: one, or torch's own choice. Sets it.

    On idle cores that is torch's choice. Where other programs compute on them, threads that wait for each other are
    slower than a single one.
    """
    most = torch.get_num_threads()
    if most == 1:
        return 1

    seconds = {threads: _seconds_of_products(threads) for threads in (1, most)}
    chosen = most if seconds[1] > WORTH * seconds[most] else 1
    torch.set_num_threads(chosen)
    return chosen


def _seconds_of_products(threads: int) -> float:
    """Seconds of `TRIALS` matrix products with so many threads, which are started before."""
    torch.set_num_threads(threads)
    matrix = torch.ones(SIDE, SIDE)
    matrix @ matrix

    started = time.perf_counter()
    for _ in range(TRIALS):
        matrix @ matrix
    return time.perf_counter() - started
