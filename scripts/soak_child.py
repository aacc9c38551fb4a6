"""The processes that scripts/soak.py strikes: one has imported everything, and forks another for each command.

    python scripts/soak_child.py MODULE ...     # then one request a line on stdin, one answer a line on stdout

A request names `argv`, the file `log` of what the command prints, and what is to happen to it (`Strike`). With `whole`
the command is a process of its own, which imports everything itself; this file is then its sitecustomize.

A strike waits for a phase of the command, as its stack shows it, or for the name of a file that is about to be
written. Nothing of the product is replaced, but for two sizes of the cache that no flag sets (`SMALL`).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import re
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT = "SOAK_STRIKE"
TICK_S = 0.0005
# Module -> constants: so that a tiny cache has several shards.
SMALL = {"addon.cache_plan": {"FILL_BATCH": 8}, "addon.cache_shards": {"SHARD_BYTES": 60_000}}
FILLER = ".filler"
# (file, function) on the stack -> the phase; the innermost counts.
PHASES = {
    ("checkpoints.py", "write_checkpoint"): "checkpoint",
    ("checkpoints.py", "rotate"): "checkpoint",
    ("checkpoints.py", "mark_best"): "checkpoint",
    ("state.py", "save_run"): "checkpoint",
    ("stage_trainer.py", "_save_checkpoint"): "checkpoint",
    ("stage_folder.py", "forget"): "checkpoint",
    ("tables.py", "append"): "records",
    ("tables.py", "_rewrite"): "records",
    ("ownership.py", "claim"): "records",
    ("stage_loop.py", "_record_end"): "records",
    ("cache_shards.py", "fill"): "fill",
    ("prepare_language_dataset.py", "main"): "script",
    ("merge_prepared_batches.py", "main"): "script",
    ("build_reasoning_dataset.py", "main"): "script",
    ("export_model.py", "main"): "script",
    ("loop.py", "_evaluate"): "evaluation",
    ("stage_loop.py", "_measure"): "evaluation",
    ("stage_trainer.py", "_generate_single_turn"): "sampling",
    ("loop.py", "_batch"): "training",
    ("stage_trainer.py", "train_stage"): "training",
    ("loop.py", "_close"): "end",
    ("stage_loop.py", "_close"): "end",
}
# Phases whose moments are counted in operations on files; those of the others in time.
BY_FILES = ("checkpoint", "records", "fill")
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "fsync"}


@dataclass
class Strike:
    """What happens to a command.

    kind: `count` counts phases into `report`; `signal` sends one; `fill_disk` fills the disk of a file to be written.
    phase, index, delay_s: the moment: operation on a file, or stay, number `index` (from 1) in a phase, and a while.
    signal: the number that is sent.
    pattern: the name of the file, as a regular expression.
    way: tmpfs writes a filler beside `folder`'s files; rlimit lets no file grow.
    report: the file that takes what happened, one JSON line each.
    is_small: whether a cache has the sizes of `SMALL`.
    """

    report: str
    kind: str = "count"
    phase: str = ""
    index: int = 1
    delay_s: float = 0.0
    signal: int = signal.SIGKILL
    pattern: str = ""
    folder: str = ""
    way: str = "tmpfs"
    is_small: bool = False


def phase_of(frame: Any) -> str:
    """The phase that a stack is in."""
    while frame is not None:
        code = frame.f_code
        phase = PHASES.get((os.path.basename(code.co_filename), code.co_name))
        if phase:
            return phase
        frame = frame.f_back

    return "start"


class Watch:
    """Looks where this process is, and strikes."""

    def __init__(self, strike: Strike):
        self.strike = strike
        self.main = threading.main_thread().ident
        self.process = os.getpid()
        self.operations: dict[str, int] = {}
        self.entries: dict[str, list[float]] = {}  # phase -> seconds of each stay
        self.stay = ("start", time.monotonic())  # the phase of now, and since when
        self.matches = 0
        self.is_over = False
        self.is_busy = False

    def begin(self) -> None:
        """Starts looking."""
        sys.setswitchinterval(TICK_S)
        plain = os.fsync

        def fsync(handle: int) -> None:
            sys.audit("fsync", handle)
            plain(handle)

        os.fsync = fsync
        sys.addaudithook(self._happens)
        threading.Thread(target=self._look, daemon=True).start()
        if self.strike.kind == "count":
            atexit.register(self.tell)

    def tell(self) -> None:
        """Writes down what was counted."""
        if os.getpid() == self.process:
            phase, since = self.stay
            self.entries.setdefault(phase, []).append(time.monotonic() - since)
            self._report(operations=self.operations, entries=self.entries)

    def _report(self, **facts: Any) -> None:
        self.is_busy = True
        with open(self.strike.report, "a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")
        self.is_busy = False

    # --- operations on files ---

    def _happens(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or self.is_busy or self.is_over or os.getpid() != self.process:
            return
        if threading.get_ident() != self.main:
            return
        if event == "open" and not self._is_written(arguments):
            return

        if self.strike.kind == "fill_disk":
            self._fill_where_named(event, arguments)
            return
        phase = phase_of(sys._getframe())
        self.operations[phase] = self.operations.get(phase, 0) + 1
        if self.strike.kind == "signal" and self.strike.phase == phase and phase in BY_FILES:
            if self.operations[phase] == self.strike.index:
                self._send(phase, event)

    @staticmethod
    def _is_written(arguments: tuple[Any, ...]) -> bool:
        flags = arguments[2] if len(arguments) > 2 and isinstance(arguments[2], int) else 0
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    def _send(self, phase: str, event: str) -> None:
        self.is_over = True
        self._report(phase=phase, event=event)
        if self.strike.delay_s:
            time.sleep(self.strike.delay_s)
        if self.strike.signal == signal.SIGKILL:
            os.kill(self.process, signal.SIGKILL)
        signal.pthread_kill(self.main, self.strike.signal)

    def _fill_where_named(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Lets no more be written, as the file of that name is opened or its folder made."""
        path = arguments[0] if event in ("open", "os.mkdir") else None
        if not isinstance(path, str | bytes | os.PathLike):
            return
        name = os.fsdecode(path)
        if not name.startswith(self.strike.folder) or not re.search(self.strike.pattern, name):
            return
        self.matches += 1
        if self.matches < self.strike.index:
            return

        self.is_over = True
        self._report(phase=phase_of(sys._getframe()), event=event, file=name)
        if self.strike.way == "rlimit":
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return
        with open(os.path.join(self.strike.folder, FILLER), "ab", buffering=0) as file, contextlib.suppress(OSError):
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while file.write(b"\0" * size) == size:
                        pass

    # --- time ---

    def _look(self) -> None:
        """Follows the phases, from a thread of its own."""
        last = "start"
        since = time.monotonic()
        stays = 1
        due = None
        while not self.is_over:
            frame = sys._current_frames().get(self.main)
            phase = phase_of(frame) if frame is not None else last
            now = time.monotonic()
            if phase != last:
                self.entries.setdefault(last, []).append(now - since)
                last, since = phase, now
                self.stay = (phase, now)
                stays = len(self.entries.get(phase, [])) + 1
                due = None
            if self._is_mine(phase):
                if due is None and stays >= self.strike.index:
                    due = since + self.strike.delay_s
                if due is not None and now >= due:
                    self.strike.delay_s = 0.0
                    self._send(phase, "")
                    return
            time.sleep(TICK_S)

    def _is_mine(self, phase: str) -> bool:
        return self.strike.kind == "signal" and phase == self.strike.phase and phase not in BY_FILES


