"""Processes of a run that watch each other: who has died, who is busy, who has ended in order."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from engine.watch import TOKEN_BYTES, Watch, accepted, connected, keep_alive, listen
from patience import HANG_S

NEVER = 10_000.0
TOKEN = "7" * 2 * TOKEN_BYTES
NAMED = "process {rank} of 3 (rank {rank}, pid {pid} on {host})"


def pair(timeout_s: float = NEVER) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection as those of a run."""
    with listen(1) as listener:
        there = socket.create_connection(("127.0.0.1", listener.getsockname()[1]))
        here, _ = listener.accept()
    for end in (here, there):
        keep_alive(end, timeout_s)
    return here, there


def three(timeout_s: float = NEVER, hosts: str = "aab") -> list[Watch]:
    """The watches of three processes on these machines, all in this one."""
    places = [{"host": host, "pid": 100 + rank} for rank, host in enumerate(hosts)]
    first, links = {}, []
    for rank in (1, 2):
        first[rank], there = pair(timeout_s)
        links.append({0: there})
    return [Watch(own, rank, places, timeout_s, lambda told: None) for rank, own in enumerate([first, *links])]


def die(watch: Watch) -> None:
    """What the system does where a process dies."""
    watch._close()


def heard(watch: Watch) -> tuple[int, str] | None:
    """What a watch hears within a moment; None: all is well."""
    for _ in range(3):  # the last word first, then that the connection is closed
        told = watch.look(0.1)
        if told:
            return told
    return None


@pytest.fixture
def peer() -> Iterator[tuple[subprocess.Popen, socket.socket]]:
    """A process that does nothing but live, and this one's connection with it, which is to answer within a second."""
    here, there = pair(1.0)
    process = subprocess.Popen(["sleep", str(HANG_S)], pass_fds=[there.fileno()])
    there.close()
    yield process, here
    process.kill()
    process.wait()


def of_two(link: socket.socket, pid: int, timeout_s: float = 1.0) -> Watch:
    return Watch({1: link}, 0, [{"host": "here", "pid": 1}, {"host": "here", "pid": pid}], timeout_s, lambda told: None)


def test_a_process_that_dies_is_named_at_once(peer):
    process, link = peer
    watch = of_two(link, process.pid, NEVER)
    assert heard(watch) is None
    process.kill()
    assert watch.look(HANG_S) == (1, f"process 1 of 2 (rank 1, pid {process.pid} on here) has died")
    assert watch.speaks() and heard(watch) is None


def test_a_process_that_stands_still_for_longer_than_the_limit_is_not_dead(peer):
    """Stopped, it can say less than one that is busy for minutes."""
    process, link = peer
    watch = of_two(link, process.pid)
    os.kill(process.pid, signal.SIGSTOP)
    until = time.monotonic() + 3.5
    while time.monotonic() < until:
        assert watch.look(0.5) is None


@pytest.mark.parametrize("timeout_s", [0.01, 1.0, 45.0, 1e9])
def test_the_system_asks_a_silent_machine_and_gives_it_up_after_the_limit(timeout_s):
    here, there = pair(timeout_s)
    assert here.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    if hasattr(socket, "TCP_KEEPIDLE"):
        idle, between, count = (here.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{name}"))
                                for name in ("IDLE", "INTVL", "CNT"))
        assert idle + between * count == {45.0: 45, 1e9: 352_000}.get(timeout_s, 11)


def test_a_connection_without_an_answer_is_told_as_such():
    first, _, _ = three(45.0)

    class Silent:
        """A connection whose other machine is gone; this one's system has given it up."""

        def recv(self, size):
            raise TimeoutError(110, "Connection timed out")

        def close(self):
            pass

    link, first.links[1] = first.links[1], Silent()
    first._selector.unregister(link)
    first._selector.unregister = lambda link: None
    assert first._hear(1) == (1, "process 1 of 3 (rank 1, pid 101 on a) has not answered for 45 s")


def test_a_process_that_has_ended_in_order_is_not_dead():
    first, second, third = three(0.0)
    second.leave(failed=False)
    die(second)
    assert heard(first) is None and heard(third) is None
    first.leave(failed=False)
    die(first)
    assert heard(third) is None


def test_an_error_of_one_process_is_told_once_an_exchange_has_failed():
    first, second, third = three()
    second.leave(failed=True)
    second.leave(failed=False)  # the first word holds
    die(second)
    assert heard(first) is None and heard(third) is None  # they may be saving
    for watch in (first, third):
        watch._hurry.set()
        assert heard(watch) == (1, "process 1 of 3 (rank 1, pid 101 on a) has ended by an error of its own")


def test_an_error_of_one_process_ends_the_others_after_the_limit():
    first, second, _ = three(0.4)
    second.leave(failed=True)
    assert heard(first) is None
    time.sleep(0.4)
    assert heard(first)[1].endswith("has ended by an error of its own")


@pytest.mark.parametrize("hosts, speaking", [("aaa", [False, True, False]), ("aab", [False, True, True])])
def test_where_the_first_process_dies_one_of_each_machine_says_so(hosts, speaking):
    first, *others = three(hosts=hosts)
    die(first)
    for watch in others:
        assert heard(watch) == (0, "process 0 of 3 (rank 0, pid 100 on a) has died")
    assert [watch.speaks() for watch in others] == speaking[1:]


@pytest.mark.parametrize("dead", [1, 2])
def test_the_others_hear_of_a_death_from_the_first_and_none_takes_another_for_dead(dead):
    watches = three()
    ended: list[tuple[int, str]] = []
    done = threading.Event()

    def end(rank: int, told: str) -> None:
        ended.append((rank, told))
        die(watches[rank])  # as a process that ends
        if len(ended) == 2:
            done.set()

    for rank, watch in enumerate(watches):
        watch.end = lambda told, rank=rank: end(rank, told)
        if rank != dead:
            watch.start()
    die(watches[dead])
    assert done.wait(HANG_S)
    assert sorted(ended) == [(rank, f"process {dead} of 3 (rank {dead}, pid {100 + dead} on {'aab'[dead]}) has died")
                             for rank in range(3) if rank != dead]


def test_a_process_that_has_left_watches_no_more():
    first, second, _ = three()
    ended: list[str] = []
    first.end = ended.append
    threads = set(threading.enumerate())
    first.start()
    (thread,) = set(threading.enumerate()) - threads
    first.leave(failed=False)
    die(second)
    thread.join(HANG_S)
    assert not thread.is_alive() and not ended


def test_a_forked_child_does_not_keep_the_connection_of_its_parent_open():
    here, there = pair()
    watch = of_two(here, 1)
    watch.start()
    child = os.fork()
    if not child:
        time.sleep(HANG_S)
        os._exit(0)
    try:
        watch.leave(failed=False)
        die(watch)
        there.settimeout(HANG_S / 10)
        while there.recv(4096):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_strangers_at_the_port_are_turned_away_and_one_that_is_missing_is_an_error():
    with listen(4) as listener:
        port = listener.getsockname()[1]
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        strangers[0].sendall(b"GET / HTTP/1.1\r\nHost: somebody-else.example\r\n\r\n")
        strangers[1].close()
        third = connected("127.0.0.1", port, TOKEN, 2)
        third.sendall(b"more")
        with pytest.raises(OSError):
            accepted(listener, 3, TOKEN, wait_s=0.5)
        second, third = (connected("127.0.0.1", port, TOKEN, rank) for rank in (1, 2))
        third.sendall(b"more")
        links = accepted(listener, 3, TOKEN)
        assert sorted(links) == [1, 2] and links[2].recv(100) == b"more"
