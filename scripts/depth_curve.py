"""Solved rate against the number of segments at evaluation, of a trained add-on.

    python scripts/depth_curve.py runs/NAME --segments 1,2,4,8,16
    python scripts/depth_curve.py runs/NAME/checkpoints/step-00004000 --eval_n 512 --difficulty num_terms

Each number of segments answers the same evaluation items, per task and per difficulty, with Wilson 95 % bands; `last`
is the readout with halting off. A checkpoint with --use_act is also measured with halting `on` (at most so many
segments) and with `best_halt` (all segments run, the one with the highest halting score answers), and its halting head
is calibrated: the probability after k segments against whether the answer read after k segments is right.
`--halt_settled X` adds `settled`: as `on`, or without a head, and an example stops too when a segment changes z_H by
less than the share X of its norm.

Difficulty groups items by a whole number that the task itself gives each item (`num_terms`, `num_empty`), the first
that varies and takes at most 12 values; without one, by quartiles of the prompt's tokens. The `change` columns hold the
mean over items of ||z_k - z_(k-1)|| / ||z_k||, norms over the whole prompt: a recurrence that settles goes to 0.

Output, by default in depth/ of the run: depth.csv, depth.png, and reliability.png with --use_act.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import options  # noqa: E402
from addon.adapters import ADAPTER_CONFIG, load_adapter  # noqa: E402
from addon.curriculum import Curriculum  # noqa: E402
from addon.halting import calibration_error, reliability  # noqa: E402
from addon_run import task_config, task_names  # noqa: E402
from batching import PromptFormat  # noqa: E402
from engine.checkpoints import FOLDER, read_checkpoint, resolve_resume  # noqa: E402
from engine.figures import new_figure, save_figure, style  # noqa: E402
from engine.files import write_text_aside  # noqa: E402
from engine.intervals import wilson  # noqa: E402
from engine.logs import Progress  # noqa: E402
from engine.machine import pick_device, pick_precision  # noqa: E402
from evaluation import OVERALL, Answer, Decoding, answer, answer_budget  # noqa: E402
from host import load_tokenizer  # noqa: E402
from hrm_blocks import relative_change  # noqa: E402
from model import HRMController  # noqa: E402
from reasoning_gym_wrapper import Example, Reserve, beyond_reserve, make_tasks  # noqa: E402
from script_tools import ScriptParser, run_script  # noqa: E402

COLUMNS = (
    *("task", "difficulty", "readout", "segments", "n", "solved", "ci_low", "ci_high", "segments_used"),
    *("z_high_change", "z_low_change", "halt_probability", "ece", "seconds"),
)
ALL = "all"  # every difficulty
QUANTILES = 4
MOST_GROUPS = 12


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint or a run's folder (its newest checkpoint)")
    parser.add_argument("--segments", default="1,2,4,8,16", help="comma list")
    parser.add_argument("--eval_n", type=int, default=0, help="items of each task (default: as in the run)")
    parser.add_argument("--difficulty", default="auto", help="auto, length, or a name in the items' metadata")
    parser.add_argument("--halt_settled", type=float, default=0.0, help="share of change under which an example stops")
    parser.add_argument("--output", type=Path, help="folder (default: depth/ in the run's folder)")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--num_threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--trust_remote_code", action="store_true")
    args = parser.parse_args(argv)
    try:
        args.segments = sorted({int(part) for part in args.segments.split(",")})
    except ValueError:
        parser.error(f"--segments {args.segments!r} is not legal: expected whole numbers with commas")
    for name, value, low in (("segments", min(args.segments), 1), ("eval_n", args.eval_n, 0),
                             ("batch_size", args.batch_size, 1), ("num_threads", args.num_threads, 0)):
        if value < low:
            parser.error(f"--{name} {value} is not legal: expected at least {low}")
    if not 0 <= args.halt_settled <= 1:
        parser.error(f"--halt_settled {args.halt_settled} is not legal: expected a share from 0 (off) to 1")
    return args


# --- what is measured on ----------------------------------------------------------------------------------------------


@dataclass
class Loaded:
    """A checkpoint ready to be measured, with the evaluation items of its run."""

    folder: Path
    model: HRMController
    format: PromptFormat
    examples: list[Example]
    opts: argparse.Namespace
    precision: str
    budget: int

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.precision == "none":
            return contextlib.nullcontext()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        return torch.autocast(self.model.device.type, dtype=dtype)


def load(args: argparse.Namespace) -> Loaded:
    """Raises ValueError: no such checkpoint, a broken one, or one of another system."""
    folder = resolve_resume(args.checkpoint, Path("runs"), "the checkpoint")
    documents = read_checkpoint(folder, stems=[]).documents
    if ADAPTER_CONFIG not in documents or "hrm" not in json.loads(documents[ADAPTER_CONFIG]):
        raise ValueError(f"{folder} holds no HRM add-on: depth curves are of --arch addon alone")
    saved = options.read_resolved(documents["config.resolved.yaml"])
    opts = options.Options(**{flag.name: saved.get(flag.name, flag.default) for flag in options.FLAGS})
    device = pick_device(args.device)
    model, document = load_adapter(folder, device, args.trust_remote_code)
    tokenizer = load_tokenizer(document["base_model_name_or_path"], args.trust_remote_code)
    prompt = PromptFormat(tokenizer, opts.prompt_style, opts.system_header, opts.sentinel, opts.max_seq_len)
    examples = held_out(opts, args.eval_n or opts.eval_n, prompt, documents)
    return Loaded(folder, model, prompt, examples, opts, pick_precision(opts.mixed_precision, device),
                  answer_budget(prompt, examples, opts.max_new_tokens))


def held_out(opts: argparse.Namespace, n: int, prompt: PromptFormat, documents: dict[str, str]) -> list[Example]:
    """The run's evaluation items: the first n of each task, at the level its curriculum had reached."""
    tasks = make_tasks(task_names(opts), task_config(opts))
    if not opts.curriculum:
        return prompt.fitting(Reserve(tasks, n, opts.eval_seed, by_group=opts.group_split).examples, opts.overlong,
                              "evaluation")
    # Built as the run built it: which items a level has depends on --eval_n where the level is small.
    climbed = Curriculum(tasks, opts.curriculum_threshold, opts.eval_n, opts.eval_seed, opts.group_split,
                         opts.curriculum_levels, lambda items: prompt.fitting(items, opts.overlong, "evaluation"))
    climbed.restore(json.loads(documents.get("training_state.json", "{}")).get("extra", {}).get("curriculum", {}))
    taken: dict[str, int] = {}
    kept = []
    for example in climbed.examples():
        taken[example.task] = taken.get(example.task, 0) + 1
        kept += [example] if taken[example.task] <= n else []
    return kept


