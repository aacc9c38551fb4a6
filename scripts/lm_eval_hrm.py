"""Measures an add-on, and its bare LLM, on the tasks of EleutherAI's lm-evaluation-harness (package `lm-eval`).

    pip install lm-eval
    python scripts/lm_eval_hrm.py runs/NAME --tasks gsm8k,wikitext --limit 100 --compare

`import lm_eval_hrm` registers the model `hrm`, so that the harness itself takes it:

    lm_eval.simple_evaluate("hrm", model_args="checkpoint=runs/NAME,bare=1", tasks=["gsm8k"], batch_size=16)

Questions of `generate_until` are put in the frame that the add-on was trained in, and answered greedily; `frame=0`
takes the harness's text as the whole prompt. Texts of `loglikelihood` are taken as they are, and HRM reads the context.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402

from addon.adapters import ADAPTER_CONFIG, load_controller, saved_format  # noqa: E402
from batching import PromptFormat  # noqa: E402
from engine.checkpoints import read_checkpoint  # noqa: E402
from engine.files import write_text_aside  # noqa: E402
from engine.machine import pick_device, pick_precision  # noqa: E402
from engine.placement import SpreadConfig  # noqa: E402
from engine.report import text_table  # noqa: E402
from engine.resume import resolve_resume  # noqa: E402
from host import load_tokenizer  # noqa: E402
from script_tools import ScriptParser, add_spread_flags, run_script, spread_of  # noqa: E402
from text_model import CausalTextModel  # noqa: E402

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:  # told where it is needed: the flags can be read without it
    LM = object
    register_model = None

LONGEST = 256  # tokens of an answer, where a task sets none
SAMPLING = ("temperature", "top_p", "top_k", "num_beams")


class WholePrompts(PromptFormat):
    """A prompt format whose questions are whole prompts already: nothing is written around them."""

    def prompts(self, questions: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; names of special tokens in it are these tokens, as a chat template means them."""
        encoded = self.tokenizer(list(questions), add_special_tokens=not self.chat, return_attention_mask=False)
        self.check_ids(encoded["input_ids"])
        return encoded["input_ids"]


