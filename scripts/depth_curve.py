"""Solved rate against the number of segments at evaluation, of a trained add-on.

    python scripts/depth_curve.py runs/NAME --segments 1,2,4,8,16
    python scripts/depth_curve.py runs/NAME/checkpoints/step-00004000 --eval_n 512 --difficulty num_terms
    python scripts/depth_curve.py runs/NAME --steps 1-12,16 --segments 1,4,16
    python scripts/depth_curve.py runs/NAME --plugin plugins.py      # a run on tasks of your own

Each number of segments answers the same evaluation items, per task and per difficulty, with Wilson 95 % bands; `last`
is the readout with halting off. A checkpoint with --use_act is also measured with halting `on` (at most so many
segments) and with `best_halt` (all segments run, the one with the highest halting score answers), and its halting head
is calibrated: the probability after k segments against whether the answer read after k segments is right.
`--halt_settled X` adds `settled`: as `on`, or without a head, and an example stops too when a segment changes what the
injector writes where the answer begins (`--halt_settled_at prompt`: z_H over the whole prompt) by less than the share X
of its norm. `confidence` is the mean probability of the generated answers, greedy ones, and `confidence_error` its
expected calibration error. A run with `--segments_sampling item` gets the readout `own`: each item has as many
segments as it needs steps, at most the largest number asked for.

Difficulty groups items by a whole number that the task itself gives each item (`num_terms`, `num_empty`), the first
that varies and takes at most 12 values; without one, by quartiles of the prompt's tokens. `--difficulty steps` groups
by the steps that an item needs, where its task says them. The `change` columns hold the
mean over items of ||z_k - z_(k-1)|| / ||z_k||, norms over the whole prompt: a recurrence that settles goes to 0.
`answer_change` is the same of what `--halt_settled` looks at.

`--steps` draws `--eval_n` items of each of these numbers of steps, of tasks whose config has `max_steps` (toy_chain).
`beyond_training` is 1 where the run had been trained on fewer steps at this checkpoint. `--steps` and `--difficulty
steps` go with any adapter; one without segments answers once, and `segments` is 0.

Output, by default in depth/ of the run: depth.csv, depth.png, and reliability.png with --use_act.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import options  # noqa: E402
from addon.adapters import ADAPTER_CONFIG, adapter_of, load_controller, record_of, saved_format  # noqa: E402
from addon.curriculum import Curriculum, CurriculumConfig  # noqa: E402
from addon.streams import beyond_reserve  # noqa: E402
from addon_run import chosen_tasks, task_config, task_names  # noqa: E402
from batching import PromptConfig, PromptFormat  # noqa: E402
from calibration import calibration_error  # noqa: E402
from depth_measures import (  # noqa: E402
    Loaded,
    Settled,
    Trajectory,
    answers_at,
    difficulties,
    groups,
    rows_of,
    trajectory,
)
from depth_report import calibrations, draw, draw_reliability, table, verdicts, write  # noqa: E402
from depth_steps import (  # noqa: E402
    LAST,
    OWN,
    add_steps,
    changed,
    items_by_steps,
    note_of_steps,
    read_steps,
    steps_table,
    trained_steps,
)
from engine.checkpoints import FOLDER, read_checkpoint  # noqa: E402
from engine.machine import pick_device, pick_precision  # noqa: E402
from engine.progress import Progress  # noqa: E402
from engine.resume import resolve_resume  # noqa: E402
from evaluation import Decoding, answer_budget  # noqa: E402
from host import load_tokenizer  # noqa: E402
from own_tasks.record import changes, folders_before, missing_plugin, read_record  # noqa: E402
from own_tasks.task import OwnTask  # noqa: E402
from own_tasks.trusted import type_in  # noqa: E402
from reasoning_gym_wrapper import Example, Reserve, Task, task_problems  # noqa: E402
from script_tools import ScriptParser, add_spread_flags, run_script, spread_of  # noqa: E402
from tasks.plugins import Plugin, load_plugin  # noqa: E402
from text_data.trained import trained_in  # noqa: E402


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with status 2 and one line for a mistake."""
    parser = ScriptParser(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint or a run's folder (its newest checkpoint)")
    parser.add_argument("--segments", "--eval_segments", default="1,2,4,8,16", help="comma list")
    parser.add_argument("--steps", default="", help="of depth probes: a comma list with ranges, 1-12,16")
    parser.add_argument("--task_config", default="", help="with --steps: fields of the tasks in place of the run's, as "
                        "train.py takes them, to measure items of another shape")
    parser.add_argument("--eval_n", type=int, default=0, help="items of each task (default: as in the run)")
    parser.add_argument("--difficulty", default="auto", help="auto, steps, length, or a name in the items' metadata")
    parser.add_argument("--halt_settled", type=float, default=0.0, help="share of change under which an example stops")
    parser.add_argument("--halt_settled_at", choices=("answer", "prompt"), help="default: as in the run")
    parser.add_argument("--output", type=Path, help="folder (default: depth/ in the run's folder, with "
                        "--task_config one of its own)")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add_spread_flags(parser)
    parser.add_argument("--num_threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--plugin", help="the Python file of tasks that the run was trained with; it runs only when "
                        "typed")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with a hub model")
    parser.add_argument("--trust_functions", default="", help="as in train.py: verifiers of your own that the "
                        "checkpoint names")
    parser.add_argument("--allow_code_tasks", action="store_true", help="as in train.py, typed in each call")
    args = parser.parse_args(argv)

    try:
        args.segments = sorted({int(part) for part in args.segments.split(",")})
    except ValueError:
        parser.error(f"--segments {args.segments!r} is not legal: expected whole numbers with commas")
    try:
        args.steps = read_steps(args.steps)
    except ValueError as error:
        parser.error(str(error))
    for name, value, low in (
        ("segments", min(args.segments), 1),
        ("eval_n", args.eval_n, 0),
        ("batch_size", args.batch_size, 1),
        ("num_threads", args.num_threads, 0),
    ):
        if value < low:
            parser.error(f"--{name} {value} is not legal: expected at least {low}")
    if args.task_config and not args.steps:
        parser.error("--task_config needs --steps: the items of the run itself have the run's own settings")
    _check_settled(args, parser)
    return args


def _check_settled(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Exits with status 2 and one line where --halt_settled and what belongs to it are not legal together."""
    if not 0 <= args.halt_settled <= 1:
        parser.error(f"--halt_settled {args.halt_settled} is not legal: expected a share from 0 (off) to 1")
    if args.halt_settled_at and not args.halt_settled:
        parser.error(f"--halt_settled_at {args.halt_settled_at} does nothing without --halt_settled: add it")
    if args.halt_settled and max(args.segments) < 3:
        parser.error(f"--halt_settled {args.halt_settled} saves nothing with fewer than 3 --segments: add one")


# --- what is measured on ----------------------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> tuple[Loaded, options.Options]:
    """What the command line names, and the options of its run.

    Raises:
        ValueError: no such checkpoint, a broken one, or one of another system.
    """
    folder = resolve_resume(args.checkpoint, Path("runs"), "the checkpoint")
    documents = read_checkpoint(folder, stems=[]).documents
    if ADAPTER_CONFIG not in documents:
        raise ValueError(f"{folder} holds no add-on: depth curves are of --arch addon alone")
    adapter = adapter_of(record_of(documents))
    if adapter != "hrm" and not args.steps and args.difficulty != "steps":
        raise ValueError(f"{folder} holds an adapter without segments ({adapter}): it has a curve over the steps of "
                         "items alone, by --steps or --difficulty steps")

    # A checkpoint from before a flag was there gets the flag's default.
    saved = options.read_resolved(documents["config.resolved.yaml"])
    opts = options.Options(**{flag.name: saved.get(flag.name, flag.default) for flag in options.FLAGS})
    type_in(options.names(args.trust_functions), folders_before(folder))
    plugin = add_plugin(folder, task_names(opts), args.plugin)
    lines = task_problems(task_names(opts), task_config(opts), args.allow_code_tasks, supervised=False)
    if lines:
        raise ValueError("\n".join(lines))
    device = pick_device(args.device)
    model, document = load_controller(folder, device, args.trust_remote_code, spread_of(args))
    tokenizer = load_tokenizer(
        document["base_model_name_or_path"], args.trust_remote_code, document.get("base_revision")
    )
    rows = model.host.get_input_embeddings().weight.shape[0]
    prompt, note = saved_format(document, tokenizer, rows, options.part(PromptConfig, opts))
    if note:
        print(note, file=sys.stderr)

    tasks = chosen_tasks(opts, folder)
    tell_of_changes(folder, tasks, plugin)
    examples, trained = held_out(opts, args, prompt, documents, tasks)
    decoding = Decoding(
        opts.decode_temperature,
        opts.decode_top_p,
        opts.decode_top_k,
        answer_budget(prompt, examples, opts.max_new_tokens),
        args.batch_size,
        opts.seed,
    )
    precision = pick_precision(opts.mixed_precision, device)
    loaded = Loaded(
        folder, model, prompt, examples, bool(opts.use_act), decoding, precision, adapter == "hrm", trained,
        opts.segments_sampling == "item",
    )
    return loaded, opts


def add_plugin(folder: Path, names: list[str], plugin: str | None) -> Plugin | None:
    """Adds the tasks of `--plugin`, where it is typed, and returns it.

    Raises:
        ValueError: the file cannot be used, or one of the run's tasks needs one and none is typed.
    """
    lines = missing_plugin(read_record(folder), names, plugin)
    if lines:
        raise ValueError(lines[0])
    return load_plugin(plugin) if plugin else None


def tell_of_changes(folder: Path, tasks: list[Task | OwnTask], plugin: Plugin | None) -> None:
    """Says which files of the user's own are not what they were when the checkpoint was written."""
    own = next((task for task in tasks if isinstance(task, OwnTask)), None)

    for line in changes(read_record(folder), own, plugin):
        print(line, file=sys.stderr)


def held_out(
    opts: options.Options, args: argparse.Namespace, prompt: PromptFormat, documents: dict[str, str],
    tasks: list[Task | OwnTask],
) -> tuple[list[Example], dict[str, int]]:
    """Items to measure, and the most steps that each task with that knob is trained on.

    The items are the first --eval_n of the run's own of each task, at the level its curriculum had reached; with
    --steps so many of each number of steps.

    Raises:
        ValueError: a task has fewer items, or one is too long for the run's --max_seq_len.
    """
    n = args.eval_n or opts.eval_n

    def fitting(examples: list[Example]) -> list[Example]:
        return prompt.fitting(examples, opts.overlong, "evaluation")

    as_configured = tasks  # a low level of a curriculum has no room for many steps
    curriculum = None
    if opts.curriculum:
        # Built as the run built it: which items a level has depends on --eval_n where the level is small.
        earlier = trained_in(documents, goes_on=True).earlier
        curriculum = Curriculum(tasks, options.part(CurriculumConfig, opts), fitting, trained=earlier)
        state = json.loads(documents.get("training_state.json", "{}"))
        curriculum.restore(state.get("extra", {}).get("curriculum", {}))
        tasks = curriculum.tasks()

    # Items that were not kept off training must not be among those that were trained on.
    trained = trained_steps(tasks)
    known = trained_in(documents, goes_on=False)
    if not known.is_whole:
        warn_of_unknown(args, opts, trained)
    if args.steps:
        shaped = changed(as_configured, args.task_config)
        return fitting(items_by_steps(shaped, args.steps, n, opts.eval_seed, known)), trained
    if curriculum is None:
        drawn = Reserve(tasks, n, opts.eval_seed, by_group=opts.group_split, trained=known)
        return fitting(drawn.examples), trained

    taken: dict[str, int] = {}
    kept = []
    for example in curriculum.examples():
        taken[example.task] = taken.get(example.task, 0) + 1
        if taken[example.task] <= n:
            kept.append(example)
    return kept, trained


def warn_of_unknown(args: argparse.Namespace, opts: options.Options, trained: dict[str, int]) -> None:
    """Says which items may have been trained on, where the checkpoint does not record what was."""
    if args.steps:
        print(note_of_steps(trained), file=sys.stderr)
    elif args.eval_n > opts.eval_n and not opts.curriculum:  # a curriculum's items are all reserved
        names = [task.name for task in chosen_tasks(opts)]
        for line in beyond_reserve(names, opts.eval_n, opts.group_split):
            print(line, file=sys.stderr)


def folder_name(task_config: str) -> str:
    """The folder of a curve in its run's: items of another shape have one of their own."""
    if not task_config:
        return "depth"
    return "depth-" + hashlib.sha256(task_config.encode()).hexdigest()[:8]


# --- the command ------------------------------------------------------------------------------------------------------


class Curve:
    """The rows of every readout at every number of segments, and what the halting head said of each answer."""

    def __init__(self, loaded: Loaded, labels: list[str], walk: Trajectory | None, settled: Settled):
        self.loaded = loaded
        self.walk = walk
        self.settled = settled
        self.rows: list[dict[str, Any]] = []
        self.chances: list[float] = []  # halting probability, of each item after each number of segments
        self.right: list[bool] = []  # whether the answer read there is right
        self._places = groups(loaded.examples, labels)

    def measure(self, readout: str, segments: int) -> None:
        """Adds one readout at one number of segments."""
        began = time.monotonic()
        answers = answers_at(self.loaded, readout, segments, self.settled)
        seconds = time.monotonic() - began
        self.rows += rows_of(answers, self._places, self.walk, readout, segments, seconds, self.loaded.use_act)
        if self.loaded.use_act and self.walk is not None and readout == LAST:
            self.chances += self.walk.halt_probability[segments - 1].tolist()
            self.right += [a.solved for a in answers]


def measure(loaded: Loaded, args: argparse.Namespace) -> Curve:
    """Every readout that the checkpoint and the command line allow, with a line of progress."""
    readouts = [LAST]
    if not loaded.has_segments:
        args.segments = [0]
    elif loaded.use_act:
        readouts += ["on", "best_halt"]
    if args.halt_settled > 0 and loaded.has_segments:
        readouts.append("settled")

    # Items that do not say their steps take all segments.
    measurements = [(readout, segments) for readout in readouts for segments in args.segments]
    if loaded.item_segments:
        measurements.append((OWN, max(args.segments)))

    difficulty = "steps" if args.steps else args.difficulty
    labels = difficulties(loaded.examples, loaded.format, difficulty)
    total = len(measurements) + 1
    with Progress(total, "measurement", "measurement") as progress:
        walk = trajectory(loaded, max(args.segments), args.batch_size) if loaded.has_segments else None
        place = args.halt_settled_at or getattr(loaded.model.config, "halt_settled_at", "")
        settled = Settled(args.halt_settled, place)
        curve = Curve(loaded, labels, walk, settled)
        done = 1
        for readout, segments in measurements:
            progress.update(done, readout=readout, segments=segments)
            curve.measure(readout, segments)
            done += 1
        progress.update(total)
    add_steps(curve.rows, loaded.trained)
    return curve


def main(argv: list[str] | None = None) -> int:
    """The exit status. Raises ValueError and OSError for the user's mistakes."""
    args = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.num_threads:
        torch.set_num_threads(args.num_threads)

    loaded, opts = load(args)
    run = loaded.folder
    if run.parent.name == FOLDER:
        run = run.parent.parent
    output = args.output or run / folder_name(args.task_config)

    curve = measure(loaded, args)
    write(curve.rows, output / "depth.csv")
    draw(curve.rows, curve.walk, opts.segments, loaded.trained, output / "depth.png")
    lines = [table(curve.rows), *calibrations(curve.rows)]
    if loaded.has_segments:
        lines += verdicts(curve.rows)
    print("\n".join([*lines, *steps_table(curve.rows)]))
    if loaded.use_act and loaded.has_segments:
        path = output / "reliability.png"
        draw_reliability(curve.chances, curve.right, path)
        error = calibration_error(curve.chances, curve.right)
        print(f"halting head: expected calibration error {error:.3f} over {len(curve.right)} answers; {path}")
    print(f"depth curve: {output / 'depth.csv'}, {output / 'depth.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
