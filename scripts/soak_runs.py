"""What scripts/soak.py runs: tiny runs of each system, the process that forks them, what two runs must have alike."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from engine.files import json_lines  # noqa: E402
from soak_child import Strike  # noqa: E402

RUN = "r"  # the name of every run
LIMIT_S = 600.0  # a command that takes longer hangs
# What differs between two runs of one command line: times, and the run's own id.
TIMES = ("elapsed_s", "examples_per_second", "tokens_per_second", "step_time", "warmup_s", "run")
# Files that hold nothing else, or are drawn from the others.
NOT_COMPARED = ("manifest.json", "run.json", "README.md", "curve.png", "report.html")
MODULES = ("torch", "transformers", "accelerate", "reasoning_gym", "addon_run", "hybrid.run", "grpo.run",
           "grpo.stage_trainer", "addon.items", "addon.cache_shards", "engine.figures")

COMMON = (
    "--batch_size 4 --mixed_precision none --log_steps 1 --num_threads 1 --device cpu --save_every 2 --eval_every 2 "
    f"--eval_batch_size 4 --checkpoint_limit 2 --warmup_steps 2 --run_name {RUN}"
)
PLANNER = (
    "--arch enhanced --d_model 16 --n_heads 2 --n_planner_layers 1 --n_worker_layers 1 --max_cycles 2 --thought_dim 8 "
    f"--eval_n 4 --max_completion_length 8 {COMMON}"
)
SUMS = [{"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}]
# A random model's completions would all be rewarded alike, and nothing would be learnt.
REWARD = '"""A reward that tells texts apart, whatever they say."""\n\n\ndef letters(completions, **columns):\n' \
    "    return [sum(map(ord, text)) % 7 / 6 for text in completions]\n"
STAGES = {name: {"size": 6, "epochs": 1, "levels": SUMS, "rewards": {"soak_reward:letters": 1.0}}
          for name in ("format", "math")}
GRPO = (
    "--objective grpo --grpo_save_every 2 --num_generations 2 --grpo_batch_size 2 --grpo_accum_steps 1 --grpo_lr 1e-3"
)


@dataclass(frozen=True)
class System:
    """A tiny run of one system.

    words: its command line, without the folders.
    phases: what can be struck.
    cache: whether it keeps hidden states on disk, in several small shards.
    """

    name: str
    words: tuple[str, ...]
    phases: tuple[str, ...] = ("training", "evaluation", "checkpoint", "records")
    cache: bool = False


SYSTEMS = {
    "add_on": System(
        "add_on",
        tuple("--task toy_add --d_h 16 --n_heads 2 --segments 2 --inner_T 1 --max_steps 8 --train_n 60 --eval_n 6 "
              f"--max_new_tokens 4 --cache_hidden disk {COMMON}".split()),
        ("training", "evaluation", "checkpoint", "records", "fill"), cache=True),
    "hybrid": System(
        "hybrid",
        tuple("--arch hybrid --dataset synthetic --d_model 16 --n_heads 2 --d_h 16 --encoder_layers 1 "
              "--decoder_layers 1 --state_size 4 --h_len 2 --l_len 2 --prefix_len 2 --max_steps 8 --eval_n 6 "
              f"--max_seq_len 24 {COMMON}".split())),
    "planner_worker": System(
        "planner_worker", (*PLANNER.split(), "--max_steps", "8", "--stages", json.dumps({"format": STAGES["format"]}))),
    "grpo": System(
        "grpo", (*PLANNER.split(), *GRPO.split(), "--max_steps", "2", "--stages", json.dumps(STAGES)),
        ("training", "sampling", "evaluation", "checkpoint", "records")),
}


@dataclass
class Ended:
    """How a command ended.

    status: exit status, a negative signal's number, or None where it took longer than `LIMIT_S`.
    text: what it printed.
    facts: what the strike wrote down, the last of it.
    """

    status: int | None
    seconds: float
    cpu_s: float
    text: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def last_line(self) -> str:
        """The last line that it printed."""
        lines = self.text.strip().splitlines()
        return lines[-1][:300] if lines else ""


class Bench:
    """A folder for all that is run, and the process that forks the commands."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cpu_s = 0.0
        self.hooks = folder / "hooks"
        self.hooks.mkdir(parents=True, exist_ok=True)
        link = self.hooks / "sitecustomize.py"
        if not link.exists():
            link.symlink_to(ROOT / "scripts" / "soak_child.py")
        (self.hooks / "soak_reward.py").write_text(REWARD, encoding="utf-8")

        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1",
                       "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(self.hooks), "XDG_STATE_HOME": str(folder / "state"),
                       "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "soak_child.py"), *MODULES], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, encoding="utf-8", env=environment, start_new_session=True)
        if not self.process.stdout.readline():
            raise OSError("the process that forks the commands did not start")

    def close(self) -> None:
        """Ends the process that forks, and the command that it has begun."""
        self.process.stdin.close()
        self.process.wait()

    def run(self, argv: list[str], strike: Strike | None = None, whole: bool = False, plain: bool = False) -> Ended:
        """Runs a command to its end; `plain`: without root's right to read every file."""
        log = self.folder / "log.txt"
        for path in (log, Path(self.report)):
            path.write_bytes(b"")
        request = {"argv": argv, "log": str(log), "limit_s": LIMIT_S, "whole": whole, "plain": plain,
                   "hooks": str(self.hooks), "strike": asdict(strike) if strike else None}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())

        facts: dict[str, Any] = {}
        told = [line for _, line in json_lines(Path(self.report))]
        if told:
            facts = told[-1]
        self.cpu_s += answer["cpu_s"]
        return Ended(**answer, text=log.read_text(encoding="utf-8", errors="replace"), facts=facts)

    @property
    def report(self) -> str:
        """Where strikes write down what happened."""
        return str(self.folder / "strike.jsonl")