class HRMEvalModel(LM):
    """An add-on of this project, or its bare LLM, as the harness's model `hrm`.

    Args:
        checkpoint: a run's folder (its newest checkpoint), RUN@best, or a checkpoint.
        bare: 1 asks the bare LLM, by the same prompts.
        frame: 0 takes the contexts of `generate_until` for whole prompts, which a chat template of the harness makes
            them anyway.
        batch_size: items generated or scored at a time.
        device: auto, cpu, cuda or mps.
        max_gen_toks: tokens of an answer, where a task sets none.
        trust_remote_code: run Python code that comes with a hub model.
        device_map, max_memory: how the LLM is spread, as train.py's flags of these names.

    Raises:
        ValueError: no such checkpoint, a broken one, or one that holds no add-on.
    """

    def __init__(
        self, checkpoint: str, bare: int = 0, frame: int = 1, batch_size: int | str = 16, device: str | None = "auto",
        max_gen_toks: int = LONGEST, trust_remote_code: bool = False, device_map: str = "none",
        max_memory: str | None = None, **_: Any,
    ):
        super().__init__()
        folder = resolve_resume(str(checkpoint), Path("runs"), "the run")
        if ADAPTER_CONFIG not in read_checkpoint(folder, stems=[]).documents:
            raise ValueError(f"{folder} holds no add-on: the harness's own model hf reads other systems' folders")

        name = pick_device(device or "auto")
        self.model, record = load_controller(
            folder, name, bool(trust_remote_code), SpreadConfig(device_map, max_memory)
        )
        base = record["base_model_name_or_path"]
        tokenizer = load_tokenizer(base, bool(trust_remote_code), record.get("base_revision"))
        rows = self.model.host.get_input_embeddings().weight.shape[0]
        self.format, note = saved_format(record, tokenizer, rows)
        if note:
            print(note, file=sys.stderr)

        # What the add-on computes in is part of its record; the bare LLM keeps its own precision.
        precision = pick_precision(record.get("mixed_precision") or "none", name)
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}

        def autocast() -> contextlib.AbstractContextManager:
            if precision == "none":
                return contextlib.nullcontext()
            return torch.autocast(name.partition(":")[0], dtype=dtypes[precision])

        size = int(batch_size) if str(batch_size).isdigit() else 16  # the harness's `auto` is a word
        self.whole = WholePrompts(tokenizer, self.format.config, rows, self.format.frame)
        self.framed = CausalTextModel(self.model, self.format, size, bool(int(bare)), autocast)
        self.unframed = CausalTextModel(self.model, self.whole, size, bool(int(bare)), autocast)
        self.has_frame = bool(int(frame))
        self.has_template = False  # the harness has rendered the contexts by a chat template
        self.max_gen_toks = int(max_gen_toks)
        self._device = torch.device(name)

    # --- what the harness asks ---

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each cut before the first of its task's stop texts.

        Raises:
            ValueError: a task asks for samples.
        """
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(self._limits(request.args[1]), []).append(place)

        asked = self.framed if self.has_frame and not self.has_template else self.unframed
        texts = [""] * len(requests)
        for (longest, stops), places in groups.items():
            contexts = [requests[place].args[0] for place in places]
            for place, text in zip(places, asked.generate(contexts, longest, stop=stops), strict=True):
                texts[place] = cut_at(text, stops)
                self.cache_hook.add_partial("generate_until", requests[place].args, texts[place])
        return texts

    def _limits(self, settings: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
        """(most new tokens, stop texts) that a task's generation settings ask for."""
        samples = settings.get("do_sample") and settings.get("temperature", 1.0)
        if samples or settings.get("num_beams", 1) != 1:
            shown = {name: settings[name] for name in ("do_sample", *SAMPLING) if name in settings}
            raise ValueError(f"answers are greedy here, and a task asks for {shown}: give gen_kwargs do_sample=False")
        until = settings.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(until)
        longest = settings.get("max_gen_toks") or settings.get("max_new_tokens") or self.max_gen_toks
        return int(longest), tuple(stop for stop in stops if stop)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether greedy decoding gives it) of each pair of context and continuation.

        Raises:
            ValueError: the contexts were rendered by a chat template, whose tokens a text cannot name.
        """
        if self.has_template:
            raise ValueError("log-likelihoods take plain texts: leave the chat template out for such tasks")
        results = []
        scores = self.framed.token_scores([request.args for request in requests])
        for request, (log_p, is_top) in zip(requests, scores, strict=True):
            results.append((float(log_p.sum()), bool(is_top.all())))
            self.cache_hook.add_partial("loglikelihood", request.args, results[-1])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log p of each whole text, every token predicted once; behind the LLM's positions from the half before it."""
        pairs = [("", request.args[0]) for request in requests]
        results = [total for total, _ in self.framed.log_likelihoods(pairs)]
        for request, total in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return results

    # --- chat templates of the harness ---

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer, for the harness's caches."""
        return self.format.tokenizer.name_or_path.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The tokenizer's own template, as text."""
        return self.format.tokenizer.chat_template or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as the tokenizer's template writes it; its text is then the whole prompt."""
        self.has_template = True
        return self.format.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops` in it."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


if register_model is not None:
    register_model("hrm")(HRMEvalModel)


# --- the command ------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with status 2 and one line for a mistake."""
    parser = ScriptParser(__doc__)
    parser.add_argument("run", help="a run's folder (its newest checkpoint), RUN@best, or a checkpoint")
    parser.add_argument("--tasks", required=True, help="comma list of the harness's tasks")
    parser.add_argument("--compare", action="store_true", help="measure the bare LLM as well")
    parser.add_argument("--bare", action="store_true", help="measure the bare LLM alone")
    parser.add_argument("--limit", type=int, help="first items of each task; all by default")
    parser.add_argument("--num_fewshot", type=int, help="solved examples before each item")
    parser.add_argument("--frame", type=int, default=1, choices=(0, 1), help="1 = as in training, 0 = as in the task")
    parser.add_argument("--chat", action="store_true", help="the harness renders items by the chat template")
    parser.add_argument("--include_path", type=Path, help="folder of further task files")
    parser.add_argument("--batch_size", type=int, default=16, help="items at a time")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add_spread_flags(parser)
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with a hub model")
    parser.add_argument("--to", type=Path, help="write the harness's results to this JSON file, too")
    args = parser.parse_args(argv)

    if register_model is None:
        parser.error("the package lm-eval is not installed; run: pip install lm-eval")
    for name, least in (("limit", 1), ("num_fewshot", 0), ("batch_size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value} is not legal: expected {least} or more")
    if args.include_path and not args.include_path.is_dir():
        parser.error(f"--include_path {args.include_path} is no folder: give the folder of your task files")
    if args.bare and args.compare:
        parser.error("--bare and --compare are both given: keep one")
    return args


def chosen_tasks(text: str, manager: Any) -> list[str]:
    """The harness's tasks that a comma list names; a name may be a pattern, such as `mmlu_*`.

    Raises:
        ValueError: one line: a name that is no task of `manager`, the harness's `TaskManager`.
    """
    chosen: list[str] = []
    for name in filter(None, map(str.strip, text.split(","))):
        tasks = manager.match_tasks([name])

        if not tasks:
            near = difflib.get_close_matches(name, manager.all_tasks)
            hint = f"the nearest names are {', '.join(near)}" if near else "list them by: lm_eval ls tasks"
            raise ValueError(f"--tasks {name} is no task of the harness: {hint}; --include_path adds your own")
        chosen += tasks

    if not chosen:
        raise ValueError(f"--tasks {text!r} names no task: list them by: lm_eval ls tasks")
    return chosen


def measured(args: argparse.Namespace, bare: bool) -> dict[str, dict[str, Any]]:
    """Task -> metric -> value, as the harness returns them, of the add-on or of the bare LLM. Raises ValueError."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    # A misspelt task is told before the LLM loads.
    manager = TaskManager(include_path=str(args.include_path) if args.include_path else None)
    tasks = chosen_tasks(args.tasks, manager)
    spread = spread_of(args)
    model = HRMEvalModel(args.run, int(bare), args.frame, args.batch_size, args.device,
                         trust_remote_code=args.trust_remote_code, device_map=spread.device_map,
                         max_memory=spread.max_memory)
    results = lm_eval.simple_evaluate(
        model, tasks=tasks, limit=args.limit, num_fewshot=args.num_fewshot, task_manager=manager,
        apply_chat_template=args.chat, log_samples=False, bootstrap_iters=1000,
    )
    return results["results"]


def lines_of(columns: dict[str, dict[str, dict[str, Any]]]) -> list[list[str]]:
    """A table: task, metric, then a column for each who was measured, `value +- standard error`."""
    rows = [["task", "metric", *columns]]
    first = next(iter(columns.values()))
    for task, metrics in first.items():
        for metric, value in metrics.items():
            if "_stderr" in metric or not isinstance(value, int | float) or metric == "sample_len":
                continue
            cells = [task, metric]
            for results in columns.values():
                name, _, which = metric.partition(",")
                error = results[task].get(f"{name}_stderr,{which}")
                beside = f" +- {error:.4f}" if isinstance(error, float) else ""
                cells.append(f"{results[task][metric]:.4f}{beside}")
            rows.append(cells)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints a table. Raises ValueError and OSError for the user's mistakes."""
    args = parse(argv)
    columns = {}
    if args.bare or args.compare:
        columns["bare LLM"] = measured(args, True)
    if not args.bare:
        columns["with the add-on"] = measured(args, False)

    print(text_table(lines_of(columns)))
    if args.to:
        write_text_aside(args.to, json.dumps(columns, indent=1, default=str) + "\n", "--to")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
