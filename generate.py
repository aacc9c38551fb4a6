"""Prompts in, answers out, from a trained checkpoint: `python generate.py --prompt "What is 12 + 7?"`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn, Protocol

from engine.environment import prepare
from flags import UNWRITABLE

PROG = "generate.py"
prepare()  # before torch loads
COMMANDS = "an empty line or Ctrl-D ends"


class Answerer(Protocol):
    """A loaded checkpoint; `title` says what it is, `has_host` whether a frozen LLM is part of it."""

    title: str
    has_host: bool

    def check_length(self, question: str) -> None:
        """Raises ValueError when prompt and answer cannot fit."""

    def answers(self, question: str) -> list[tuple[str, str]]:
        """(label, answer); with --compare also of what the model is compared with."""


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        self.exit(2, f"{PROG}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(
        prog=PROG,
        description="Answers prompts with a trained checkpoint: a frozen LLM with its HRM add-on, a hybrid, or a"
        " planner/worker LM.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    # What answers.
    parser.add_argument("--checkpoint", help="checkpoint or run folder; the newest run of --save_dir by default")
    parser.add_argument("--save_dir", default="runs", help="folder of all runs")
    parser.add_argument("--dataset", help="take the newest checkpoint that was trained on this data set (hybrid)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="device")
    parser.add_argument("--device_map", default="none", choices=("none", "auto"), help="auto spreads an add-on's LLM "
                        "over all accelerators, then memory, then the disk")
    parser.add_argument("--max_memory", metavar="JSON", help="with --device_map auto: the most that each place holds, "
                        'such as {"0": "10GiB", "cpu": "30GiB"}')
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with a hub model")

    # What is asked.
    parser.add_argument("--prompt", action="append", default=[], help="a question; may be given several times")
    parser.add_argument("--interactive", action="store_true", help=f"read questions from the terminal; {COMMANDS}")
    parser.add_argument("--compare", action="store_true", help="show the bare LLM (hybrid: gate shut; "
                        "enhanced: the thought before the solution), too")

    # How answers are generated.
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer in tokens")
    parser.add_argument("--decode_temperature", type=float, default=0.0, help="sampling temperature; 0 = greedy")
    parser.add_argument("--decode_top_p", type=float, default=1.0, help="nucleus sampling; 1 = off")
    parser.add_argument("--decode_top_k", type=int, default=0, help="sample among the k likeliest tokens; 0 = off")
    parser.add_argument("--eval_segments", type=int, default=0, help="HRM segments or cycles; 0 = as trained")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling")
    return parser


def problems(opts: argparse.Namespace) -> list[str]:
    """Everything wrong with the flags, one line each."""
    lines = []
    if not opts.prompt and not opts.interactive:
        lines.append('nothing to answer: add --prompt "..." or --interactive')
    for name, low in (("max_new_tokens", 1), ("eval_segments", 0), ("decode_top_k", 0), ("decode_temperature", 0)):
        value = getattr(opts, name)
        if not value >= low:  # nan is at least nothing
            lines.append(f"--{name} {value} is not legal: expected at least {low}")

    if not 0 < opts.decode_top_p <= 1:
        lines.append(f"--decode_top_p {opts.decode_top_p} is not legal: expected above 0 and at most 1")
    for text in opts.prompt:
        if not text.strip():
            lines.append(f"--prompt {text!r} is empty: type a question")
        if UNWRITABLE.search(text):
            lines.append(f"--prompt {text!r} is no UTF-8 text without NUL: type another question")
    return lines


# --- the checkpoint ---


def find_checkpoint(checkpoint: str | None, save_dir: Path, dataset: str | None) -> Path:
    """The folder of `--checkpoint`, else of the checkpoint written last in `save_dir` (on `dataset`, if given).

    Raises:
        ValueError: no such checkpoint, a broken one, or one trained on another data set.
    """
    from engine.resume import resolve_resume

    def fits(folder: Path) -> bool:
        return dataset is None or dataset_of(folder) == dataset

    folder = resolve_resume(checkpoint or "auto", save_dir, "--checkpoint", fits)
    if not fits(folder):
        trained = dataset_of(folder) or "Reasoning Gym tasks"
        raise ValueError(f"{folder} was trained on {trained}, not on --dataset {dataset}: leave one of them out")
    return folder


def dataset_of(folder: Path) -> str | None:
    """The data set that a checkpoint was trained on; None for systems that train on tasks."""
    from engine.checkpoints import read_checkpoint
    from options import read_resolved

    return read_resolved(read_checkpoint(folder, stems=[]).documents["config.resolved.yaml"]).get("dataset")


def answerer_of(folder: Path) -> type[Any]:
    """The class that answers with a checkpoint of its system; its constructor takes (config, folder, device)."""
    from addon.adapters import ADAPTER_CONFIG
    from engine.checkpoints import read_checkpoint
    from enhanced.config import EnhancedHRMConfig
    from hybrid.training import CONFIG_JSON

    documents = read_checkpoint(folder, stems=[]).documents
    if ADAPTER_CONFIG in documents:
        from addon.answering import AddonAnswerer

        return AddonAnswerer
    if json.loads(documents[CONFIG_JSON]).get("model_type") == EnhancedHRMConfig.model_type:
        from enhanced.answering import EnhancedAnswerer

        return EnhancedAnswerer
    from hybrid.answering import HybridAnswerer

    return HybridAnswerer


def load(opts: argparse.Namespace) -> Answerer:
    """The answerer of the checkpoint that the flags ask for, and its title on stderr; torch loads here.

    Raises:
        ValueError: no such checkpoint, a broken one, or a device that is not here.
    """
    import transformers

    from engine.machine import pick_device
    from engine.placement import SpreadConfig
    from evaluation import AnswerConfig, Decoding

    # stderr is for the title and for the user's mistakes.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    decoding = Decoding(opts.decode_temperature, opts.decode_top_p, opts.decode_top_k, opts.max_new_tokens,
                        seed=opts.seed)
    config = AnswerConfig(decoding, opts.eval_segments, opts.compare, opts.trust_remote_code,
                          SpreadConfig(opts.device_map, opts.max_memory))

    folder = find_checkpoint(opts.checkpoint, Path(opts.save_dir), opts.dataset)
    kind = answerer_of(folder)
    if opts.device_map != "none" and not kind.has_host:
        raise ValueError(f"--device_map {opts.device_map} spreads the frozen LLM of an add-on, and {folder} holds "
                         "another system: leave it out")
    answerer = kind(config, folder, pick_device(opts.device))
    print(answerer.title, file=sys.stderr)
    return answerer


# --- questions and answers ---


def show(answerer: Answerer, question: str) -> None:
    """Prints question and answers; a question that is refused prints nothing."""
    # Answers first, because they may raise.
    pairs = answerer.answers(question)
    print(f"> {question}")
    for label, text in pairs:
        indented = text.replace("\n", "\n" + " " * 11)
        print(f"{label:9s}  {indented}")


def interact(answerer: Answerer) -> None:
    """Answers question by question until an empty line or the end of input."""
    print(f"ask; {COMMANDS}", file=sys.stderr)
    while True:
        try:
            question = input("? " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if not question:
            return

        try:
            if UNWRITABLE.search(question):
                raise ValueError(f"{question!r} is no UTF-8 text without NUL: type another question")
            answerer.check_length(question)
            show(answerer, question)
        except ValueError as error:  # one question too long does not end the talk
            print(f"{PROG}: error: {error}", file=sys.stderr)


def run(opts: argparse.Namespace) -> None:
    """Loads the checkpoint and answers. Raises ValueError and OSError for the user's mistakes, before any answer."""
    # A question that is too long is refused before another is answered.
    answerer = load(opts)
    for question in opts.prompt:
        answerer.check_length(question)
    for question in opts.prompt:
        show(answerer, question)
    if opts.interactive:
        interact(answerer)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 for the user's mistakes, 130 for Ctrl-C."""
    opts = build_parser().parse_args(argv)
    lines = problems(opts)
    if not lines:
        try:
            run(opts)
            return 0
        except KeyboardInterrupt:
            return 130
        except (ValueError, OSError) as error:
            if os.environ.get("HRM_TRACEBACK"):
                raise
            lines = [" ".join(str(error).split())]

    for line in lines:
        print(f"{PROG}: error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
