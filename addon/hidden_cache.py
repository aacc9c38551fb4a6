"""`HiddenCache`: what the frozen LLM computes for every training item, computed once, kept in RAM or on disk.

A frozen LLM gives the same states in every epoch. Per token the cache keeps the last hidden state (with `hrm_read all`
the states of all layers, too); embeddings are looked up anew, which costs nothing. Before the first batch every item is
read, in batches of like length whose make-up depends on the items alone, so that a resumed run fills its cache with the
same numbers. A host in bfloat16 is kept exactly; padding then still changes the last bits of its states.

An item's entry is found by its token ids, and the whole cache belongs to one key (`cache_key`): base weights, what is
read, tokenizer, and the items as token ids, prompt frame and all. A cache is never read under another key. In RAM each
of several processes holds all of it, since every epoch deals the items anew; on disk they share the files.
Shapes: B batch, N = S + T - 1 columns, P kept parts, D LLM width.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor

from addon.cache_plan import GB, CachePlan, Read, pack, unpack
from addon.cache_shards import FORMAT, ShardStore, shards_of
from batching import Batch, PromptFormat
from engine.placement import device_of, real_state
from engine.positions import token_positions
from engine.stopping import stop_point
from model import HostStates, HRMController

PROGRESS_S = 15.0  # seconds between lines of progress while the cache is filled
SAMPLED = 256  # numbers of each weight that a digest of the LLM looks at where the cache goes with the process


# --- keys -------------------------------------------------------------------------------------------------------------


def weights_digest(host: Any, whole: bool = False) -> str:
    """Digest of names, shapes and numbers of every weight: all numbers where `whole`, else up to `SAMPLED` of each."""
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in real_state(host):
        flat = tensor.detach().flatten()
        if not whole:
            flat = flat[:: max(flat.numel() // SAMPLED, 1)]
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of the vocabulary (of a fast tokenizer, of all its rules) and of the chat template."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        vocabulary = fast.to_str()
    else:
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{vocabulary}{tokenizer.chat_template}".encode()).hexdigest()


def cache_key(controller: HRMController, tokenizer: Any, plan: CachePlan) -> str:
    """Digest of all that the kept states of the items depend on, and on disk of how they are cut into files."""
    weights = weights_digest(controller.host, whole=plan.config.cache_hidden == "disk")
    return key_of(weights, controller.config.hrm_read, tokenizer, plan)


def key_of(weights: str, hrm_read: str, tokenizer: Any, plan: CachePlan) -> str:
    """As `cache_key`, of an LLM whose weights have the digest `weights` and of which HRM reads `hrm_read`."""
    on_disk = plan.config.cache_hidden == "disk"
    parts = {
        "weights": weights,
        "settings": plan.llm,
        "read": "all" if hrm_read == "all" else "last",
        "tokenizer": tokenizer_digest(tokenizer),
        "items": plan.items_digest,
        "dtype": plan.config.cache_dtype,
    }

    if on_disk:
        parts["files"] = f"{FORMAT} {shards_of(plan)}"
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# --- the cache --------------------------------------------------------------------------------------------------------


class Store(Protocol):
    """Where the states of a plan are kept."""

    to_read: int  # items that this process has to read, once `fill` has looked

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""

    def fill(self, read: Read, done: Callable[[int], None]) -> None:
        """Keeps what `read` computes for the items that it lacks, and tells `done` how many were read each time."""

    def gather(self, columns: Tensor) -> Tensor:
        """(..., P, D) states of the columns (...,) of the cache, zeros where a column is negative."""


class RamStore:
    """The states of a plan in memory."""

    def __init__(self, plan: CachePlan):
        self.plan = plan
        self.to_read = len(plan.rows)
        self._kept: dict[str, Tensor] = {}  # as `pack` makes them; the first row is zero, for pads

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._kept.values())

    @property
    def states(self) -> Tensor:
        """(tokens + 1, P, D) in the dtype that they are kept in; the first row is of pads."""
        return self._kept["states"]

    def fill(self, read: Read, done: Callable[[int], None]) -> None:
        place = 1
        for items in self.plan.batches():
            stop_point()
            packed = pack(read(items), self.plan.config.cache_dtype)
            count = len(packed["states"])

            for name, tensor in packed.items():
                if name not in self._kept:
                    self._kept[name] = tensor.new_empty(self.plan.tokens + 1, *tensor.shape[1:])
                    self._kept[name][0] = 0
                self._kept[name][place : place + count] = tensor
            place += count
            done(len(self.plan.rows[items]))
        assert place == self.plan.tokens + 1, f"cache: {place} of {self.plan.tokens + 1} rows filled"

    def gather(self, columns: Tensor) -> Tensor:
        rows = columns.clamp_min(-1) + 1
        return unpack({name: tensor[rows] for name, tensor in self._kept.items()})


def say_nothing(text: str) -> None:
    """The `say` of a cache that reports to nobody."""


class HiddenCache:
    """Hidden states by item. `say` gets lines of progress while it is filled, and one when it has been.

    `source` names the LLM in the record of a cache on disk, for people. `share` is this process's part in filling it,
    see `ShardStore`.
    """

    def __init__(self, key: str, plan: CachePlan, prompt_format: PromptFormat,
                 say: Callable[[str], None] = say_nothing, source: str = "", share: tuple[int, int] = (0, 1)):
        self.key = key
        self.plan = plan
        self.format = prompt_format
        self.say = say
        self.store: Store = RamStore(plan)
        if plan.config.cache_hidden == "disk":
            facts = {"model_name": source, "hrm_read": plan.config.hrm_read, "dtype": plan.config.cache_dtype}
            self.store = ShardStore(plan, key, facts, say, share)
        self.is_filled = False
        self.fill_seconds = 0.0
        self._start = {tuple(row): start for row, start in zip(plan.rows, plan.starts, strict=True)}
        self._done = 0  # items that this process has read

    def encoder(self, controller: HRMController, key: str) -> Callable[[Batch], HostStates]:
        """What stands in for `controller.encode`; the first call fills the cache, unless it is filled.

        Raises:
            ValueError: `key` is not that of this cache.
        """
        if key != self.key:
            raise ValueError(f"this cache of hidden states belongs to another LLM, prompt format or data (key "
                             f"{self.key[:12]}, asked for {key[:12]}): make a new one")

        def encode(batch: Batch) -> HostStates:
            self.fill(controller)
            with torch.no_grad():
                last, read = self._read(controller, batch)
                return controller.host_states(batch, last, read)

        return encode

    def open_whole(self) -> None:
        """Opens a cache on disk without anything to fill it with. Raises ValueError as `ShardStore.open_whole`."""
        assert isinstance(self.store, ShardStore)
        self.store.open_whole()

    # --- filling ---

    @torch.no_grad()
    def fill(self, controller: HRMController) -> None:
        """Reads every item that the cache lacks; does nothing where it is filled.

        Raises:
            ValueError: the disk refuses.
            StopRequested: between two batches, as `engine.stopping.stop_point`; what is on disk stays.
        """
        if self.is_filled:
            return

        started = time.perf_counter()
        before = psutil.Process().memory_info().rss
        told = started

        def read(items: slice) -> Tensor:
            stop_point()
            return self._states(controller, items)

        def done(items: int) -> None:
            nonlocal told
            self._done += items

            now = time.perf_counter()
            if now - told >= PROGRESS_S:
                told = now
                self._say_progress(now - started)

        self.store.fill(read, done)

        self.is_filled = True
        self.fill_seconds = time.perf_counter() - started
        grown = psutil.Process().memory_info().rss - before
        self.say(f"hidden states cached: {self._size()} of {len(self._start)} items in {self.fill_seconds:.1f} s; the "
                 f"process grew by {grown / GB:.3f} GB")

    def _size(self) -> str:
        """Bytes of the cache, and on disk where it is and what of it was there already."""
        size = f"{self.store.nbytes / GB:.3f} GB"
        if not isinstance(self.store, ShardStore):
            return size
        among = f" by the first of {self.store.world} processes" if self.store.world > 1 else ""
        return f"{size} in {self.store.folder}, {self._done} read now{among},"

    def _say_progress(self, seconds: float) -> None:
        """Says how many items the first `seconds` have read, and how long those left to this process will take."""
        items = self.store.to_read
        left = (items / self._done - 1) * seconds
        self.say(f"caching hidden states: {self._done} of {items} items, {left:.0f} s left")

    def _states(self, controller: HRMController, items: slice) -> Tensor:
        """(their columns, P, D) states of a few items, which are read together."""
        device = device_of(controller)
        batch = self.format.batch(self.plan.examples[items]).to(device)
        parts = self._parts(controller, batch)

        # All tokens of a row but its last.
        mask = batch.attention_mask.bool()
        return parts[mask[:, :-1] & mask[:, 1:]]

    def _parts(self, controller: HRMController, batch: Batch) -> Tensor:
        """(B, N, P, D) hidden states to keep."""
        ids = batch.input_ids[:, :-1]
        mask = batch.attention_mask[:, :-1]
        last, read, _ = controller.model.run_host(ids, mask, token_positions(mask))
        every_layer = read if controller.config.hrm_read == "all" else []
        return torch.stack([last, *every_layer], dim=-2)

    # --- reading ---

    def _read(self, controller: HRMController, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """(last hidden states, what HRM reads), (B, N, D) each, in the host's dtype; zeros at pads."""
        ids = batch.input_ids
        columns = self._columns_of(batch)
        dtype = controller.get_input_embeddings().weight.dtype
        parts = self.store.gather(columns).to(ids.device, dtype)
        last, *layers = parts.unbind(dim=-2)
        return last, layers or controller.model.states_read(ids[:, :-1], last)

    def _columns_of(self, batch: Batch) -> Tensor:
        """(B, N) columns of the cache that the batch's columns are, -1 at pads.

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
        return torch.where((inner >= 0) & (inner < length), start + inner, -1)
