"""Prompts in, answers out, from a trained checkpoint: `python generate.py --prompt "What is 12 + 7?"`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, NoReturn

PROG = "generate.py"
COMMANDS = "an empty line or Ctrl-D ends"


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROG}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROG,
        description="Answers prompts with a trained checkpoint: a frozen LLM with its HRM add-on, a hybrid, or a"
        " planner/worker LM.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", help="checkpoint or run folder; the newest run of --save_dir by default")
    parser.add_argument("--save_dir", default="runs", help="folder of all runs")
    parser.add_argument("--prompt", action="append", default=[], help="a question; may be given several times")
    parser.add_argument("--interactive", action="store_true", help=f"read questions from the terminal; {COMMANDS}")
    parser.add_argument("--compare", action="store_true", help="show the bare LLM (hybrid: gate shut; "
                        "enhanced: the thought before the solution), too")
    parser.add_argument("--dataset", help="take the newest checkpoint that was trained on this data set (hybrid)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer in tokens")
    parser.add_argument("--decode_temperature", type=float, default=0.0, help="sampling temperature; 0 = greedy")
    parser.add_argument("--decode_top_p", type=float, default=1.0, help="nucleus sampling; 1 = off")
    parser.add_argument("--decode_top_k", type=int, default=0, help="sample among the k likeliest tokens; 0 = off")
    parser.add_argument("--eval_segments", type=int, default=0, help="HRM segments or cycles; 0 = as trained")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with a hub model")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="device")
    return parser


def problems(opts: argparse.Namespace) -> list[str]:
    """Everything wrong with the flags, one line each."""
    found = []
    if not opts.prompt and not opts.interactive:
        found.append('nothing to answer: add --prompt "..." or --interactive')
    for name, low in (("max_new_tokens", 1), ("eval_segments", 0), ("decode_top_k", 0), ("decode_temperature", 0)):
        if not getattr(opts, name) >= low:
            found.append(f"--{name} {getattr(opts, name)} is not legal: expected at least {low}")
    if not 0 < opts.decode_top_p <= 1:
        found.append(f"--decode_top_p {opts.decode_top_p} is not legal: expected above 0 and at most 1")
    return found + [f"--prompt {text!r} is empty: type a question" for text in opts.prompt if not text.strip()]


def load(opts: argparse.Namespace) -> Any:
    """The answerer of the checkpoint, see `answering.load_answerer`; torch and transformers load here."""
    import transformers

    from answering import load_answerer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    answerer = load_answerer(opts)
    print(answerer.title, file=sys.stderr)
    return answerer


def show(answerer: Any, question: str) -> None:
    """Question and answers; a question that is refused prints nothing."""
    found = answerer.answers(question)
    print(f"> {question}")
    for label, text in found:
        indented = text.replace("\n", "\n" + " " * 11)
        print(f"{label:9s}  {indented}")


def interact(answerer: Any) -> None:
    """Question by question until an empty line or the end of input."""
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
            answerer.check_length(question)
            show(answerer, question)
        except ValueError as error:  # one question too long does not end the talk
            print(f"{PROG}: error: {error}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, or 2 for the user's mistakes."""
    opts = build_parser().parse_args(argv)
    found = problems(opts)
    if not found:
        try:
            answerer = load(opts)
            for question in opts.prompt:
                answerer.check_length(question)
            for question in opts.prompt:
                show(answerer, question)
            if opts.interactive:
                interact(answerer)
            return 0
        except KeyboardInterrupt:
            return 130
        except (ValueError, OSError) as error:
            if os.environ.get("HRM_TRACEBACK"):
                raise
            found = [" ".join(str(error).split())]
    for problem in found:
        print(f"{PROG}: error: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
