"""`HiddenCache`: what the frozen LLM says of every training item, asked once, kept in RAM in bfloat16.

A frozen LLM says the same thing in every epoch. Per token the cache keeps the last hidden state (with `hrm_read all`
the states of all layers, too); embeddings are looked up anew, which costs nothing. On the first batch every item is
read, in batches of like length whose make-up depends on the items alone, so that a resumed run fills its cache with the
same numbers. A host in bfloat16 is kept exactly; padding then still changes the last bits of what it says.

An item's entry is found by its token ids, and the whole cache belongs to one key (`cache_key`): base weights, what is
read, tokenizer, prompt format and data. A cache is never read under another key. With several processes each holds all
of it, since every epoch deals the items anew. Shapes: B batch, N = S + T - 1 columns, D LLM width, P kept parts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor

from addon.adapters import PROMPT_FIELDS
from batching import Batch, PromptFormat
from hrm_blocks import token_positions
from model import HostStates, HRMController
from reasoning_gym_wrapper import Example

GB = 1e9
FILL_BATCH = 64
TELL_S = 15.0  # between lines of progress while the cache is filled
DATA_FIELDS = ("task", "tasks", "task_config", "train_n", "seed", "eval_n", "eval_seed", "group_split", "overlong")


# --- how large, and of what ---


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

    def told(self) -> str:
        each = f", in each of {self.processes} processes" if self.processes > 1 else ""
        return (f"{self.bytes / GB:.3f} GB for {len(self.rows)} items ({self.tokens} tokens of {self.width} numbers in "
                f"bf16){each}")

    def check(self, most_gb: float) -> None:
        """Raises ValueError when it is larger than `most_gb` allows, or than the machine's free memory."""
        needed, free = self.bytes * self.processes, psutil.virtual_memory().available
        if needed > most_gb * GB:
            raise ValueError(f"--cache_hidden ram needs {self.told()}: more than --cache_max_gb {most_gb:g}; raise it, "
                             "lower --train_n, or leave the cache off")
        if needed > free:
            raise ValueError(f"--cache_hidden ram needs {self.told()}: more than the {free / GB:.1f} GB of memory that "
                             "are free; lower --train_n, or leave the cache off")


def plan_cache(opts: argparse.Namespace, config: Any, prompt_format: PromptFormat, examples: Sequence[Example],
               processes: int = 1) -> CachePlan:
    """The plan of a run's cache; `config` is that of its LLM. Raises ValueError as `CachePlan.check`."""
    text = config.get_text_config()
    parts = 1 + (text.num_hidden_layers + 1 if opts.hrm_read == "all" else 0)
    prompts = prompt_format.prompts([example.question for example in examples])
    targets = prompt_format.targets([example.target or "" for example in examples])
    distinct = {tuple(p + t): example for p, t, example in zip(prompts, targets, examples, strict=True)}
    rows = sorted(distinct, key=lambda row: (len(row), row))
    plan = CachePlan([distinct[row] for row in rows], [list(row) for row in rows], parts * text.hidden_size, processes)
    plan.check(opts.cache_max_gb)
    return plan


def weights_digest(host: Any) -> str:
    """Digest of names, shapes and up to 256 numbers of every weight."""
    found = hashlib.sha256()
    for name, tensor in host.state_dict().items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(flat.numel() // 256, 1)].float().cpu().numpy().tobytes()
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode() + sample)
    return found.hexdigest()


