"""Runs generated Python code with its tests in a confined process: MBPP pass rates, and a GRPO reward.

Each run is a fresh interpreter without site packages, in which the tests run beside the code, on the code's own objects
(see `sandbox.worker` and `sandbox.guard` for what keeps code from forging a verdict, `sandbox.jail` for the means of
confinement). Confined:

- network: an own, empty network namespace, and no new sockets;
- files: an own root that holds the standard library, shared libraries and /dev/null, all read-only. Nothing else of the
  host is there to be read. The working directory (HOME too) is 16 MiB of memory that vanishes with the run;
- processes: an own pid namespace; no new process, thread or program, no signals or handlers of them. All of it dies
  with the run. Pools, executors and threads do their work at once, in the code's own thread;
- environment: empty but for HOME, TMPDIR, LANG and a fixed PYTHONHASHSEED, so that runs repeat; no standard input;
- privileges: an own user namespace, no capabilities, no debugger, mounts, keys or other kernel services;
- amounts: wall and CPU time, address space, file size, open files, captured output.

Not confined: the kernel itself (a kernel bug is a way out), timing and load of shared cores, reading libraries the host
keeps under /lib and /usr. Where namespaces are refused (many containers do), a run is refused with one line that says
why, unless `allow_unconfined`: then files are the user's own to read and write, and what is left is an empty
environment, a working directory of its own, the limits, and on x86_64 and aarch64 still no processes, signals, sockets.
"""

from __future__ import annotations

import contextlib
import functools
import marshal
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

OUTPUT_LIMIT = 20_000  # bytes of the code's output that are kept
RECORD_BYTES = 4096  # the longest record of a test, with room to spare
STARTUP_S = 30.0  # until the worker is ready, on however loaded a machine
STOP_S = 3.0  # for the keeper to end its children before the group is killed
MIN_MEMORY_MB = 64
STATUSES = ("passed", "failed", "error", "timeout", "memory", "syntax", "refused")
_BOOTSTRAP = (
    "import sys; sys.path.insert(0, sys.argv[1]); from sandbox.judge import main; del sys.path[0]; "
    "main(int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == '1')"
)


@dataclass(frozen=True)
class CodeResult:
    """The verdict on one run.

    status: `passed` (every test), `failed` (a test did not hold, or there was none), `error` (the code raised while
    loading, left the interpreter or crashed it), `timeout`, `memory`, `syntax`, `refused` (no confinement here; output
    says why). output: what the code printed, cut, then one line for each thing that went wrong. seconds: wall time.
    """

    passed: bool
    status: str
    passed_tests: int
    total_tests: int
    output: str
    seconds: float


@dataclass(frozen=True)
class CodeJob:
    """Code, the `assert` statements it must satisfy, and statements to run before them."""

    code: str
    tests: Sequence[str]
    setup: str = ""


@dataclass
class _Record:
    """What has been read of a run so far.

    verdict: the worker's records as bytes, see `sandbox.worker.write_record`; the code can write there, too, so no more
        than `room` is read. output: what the code printed, cut.
    """

    room: int
    verdict: bytearray = field(default_factory=bytearray)
    output: bytearray = field(default_factory=bytearray)
    timed_out: bool = False

    def add_output(self, data: bytes) -> None:
        """Keeps what there is room for."""
        self.output += data[: OUTPUT_LIMIT - len(self.output)]

    def lines(self) -> list[tuple[str, str]]:
        """(kind, note) of every complete record."""
        pairs = []
        for line in self.verdict.decode("utf-8", "replace").split("\n")[:-1]:
            kind, _, note = line.partition(" ")
            pairs.append((kind, note))
        return pairs


def run_tests(
    code: str,
    tests: Sequence[str],
    setup: str = "",
    timeout: float = 5.0,
    memory_mb: int = 512,
    allow_unconfined: bool = False,
) -> CodeResult:
    """Runs `code`, then each of `tests` in the same interpreter; whatever the code does, a result comes back.

    The tests share one namespace, and see the code's names where they have none of their own. An operator of a class
    that is written in Python must tell the value of a test from made-up ones, see `sandbox.guard`. Code that loads
    ctypes passes no test: it could reach the tests themselves.

    Args:
        code: the program.
        tests: `assert` statements about it.
        setup: runs before the code where it can, and before the tests; its classes and values are the code's, its
            functions the tests'.
        timeout: wall seconds for everything after start-up; tests judged before it ends keep their verdict.
        memory_mb: address space of the code, in MiB.
        allow_unconfined: run even where this machine refuses to confine.

    Raises:
        ValueError: timeout not above 0, or memory_mb below 64.
    """
    # A timeout that is not a number is not above 0 either.
    if not timeout > 0 or memory_mb < MIN_MEMORY_MB:
        raise ValueError(f"need timeout > 0 and memory_mb >= {MIN_MEMORY_MB}, got {timeout} and {memory_mb}")
    started = time.monotonic()
    if not sys.platform.startswith("linux"):
        reason = f"needs Linux, this is {sys.platform}"
        return _result([("refused", reason)], [""] * len(tests), "", False, started)

    # The job is handed over as an open file in memory, so that its tests never lie on the disk.
    with contextlib.ExitStack() as stack:
        job = stack.enter_context(open(os.memfd_create("job"), "w+b"))
        tokens = [secrets.token_hex(8) for _ in tests]
        job.write(marshal.dumps((setup, code, list(map(str, tests)), tokens)))
        job.seek(0)
        folder = "/"
        if allow_unconfined:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
        record = _run(job.fileno(), len(tokens), folder, timeout, memory_mb, allow_unconfined)

    output = record.output.decode("utf-8", "replace")
    return _result(record.lines(), tokens, output, record.timed_out, started)


