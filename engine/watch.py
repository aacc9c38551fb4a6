"""The processes of a run watch each other: where one has died, the others say which, and end.

Without it they would wait in their next exchange, for as long as the backend does (gloo half an hour where a machine is
gone, NCCL ten minutes). Each process writes a sign of life into a store of torch's that the first one holds, once a
second, and reads those of the others. A process of the same machine is looked up by its id as well, which tells a death
at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

import options

BEAT_S = 1.0  # between signs of life
STORE_S = 10.0  # the longest wait for the store's answer
DEAD_EXIT = 4  # exit status where another process has died
ENDED, FAILED = "ended", "failed"  # a process's last sign


class Watch:
    """This process's signs of life, and its eye on the others; a thread from `start` on.

    Args:
        store: of all processes; the first one's own.
        rank, world: which process this is, and how many there are.
        timeout_s: seconds without a sign of life after which a process counts as dead.
        end: what ends this process, given what has happened in words.
    """

    def __init__(self, store: Any, rank: int, world: int, timeout_s: float, end: Callable[[str], None]):
        self.store = store
        self.rank = rank
        self.world = world
        self.timeout_s = timeout_s
        self.end = end
        self.others = [other for other in range(world) if other != rank]

        # What is known of the others: their newest signs, when each changed last, and where they are.
        self._signs = dict.fromkeys(self.others, "")
        self._seen = dict.fromkeys(self.others, 0.0)
        self._places: dict[int, dict[str, Any]] = {}
        self._beats = 0

        self._left = threading.Event()
        self._hurry = threading.Event()  # an exchange has failed: nothing is left to wait for

        self.introduce()

    def introduce(self) -> None:
        """Tells the others where this process is, with its first sign of life."""
        self.store.set(f"place/{self.rank}", json.dumps(place_of_this()))
        self.store.set(f"sign/{self.rank}", "0")

    def start(self) -> None:
        """Begins to watch. Every process has introduced itself before."""
        now = time.monotonic()
        for other in self.others:
            self._places[other] = json.loads(self.store.get(f"place/{other}"))
            self._seen[other] = now

        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def _run(self) -> None:
        while not self._left.wait(BEAT_S):
            told = self.look()
            if told and not self._left.is_set():
                self.end(told)
                return

    def look(self) -> str | None:
        """Gives a sign of life and looks at those of the others. Returns what has happened to one; None: all live."""
        # Without the store nothing is heard of anybody, and the first process is who holds it.
        self._beats += 1

        answers = True
        gone = [other for other in self.others if is_gone(self._places[other])]
        try:
            self.store.set(f"sign/{self.rank}", str(self._beats))
            self._hear()  # only now: whoever ends in order gives its last sign before
        except RuntimeError:
            answers = False

        now = time.monotonic()
        for other in self.others:
            silent = now - self._seen[other]
            sign = self._signs[other]
            if sign == ENDED:
                continue

            if sign == FAILED and (self._hurry.is_set() or silent > self.timeout_s):
                return f"{self._name(other)} has ended by an error of its own"
            if sign != FAILED and other in gone:
                return f"{self._name(other)} has died"
            if silent > self.timeout_s and (answers or other == 0):
                return f"{self._name(other)} has given no sign of life for {silent:.0f} s"
        return None

    def _hear(self) -> None:
        """Reads the others' newest signs. Raises RuntimeError where the store does not answer."""
        signs = self.store.multi_get([f"sign/{other}" for other in self.others])
        now = time.monotonic()

        for other, encoded in zip(self.others, signs, strict=True):
            sign = encoded.decode()
            if sign != self._signs[other]:
                self._signs[other] = sign
                self._seen[other] = now

    def _name(self, other: int) -> str:
        place = self._places[other]
        return f"process {other} of {self.world} (rank {other}, pid {place['pid']} on {place['host']})"

    def speaks(self) -> bool:
        """Whether this process tells what has happened: the first one of those that live."""
        before = [other for other in self.others if other < self.rank]
        return all(self._signs[other] in (ENDED, FAILED) or is_gone(self._places[other]) for other in before)

    def await_verdict(self) -> None:
        """After an exchange that failed: waits until the thread has found who is missing, and ends this process."""
        self._hurry.set()
        time.sleep(self.timeout_s + 3 * BEAT_S)

    def leave(self, failed: bool) -> None:
        """The last sign of life. The first process waits for the others, which hear of its end from its own store."""
        self._left.set()
        until = time.monotonic() + self.timeout_s

        with contextlib.suppress(RuntimeError):
            self.store.set(f"sign/{self.rank}", FAILED if failed else ENDED)
            while self.rank == 0 and not failed and time.monotonic() < until and self._any_is_there():
                time.sleep(BEAT_S / 4)

    def _any_is_there(self) -> bool:
        self._hear()
        last = (ENDED, FAILED)
        return any(self._signs[other] not in last and not is_gone(self._places[other]) for other in self.others)


def place_of_this() -> dict[str, Any]:
    """Where this process is: its id, and what tells whose ids are of the same system."""
    space: int | None = None
    with contextlib.suppress(OSError):  # no Linux: nobody is looked up by an id
        space = os.stat("/proc/self/ns/pid").st_ino
    return {"host": socket.gethostname(), "space": space, "pid": os.getpid()}


def is_gone(place: dict[str, Any]) -> bool:
    """True where the process of this place is known to be dead; False for one that cannot be looked up from here."""
    here = place_of_this()
    if here["space"] is None or (place["host"], place["space"]) != (here["host"], here["space"]):
        return False

    try:
        with open(f"/proc/{place['pid']}/stat", encoding="utf-8", errors="replace") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except OSError:
        return True

    return state in "ZX"  # dead, and not yet asked for by its parent


# --- of this process --------------------------------------------------------------------------------------------------

_watch: Watch | None = None


def start_watch(machine: Any, timeout_s: float) -> None:
    """Lets the processes of a run watch each other, once. All of them call it. `timeout_s` 0: they do not.

    `machine` is this process's `engine.machine.Machine`.
    """
    global _watch
    if machine.world == 1 or not timeout_s or _watch is not None:
        return

    # The first process holds the store, on a free port of the machine that the processes met on.
    wait = timedelta(seconds=STORE_S)
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    store: TCPStore | None = None
    if machine.is_main:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait)
    port = machine.of_main(lambda: store.port if store else 0)
    with contextlib.suppress(RuntimeError):
        if store is None:
            store = TCPStore(host, port, is_master=False, timeout=wait)
    if machine.any_process(store is None):
        machine.say(f"WARNING: port {port} of {host} is not open to every process: a dead one is noticed late")
        return

    _watch = Watch(store, machine.rank, machine.world, timeout_s, end_process)
    machine.wait()
    _watch.start()


def end_process(told: str) -> None:
    """Says what has happened, and ends this process at once: its main thread may wait for the dead one for ever."""
    assert _watch is not None
    if _watch.speaks():
        line = f"{told}: the run ends; --resume goes on from its newest checkpoint"
        print(f"{options.PROG}: error: {line}", file=sys.stderr, flush=True)
    os._exit(DEAD_EXIT)


def explain_failed_exchange(error: BaseException) -> None:
    """Ends this process where `error` comes of another process's death; returns where it does not."""
    text = str(error).lower()
    if _watch is not None and any(word in text for word in ("gloo", "nccl", "process group", "connection")):
        _watch.await_verdict()


def leave_watch(failed: bool) -> None:
    """This process ends, by an error of its own if it `failed`: no other may take that for its death."""
    if _watch is not None:
        _watch.leave(failed)
