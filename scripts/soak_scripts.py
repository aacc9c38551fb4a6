"""The scripts that write data, under the signals, kills and full disks of scripts/soak.py."""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from soak_child import FILLER, Strike
from soak_damage import Case, said_full, small_disk
from soak_runs import RUN, SYSTEMS, Bench, Place
from soak_strikes import trouble_of

OUT = "out"  # the folder that a script writes to
DOCUMENTS = 400
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)


@dataclass(frozen=True)
class Job:
    """A script with its command line.

    writes: the end of the names that it writes under, as a regular expression.
    """

    name: str
    argv: tuple[str, ...]
    writes: tuple[str, ...]


def jobs(bench: Bench) -> list[Job]:
    """The scripts, with what they read."""
    folder = bench.folder / "scripts"
    out = folder / "live" / OUT
    source = folder / "texts.txt"
    prepared = folder / "prepared"
    prepare = ("scripts/prepare_language_dataset.py", "--source", str(source), "--max_seq_len", "16",
               "--vocab_size", "300", "--val_ratio", "0.2")
    if not prepared.exists():
        folder.mkdir(parents=True, exist_ok=True)
        draw = random.Random(0)
        texts = [" ".join(draw.choice(("one", "two", "three")) for _ in range(40)) for _ in range(DOCUMENTS)]
        source.write_text("\n\n".join(f"{number} {text}" for number, text in enumerate(texts)), encoding="utf-8")
        done = bench.run([*prepare, "--dest", str(prepared)])
        if done.status != 0:
            raise ValueError(f"{prepare[0]} ended with {done.status}: {done.text}")

    place = Place(bench, SYSTEMS["add_on"])
    place.reference()
    four = (r"/\.tmp-train\.jsonl-\d+$", r"/\.tmp-meta\.json-\d+$")

    return [
        Job("prepare_language_dataset", (*prepare, "--dest", str(out)), four),
        Job("prepare_language_dataset, 2 workers", (*prepare, "--dest", str(out), "--workers", "2"), four),
        Job("merge_prepared_batches", (
            "scripts/merge_prepared_batches.py", "--sources", str(prepared), "--weights", "1", "--output", str(out),
            "--train_samples", "3000", "--val_samples", "50"), four),
        Job("build_reasoning_dataset", (
            "scripts/build_reasoning_dataset.py", "--dataset", "reasoning_gym:chain_sum", "--limit", "300", "--output",
            str(out / "rows.jsonl")), (r"/\.tmp-rows\.jsonl-\d+$",)),
        Job("export_model", (
            "scripts/export_model.py", str(place.kept / "runs" / RUN), "--to", str(out), "--device", "cpu"),
            (r"/\.tmp-out-\d+$", r"/\.tmp-out-\d+/README\.md$")),
    ]


def written(folder: Path) -> dict[str, str]:
    """The hash of every file, hidden ones as well."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != FILLER:
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()

    return found


class Yard:
    """Where a script writes, and what it writes when nothing happens."""

    def __init__(self, bench: Bench, job: Job):
        self.bench = bench
        self.job = job
        self.live = bench.folder / "scripts" / "live"
        self.clear()
        done = bench.run(list(job.argv), Strike(report=bench.report))
        if done.status != 0:
            raise ValueError(f"{job.name} ended with {done.status}: {done.text}")
        self.stays = done.facts["entries"].get("script", [0.1])
        self.expected = written(self.live)

    def clear(self) -> None:
        """Nothing is written."""
        shutil.rmtree(self.live, ignore_errors=True)
        self.live.mkdir(parents=True)

    def whole_or_nothing(self) -> str:
        """What is wrong with what a struck script left under final names; "" = nothing."""
        final = {name: digest for name, digest in written(self.live).items() if ".tmp-" not in name}
        wrong = [name for name, digest in final.items() if self.expected.get(name) != digest]
        seal = [name for name in self.expected if name.endswith("meta.json")]
        is_mixed = final and len(final) < len(self.expected) and (not seal or seal[0] in final)
        return f"half of it has its name: {', '.join(final)}" if wrong or is_mixed else ""

    def runs_again(self) -> str:
        """What is wrong when it is run again; "" = nothing."""
        if not (self.live / OUT).exists() or self.job.name != "export_model":  # which wants no folder there
            done = self.bench.run(list(self.job.argv))
            if done.status != 0:
                return f"exit status {done.status} when it is run again: {done.last_line}"
        found = written(self.live)
        return "" if found == self.expected else f"run again, it leaves {', '.join(found) or 'nothing'}"


def struck(yard: Yard, sent: signal.Signals, number: int, seed: int) -> Case:
    """A script that a signal ends at a moment that is drawn."""
    draw = random.Random(f"{seed}/{yard.job.name}/{sent}/{number}")
    yard.clear()
    delay_s = draw.uniform(0, 0.9 * sum(yard.stays))
    strike = Strike(report=yard.bench.report, kind="signal", signal=sent, phase="script", delay_s=delay_s)
    done = yard.bench.run(list(yard.job.argv), strike)
    why = trouble_of(done, sent) if done.facts.get("phase") else ""
    if not why and done.status == -signal.SIGTERM:
        why = "it ended without removing what it was writing"
    if not why and sent != signal.SIGKILL and any(".tmp-" in name for name in written(yard.live)):
        why = "what it was writing was left behind"
    why = why or yard.whole_or_nothing() or yard.runs_again()

    return {"moment": f"{sent.name} after {1000 * delay_s:.0f} ms", "why": why, "status": done.status,
            "cpu_s": done.cpu_s}


def on_full_disk(yard: Yard, pattern: str) -> Case:
    """A script whose disk is full from one write on."""
    yard.clear()
    with small_disk(yard.live) as way:
        done = yard.bench.run(list(yard.job.argv), Strike(
            report=yard.bench.report, kind="fill_disk", pattern=pattern, folder=str(yard.live), way=way))
        why = "" if done.facts.get("file") else "the write did not come"
        why = why or said_full(done, yard.job.name)
        left = [name for name in written(yard.live)]
        if left and not why:
            why = f"{', '.join(left)} was left behind"
        (yard.live / FILLER).unlink(missing_ok=True)
        why = why or yard.runs_again()

    return {"moment": way, "why": why, "status": done.status, "cpu_s": done.cpu_s}


def signal_cases(bench: Bench, count: int, seed: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Each script, ended `count` times by each signal."""
    for job in jobs(bench):
        yard = Yard(bench, job)
        for sent in SIGNALS:
            for number in range(count):
                yield (f"{job.name}, {sent.name} {number + 1}",
                       lambda yard=yard, sent=sent, number=number: struck(yard, sent, number, seed))


def disk_cases(bench: Bench) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Each script, with a full disk at its first file and at its last."""
    for job in jobs(bench):
        yard = Yard(bench, job)
        for pattern in job.writes:
            yield f"{job.name}, {pattern}", lambda yard=yard, pattern=pattern: on_full_disk(yard, pattern)


