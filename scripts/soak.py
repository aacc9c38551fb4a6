"""Breaks tiny runs of every system in many ways, and says which held: `make soak`.

    python scripts/soak.py                                       # everything, in the file of rows and as a table
    python scripts/soak.py --short                               # a few cases of each kind, a minute or two
    python scripts/soak.py --only kills --systems add_on --kills 25 --seed 3
    python scripts/soak.py --only kills --systems add_on --chain 4   # one chain of strikes again

kills: SIGKILL at moments drawn over training, evaluation, filling the cache, sampling, and inside saves. A run is
killed, goes on, is killed again, and at last left alone; then everything it has left must be what an uninterrupted run
leaves, bit for bit. signals: the same with SIGTERM and Ctrl-C, which must also end it in order; the data scripts, too.
damage: each file of the newest checkpoint, of the cache and of a stage's state, cut, emptied, one bit flipped, deleted,
unreadable, or a folder: named, passed over by `--resume auto`, refused by its path. full_disk: each kind of write.

Each case is a row of the file of rows. Ctrl-C keeps those that are done, and the same command goes on behind them; rows
that failed are run again. Exit status: 0 all held, 1 a case failed, 2 a mistake on the command line.
"""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import soak_scripts  # noqa: E402
from script_tools import ScriptParser, csv_text, run_script  # noqa: E402
from soak_damage import NEVER, damage_cases, disk_cases, some  # noqa: E402
from soak_runs import SYSTEMS, Bench, Place  # noqa: E402
from soak_strikes import MOST_IN_CHAIN, chain  # noqa: E402

PARTS = ("kills", "signals", "damage", "full_disk")
CHAINED = ("kills", "signals")
SCRIPTS = "scripts"  # what stands for a system in the rows of the data scripts
COLUMNS = ("part", "system", "case", "moment", "held", "why", "status", "cpu_s", "seed", "commit", "date")
CPU_S = {"kills": 0.7, "signals": 0.9, "damage": 1.7, "full_disk": 2.4}  # about what a case costs on an AMD EPYC
CASES = {"damage": 95, "full_disk": 28}  # about so many in each system
START_S = 40  # about what the process that forks the commands and the uninterrupted runs cost
IN_SHORT = 3  # cases of each part and system

Case = dict[str, Any]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help=f"comma list of {', '.join(PARTS)}")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help=f"comma list of {', '.join(SYSTEMS)}")
    parser.add_argument("--kills", type=int, default=25, help="kills, and signals, of each system")
    parser.add_argument("--cases", type=int, default=0,
                        help="of damage, and of full disks, in each system: so many are drawn; 0 = all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments that are drawn")
    parser.add_argument("--scripts", type=int, default=1, choices=(0, 1), help="whether the data scripts are run, too")
    parser.add_argument("--chain", type=int, help="run this chain of strikes alone, and write no row")
    parser.add_argument("--short", action="store_true", help="a few cases of each kind")
    parser.add_argument("--rows", type=Path, default=ROOT / "docs" / "results" / "soak" / "rows.csv",
                        help="the file of rows")
    parser.add_argument("--again", action="store_true", help="begin anew, whatever the file of rows holds")
    parser.add_argument("--work", type=Path, help="the folder of the runs; a temporary one by default")
    args = parser.parse_args(argv)

    args.only = [name for name in args.only.split(",") if name]
    args.systems = [name for name in args.systems.split(",") if name]
    for given, known, flag in ((args.only, PARTS, "--only"), (args.systems, SYSTEMS, "--systems")):
        wrong = sorted(set(given) - set(known))
        if wrong or not given:
            parser.error(f"{flag}: {', '.join(wrong) or 'nothing'} is not among {', '.join(known)}")
    if args.kills < 1 or args.cases < 0:
        parser.error("--kills must be 1 or more, --cases 0 or more")
    if args.short:
        args.kills = min(args.kills, IN_SHORT)
        args.cases = IN_SHORT

    return args


class Rows:
    """The file of rows. Those that held are not run again.

    Args:
        path: the file; None = nothing is kept.
        again: begin anew.
    """

    def __init__(self, path: Path | None, again: bool):
        self.path = path
        self.rows: list[Case] = []
        self.failed: list[Case] = []
        if path is not None and path.exists() and not again:
            with open(path, newline="", encoding="utf-8") as file:
                self.rows = [row for row in csv.DictReader(file) if row["held"] == "1"]

    def has(self, part: str, system: str, case: str, seed: int) -> bool:
        """Whether a case has held before; of a chain, all of its strikes."""
        return bool(self.of(part, system, case, seed))

    def of(self, part: str, system: str, case: str, seed: int) -> list[Case]:
        """The rows of a case."""
        wanted = (part, system, str(seed))
        return [row for row in self.rows if (row["part"], row["system"], str(row["seed"])) == wanted
                and (row["case"] == case or row["case"].startswith(f"{case} "))]

    def add(self, rows: list[Case]) -> None:
        """Enters rows, which appear in the file together: a chain's strikes count as one."""
        self.rows += rows
        self.failed += [row for row in rows if row["held"] != 1]
        if self.path is not None:
            from engine.files import write_text_aside

            write_text_aside(self.path, csv_text(COLUMNS, self.rows), "--rows")