def cache_key(controller: HRMController, prompt_format: PromptFormat, opts: argparse.Namespace) -> str:
    """Digest of all that the LLM's states of the training items depend on."""
    tokenizer = prompt_format.tokenizer
    fast = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = fast.to_str() if fast is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts = {
        "weights": weights_digest(controller.host),
        "read": "all" if controller.config.hrm_read == "all" else "last",
        "tokenizer": hashlib.sha256(f"{vocabulary}{tokenizer.chat_template}".encode()).hexdigest(),
        **{name: getattr(opts, name) for name in (*PROMPT_FIELDS, *DATA_FIELDS)},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# --- the cache ---


class HiddenCache:
    """Hidden states by item. `say` is told when it has been filled."""

    def __init__(self, key: str, plan: CachePlan, prompt_format: PromptFormat,
                 say: Callable[[str], None] = lambda text: None):
        self.key, self.plan, self.format, self.say = key, plan, prompt_format, say
        self.states: Tensor | None = None  # (tokens + 1, P D) bfloat16 on CPU; row 0 is zero
        self._start: dict[tuple[int, ...], int] = {}
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

    def _parts(self, controller: HRMController, batch: Batch) -> Tensor:
        """(B, N, P D) of what the LLM says."""
        ids, mask = batch.input_ids[:, :-1], batch.attention_mask[:, :-1]
        last, read, _ = controller.model.run_host(ids, mask, token_positions(mask))
        every_layer = read if controller.config.hrm_read == "all" else []
        return torch.cat([last, *every_layer], dim=-1)

    @torch.no_grad()
    def _fill(self, controller: HRMController) -> None:
        """Reads every item once."""
        started, before = time.perf_counter(), psutil.Process().memory_info().rss
        told = started
        device = controller.get_input_embeddings().weight.device
        states = torch.empty(self.plan.tokens + 1, self.plan.width, dtype=torch.bfloat16)
        states[0] = 0
        place = 1
        for first in range(0, len(self.plan.examples), FILL_BATCH):
            batch = self.format.batch(self.plan.examples[first : first + FILL_BATCH]).to(device)
            said = self._parts(controller, batch)
            mask = batch.attention_mask.bool()
            kept = said[mask[:, :-1] & mask[:, 1:]]  # all tokens of a row but its last
            states[place : place + len(kept)] = kept.to("cpu", torch.bfloat16)
            for row in self.plan.rows[first : first + FILL_BATCH]:
                self._start[tuple(row)] = place
                place += len(row) - 1
            now = time.perf_counter()
            if now - told >= TELL_S:
                told, left = now, (len(self.plan.rows) / len(self._start) - 1) * (now - started)
                self.say(f"caching hidden states: {len(self._start)} of {len(self.plan.rows)} items, {left:.0f} s left")
        assert place == len(states), f"cache: {place} of {len(states)} rows filled"
        self.states, self.fill_seconds = states, time.perf_counter() - started
        grown = psutil.Process().memory_info().rss - before
        self.say(f"hidden states cached: {states.nbytes / GB:.3f} GB of {len(self._start)} items in "
                 f"{self.fill_seconds:.1f} s; the process grew by {grown / GB:.3f} GB")

    def _read(self, controller: HRMController, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """(last hidden states, what HRM reads), (B, N, D) each, in the host's dtype; zeros at pads."""
        ids, mask = batch.input_ids, batch.attention_mask
        rows = [tuple(row[seen].tolist()) for row, seen in zip(ids.cpu(), mask.bool().cpu(), strict=True)]
        missing = [row for row in rows if row not in self._start]
        if missing:
            raise ValueError(f"{len(missing)} items of a batch are not in the cache of hidden states: it was made for "
                             "other training items")
        start = torch.tensor([self._start[row] for row in rows])[:, None]
        length = torch.tensor([len(row) - 1 for row in rows])[:, None]
        inner = torch.arange(ids.shape[1] - 1) - (batch.prompt_mask.cpu() == 0).sum(dim=1, keepdim=True)
        index = torch.where((inner >= 0) & (inner < length), start + inner, 0)
        table = controller.get_input_embeddings()
        said = self.states[index].to(ids.device, table.weight.dtype)
        last, *layers = said.split(controller.get_output_embeddings().weight.shape[-1], dim=-1)
        if controller.config.hrm_read == "embed+last":
            return last, [table(ids[:, :-1]), last]
        return last, layers or [last]
