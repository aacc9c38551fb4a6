"""Hidden states on disk: safetensors files (shards) in a folder of their own, mapped into memory and shared.

The folder's name holds two digests, of the items and of all that their states depend on, so every run, arm of a grid
and adapter that reads the same finds the same files, and no other does. A shard holds whole batches of items, and which
ones depends on the items alone: a shard that is written again has the same numbers.

A shard is written aside and renamed: it is whole or not there. Its record holds a CRC-32 of its tensors, which is
compared when it is opened. Each process of a run fills its share of the shards, whose numbers tell whose they are, and
waits for the others'. Runs that fill the same folder lock the shard that they write, and wait for each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from addon.cache_plan import GB, CachePlan, Read, pack, unpack
from engine.checkpoints import disk_check
from engine.files import WriteError, reason_of, write_bytes_aside, write_problem, write_text_aside
from engine.ownership import HELD
from engine.stopping import stop_point

SHARD_BYTES = 64_000_000  # a shard ends with the batch that takes it to this size or beyond
FORMAT = 1  # of the files
NAMED = 16  # characters of each digest in the folder's name
WAIT_S = 0.2  # seconds between two looks at what another process fills
TOLD_S = 15.0  # seconds of waiting before the first line about it, and from one line to the next
RECORD = "cache.json"


class DamagedShard(ValueError):
    """A shard's file is not what was written; the message says why."""


@dataclass(frozen=True)
class Shard:
    """A file of the cache: which batches of items, and which of the kept columns.

    number: from 0.
    batches: the items, in parts that are read together.
    first: its first column among those of the whole cache.
    tokens: its columns.
    """

    number: int
    batches: tuple[slice, ...]
    first: int
    tokens: int

    @property
    def name(self) -> str:
        return f"shard-{self.number:05d}.safetensors"


def shards_of(plan: CachePlan) -> list[Shard]:
    """The shards that a plan is cut into."""
    shards: list[Shard] = []
    batches: list[slice] = []
    first = 0
    tokens = 0

    for batch in plan.batches():
        batches.append(batch)
        tokens += plan.tokens_of(batch)
        if plan.bytes_of(tokens) >= SHARD_BYTES:
            shards.append(Shard(len(shards), tuple(batches), first, tokens))
            first += tokens
            batches = []
            tokens = 0

    if batches:
        shards.append(Shard(len(shards), tuple(batches), first, tokens))
    return shards


# --- before the model loads -------------------------------------------------------------------------------------------


def check_folder(plan: CachePlan, beside: int = 0) -> None:
    """Whether the cache can lie in `cache_dir`, asked before the LLM is there, whose digest is a part of the name.

    Args:
        plan: what is kept.
        beside: bytes that are to be written beside it.

    Raises:
        ValueError: the folder cannot be written, or has too little room, and no whole cache of these items lies there.
    """
    folder = Path(plan.config.cache_dir)
    candidates = _candidates(folder, plan)

    missing = plan.bytes - max(candidates, default=0)
    is_whole = missing <= plan.bytes - plan.bytes_of(plan.tokens)
    if is_whole and not beside:  # it may lie where nobody may write
        return

    disk_check(folder, "--cache_dir")
    check_room(folder, missing + beside)


def _candidates(folder: Path, plan: CachePlan) -> list[int]:
    """Bytes of the shards in each folder of these items."""
    names = [shard.name for shard in shards_of(plan)]

    sizes = []
    for place in folder.glob(f"{plan.items_digest[:NAMED]}-*"):
        sizes.append(sum((place / name).stat().st_size for name in names if (place / name).exists()))
    return sizes


