"""Runs of `train.py` in one or more processes each, forked from one that has imported everything.

    python tests/several.py RUNS.json

RUNS.json is a list of runs, done one after the other: `argv`; `processes`; `log`, the file of what they print;
`environment`, the variables that are set for them, or missing; `stop` and `kill`, both [rank, step] or missing: that
process alone gets a SIGTERM, or a SIGKILL, as it begins the step; and `busy`, likewise: none of its threads can do
anything for `BUSY_S` seconds, as in a long call of a library's. The file is replaced by the list of their exit
statuses, a negative signal's number where one was killed, and their seconds.
GRPO's completions are not sampled here but follow from the question and the completion's place in its group, since each
process has random numbers of its own.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import train  # noqa: E402
from engine.optimization import BaseTrainer  # noqa: E402

BUSY_S = 5


def value_of(run: dict[str, Any], flag: str, default: str) -> str:
    """What a run's command line says of a flag."""
    argv = run["argv"]
    return argv[argv.index(f"--{flag}") + 1] if f"--{flag}" in argv else default


def strike(run: dict[str, Any], rank: int, step: int) -> None:
    """What is to happen to this process as it begins `step`."""
    if run.get("stop") == [rank, step]:
        os.kill(os.getpid(), signal.SIGTERM)
    if run.get("kill") == [rank, step]:
        os.kill(os.getpid(), signal.SIGKILL)
    if run.get("busy") == [rank, step]:
        ctypes.PyDLL(None).sleep(BUSY_S)  # keeps the interpreter's lock


def prepare(run: dict[str, Any], rank: int) -> None:
    """Lets supervised training and GRPO be struck, and takes what a step draws out of chance's hands."""
    if value_of(run, "arch", "addon") == "enhanced":  # every token is in the sample of early exits, none drawn
        from grpo import warm_start

        make = warm_start.create_hrm_model_and_tokenizer
        warm_start.create_hrm_model_and_tokenizer = functools.partial(make, exit_sample=10_000)

    if value_of(run, "objective", "ce") != "grpo":
        begin = BaseTrainer.begin

        def begin_or_die(self, step, lr):
            strike(run, rank, step)
            begin(self, step, lr)

        BaseTrainer.begin = begin_or_die
        return

    from grpo.stage_trainer import Reporter, StageTrainer

    def complete(self, prompt_ids, images, fields, num_generations, has_tool_images=False):
        made = []
        for place, prompt in enumerate(prompt_ids):
            draw = random.Random(f"{prompt}/{place % num_generations}")
            made.append([draw.randrange(10, 200) for _ in range(draw.randint(2, self.max_completion_length))])
        return made, None

    StageTrainer._generate_single_turn = complete
    Reporter.on_step_begin = lambda self, args, state, control, **_: strike(run, rank, state.global_step)


def begin(run: dict[str, Any], rank: int, port: int) -> int:
    """One process of a run; returns its id."""
    child = os.fork()
    if child:
        return child
    world = run["processes"]
    os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", **run.get("environment", {}))
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
    log = os.open(run["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        prepare(run, rank)
        status = train.main(run["argv"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def done(run: dict[str, Any]) -> dict[str, Any]:
    """A run's exit statuses and seconds, once all of its processes have ended by themselves."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]

    started = time.monotonic()
    children = [begin(run, rank, port) for rank in range(run["processes"])]
    statuses = dict.fromkeys(children, 0)
    ends = []
    while len(ends) < len(children):  # each at once: one that is dead and not asked for would still have an id
        child, status = os.wait()
        statuses[child] = os.waitstatus_to_exitcode(status)
        ends.append(time.monotonic() - started)
    return {"statuses": [statuses[child] for child in children], "seconds": ends}


if __name__ == "__main__":
    plan = Path(sys.argv[1])
    runs = json.loads(plan.read_text(encoding="utf-8"))

    # Imported once, and nothing computed: torch's backward pass does not outlive a fork.
    for run in runs:
        train.run_of(SimpleNamespace(objective=value_of(run, "objective", "ce"), arch=value_of(run, "arch", "addon")))
        if value_of(run, "objective", "ce") == "grpo":
            import grpo.stage_trainer  # noqa: F401

    plan.write_text(json.dumps([done(run) for run in runs]), encoding="utf-8")