def difficulties(examples: Sequence[Example], prompt: PromptFormat, key: str) -> list[str]:
    """The difficulty group of each item, see the top of this file.

    Raises:
        ValueError: no item has the metadata `key`.
    """
    labels = [""] * len(examples)
    for task in dict.fromkeys(example.task for example in examples):
        places = [i for i, example in enumerate(examples) if example.task == task]
        metadata = [examples[i].entry["metadata"] for i in places]
        name = key if key not in ("auto", "length") else own_difficulty(metadata) if key == "auto" else None
        if name is not None and any(name in entry for entry in metadata):
            found = [f"{name} {entry.get(name, 'unknown')}" for entry in metadata]
        elif key not in ("auto", "length"):
            names = sorted(n for n, value in metadata[0].items() if isinstance(value, int | str))
            raise ValueError(f"items of {task} have no {key!r}: --difficulty takes auto, length or one of "
                             f"{', '.join(names)}")
        else:
            found = by_length([len(ids) for ids in prompt.prompts([examples[i].question for i in places])])
        for place, label in zip(places, found, strict=True):
            labels[place] = label
    return labels


def own_difficulty(metadata: Sequence[dict[str, Any]]) -> str | None:
    """The first whole number in the items' metadata that says how hard they are; None where there is none."""
    for name, value in metadata[0].items():
        if isinstance(value, bool) or not isinstance(value, int) or name == "source_index":
            continue
        values = [entry.get(name) for entry in metadata]
        named = name.startswith("num_") or name in metadata[0].get("difficulty", {})
        if named and all(isinstance(v, int) for v in values) and 2 <= len(set(values)) <= MOST_GROUPS:
            return name
    return None


