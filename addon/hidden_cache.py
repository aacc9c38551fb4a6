"""`HiddenCache`: what the frozen LLM computes for every training item, computed once, kept in RAM in bfloat16.

A frozen LLM gives the same states in every epoch. Per token the cache keeps the last hidden state (with `hrm_read all`
the states of all layers, too); embeddings are looked up anew, which costs nothing. On the first batch every item is
read, in batches of like length whose make-up depends on the items alone, so that a resumed run fills its cache with the
same numbers. A host in bfloat16 is kept exactly; padding then still changes the last bits of its states.

An item's entry is found by its token ids, and the whole cache belongs to one key (`cache_key`): base weights, what is
read, tokenizer, prompt format and data. A cache is never read under another key. With several processes each holds all
of it, since every epoch deals the items anew. Shapes: B batch, N = S + T - 1 columns, D LLM width, P kept parts.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor

from batching import Batch, PromptConfig, PromptFormat
from engine.memory import free_memory
from engine.positions import token_positions
from model import HostStates, HRMController
from reasoning_gym_wrapper import EVAL_SEED, Example

GB = 1e9
FILL_BATCH = 64  # items that are read together while the cache is filled
PROGRESS_S = 15.0  # seconds between lines of progress meanwhile
SAMPLED = 256  # numbers of each weight that a digest of the LLM looks at


@dataclass(frozen=True)
class CacheConfig:
    """What is kept, and how much of it at most; each field is the flag of its name.

    hrm_read: LLM states that HRM reads: embed, last, embed+last or all.
    cache_max_gb: largest cache of all processes together, in GB (10^9 bytes), above 0.
    """

    hrm_read: str = "embed+last"
    cache_max_gb: float = 4.0


@dataclass(frozen=True)
class ItemsConfig:
    """What decides which items a run trains on; each field is the flag of its name.

    task, tasks: one task, or several with commas between; None = the default ones.
    task_config: their settings; None = small when no task is named, else default.
    data, question_field, answer_field, messages_field, eval_data, verifier: own data, see `own_tasks.table`.
    mix: shares of the tasks.
    train_n: items of a fixed set; 0 = fresh ones without end.
    seed: of the training items.
    eval_n, eval_seed, group_split: what is held out, and so never trained on.
    overlong: error or drop, for items that are too long.
    """

    task: str | None = None
    tasks: str | None = None
    task_config: str | None = None
    data: str | None = None
    question_field: str = "question"
    answer_field: str = "answer"
    messages_field: str | None = None
    eval_data: str | None = None
    verifier: str = "exact"
    mix: str | None = None
    train_n: int = 0
    seed: int = 0
    eval_n: int = 256
    eval_seed: int = EVAL_SEED
    group_split: bool = True
    overlong: str = "error"


# --- how large, and of what -------------------------------------------------------------------------------------------


@dataclass
class CachePlan:
    """The items to keep and what they take, known before any model loads."""

    examples: list[Example]  # distinct in their token ids, from short to long
    rows: list[list[int]]  # token ids of prompt and target of each
    width: int  # P x D numbers a token
    processes: int = 1  # on this machine, each with a cache of its own
    tokens: int = field(init=False)  # kept columns: the last target token predicts nothing

    def __post_init__(self) -> None:
        self.tokens = sum(len(row) - 1 for row in self.rows)

    @property
    def bytes(self) -> int:
        """Of one process: bfloat16, and a row of zeros for pads."""
        return 2 * (self.tokens + 1) * self.width

    def size_text(self) -> str:
        """Bytes, items and tokens, for the user."""
        each = f", in each of {self.processes} processes" if self.processes > 1 else ""
        return (f"{self.bytes / GB:.3f} GB for {len(self.rows)} items ({self.tokens} tokens of {self.width} numbers in "
                f"bf16){each}")

    def check(self, most_gb: float) -> None:
        """Raises ValueError when it is larger than `most_gb` allows, or than the machine's free memory."""
        needed = self.bytes * self.processes
        free = free_memory()
        if needed > most_gb * GB:
            raise ValueError(
                f"--cache_hidden ram needs {self.size_text()}: more than --cache_max_gb {most_gb:g}; raise it, lower "
                "--train_n, or leave the cache off"
            )
        if needed > free:
            raise ValueError(
                f"--cache_hidden ram needs {self.size_text()}: more than the {free / GB:.1f} GB of memory that are "
                "free; lower --train_n, or leave the cache off"
            )


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

    plan = CachePlan([distinct[row] for row in rows], [list(row) for row in rows], parts * text.hidden_size, processes)
    plan.check(config.cache_max_gb)
    return plan


# --- keys -------------------------------------------------------------------------------------------------------------


