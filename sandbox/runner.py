"""Runs generated Python code with its tests in a confined process: MBPP pass rates, and a GRPO reward.

Each run is a fresh interpreter without site packages (see `sandbox.judge` for the processes in it and why code cannot
forge a verdict, `sandbox.jail` for the means). Confined:

- network: an own, empty network namespace, and no new sockets;
- files: an own root that holds the standard library, shared libraries and /dev/null, all read-only. Nothing else of the
  host is there to be read. The working directory (HOME too) is 16 MiB of memory that vanishes with the run;
- processes: an own pid namespace; no new process, thread or program, no signals. All of it dies with the run;
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
import os
import pickle
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
STARTUP_S = 30.0  # until the judge is ready, on however loaded a machine
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

    verdict: the judge's records as bytes, see `sandbox.judge.write_record`. output: what the code printed, cut.
    """

    verdict: bytearray = field(default_factory=bytearray)
    output: bytearray = field(default_factory=bytearray)
    timed_out: bool = False

    def add_output(self, data: bytes) -> None:
        """Keeps what there is room for."""
        self.output += data[: OUTPUT_LIMIT - len(self.output)]

    def lines(self) -> list[tuple[str, str]]:
        """(kind, note) of every complete record."""
        pairs = []
        for line in self.verdict.decode("ascii", "replace").split("\n")[:-1]:
            kind, _, note = line.encode().decode("unicode_escape").partition(" ")
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
    """Runs `code`, then judges each of `tests`; whatever the code does, a result comes back.

    A result is compared as plain data (numbers, text, containers, fractions, decimals, dates); an object of a class of
    the code's own equals only itself, and a change made to an argument in place does not come back.

    Args:
        code: the program.
        tests: `assert` statements about it.
        setup: runs before the code where it can, and before the tests; a class it defines is the code's.
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
        return _result([("refused", reason)], len(tests), "", False, started)

    # The job is handed over as an open file in memory, so that its tests never lie on the disk.
    with contextlib.ExitStack() as stack:
        job = stack.enter_context(open(os.memfd_create("job"), "w+b"))
        job.write(pickle.dumps((setup, code, list(tests)), protocol=4))
        job.seek(0)
        folder = "/"
        if allow_unconfined:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
        record = _run(job.fileno(), folder, timeout, memory_mb, allow_unconfined)

    output = record.output.decode("utf-8", "replace")
    return _result(record.lines(), len(tests), output, record.timed_out, started)


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


def _run(job_fd: int, folder: str, timeout: float, memory_mb: int, allow_unconfined: bool) -> _Record:
    """Starts the keeper, reads verdict and output until the end or the deadline, and leaves no process behind."""
    verdict_read, verdict_write = os.pipe()
    root = Path(__file__).resolve().parent.parent
    arguments = [root, verdict_write, memory_mb, int(timeout) + 2, int(allow_unconfined)]
    record = _Record()
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

        # Only the keeper may hold this end: reading the other then ends when the judge does.
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
    """Fills `record` until the judge hangs up; the clock starts when it is ready."""
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
                if not data:  # the code closed its output; the judge may still have something to say
                    poll.unregister(fd)
                continue

            if not data:
                return
            record.verdict += data
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


def _result(lines: list[tuple[str, str]], total: int, output: str, timed_out: bool, started: float) -> CodeResult:
    """The verdict from the judge's records.

    Args:
        lines: (kind, note) of each record.
        total: how many tests there were.
        output: what the code printed.
        timed_out: the deadline passed.
        started: `time.monotonic()` at the beginning.
    """
    # Tests are judged after the record `loaded`; what stands before it is about the code and the setup.
    kinds = [kind for kind, _ in lines]
    loaded = kinds.index("loaded") + 1 if "loaded" in kinds else len(kinds)
    verdicts = [kind for kind in kinds[loaded:] if kind in ("passed", "failed", "memory")]
    passed = verdicts.count("passed")
    complete = "end" in kinds and len(verdicts) == total

    if "refused" in kinds:
        status = "refused"
        reason = dict(lines)["refused"]
        output = (
            f"code cannot be confined here ({reason}): use a machine that permits it, or pass --allow_unconfined_code"
        )
    elif timed_out:
        status = "timeout"
    elif complete and 0 < total == passed:
        status = "passed"
    elif "memory" in kinds:
        status = "memory"
    elif "syntax" in kinds:
        status = "syntax"
    elif complete:
        status = "failed"
    else:
        status = "error"

    # What the code printed, then what the judge noted, one line each.
    parts = [output.rstrip("\n")]
    for kind, note in lines:
        if note and kind != "refused":
            parts.append(f"{kind}: {note}")
    shown = "\n".join(filter(None, parts))
    return CodeResult(status == "passed", status, passed, total, shown, time.monotonic() - started)
