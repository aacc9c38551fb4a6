"""Several processes that share a row of tasks: order, bounded memory, and what becomes of them when something ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import pool_work
from engine import worker_pool
from engine.worker_pool import WorkerError, WorkerPool, worker_count, workers_problem
from patience import HANG_S

ROOT = Path(__file__).resolve().parents[2]
LEFT_ALONE = """
import sys
sys.path[:0] = sys.argv[1:3]
import pool_work
from engine.worker_pool import WorkerPool
with WorkerPool(pool_work.process, (sys.argv[3],), 2) as pool:
    for _ in pool.in_order(iter(int, 1)):
        pass
"""


def echoed(tasks: list[int], count: int) -> Iterator[str]:
    with WorkerPool(pool_work.echo, ("task",), count) as pool:
        yield from (answer.rstrip("x") for answer in pool.in_order(tasks))


def lives(process: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked for yet does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return False


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("tasks", [0, 1, 12])
def test_results_come_in_the_order_of_the_tasks(count, tasks):
    assert list(echoed(list(range(tasks)), count)) == [f"task {number} " for number in range(tasks)]


def test_tasks_and_results_larger_than_any_pipe_pass():
    with WorkerPool(pool_work.twice, (), 2) as pool:
        sizes = [len(result) for result in pool.in_order("x" * (2_000_000 + number) for number in range(12))]
    assert sizes == [2 * (2_000_000 + number) for number in range(12)]


def test_tasks_are_taken_a_few_at_a_time(tmp_path):
    taken = []
    gate = tmp_path / "gate"
    limit = 2 * worker_pool.AHEAD

    def tasks() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            if len(taken) == limit:  # time for the other worker to do many more while the first task waits
                threading.Timer(1, gate.touch).start()
            yield number

    with WorkerPool(pool_work.gated, (str(gate),), 2) as pool:
        for done in pool.in_order(tasks()):
            assert len(taken) <= done + limit


def test_bad_input_is_told_in_its_turn():
    results = echoed([0, 1, pool_work.BAD, 3], 2)
    assert [next(results), next(results)] == ["task 0 ", "task 1 "]
    with pytest.raises(ValueError, match="^this row is bad$"):
        next(results)


def test_a_pool_goes_on_with_other_tasks_where_a_call_was_left_early():
    with WorkerPool(pool_work.twice, (), 2) as pool:
        assert next(pool.in_order(str(number) for number in range(20))) == "00"
        assert list(pool.in_order(["a", "b"])) == ["aa", "bb"]
        assert list(pool.in_order([])) == []


def test_a_fault_in_a_worker_shows_its_place():
    with pytest.raises(RuntimeError, match=r'(?s)pool_work.py", line .*a fault of ours'):
        list(echoed([pool_work.FAULTY], 2))


def test_a_killed_worker_is_named_in_one_line():
    with pytest.raises(WorkerError) as error:
        list(echoed([pool_work.KILLED, *range(40)], 2))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("worker ") and " of 2 (process " in str(error.value)
    assert "was ended by SIGKILL, perhaps because memory ran out: use fewer --workers" in str(error.value)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_no_worker_outlives_the_pool(tmp_path, error):
    processes = set()
    try:
        with WorkerPool(pool_work.process, (str(tmp_path),), 2) as pool:
            for process in pool.in_order(range(20)):
                processes.add(process)
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    assert processes and not any(map(lives, [*processes, *(int(path.name) for path in tmp_path.iterdir())]))


def test_workers_end_with_a_killed_owner(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", LEFT_ALONE, str(ROOT), str(ROOT / "tests"), str(tmp_path)])
    deadline = time.monotonic() + HANG_S
    while len(list(tmp_path.iterdir())) < 2:
        assert owner.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    while any(lives(int(path.name)) for path in tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_zero_workers_are_one_for_each_core():
    assert worker_count(0) == len(os.sched_getaffinity(0)) and worker_count(3) == 3
    assert workers_problem(0) is None and "--workers -1 must be at least 0" in workers_problem(-1)
    assert "--workers 257 must be at least 0 and at most 256" in workers_problem(257)
