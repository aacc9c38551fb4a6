"""Processes of a run that watch each other: who has died, who is silent, who has ended in order."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from engine.watch import ENDED, FAILED, Watch, place_of_this
from patience import HANG_S

NEVER = 10_000.0


@pytest.fixture
def store():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))


@pytest.fixture
def peer():
    """A process that does nothing but live."""
    process = subprocess.Popen(["sleep", str(HANG_S)])
    yield process
    process.kill()
    process.wait()


def beside(store: TCPStore, timeout_s: float, rank: int = 0, **place) -> Watch:
    """The watch of process `rank` of two; the other one is at `place`, by default this very process."""
    other = 1 - rank
    store.set(f"place/{other}", json.dumps(place_of_this() | place))
    store.set(f"sign/{other}", "0")
    watch = Watch(store, rank, 2, timeout_s, lambda told: None)
    watch._places[other] = json.loads(store.get(f"place/{other}"))
    watch._seen[other] = time.monotonic()
    return watch


def test_a_process_that_dies_is_named_at_once(store, peer):
    watch = beside(store, NEVER, pid=peer.pid)
    assert watch.look() is None
    peer.kill()
    host = place_of_this()["host"]
    until = time.monotonic() + HANG_S
    while (told := watch.look()) is None and time.monotonic() < until:  # before its parent asks for it as well
        time.sleep(0.01)
    assert told == f"process 1 of 2 (rank 1, pid {peer.pid} on {host}) has died" and watch.speaks()
    peer.wait()
    assert watch.look() == told


def test_a_silent_process_of_another_machine_counts_as_dead_and_one_with_signs_does_not(store):
    watch = beside(store, 0.2, host="elsewhere", pid=2**30)
    for beat in range(1, 5):
        store.set("sign/1", str(beat))
        time.sleep(0.1)
        assert watch.look() is None
    time.sleep(0.3)
    assert watch.look().startswith("process 1 of 2 (rank 1, pid 1073741824 on elsewhere) has given no sign of life")


@pytest.mark.parametrize("timeout_s", [0.0, NEVER])
def test_a_process_that_has_ended_in_order_is_not_dead(store, peer, timeout_s):
    watch = beside(store, timeout_s, pid=peer.pid)
    store.set("sign/1", ENDED)
    peer.kill()
    peer.wait()
    assert watch.look() is None and not watch._any_is_there()


def test_an_error_of_one_process_is_told_once_an_exchange_has_failed(store, peer):
    watch = beside(store, NEVER, pid=peer.pid)
    store.set("sign/1", FAILED)
    peer.kill()
    peer.wait()
    assert watch.look() is None  # the others may be saving
    watch._hurry.set()
    assert "(rank 1, " in watch.look() and watch.look().endswith("has ended by an error of its own")


def test_without_the_store_it_is_the_first_process_that_is_missed(store):
    client = TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=5))
    watch = beside(client, 0.2, rank=1, host="elsewhere")
    assert watch.look() is None

    class Gone:
        """What is left of a store whose process has died."""

        def set(self, key, value):
            raise RuntimeError("Connection reset by peer")

    watch.store = Gone()
    time.sleep(0.3)
    assert watch.look().startswith("process 0 of 2 (rank 0, ")


def test_the_thread_ends_the_process_and_an_end_in_order_stops_it(store, peer):
    told = threading.Event()
    watch = beside(store, NEVER, pid=peer.pid)
    watch.end = lambda text: told.set()
    watch.start()
    peer.kill()
    peer.wait()
    assert told.wait(HANG_S)

    left = beside(store, NEVER, pid=2**30)
    left.end = lambda text: pytest.fail(text)
    store.set("sign/1", ENDED)
    left.leave(failed=False)
    assert store.get("sign/0").decode() == ENDED and left._left.is_set()
