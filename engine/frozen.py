"""Where torch and bitsandbytes treat a frozen LLM badly, and what is done about it."""

from __future__ import annotations

from typing import Any

from torch import nn


def keep_fast(head: nn.Module | None) -> None:
    """From now on copies what a head is given where it is a slice, such as the last position of every row.

    torch 2.13 multiplies a slice (B, 1, D) by weights that need no gradient row by row: it writes the weights B times
    first. For 128 rows and the 49,152 tokens of SmolLM2 in bfloat16 that takes 7.1 GB and 14.8 CPU seconds instead of
    0.03, in float32 1.1 instead of 0.1. The copy is of B x D numbers.
    """
    if head is not None and _contiguous not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_contiguous)


def _contiguous(_head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments, the states in one piece."""
    states, *others = inputs
    return (states.contiguous(), *others)


def keep_as_packed(host: nn.Module) -> None:
    """Keeps the 4-bit weights of bitsandbytes in the order in which they were packed.

    On a CPU with AVX512-BF16 bitsandbytes 0.50 packs them anew at the first forward pass, and its `state_dict` puts
    them back with other scales: whoever saves anything of the model changes its answers. Elsewhere this does nothing.
    """
    for module in host.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - nn.Module declares no such field