def weights_digest(host: Any) -> str:
    """Digest of names, shapes and up to `SAMPLED` numbers of every weight."""
    digest = hashlib.sha256()
    for name, tensor in host.state_dict().items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(flat.numel() // SAMPLED, 1)].float().cpu().numpy().tobytes()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode() + sample)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of the vocabulary (of a fast tokenizer, of all its rules) and of the chat template."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        vocabulary = fast.to_str()
    else:
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{vocabulary}{tokenizer.chat_template}".encode()).hexdigest()


def cache_key(controller: HRMController, tokenizer: Any, prompt: PromptConfig, items: ItemsConfig) -> str:
    """Digest of all that the LLM's states of the training items depend on."""
    parts = {
        "weights": weights_digest(controller.host),
        "read": "all" if controller.config.hrm_read == "all" else "last",
        "tokenizer": tokenizer_digest(tokenizer),
        **asdict(prompt),
        **asdict(items),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# --- the cache --------------------------------------------------------------------------------------------------------


def say_nothing(text: str) -> None:
    """The `say` of a cache that reports to nobody."""


class HiddenCache:
    """Hidden states by item. `say` gets lines of progress while it is filled, and one when it has been."""

    def __init__(self, key: str, plan: CachePlan, prompt_format: PromptFormat,
                 say: Callable[[str], None] = say_nothing):
        self.key = key
        self.plan = plan
        self.format = prompt_format
        self.say = say
        self.states: Tensor | None = None  # (tokens + 1, P D) bfloat16 on CPU; row 0 is zero
        self._start: dict[tuple[int, ...], int] = {}  # token ids of an item -> its first row in `states`
        self.fill_seconds = 0.0

    def encoder(self, controller: HRMController, key: str) -> Callable[[Batch], HostStates]:
        """What stands in for `controller.encode`; the first call fills the cache.

        Raises:
            ValueError: `key` is not that of this cache.
        """
        if key != self.key:
            raise ValueError(f"this cache of hidden states belongs to another LLM, prompt format or data (key "
                             f"{self.key[:12]}, asked for {key[:12]}): make a new one")

        def encode(batch: Batch) -> HostStates:
            if self.states is None:
                self._fill(controller)
            with torch.no_grad():
                last, read = self._read(controller, batch)
                return controller.host_states(batch, last, read)

        return encode

    # --- filling ---

    @torch.no_grad()
    def _fill(self, controller: HRMController) -> None:
        """Reads every item once."""
        started = time.perf_counter()
        before = psutil.Process().memory_info().rss
        states = torch.empty(self.plan.tokens + 1, self.plan.width, dtype=torch.bfloat16)
        states[0] = 0

        place = 1
        last_line = started
        for first in range(0, len(self.plan.rows), FILL_BATCH):
            chosen = slice(first, first + FILL_BATCH)
            place = self._store(controller, states, place, self.plan.examples[chosen], self.plan.rows[chosen])

            now = time.perf_counter()
            if now - last_line >= PROGRESS_S:
                last_line = now
                self._say_progress(now - started)
        assert place == len(states), f"cache: {place} of {len(states)} rows filled"

        self.states = states
        self.fill_seconds = time.perf_counter() - started
        grown = psutil.Process().memory_info().rss - before
        self.say(f"hidden states cached: {states.nbytes / GB:.3f} GB of {len(self._start)} items in "
                 f"{self.fill_seconds:.1f} s; the process grew by {grown / GB:.3f} GB")

    def _say_progress(self, seconds: float) -> None:
        """Says how many items the first `seconds` have read, and how long the others will take."""
        done = len(self._start)
        items = len(self.plan.rows)
        left = (items / done - 1) * seconds
        self.say(f"caching hidden states: {done} of {items} items, {left:.0f} s left")

    def _store(self, controller: HRMController, states: Tensor, place: int, examples: list[Example],
               rows: list[list[int]]) -> int:
        """Writes the states of a few items into `states` from row `place` on; returns the first row behind them."""
        device = controller.get_input_embeddings().weight.device
        batch = self.format.batch(examples).to(device)
        parts = self._parts(controller, batch)

        # All tokens of a row but its last.
        mask = batch.attention_mask.bool()
        kept = parts[mask[:, :-1] & mask[:, 1:]]
        states[place : place + len(kept)] = kept.to("cpu", torch.bfloat16)

        for row in rows:
            self._start[tuple(row)] = place
            place += len(row) - 1
        return place

    def _parts(self, controller: HRMController, batch: Batch) -> Tensor:
        """(B, N, P D) hidden states to keep."""
        ids = batch.input_ids[:, :-1]
        mask = batch.attention_mask[:, :-1]
        last, read, _ = controller.model.run_host(ids, mask, token_positions(mask))
        every_layer = read if controller.config.hrm_read == "all" else []
        return torch.cat([last, *every_layer], dim=-1)

    # --- reading ---

    def _read(self, controller: HRMController, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """(last hidden states, what HRM reads), (B, N, D) each, in the host's dtype; zeros at pads."""
        ids = batch.input_ids
        index = self._rows_of(batch)
        dtype = controller.get_input_embeddings().weight.dtype
        parts = self.states[index].to(ids.device, dtype)
        last, *layers = parts.split(controller.get_output_embeddings().weight.shape[-1], dim=-1)
        return last, layers or controller.model.states_read(ids[:, :-1], last)

    def _rows_of(self, batch: Batch) -> Tensor:
        """(B, N) rows of `states` that hold the batch's columns, 0 at pads.

        Raises:
            ValueError: items that are not in the cache.
        """
        ids = batch.input_ids.cpu()
        mask = batch.attention_mask.bool().cpu()
        rows = [tuple(row[attended].tolist()) for row, attended in zip(ids, mask, strict=True)]
        missing = sum(row not in self._start for row in rows)
        if missing:
            raise ValueError(f"{missing} items of a batch are not in the cache of hidden states: it was made for "
                             "other training items")

        # `inner` counts a row's own tokens from 0; prompts are padded on the left.
        start = torch.tensor([self._start[row] for row in rows])[:, None]
        length = torch.tensor([len(row) - 1 for row in rows])[:, None]
        pads = (batch.prompt_mask.cpu() == 0).sum(dim=1, keepdim=True)
        inner = torch.arange(ids.shape[1] - 1) - pads
        return torch.where((inner >= 0) & (inner < length), start + inner, 0)
