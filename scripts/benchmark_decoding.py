"""CPU seconds of answers with HRM beside the bare LLM's own `generate`, here and at an earlier commit, in one run.

    python scripts/benchmark_decoding.py                                          # this code alone, the embedded LLM
    python scripts/benchmark_decoding.py --against v1.0 --host assets/local/NAME --batches 64

decoding      the bare LLM's seconds over those with HRM: answers of --tokens tokens to one batch (aim: at least 0.95)
evaluation    seconds with HRM over the bare LLM's: --items sums in batches, read and scored (aim: at most 1.15)

One thread, one segment, the LLM in the dtype that `auto` picks. Bare and with HRM take turns, so ratios are of one
turn; shown are medians [smallest, largest]. HRM is untrained: it then answers as the bare LLM, token by token, so both
do the same work. With --against each tree is measured by a process of its own, in turn, and the greedy answers of both
to 512 sums are compared, with the injector opened at random so that HRM decides some of them.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark import PATIENCE_S, ROOT, processor, spread, unpacked, words
from script_tools import ScriptParser, run_script

COMPARED = 512  # answers of both trees
LEAST_DECODING = 0.95
MOST_EVALUATION = 1.15


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--host", default="assets/tiny_host", help="folder of the LLM, from the repository's root")
    parser.add_argument("--batches", default="64,256", help="comma list of batch sizes")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer in the decoding")
    parser.add_argument("--items", type=int, default=1000, help="sums of the evaluation; 0 = no evaluation")
    parser.add_argument("--repeats", type=int, default=5, help="turns in each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each tree")
    parser.add_argument("--against", help="the commit to compare with; none by default")
    parser.add_argument("--output", type=Path, help="JSON of all figures")
    parser.add_argument("--measure_here", action="store_true", help=argparse.SUPPRESS)  # the process of one tree
    args = parser.parse_args(argv)
    if min(args.tokens, args.repeats, args.rounds, args.items + 1) < 1:
        parser.error("--tokens, --repeats and --rounds must be at least 1, --items at least 0")
    if not all(size.isdecimal() and int(size) for size in args.batches.split(",")):
        parser.error(f"--batches {args.batches} must be numbers above 0, as in 64,256")
    if not (ROOT / args.host / "config.json").is_file():
        parser.error(f"--host {args.host} is no folder with an LLM, seen from {ROOT}")
    return args


# --- in the tree that is measured -------------------------------------------------------------------------------------


class Bench:
    """The LLM, the default add-on on it, and sums to answer."""

    def __init__(self, host: str):
        import torch

        import options
        from addon.host_dtype import pick_dtype
        from batching import PromptConfig, PromptFormat
        from engine.machine import pick_precision
        from host import HostConfig, load_host, load_tokenizer
        from model import HRMAddonConfig, HRMController
        from reasoning_gym_wrapper import make_tasks

        torch.set_num_threads(1)
        self.host = load_host(host, host_dtype=pick_dtype(HostConfig(model_name=host), "cpu")[0])
        torch.manual_seed(0)
        config = options.part(HRMAddonConfig, options.parse([]), base_config=self.host.config)
        self.hrm = HRMController(config, self.host).eval()
        self.precision = pick_precision("auto", "cpu")
        self.format = PromptFormat(load_tokenizer(host), PromptConfig())
        (task,) = make_tasks(["chain_sum"], "small")
        self.examples = [example for _, example in itertools.islice(task.items(5 * 10**8), 1000)]

    def autocast(self, model: Any) -> Any:
        """The precision that an evaluation has: the bare LLM has its own."""
        import torch

        enabled = model is self.hrm and self.precision == "bf16"
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)

    def decode(self, model: Any, batch: int, tokens: int) -> list[Any]:
        """Answers of exactly `tokens` tokens to the first `batch` sums."""
        import torch

        from engine.decoding import Decoding
        from evaluation import generate_answers

        questions = [example.question for example in self.examples[:batch]]
        with torch.no_grad(), self.autocast(model):
            return generate_answers(
                model, self.format, questions, tokens, Decoding(), torch.device("cpu"), min_new_tokens=tokens
            )

    def evaluate(self, model: Any, batch: int, items: int, budget: int = 0) -> list[Any]:
        """Scored answers to the first `items` sums."""
        from engine.decoding import Decoding
        from evaluation import answer

        decoding = Decoding(batch_size=batch, max_new_tokens=budget)
        with self.autocast(model):
            return answer(model, self.format, self.examples[:items], decoding, thinks=model is self.hrm)

    def digest(self) -> str:
        """Of the answers to `COMPARED` sums with an opened injector, 12 tokens each at most. Comes last."""
        import torch

        torch.nn.init.normal_(self.hrm.model.addon.injector.out.weight, std=0.05)
        answers = self.evaluate(self.hrm, 64, COMPARED, 12)
        return hashlib.sha256(json.dumps([given.text for given in answers]).encode()).hexdigest()[:16]


def seconds(work: Callable[[Any], object], model: Any) -> float:
    """CPU seconds of this process for `work` with a model."""
    started = time.process_time()
    work(model)
    return time.process_time() - started


def measure_here(args: argparse.Namespace) -> dict[str, Any]:
    """Pairs (bare, with HRM) of CPU seconds of the code in the working directory, and the digest of its answers."""
    sys.path.insert(0, os.getcwd())
    bench = Bench(args.host)
    pairs: dict[str, list[tuple[float, float]]] = {}
    for size in map(int, args.batches.split(",")):
        works: dict[str, Callable[[Any], object]] = {
            f"decoding, batch {size}": lambda model, size=size: bench.decode(model, size, args.tokens)}
        if args.items:
            works[f"evaluation, batch {size}"] = lambda model, size=size: bench.evaluate(model, size, args.items)

        # The first turn pays for what libraries set up.
        for name, work in works.items():
            turns = []
            for _ in range(args.repeats + 1):
                turns.append((seconds(work, bench.host), seconds(work, bench.hrm)))
            pairs[name] = turns[1:]
    return {"pairs": pairs, "dtype": str(bench.host.dtype), "precision": bench.precision, "answers": bench.digest()}


# --- the comparison ---------------------------------------------------------------------------------------------------


def measured(tree: Path, args: argparse.Namespace) -> dict[str, Any]:
    """`measure_here` of the code in `tree`. Raises ValueError where it fails."""
    command = [sys.executable, str(Path(__file__).resolve()), "--measure_here"]
    for name in ("batches", "tokens", "items", "repeats"):
        command += [f"--{name}", str(getattr(args, name))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    command += ["--host", str((ROOT / args.host).resolve())]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    if done.returncode:
        raise ValueError(f"the measurement in {tree} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ratios(rounds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Measure -> spread of its ratios over all turns of one tree."""
    values: dict[str, list[float]] = {}
    for measure in rounds:
        for name, turns in measure["pairs"].items():
            is_decoding = name.startswith("decoding")
            own = [bare / hrm if is_decoding else hrm / bare for bare, hrm in turns]
            values.setdefault(name, []).extend(own)
    return {name: spread(own) for name, own in values.items()}