class SmallSizes:
    """Sets the constants of `SMALL` once their modules are imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """As `importlib.abc.MetaPathFinder` has it."""
        if name not in SMALL:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        plain = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            plain(module)
            vars(module).update(SMALL[name])

        spec.loader.exec_module = exec_module
        return spec


def prepare(strike: dict[str, Any] | None) -> None:
    """What this process is to expect."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a command in the background would ignore it
    if strike is None:
        return
    wanted = Strike(**strike)
    if wanted.is_small:
        sys.meta_path.insert(0, SmallSizes())
        for name in SMALL.keys() & sys.modules.keys():
            vars(sys.modules[name]).update(SMALL[name])
    Watch(wanted).begin()


# --- the process that forks -------------------------------------------------------------------------------------------


def obey_permissions() -> None:
    """Takes from this process, where it is root's, what lets it read files against their permissions."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the capabilities, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 of them
    if libc.capget(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    for index in range(3):
        sets[index] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if libc.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def run_command(request: dict[str, Any]) -> int:
    """One command in this process, a child of the one that has imported everything. Returns its exit status."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    if (request.get("strike") or {}).get("way") == "rlimit":  # what is said must grow where no file may
        log = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log).stdin.fileno()
    for number in (1, 2):
        os.dup2(log, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request.get("environment", {}))
    if request.get("plain"):
        obey_permissions()

    sys.argv = request["argv"]
    try:
        prepare(request.get("strike"))
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as left:
        code = left.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
        return code if isinstance(code, int) else int(code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1

    return 0


def begin(request: dict[str, Any]) -> int:
    """The command's process, begun; returns its id."""
    if request.get("whole"):
        environment = {**os.environ, **request.get("environment", {})}
        if request.get("strike"):
            environment[ENVIRONMENT] = json.dumps(request["strike"])
            hooks = [request["hooks"], environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, hooks))
        with open(request["log"], "ab") as log:
            return subprocess.Popen(
                [sys.executable, *request["argv"]], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)).pid

    child = os.fork()
    if child:
        return child
    status = 1
    try:
        status = run_command(request)
        atexit._run_exitfuncs()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(child: int, limit_s: float) -> dict[str, Any]:
    """How a command ended: exit status (a negative signal's number), seconds of the clock and of the CPU."""
    started = time.monotonic()
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            break
        is_left = bool(select.select([sys.stdin], [], [], 0)[0])  # whoever asks has ended
        hangs = time.monotonic() - started > limit_s
        if is_left or hangs:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if is_left:
                sys.exit(0)
            return {"status": None, "seconds": limit_s, "cpu_s": 0.0}
        time.sleep(0.01)

    return {"status": os.waitstatus_to_exitcode(status), "seconds": round(time.monotonic() - started, 2),
            "cpu_s": round(usage.ru_utime + usage.ru_stime, 2)}


def serve(modules: list[str]) -> None:
    """Answers requests until stdin ends."""
    root = Path(__file__).resolve().parent.parent
    os.chdir(root)
    sys.path[:0] = [str(root), str(root / "scripts")]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what an import prints is no answer
    for module in modules:
        importlib.import_module(module)

    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(ended(begin(request), request["limit_s"])), file=answers, flush=True)


if __name__ == "sitecustomize":
    prepare(json.loads(os.environ.pop(ENVIRONMENT)) if ENVIRONMENT in os.environ else None)
elif __name__ == "__main__":
    serve(sys.argv[1:])
