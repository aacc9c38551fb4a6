"""The processes of a run watch each other: where one has died, the others say which, and end.

Without it they would wait in their next exchange, for as long as the backend does (gloo half an hour where a machine is
gone, NCCL ten minutes). Each process holds a connection to the first one, which passes on what it hears. It is the
operating system that closes the connection of a process that dies, and that answers for one that lives: a process that
computes for hours without a word, or is stopped, is not taken for dead.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate.utils import gather_object

import options

LOOK_S = 1.0  # the longest wait for news before a look at the clock
MEET_S = 20.0  # the longest wait for all connections
HELLO_S = 2.0  # the longest wait for the first words on one
TOKEN_BYTES = 16
RANK_DIGITS = 8
DEAD_EXIT = 4  # exit status where another process has died
ENDED, FAILED, OVER = "ended", "failed", "over"  # what processes say to each other


class Watch:
    """This process's connections, and its eye on the others; a thread from `start` on.

    Args:
        links: connections by the process at their other end: of the first process to all others, of each other process
            to the first one.
        rank: which process this is.
        places: where each process is, as `place_of_this` tells.
        timeout_s: seconds until an error that one process alone had ends the others.
        end: what ends this process, given what has happened in words.
    """

    def __init__(
        self,
        links: Mapping[int, socket.socket],
        rank: int,
        places: Sequence[Mapping[str, Any]],
        timeout_s: float,
        end: Callable[[str], None],
    ):
        self.links = dict(links)
        self.rank = rank
        self.places = places
        self.timeout_s = timeout_s
        self.end = end

        # What is known of the others: who watches no more, and when one told of its error.
        self._gone: set[int] = set()
        self._errors: dict[int, float] = {}
        self._rests = dict.fromkeys(self.links, b"")  # begun lines

        self._left = threading.Event()
        self._hurry = threading.Event()  # an exchange has failed: nothing is left to wait for

        self._selector = selectors.DefaultSelector()
        for other, link in self.links.items():
            self._selector.register(link, selectors.EVENT_READ, other)

    def start(self) -> None:
        """Begins to watch."""
        # A forked child would hold the connection of a process that has died.
        os.register_at_fork(after_in_child=self._close)
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def _run(self) -> None:
        while not self._left.is_set():
            told = self.look(LOOK_S)
            if told and not self._left.is_set():
                self._say(OVER, *told)
                self.end(told[1])
                return

    def look(self, wait_s: float) -> tuple[int, str] | None:
        """Hears what the others say, waiting for it at most `wait_s`. Returns (who has died, in words), or None."""
        for key, _ in self._selector.select(wait_s):
            told = self._hear(key.data)
            if told:
                return told

        # Others may be saving while one has failed, so it ends them only where they wait for it.
        now = time.monotonic()
        for other, since in self._errors.items():
            if self._hurry.is_set() or now - since > self.timeout_s:
                return other, f"{self._name(other)} has ended by an error of its own"
        return None

    def _hear(self, other: int) -> tuple[int, str] | None:
        """Takes in what a connection brings. Returns as `look`."""
        happened = "has died"
        try:
            data = self.links[other].recv(4096)
        except ConnectionError:
            data = b""
        except OSError:  # the probes of `keep_alive` were not answered
            data = b""
            happened = f"has not answered for {self.timeout_s:.0f} s"

        if not data:
            self._selector.unregister(self.links[other])
            self.links.pop(other).close()
            known = other in self._gone
            self._gone.add(other)
            return None if known else (other, f"{self._name(other)} {happened}")

        # A line may come in pieces.
        *lines, self._rests[other] = (self._rests[other] + data).split(b"\n")
        for line in lines:
            told = self._note(*json.loads(line))
            if told:
                return told
        return None

    def _note(self, what: str, who: int, words: str = "") -> tuple[int, str] | None:
        """Takes down one thing said. Returns as `look`."""
        self._gone.add(who)
        if what == OVER:
            return who, words
        if what == FAILED:
            self._errors.setdefault(who, time.monotonic())
            if self.rank == 0:
                self._say(FAILED, who)
        return None

    def _say(self, *words: Any) -> None:
        """Says something to all that this process is connected with."""
        line = json.dumps(words).encode() + b"\n"
        for link in list(self.links.values()):
            with contextlib.suppress(OSError):  # it is dead, too
                link.sendall(line)

    def _name(self, other: int) -> str:
        place = self.places[other]
        return f"process {other} of {len(self.places)} (rank {other}, pid {place['pid']} on {place['host']})"

    def speaks(self) -> bool:
        """Whether this process tells what has happened: the first one of those that live on its machine."""
        host = self.places[self.rank]["host"]
        before = [other for other in range(self.rank) if self.places[other]["host"] == host]
        return self._gone.issuperset(before)

    def await_verdict(self) -> None:
        """After an exchange that failed: waits until the thread has found who is missing, and ends this process."""
        self._hurry.set()
        time.sleep(self.timeout_s + 3 * LOOK_S)

    def leave(self, failed: bool) -> None:
        """The last word of this process, by which the others know that it has not died."""
        if self._left.is_set():
            return
        self._left.set()
        self._say(FAILED if failed else ENDED, self.rank)

    def _close(self) -> None:
        for link in self.links.values():
            link.close()
        self.links.clear()


def place_of_this() -> dict[str, Any]:
    """Where this process is, for people."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