def main() -> int:
    """Measures, prints the table and writes the JSON."""
    args = parse()
    if args.measure_here:
        print(json.dumps(measure_here(args)))
        return 0

    rounds: dict[str, list[dict[str, Any]]] = {"now": []}
    with tempfile.TemporaryDirectory() as folder:
        trees = {"now": ROOT}
        if args.against:
            name = unpacked(args.against, Path(folder))
            trees = {name: Path(folder), "now": ROOT}
            rounds = {name: [], "now": []}
        for number in range(args.rounds):
            for name in list(trees) if number % 2 == 0 else list(trees)[::-1]:
                rounds[name].append(measured(trees[name], args))

    columns = {name: ratios(measures) for name, measures in rounds.items()}
    first = rounds["now"][0]
    answers = {measure["answers"] for measures in rounds.values() for measure in measures}
    figures = {"machine": processor(), "host": args.host, "dtype": first["dtype"], "precision": first["precision"],
               "tokens": args.tokens, "items": args.items, "rounds": args.rounds, "repeats": args.repeats,
               "ratios": columns, "answers_equal": len(answers) == 1, "turns": rounds}
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

    print(f"{processor()}; {args.host} in {first['dtype']}, {first['precision']}; aims: decoding at least "
          f"{LEAST_DECODING}, evaluation at most {MOST_EVALUATION}")
    print(f"{'':24}" + "".join(f"{name:>24}" for name in columns))
    for name in columns["now"]:
        print(f"{name:24}" + "".join(f"{words(column[name]):>24}" for column in columns.values()))
    print(f"greedy answers to {COMPARED} sums: {'equal' if len(answers) == 1 else 'DIFFERENT'}")
    return 0 if len(answers) == 1 else 1


if __name__ == "__main__":
    sys.exit(run_script(main))
