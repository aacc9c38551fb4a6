"""Shows a run as one HTML page: settings, curves, a table of each task, samples, segments used, gate and halting.

    python scripts/report.py runs/NAME
    python scripts/report.py runs/NAME --to page.html --samples 40

The page needs no other file and no network. `train.py` writes it at the end of each run (`--report`); this command
makes it of a run that goes on or was stopped, or with more samples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.page import SAMPLES, write_page  # noqa: E402
from script_tools import ScriptParser, run_script  # noqa: E402


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with status 2 and one line for a mistake."""
    parser = ScriptParser(__doc__)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--to", type=Path, help="the file to write; report.html in the run's folder by default")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="most samples of each kind")
    args = parser.parse_args(argv)

    if not args.run.is_dir():
        parser.error(f"{args.run} is no folder: give the folder of a run, such as runs/NAME")
    if args.samples < 0:
        parser.error(f"--samples {args.samples} is not legal: expected 0 or more")
    if args.to and args.to.is_dir():
        parser.error(f"--to {args.to} is a folder: name the file, such as {args.to / 'report.html'}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page and says where it lies."""
    args = parse(argv)
    print(write_page(args.run, to=args.to, most=args.samples))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
