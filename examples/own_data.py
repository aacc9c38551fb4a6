"""Trains on rows of your own, judged by a function of your own, then asks what was trained.

    python examples/own_data.py                      # 10,000 rows, a few minutes on two cores
    python examples/own_data.py --max_steps 20       # any flag of train.py may follow

Run it from the repository's folder, so that `examples.own_data:close` can be imported again by whatever goes on with
the run: `python train.py --resume runs/prices`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import generate  # noqa: E402
import train  # noqa: E402

DATA = Path("runs/prices.jsonl")


def close(answer: str, entry: dict) -> float:
    """1 for a price that is right to the cent, half for one that is off by less than one: only 1 counts as solved."""
    error = abs(float(answer.removeprefix("$")) - float(entry["answer"]))
    return 1.0 if error < 0.005 else 0.5 * (error < 1)


def write_rows(path: Path) -> None:
    """One JSON object a line, with a question and the gold answer."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for cups in range(1, 101):
            for pens in range(1, 101):
                question = f"A cup costs $3, a pen $2. What do {cups} cups and {pens} pens cost?"
                file.write(json.dumps({"question": question, "answer": str(3 * cups + 2 * pens)}) + "\n")


def main(flags: list[str]) -> int:
    """Writes the rows, trains, asks one question."""
    write_rows(DATA)
    own = f"--data {DATA} --verifier examples.own_data:close --eval_n 128 --max_steps 600 --run_name prices".split()
    status = train.main([*own, *flags])
    if status:
        return status
    asked = "A cup costs $3, a pen $2. What do 7 cups and 5 pens cost?"
    return generate.main(["--prompt", asked, "--compare"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