# --- connections ------------------------------------------------------------------------------------------------------


def listen(backlog: int) -> socket.socket:
    """A socket that takes connections on a free port of all this machine's addresses. Raises OSError."""
    with contextlib.suppress(OSError):  # without IPv6
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


def keep_alive(link: socket.socket, timeout_s: float) -> None:
    """Lets the two systems ask each other whether they are there; reading fails after `timeout_s` without an answer."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    # A third of the time in silence, then ten questions; one answer is enough. Names differ between systems.
    idle = min(max(round(timeout_s / 3), 1), 32_000)
    between = min(max(round(timeout_s / 15), 1), 32_000)
    values = {
        "TCP_KEEPIDLE": idle,
        "TCP_KEEPALIVE": idle,
        "TCP_KEEPINTVL": between,
        "TCP_KEEPCNT": 10,
        "TCP_USER_TIMEOUT": min(round(1000 * timeout_s), 2**31 - 1),  # for what was said and not acknowledged
    }
    for name, value in values.items():
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def connected(host: str, port: int, token: str, rank: int) -> socket.socket:
    """A connection of process `rank` to the first one. Raises OSError."""
    link = socket.create_connection((host, port), timeout=MEET_S)
    link.sendall(f"{token}{rank:{RANK_DIGITS}d}".encode())
    return link


def accepted(listener: socket.socket, world: int, token: str, wait_s: float = MEET_S) -> dict[int, socket.socket]:
    """The first process's connections to all others, by rank. Raises OSError where one does not come in time."""
    until = time.monotonic() + wait_s
    links: dict[int, socket.socket] = {}
    while len(links) < world - 1:
        listener.settimeout(max(until - time.monotonic(), 0.01))
        link, _ = listener.accept()

        # Whoever does not know the token is a stranger.
        hello = first_words(link)
        if len(hello) < len(token) + RANK_DIGITS or not hello.startswith(token):
            link.close()
            continue
        links[int(hello[len(token) :])] = link
    return links


def first_words(link: socket.socket) -> str:
    """Token and rank, or less where they do not come; never more, since what follows is for `Watch`."""
    size = 2 * TOKEN_BYTES + RANK_DIGITS
    words = b""
    link.settimeout(HELLO_S)
    with contextlib.suppress(OSError):
        while len(words) < size and (more := link.recv(size - len(words))):
            words += more
    return words.decode(errors="replace")


def met(machine: Any) -> dict[int, socket.socket] | None:
    """This process's connections, by the process at their other end; None where there are not all. All call it."""
    # The first process takes connections on a free port of the machine that the processes met on.
    listener: socket.socket | None = None
    if machine.is_main:
        with contextlib.suppress(OSError):
            listener = listen(machine.world)
    port, token = machine.of_main(
        lambda: (listener.getsockname()[1] if listener else 0, secrets.token_hex(TOKEN_BYTES))
    )

    links: dict[int, socket.socket] | None = None
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with contextlib.suppress(OSError):
        if listener:
            links = accepted(listener, machine.world, token)
        elif not machine.is_main:
            links = {0: connected(host, port, token, machine.rank)}
    if listener:
        listener.close()

    # All watch, or none does.
    if machine.any_process(links is None):
        for link in (links or {}).values():
            link.close()
        machine.say(f"WARNING: port {port} of {host} is not open to every process: a dead one is noticed late")
        return None
    return links


# --- of this process --------------------------------------------------------------------------------------------------

_watch: Watch | None = None


def start_watch(machine: Any, timeout_s: float) -> None:
    """Lets the processes of a run watch each other, once. All of them call it. `timeout_s` 0: they do not.

    `machine` is this process's `engine.machine.Machine`.
    """
    global _watch
    if machine.world == 1 or not timeout_s or _watch is not None:
        return

    places = gather_object([place_of_this()])
    links = met(machine)
    if links is None:
        return

    for link in links.values():
        keep_alive(link, timeout_s)
    _watch = Watch(links, machine.rank, places, timeout_s, end_process)
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