def run_many(
    jobs: Iterable[CodeJob],
    workers: int = 0,
    timeout: float = 5.0,
    memory_mb: int = 512,
    allow_unconfined: bool = False,
) -> list[CodeResult]:
    """`run_tests` of every job, in order, `workers` at a time (0: one per core this process may use)."""
    # Threads do: each only waits for a process.
    workers = workers or len(os.sched_getaffinity(0))

    def one(job: CodeJob) -> CodeResult:
        return run_tests(job.code, job.tests, job.setup, timeout, memory_mb, allow_unconfined)

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, jobs))


@functools.cache
def confinement() -> str | None:
    """None where runs are confined on this machine, else one line that says why not and what to do."""
    result = run_tests("", ["assert True"])
    if result.passed:
        return None
    return result.output.strip() or f"the runner ended with status {result.status}"


def _run(job_fd: int, tests: int, folder: str, timeout: float, memory_mb: int, allow_unconfined: bool) -> _Record:
    """Starts the keeper, reads verdict and output until the end or the deadline, and leaves no process behind.

    `tests` is how many there are.
    """
    verdict_read, verdict_write = os.pipe()
    root = Path(__file__).resolve().parent.parent
    arguments = [root, verdict_write, memory_mb, int(timeout) + 2, int(allow_unconfined)]
    record = _Record(RECORD_BYTES * (tests + 8))
    try:
        # No site packages and no user's site (-s -S), no folder of the script on the path (-P).
        process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", "-X", "utf8", "-c", _BOOTSTRAP, *map(str, arguments)],
            stdin=job_fd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[verdict_write],
            cwd=folder,
            env={"LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )

        # Only the keeper may hold this end: reading the other then ends when it does.
        os.close(verdict_write)
        verdict_write = -1
        try:
            _read(record, verdict_read, process.stdout.fileno(), timeout)
        finally:
            _stop(process)
        _drain(record, process.stdout.fileno())
        process.stdout.close()
    finally:
        os.close(verdict_read)
        if verdict_write >= 0:
            os.close(verdict_write)
    return record


def _read(record: _Record, verdict_fd: int, output_fd: int, timeout: float) -> None:
    """Fills `record` until the worker hangs up; the clock starts when it is ready."""
    # Both are read by turns: code that fills its pipe would else wait for ever.
    poll = select.poll()
    poll.register(verdict_fd, select.POLLIN)
    poll.register(output_fd, select.POLLIN)
    deadline = time.monotonic() + STARTUP_S
    ready = False
    while not record.verdict.endswith(b"\nend \n"):
        left = deadline - time.monotonic()
        if left <= 0:
            record.timed_out = ready
            return

        for fd, _ in poll.poll(left * 1000):
            data = os.read(fd, 65536)
            if fd == output_fd:
                record.add_output(data)
                if not data:  # the code closed its output; the worker may still have something to say
                    poll.unregister(fd)
                continue

            record.verdict += data
            if not data or len(record.verdict) > record.room:
                return
            if not ready and record.verdict.startswith(b"ready \n"):
                ready = True
                deadline = time.monotonic() + timeout


def _drain(record: _Record, output_fd: int) -> None:
    """What the dead processes left in the pipe."""
    os.set_blocking(output_fd, False)
    with contextlib.suppress(BlockingIOError):
        while len(record.output) < OUTPUT_LIMIT and (data := os.read(output_fd, 65536)):
            record.add_output(data)


def _stop(process: subprocess.Popen) -> None:
    """Ends the keeper, which ends and reaps its children; kills the whole group if that takes too long."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _result(
    lines: list[tuple[str, str]], tokens: list[str], output: str, timed_out: bool, started: float
) -> CodeResult:
    """The verdict from the worker's records.

    Args:
        lines: (kind, note) of each record. The code can write records as well, but knows no token.
        tokens: one for each test, which stands in the record of a test that has passed.
        output: what the code printed.
        timed_out: the deadline passed.
        started: `time.monotonic()` at the beginning.
    """
    kinds = [kind for kind, _ in lines]
    passed = len(set(tokens) & {note for kind, note in lines if kind == "passed"})
    ended = "end" in kinds

    if kinds[:1] == ["refused"]:
        status = "refused"
        output = (
            f"code cannot be confined here ({lines[0][1]}): use a machine that permits it, or pass "
            "--allow_unconfined_code"
        )
        lines = []
    elif timed_out:
        status = "timeout"
    elif ended and 0 < len(tokens) == passed:
        status = "passed"
    elif "memory" in kinds:
        status = "memory"
    elif "syntax" in kinds:
        status = "syntax"
    elif ended and "loaded" in kinds:
        status = "failed"
    else:
        status = "error"

    # What the code printed, then what went wrong, one line each.
    parts = [output.rstrip("\n")]
    for kind, note in lines:
        if note and kind != "passed" and not (ended and kind == "gone"):
            parts.append(f"{kind}: {note}")
    shown = "\n".join(filter(None, parts))
    return CodeResult(status == "passed", status, passed, len(tokens), shown, time.monotonic() - started)