def by_length(lengths: Sequence[int]) -> list[str]:
    """A label by quartile of prompt length; equal lengths share a label."""
    ordered = sorted(lengths)
    ends = sorted({ordered[(len(ordered) - 1) * (q + 1) // QUANTILES] for q in range(QUANTILES)})
    starts = [ordered[0], *(end + 1 for end in ends[:-1])]
    return [next(f"prompt {low}-{high} tokens" for low, high in zip(starts, ends, strict=True) if length <= high)
            for length in lengths]


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Trajectory:
    """What the recurrence does on each item, segment by segment; all (segments, n)."""

    z_high_change: torch.Tensor
    z_low_change: torch.Tensor
    halt_probability: torch.Tensor


@torch.no_grad()
def trajectory(loaded: Loaded, segments: int, batch_size: int) -> Trajectory:
    """Thinks about every item for `segments` segments, without an answer."""
    backbone, parts = loaded.model.model, []
    for start in range(0, len(loaded.examples), batch_size):
        batch = loaded.format.batch(loaded.examples[start : start + batch_size]).to(loaded.model.device)
        with loaded.autocast():
            states = loaded.model.encode(batch)
            mask, carry = states.context.mask, backbone.addon.core.initial_carry(states.context.mask)
            rows = []
            for _ in range(segments):
                before, carry = carry, backbone.advance(states.features, states.context, carry)
                logits = backbone.addon.core.halt_logits(carry.z_high, mask)
                rows.append(torch.stack([relative_change(before.z_high, carry.z_high, mask),
                                         relative_change(before.z_low, carry.z_low, mask), logits.float().sigmoid()]))
        parts.append(torch.stack(rows).cpu())
    return Trajectory(*torch.cat(parts, dim=2).unbind(dim=1))


def answers_at(loaded: Loaded, readout: str, segments: int, batch_size: int, settled: float = 0.0) -> list[Answer]:
    """The items' answers by one readout after (`on`, `settled`: at most) so many segments."""
    config, opts = loaded.model.config, loaded.opts
    names = ("use_act", "eval_readout", "segments", "halt_max_segments", "halt_settled")
    before = {name: getattr(config, name) for name in names}
    config.use_act = bool(opts.use_act) and readout != "last"
    config.eval_readout = "best_halt" if readout == "best_halt" else "last"
    config.segments = config.halt_max_segments = segments
    config.halt_settled = settled if readout == "settled" else 0.0
    decoding = Decoding(opts.decode_temperature, opts.decode_top_p, opts.decode_top_k, loaded.budget, batch_size,
                        opts.seed)
    try:
        with loaded.autocast():
            return answer(loaded.model, loaded.format, loaded.examples, decoding)
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def groups(loaded: Loaded, labels: Sequence[str]) -> dict[tuple[str, str], list[int]]:
    """(task, difficulty) -> places of its items, with all difficulties of a task and all tasks together."""
    found: dict[tuple[str, str], list[int]] = {}
    tasks = list(dict.fromkeys(example.task for example in loaded.examples))
    for task in tasks:
        places = [i for i, example in enumerate(loaded.examples) if example.task == task]
        found[task, ALL] = places
        for label in sorted({labels[i] for i in places}, key=_natural):
            found[task, label] = [i for i in places if labels[i] == label]
    if len(tasks) > 1:
        found[OVERALL, ALL] = list(range(len(loaded.examples)))
    return found


def _natural(label: str) -> tuple[float, str]:
    number = "".join(c if c.isdigit() else " " for c in label).split()
    return (float(number[0]) if number else float("inf"), label)


def rows_of(answers: Sequence[Answer], found: dict[tuple[str, str], list[int]], walk: Trajectory, readout: str,
            segments: int, seconds: float, calibrated: bool) -> list[dict[str, Any]]:
    """CSV rows of one readout at one number of segments."""
    rows = []
    for (task, label), places in found.items():
        solved = [answers[i].solved for i in places]
        low, high = wilson(sum(solved), len(solved))
        row: dict[str, Any] = {
            "task": task, "difficulty": label, "readout": readout, "segments": segments, "n": len(places),
            "solved": sum(solved) / len(solved), "ci_low": low, "ci_high": high, "seconds": seconds,
            "segments_used": sum(answers[i].segments for i in places) / len(places),
        }
        if readout == "last":
            for name in ("z_high_change", "z_low_change"):
                row[name] = float(getattr(walk, name)[segments - 1, places].mean())
        if readout == "last" and calibrated:
            chances = walk.halt_probability[segments - 1, places].tolist()
            row |= {"halt_probability": sum(chances) / len(chances), "ece": calibration_error(chances, solved)}
        rows.append(row)
    return rows


# --- figures ----------------------------------------------------------------------------------------------------------


def draw(rows: Sequence[dict[str, Any]], walk: Trajectory, trained: int, path: Path) -> None:
    """Per task: readouts, and difficulties with halting off; then the change of z by segment."""
    whole = [row for row in rows if row["difficulty"] == ALL]
    tasks = list(dict.fromkeys(row["task"] for row in whole))
    split = [task for task in tasks if any(r["task"] == task and r["difficulty"] != ALL for r in rows)]
    figure, panels = new_figure(len(tasks) + len(split) + 1)
    left = iter(panels)
    for task in tasks:
        _curves(next(left), [row for row in whole if row["task"] == task], "readout", f"{task}: readouts", trained)
    for task in split:
        members = [r for r in rows if r["task"] == task and r["difficulty"] != ALL and r["readout"] == "last"]
        _curves(next(left), members, "difficulty", f"{task}: by difficulty", trained)
    axes = next(left)
    for index, name in enumerate(("z_high_change", "z_low_change")):
        values = getattr(walk, name).mean(dim=1).tolist()
        axes.plot(range(1, len(values) + 1), values, label=name.removesuffix("_change"), **style(index, 2))
    axes.set(title="relative change of z by segment", xlabel="segment", ylabel="||z_k - z_(k-1)|| / ||z_k||",
             yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, [path])


def _curves(axes: Any, rows: Sequence[dict[str, Any]], by: str, title: str, trained: int) -> None:
    names = list(dict.fromkeys(row[by] for row in rows))
    for index, name in enumerate(names):
        members = [row for row in rows if row[by] == name]
        ticks, looks = [row["segments"] for row in members], style(index, len(names))
        axes.plot(ticks, [100 * row["solved"] for row in members], label=name, **looks)
        axes.fill_between(ticks, [100 * row["ci_low"] for row in members], [100 * row["ci_high"] for row in members],
                          color=looks["color"], alpha=0.12, linewidth=0)
    axes.axvline(trained, color="0.6", linestyle=":", linewidth=1)
    axes.set(title=title, xlabel="segments at evaluation (dotted: trained)", ylabel="solved, % (95 %)", ylim=(-2, 102))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def draw_reliability(chances: Sequence[float], right: Sequence[bool], path: Path) -> None:
    """Share of right answers against the halting probability, with Wilson bars, and how many answers each bin has."""
    figure, (axes, counts) = new_figure(2)
    held = reliability(chances, right)
    x, y = [b.probability for b in held], [b.right / b.n for b in held]
    ends = [wilson(b.right, b.n) for b in held]
    axes.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="perfect")
    axes.errorbar(x, y, [[r - low for r, (low, _) in zip(y, ends, strict=True)],
                         [high - r for r, (_, high) in zip(y, ends, strict=True)]], color="0.1", marker="o", capsize=3,
                  label=f"halting head, ECE {calibration_error(chances, right):.3f}")
    axes.set(xlabel="halting probability", ylabel="share of right answers (95 %)", xlim=(-0.02, 1.02),
             ylim=(-0.02, 1.02), title="reliability")
    axes.legend(fontsize=8)
    counts.bar([b.low for b in held], [b.n for b in held], width=[b.high - b.low for b in held], align="edge",
               color="0.7", edgecolor="0.2")
    counts.set(xlabel="halting probability", ylabel="answers", xlim=(0, 1), title="how often")
    save_figure(figure, [path])


# --- the command ------------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What the terminal shows: one line per task, readout and number of segments."""
    lines = [f"{'task':18s} {'readout':10s} {'segments':>8s}  {'solved':22s} {'used':>6s}  change of z_H, z_L"]
    for row in rows:
        if row["difficulty"] != ALL:
            continue
        share = f"{100 * row['solved']:.1f} % [{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]"
        change = f"{row['z_high_change']:.4f}  {row['z_low_change']:.4f}" if "z_high_change" in row else ""
        lines.append(f"{row['task']:18s} {row['readout']:10s} {row['segments']:8d}  {share:22s} "
                     f"{row['segments_used']:6.2f}  {change}".rstrip())
    return "\n".join(lines)


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Per task: what most segments lose against the best number, and what halting saves and costs at the most."""
    lines = []
    whole = [row for row in rows if row["difficulty"] == ALL]
    for task in dict.fromkeys(row["task"] for row in whole):
        off = {row["segments"]: row for row in whole if row["task"] == task and row["readout"] == "last"}
        most, best = off[max(off)], max(off.values(), key=lambda row: row["solved"])
        lines.append(f"{task}: best with {best['segments']} segments, {100 * best['solved']:.1f} %; with "
                     f"{most['segments']} {100 * (most['solved'] - best['solved']):+.1f} points")
        for readout, name in (("on", "halting"), ("settled", "stopping what has settled (and halting)")):
            on = next((row for row in whole if row["task"] == task and row["readout"] == readout
                       and row["segments"] == most["segments"]), None)
            if on:
                saved = 1 - on["segments_used"] / most["segments"]
                lines.append(f"{task}: {name} of at most {most['segments']} segments saves {100 * saved:.0f} % of them "
                             f"at {100 * (on['solved'] - most['solved']):+.1f} points")
    return lines


def write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    write_text_aside(path, text.getvalue(), "--output")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    loaded = load(args)
    run = loaded.folder.parent.parent if loaded.folder.parent.name == FOLDER else loaded.folder
    output = args.output or run / "depth"
    if args.eval_n > loaded.opts.eval_n and not loaded.opts.curriculum:  # a curriculum's items are all reserved
        for line in beyond_reserve(task_names(loaded.opts), loaded.opts.eval_n, loaded.opts.group_split):
            print(line, file=sys.stderr)
    found = groups(loaded, difficulties(loaded.examples, loaded.format, args.difficulty))
    act = bool(loaded.opts.use_act)
    readouts = ["last"] + ["on", "best_halt"] * act + ["settled"] * (args.halt_settled > 0)
    rows: list[dict[str, Any]] = []
    chances: list[float] = []
    right: list[bool] = []
    with Progress(len(readouts) * len(args.segments) + 1, "measurement", "measurement") as progress:
        walk = trajectory(loaded, max(args.segments), args.batch_size)
        for readout in readouts:
            for segments in args.segments:
                progress.update(1 + readouts.index(readout) * len(args.segments) + args.segments.index(segments),
                                readout=readout, segments=segments)
                begun = time.monotonic()
                answers = answers_at(loaded, readout, segments, args.batch_size, args.halt_settled)
                rows += rows_of(answers, found, walk, readout, segments, time.monotonic() - begun, act)
                if act and readout == "last":
                    chances += walk.halt_probability[segments - 1].tolist()
                    right += [a.solved for a in answers]
        progress.update(len(readouts) * len(args.segments) + 1)
    write(rows, output / "depth.csv")
    draw(rows, walk, loaded.opts.segments, output / "depth.png")
    print(table(rows))
    print("\n".join(verdicts(rows)))
    if act:
        draw_reliability(chances, right, output / "reliability.png")
        print(f"halting head: expected calibration error {calibration_error(chances, right):.3f} over {len(right)} "
              f"answers; {output / 'reliability.png'}")
    print(f"depth curve: {output / 'depth.csv'}, {output / 'depth.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