class Place:
    """The folder in which a system runs: the same one each time, so that all that is recorded is alike."""

    def __init__(self, bench: Bench, system: System):
        self.bench = bench
        self.system = system
        self.folder = bench.folder / system.name
        self.live = self.folder / "live"
        self.kept = self.folder / "reference"
        self.run_folder = self.live / "runs" / RUN
        self.cache = self.live / "cache"

    @property
    def argv(self) -> list[str]:
        """The whole command line, which goes on with a run that has begun."""
        words = ["train.py", *self.system.words, "--save_dir", str(self.live / "runs")]
        if self.system.cache:
            words += ["--cache_dir", str(self.cache)]
        return words

    def strike(self, **changes: Any) -> Strike:
        """A strike here."""
        return Strike(report=self.bench.report, is_small=self.system.cache, **changes)

    def clear(self) -> None:
        """Nothing has been run here."""
        shutil.rmtree(self.live, ignore_errors=True)
        self.live.mkdir(parents=True)

    def reference(self) -> dict[str, Any]:
        """The uninterrupted run, run once: what was counted in it (`Watch`)."""
        path = self.folder / "counted.json"
        if not path.exists():
            self.clear()
            done = self.bench.run(self.argv, self.strike())
            if done.status != 0:
                raise ValueError(f"the uninterrupted run of {self.system.name} ended with {done.status}: {done.text}")
            shutil.rmtree(self.kept, ignore_errors=True)
            self.live.rename(self.kept)
            path.write_text(json.dumps(done.facts | {"cpu_s": done.cpu_s}), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    def restore(self) -> None:
        """The finished run stands here again."""
        shutil.rmtree(self.live, ignore_errors=True)
        shutil.copytree(self.kept, self.live)

    def differences(self, newest_only: bool = False) -> list[str]:
        """In what the run here is not the uninterrupted one, and what was left lying about.

        `newest_only`: a run that saved when it was told to stop has other checkpoints before its newest.
        """
        found = list(run_differences(self.kept / "runs" / RUN, self.run_folder, newest_only))
        for path in sorted(self.live.rglob(".*")):
            if path.name.startswith((".tmp-", ".old-")):
                found.append(f"{path.relative_to(self.live)} was left behind")
        return found


# --- what must be alike -----------------------------------------------------------------------------------------------


def without_times(value: Any) -> Any:
    """A JSON value without what differs between two runs of one command line."""
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if key not in TIMES}
    if isinstance(value, list):
        return [without_times(each) for each in value]

    return value


def content_of(path: Path) -> Any:
    """What two files must have alike: JSON and rows without times, a hash of anything else."""
    if path.suffix == ".jsonl":
        return [without_times(line) for _, line in json_lines(path)]
    if path.suffix == ".json":
        record = without_times(json.loads(path.read_text(encoding="utf-8")))
        if path.name == "trained_questions.json":  # a call that goes on counts what it finds as trained on earlier
            return record["whole"], all_keys(record)
        return record
    if path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8") as file:
            return [without_times(row) for row in csv.DictReader(file)]

    return hashlib.sha256(path.read_bytes()).hexdigest()


def all_keys(record: dict[str, Any]) -> list[str]:
    """The hashes of the questions that a checkpoint records, 8 characters each."""
    text = record["earlier"] + record["own"]

    return sorted(text[start : start + 8] for start in range(0, len(text), 8))


def files_of(run: Path, newest_only: bool = False) -> dict[str, Path]:
    """The files of a run that are compared, by their names in it; of its checkpoints all, or the newest alone."""
    older = sorted((run / "checkpoints").glob("step-*"))[:-1] if newest_only else []

    found = {}
    for path in sorted(run.rglob("*")):
        if path.name in NOT_COMPARED or path.name.startswith((".tmp-", ".old-")) or path.parent in older:
            continue
        if path.is_file():
            found[str(path.relative_to(run))] = path

    return found


def run_differences(expected: Path, got: Path, newest_only: bool = False) -> Iterator[str]:
    """Each file in which two runs differ, in words."""
    ours = files_of(expected, newest_only)
    theirs = files_of(got, newest_only)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            yield f"{name} is missing"
        elif name not in ours:
            yield f"{name} is not in the uninterrupted run"
        else:
            one = content_of(ours[name])
            other = content_of(theirs[name])
            if isinstance(one, list) and isinstance(other, list) and len(one) != len(other):
                yield f"{name} has {len(other)} rows, not {len(one)}"
            elif one != other:
                yield f"{name} differs"