def commit() -> str:
    """The commit that is run, with + where files differ from it; "" without git."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=8", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def stamped(args: argparse.Namespace, part: str, system: str, cases: Iterator[Case]) -> list[Case]:
    """Rows of the file."""
    here = commit()
    rows = []
    for case in cases:
        why = case.get("why") or ""
        row = {"part": part, "system": system, "held": int(not why), "seed": args.seed, "commit": here,
               "date": f"{datetime.now(UTC):%Y-%m-%d}", **case, "why": why}
        rows.append(row)

    return rows


def strike_all(args: argparse.Namespace, place: Place, rows: Rows, part: str, say: Callable[[str], None]) -> None:
    """Chain after chain, until as many strikes have landed as are wanted."""
    name = place.system.name
    landed = 0
    number = 0
    while landed < args.kills:
        known = rows.of(part, name, f"chain {number}", args.seed)
        if known:
            landed += len(known)
        else:
            most = min(MOST_IN_CHAIN, args.kills - landed)
            new = stamped(args, part, name, chain(place, number, args.seed, part, most))
            rows.add(new)
            landed += len(new)
            held = sum(row["held"] for row in new)
            say(f"{part} {name}: {landed} of {args.kills}, chain {number}: {held} of {len(new)} held")
        number += 1


def run_cases(
    args: argparse.Namespace, rows: Rows, part: str, system: str, cases: list[Any], say: Callable[[str], None]
) -> None:
    """Case after case, those left out that have held before."""
    if args.cases:
        cases = some(cases, args.cases, args.seed)
    for number, (name, run) in enumerate(cases, start=1):
        if rows.has(part, system, name, args.seed):
            continue
        new = stamped(args, part, system, iter([{"case": name, **run()}]))
        if new[0]["moment"] == NEVER and not new[0]["why"]:  # no case of this system
            continue
        rows.add(new)
        say(f"{part} {system}: {number} of {len(cases)}, {name}: {'held' if new[0]['held'] else new[0]['why']}")


def run_part(args: argparse.Namespace, bench: Bench, rows: Rows, part: str, say: Callable[[str], None]) -> None:
    """One part, of each system and of the data scripts."""
    for name in args.systems:
        place = Place(bench, SYSTEMS[name])
        if part in CHAINED:
            strike_all(args, place, rows, part, say)
        else:
            cases = damage_cases if part == "damage" else disk_cases
            run_cases(args, rows, part, name, list(cases(place)), say)

    # Once, whatever the systems.
    if part == "signals" and args.scripts:
        count = 1 if args.short else max(1, args.kills // 5)
        run_cases(args, rows, part, SCRIPTS, list(soak_scripts.signal_cases(bench, count, args.seed)), say)
    if part == "full_disk" and args.scripts:
        run_cases(args, rows, part, SCRIPTS, list(soak_scripts.disk_cases(bench)), say)


def repeat(args: argparse.Namespace, bench: Bench, say: Callable[[str], None]) -> int:
    """One chain of strikes again, told strike by strike. Returns how many failed."""
    failed = 0
    for part in [each for each in args.only if each in CHAINED]:
        for name in args.systems:
            for row in chain(Place(bench, SYSTEMS[name]), args.chain, args.seed, part, MOST_IN_CHAIN):
                failed += bool(row["why"])
                say(f"{part} {name} {row['case']}: {row['moment']}: {row['why'] or 'held'}")

    return failed


def table(rows: list[Case]) -> str:
    """Cases and how many held, of each part and system."""
    lines = ["part       system          cases  held"]
    for part, system in sorted({(row["part"], row["system"]) for row in rows}):
        own = [row for row in rows if (row["part"], row["system"]) == (part, system)]
        held = sum(int(row["held"]) for row in own)
        lines.append(f"{part:<10} {system:<15} {len(own):>5} {held:>5}")

    return "\n".join(lines)


def command_of(row: Case) -> str:
    """How a case that failed is repeated."""
    words = f"python scripts/soak.py --only {row['part']} --seed {row['seed']}"
    if row["system"] != SCRIPTS:
        words += f" --systems {row['system']}"
    if row["case"].startswith("chain "):
        words += f" --chain {row['case'].split()[1]}"

    return words


def cost_s(args: argparse.Namespace) -> float:
    """About how many CPU seconds are asked for."""
    total = START_S
    for part in args.only:
        count = args.kills if part in CHAINED else min(CASES[part], args.cases or CASES[part])
        total += CPU_S[part] * count * len(args.systems)

    return total


def main(argv: list[str] | None = None) -> int:
    """Runs what is asked for. Returns the exit status."""
    args = parse(argv)
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started:6.0f} s] {line}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="hrm-soak-") as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if args.chain is None:
            say(f"about {cost_s(args) / 60:.0f} minutes of CPU time on {platform.machine()}; Ctrl-C keeps what is done")
        bench = Bench(work)
        try:
            if args.chain is not None:
                return int(repeat(args, bench, say) > 0)
            rows = Rows(args.rows, args.again)
            for part in args.only:
                run_part(args, bench, rows, part, say)
        finally:
            bench.close()

    print(table(rows.rows))
    print(f"{bench.cpu_s:.0f} s of CPU time in the commands, {time.monotonic() - started:.0f} s in all")
    for row in rows.failed:
        print(f"FAILED {row['part']} {row['system']} {row['case']} ({row.get('moment', '')}): {row['why']}; "
              f"again: {command_of(row)}")

    return int(bool(rows.failed))


if __name__ == "__main__":
    sys.exit(run_script(main))