def check_room(folder: Path, needed: int) -> None:
    """Raises ValueError where the disk of `folder` has less room than `needed` bytes."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"--cache_hidden disk needs {needed / GB:.3f} GB more in --cache_dir {folder}: {free / GB:.3f} GB are free "
            "there; free some space, choose another folder, or lower --train_n"
        )


# --- the files --------------------------------------------------------------------------------------------------------


def folder_of(plan: CachePlan, key: str) -> Path:
    """Where the files of a plan lie whose states have this key."""
    return Path(plan.config.cache_dir) / f"{plan.items_digest[:NAMED]}-{key[:NAMED]}"


class ShardStore:
    """The states of a plan in `cache_dir`.

    Args:
        plan: what is kept.
        key: digest of all that the states depend on.
        facts: what the folder's record shall say beside it, for people.
        say: takes lines for the user.
        share: (number of this process from 0, number of processes) of those that fill together. A process fills the
            shards whose numbers leave its own when they are divided by that of all.
    """

    def __init__(self, plan: CachePlan, key: str, facts: dict[str, object], say: Callable[[str], None],
                 share: tuple[int, int] = (0, 1)):
        self.plan = plan
        self.key = key
        self.say = say
        self.rank, self.world = share
        self.to_read = 0  # items that this process has to read, once `fill` has looked
        self.folder = folder_of(plan, key)
        self.shards = shards_of(plan)
        self.facts = {"format": FORMAT, "key": key, "items": len(plan.rows), "tokens": plan.tokens, **facts}
        self._told: set[int] = set()  # numbers of the shards that were told to be damaged
        self._first = torch.tensor([shard.first for shard in self.shards])
        self._tensors: list[dict[str, Tensor] | None] = [None] * len(self.shards)  # mapped, not read

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(tensor.nbytes for kept in self._tensors for tensor in kept.values())

    # --- filling ---

    def fill(self, read: Read, done: Callable[[int], None]) -> None:
        """Opens what is there, and fills what is missing of this process's share, while others fill theirs.

        Args:
            read: computes the states of items.
            done: told the number of items after each batch that was read here.

        Raises:
            ValueError: the disk refuses.
        """
        missing = self._missing()
        if missing and len(missing) < len(self.shards):
            self.say(f"{self.folder} holds {len(self.shards) - len(missing)} of {len(self.shards)} shards: the others "
                     "are filled")
        if missing:
            check_room(self.folder, sum(self.plan.bytes_of(shard.tokens) for shard in missing))
            write_text_aside(self.folder / RECORD, json.dumps(self.facts, indent=1) + "\n", "--cache_dir")
        self.to_read = sum(len(self.plan.rows[batch]) for shard in missing if self._is_mine(shard)
                           for batch in shard.batches)

        # Whoever has no shard left to take waits for those that others hold, or for their end.
        told = time.monotonic()
        while missing:
            left = [shard for shard in missing if not self._taken(shard, read, done)]
            if len(left) == len(missing):
                stop_point()
                time.sleep(WAIT_S)
                if time.monotonic() - told >= TOLD_S:
                    told = time.monotonic()
                    self.say(f"caching hidden states: another process fills the last {len(left)} shards")
            missing = left

    def _missing(self) -> list[Shard]:
        """Opens every shard that is there, which reads it once; the others. Says how far it is where it takes long."""
        missing = []
        told = time.monotonic()
        for shard in self.shards:
            stop_point()
            if not self._open(shard):
                missing.append(shard)
            if time.monotonic() - told >= TOLD_S:
                told = time.monotonic()
                self.say(f"checking hidden states on disk: {shard.number + 1} of {len(self.shards)} shards")
        return missing

    def _is_mine(self, shard: Shard) -> bool:
        """Whether this process fills the shard, and none of those that fill with it."""
        return shard.number % self.world == self.rank

    def _taken(self, shard: Shard, read: Read, done: Callable[[int], None]) -> bool:
        """Fills a shard of this process's share, or looks whether its owner has. True where it is there now."""
        if self._is_mine(shard):
            return self._fill_alone(shard, read, done)
        return self._open(shard)

    def _fill_alone(self, shard: Shard, read: Read, done: Callable[[int], None]) -> bool:
        """Fills a shard unless another process does. True where it is there now."""
        with self._locked(shard) as mine:
            # Another process may have written it since.
            if self._open(shard):
                return True
            if not mine:
                return False

            parts = []
            for batch in shard.batches:
                parts.append(pack(read(batch), self.plan.config.cache_dtype))
                done(len(self.plan.rows[batch]))
            self._write(shard, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        if not self._open(shard):
            raise WriteError(f"{self.folder / shard.name} was written and cannot be read: choose another --cache_dir")
        return True

    @contextlib.contextmanager
    def _locked(self, shard: Shard) -> Iterator[bool]:
        """Inside, no other process writes the shard, where the value is True. The lock of a dead process is gone."""
        path = self.folder / f"{shard.name}.lock"

        try:
            handle = open(path, "wb")
        except OSError as error:
            raise WriteError(write_problem(path, error, 0, "--cache_dir")) from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = True
            except OSError as error:
                mine = error.errno not in HELD  # a file system without locks: both write, and the last one's stays
            try:
                yield mine
            finally:
                if mine:
                    path.unlink(missing_ok=True)

    def _write(self, shard: Shard, tensors: dict[str, Tensor]) -> None:
        """Writes a shard aside and renames it. Raises WriteError."""
        import safetensors.torch

        record = {"key": self.key, "shard": str(shard.number), "crc32": checksum(tensors)}
        content = safetensors.torch.save(tensors, metadata=record)
        write_bytes_aside(self.folder / shard.name, content, "--cache_dir")

    # --- opening ---

    def _open(self, shard: Shard) -> bool:
        """Maps a shard's file where it is there; False where it is not. Says which one is damaged."""
        if self._tensors[shard.number] is not None:
            return True
        path = self.folder / shard.name
        if not path.exists():
            return False

        try:
            self._tensors[shard.number] = self._mapped(path, shard)
        except FileNotFoundError:  # its owner has removed it since
            return False
        except DamagedShard as error:
            if shard.number not in self._told:
                self._told.add(shard.number)
                self.say(f"{path} is damaged ({error}): it is filled again")

            # Its owner alone removes it: another process might remove what the owner has written since.
            if self._is_mine(shard):
                self._discard(path)
            return False
        return True

    def open_whole(self) -> None:
        """Opens every shard, and writes nothing.

        Raises:
            ValueError: one is missing or damaged.
        """
        missing = [shard for shard in self.shards if not (self.folder / shard.name).exists()]
        if missing:
            raise ValueError(f"{self.folder} lacks {len(missing)} of {len(self.shards)} shards, {missing[0].name} "
                             "first: fill them with --cache_mode fill")

        for shard in self.shards:
            path = self.folder / shard.name
            try:
                self._tensors[shard.number] = self._mapped(path, shard)
            except (DamagedShard, FileNotFoundError) as error:
                raise ValueError(f"{path} is damaged ({error}): fill it again with --cache_mode fill") from error

    def _discard(self, path: Path) -> None:
        """Removes a damaged file. Raises WriteError where the folder cannot be written."""
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise WriteError(write_problem(path, error, 0, "--cache_dir")) from error

    def _mapped(self, path: Path, shard: Shard) -> dict[str, Tensor]:
        """The tensors of a file, whose pages the system reads when they are needed.

        Raises:
            DamagedShard: it is not what was written.
            FileNotFoundError: it is not there.
        """
        import safetensors

        try:
            with safetensors.safe_open(path, framework="pt") as file:
                record = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except FileNotFoundError:  # which safetensors says of any file that it cannot open
            try:
                path.open("rb").close()
            except PermissionError as error:
                raise DamagedShard("it cannot be read: check its permissions") from error
            raise
        except (safetensors.SafetensorError, OSError) as error:
            raise DamagedShard(reason_of(error)) from error

        if (record.get("key"), record.get("shard")) != (self.key, str(shard.number)):
            raise DamagedShard("it is of another cache")
        if any(len(tensor) != shard.tokens for tensor in tensors.values()):
            raise DamagedShard(f"it does not have {shard.tokens} tokens")
        if record.get("crc32") != checksum(tensors):
            raise DamagedShard("its content does not have its checksum")
        return tensors

    # --- reading ---

    def gather(self, columns: Tensor) -> Tensor:
        """(..., P, D) states of the columns (...,) int64 of the cache, zeros where a column is negative."""
        flat = columns.flatten()
        owner = torch.bucketize(flat, self._first, right=True) - 1

        states = None
        for number in owner.unique().tolist():
            if number < 0:
                continue
            of_shard = owner == number
            inside = flat[of_shard] - self.shards[number].first
            found = unpack({name: tensor[inside] for name, tensor in self._tensors[number].items()})
            if states is None:
                states = found.new_zeros(len(flat), *found.shape[1:])
            states[of_shard] = found

        return states.unflatten(0, columns.shape)


def checksum(tensors: dict[str, Tensor]) -> str:
    """CRC-32 of the bytes of contiguous tensors on the CPU, in the order of their names."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].view(torch.uint8).numpy(), value)
    return f"{value:08x}"
