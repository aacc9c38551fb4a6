"""What a cache of hidden states keeps: which items, how large that is, how a number is stored.

Shapes: K tokens, P kept parts (the last hidden state, with `hrm_read all` those of every layer, too), D LLM width.
"""

from __future__ import annotations

import functools
import hashlib
import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from batching import PromptFormat
from engine.memory import free_memory
from reasoning_gym_wrapper import Example

GB = 1e9
FILL_BATCH = 64  # items that are read together while the cache is filled
LARGEST = 127  # of int8, whose -128 is not used
IDLE_SETTINGS = {"architectures", "dtype", "quantization_config", "torch_dtype", "transformers_version", "use_cache"}

Read = Callable[[slice], Tensor]  # items of the plan -> (their columns, P, D)


@dataclass(frozen=True)
class CacheConfig:
    """What is kept, where, and how much of it at most; each field is the flag of its name.

    cache_hidden: off, ram or disk.
    cache_dir: folder of every cache on disk; None = no such cache.
    cache_dtype: what a number is stored in: bf16 (2 bytes), or int8 with a scale for each token and part.
    cache_max_gb: largest cache of all processes together, in GB (10^9 bytes), above 0.
    hrm_read: LLM states that HRM reads: embed, last, embed+last or all.
    """

    cache_hidden: str = "off"
    cache_dir: str | None = None
    cache_dtype: str = "bf16"
    cache_max_gb: float = 4.0
    hrm_read: str = "embed+last"


# --- how a number is stored -------------------------------------------------------------------------------------------


def pack(states: Tensor, dtype: str) -> dict[str, Tensor]:
    """The tensors that keep `states` (K, P, D), on the CPU: `states`, and with int8 `scales` (K, P) float32.

    An int8 is the number divided by its scale, the 127th part of the largest of the D numbers beside it.
    """
    if dtype == "bf16":
        return {"states": states.to("cpu", torch.bfloat16)}

    states = states.to("cpu", torch.float32)
    scales = states.abs().amax(dim=-1) / LARGEST
    divisor = scales.clamp_min(torch.finfo(torch.float32).tiny)  # a state of zeros has no largest number
    whole = (states / divisor[..., None]).round().clamp(-LARGEST, LARGEST)
    return {"states": whole.to(torch.int8), "scales": scales}


def unpack(kept: dict[str, Tensor]) -> Tensor:
    """(..., P, D) of tensors that `pack` made: bfloat16 as it is, int8 as float32."""
    if "scales" in kept:
        return kept["states"].float() * kept["scales"][..., None]
    return kept["states"]


# --- how large, and of what -------------------------------------------------------------------------------------------


@dataclass
class CachePlan:
    """The items to keep and what they take, known before any model loads."""

    examples: list[Example]  # distinct in their token ids, from short to long
    rows: list[list[int]]  # token ids of prompt and target of each
    parts: int  # P
    width: int  # D
    config: CacheConfig = CacheConfig()
    processes: int = 1  # on this machine, each with a cache of its own
    llm: str = ""  # digest of its settings, see `settings_digest`
    tokens: int = field(init=False)  # kept columns: the last target token predicts nothing
    starts: list[int] = field(init=False)  # of each item, its first column among them

    def __post_init__(self) -> None:
        self.starts = []
        self.tokens = 0
        for row in self.rows:
            self.starts.append(self.tokens)
            self.tokens += len(row) - 1

    def bytes_of(self, tokens: int) -> int:
        """Bytes that so many tokens take."""
        numbers = self.parts * self.width
        if self.config.cache_dtype == "bf16":
            return 2 * numbers * tokens
        return (numbers + 4 * self.parts) * tokens

    @property
    def bytes(self) -> int:
        """Of the cache of one process, and a row of zeros for pads."""
        return self.bytes_of(self.tokens + 1)

    def batches(self) -> list[slice]:
        """The items that are read together, in order: their make-up depends on the items alone."""
        return [slice(first, first + FILL_BATCH) for first in range(0, len(self.rows), FILL_BATCH)]

    def tokens_of(self, items: slice) -> int:
        """Kept columns of some of the items."""
        return sum(len(row) - 1 for row in self.rows[items])

    @functools.cached_property
    def items_digest(self) -> str:
        """Digest of what the items are: their token ids, in which question, answer, frame and tokenizer meet."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(array("q", [len(row), *row]).tobytes())
        return digest.hexdigest()

    def size_text(self) -> str:
        """Bytes, items and tokens, for the user."""
        each = f", in each of {self.processes} processes" if self.processes > 1 else ""
        return (f"{self.bytes / GB:.3f} GB for {len(self.rows)} items ({self.tokens} tokens of "
                f"{self.parts * self.width} numbers in {self.config.cache_dtype}){each}")

    def check(self) -> None:
        """Raises ValueError when it is larger than `cache_max_gb` allows, or in RAM than the free memory."""
        config = self.config
        needed = self.bytes * self.processes
        what = f"--cache_hidden {config.cache_hidden} needs {self.size_text()}"
        if needed > config.cache_max_gb * GB:
            raise ValueError(
                f"{what}: more than --cache_max_gb {config.cache_max_gb:g}; raise it, lower --train_n, or leave the "
                "cache off"
            )

        free = free_memory()
        if config.cache_hidden == "ram" and needed > free:
            raise ValueError(
                f"{what}: more than the {free / GB:.1f} GB of memory that are free; lower --train_n, take "
                "--cache_hidden disk, or leave the cache off"
            )


def settings_digest(text_config: Any) -> str:
    """Digest of what an LLM computes with its weights: those of its settings that differ from their defaults.

    Names, versions, and what its weights are held in do not count.
    """
    settings = {name: value for name, value in text_config.to_diff_dict().items()
                if not name.startswith("_") and name not in IDLE_SETTINGS}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def plan_cache(config: CacheConfig, host_config: Any, prompt_format: PromptFormat, examples: Sequence[Example],
               processes: int = 1) -> CachePlan:
    """The plan of a run's cache; `host_config` is its LLM's. Raises ValueError as `CachePlan.check`."""
    text = host_config.get_text_config()
    parts = 1
    if config.hrm_read == "all":
        parts += text.num_hidden_layers + 1

    # Items that read alike share an entry.
    prompts = prompt_format.prompts([example.question for example in examples])
    targets = prompt_format.targets([example.target or "" for example in examples])
    distinct: dict[tuple[int, ...], Example] = {}
    for prompt, target, example in zip(prompts, targets, examples, strict=True):
        distinct[tuple(prompt + target)] = example
    rows = sorted(distinct, key=lambda row: (len(row), row))

    # The processes of one machine read the same files.
    shared = config.cache_hidden == "disk"
    plan = CachePlan(
        [distinct[row] for row in rows], [list(row) for row in rows], parts, text.hidden_size, config,
        1 if shared else processes, settings_digest(text),
    )
    plan.check()
    return plan


