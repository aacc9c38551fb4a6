"""What a trained add-on does and answers at each number of segments; the measuring part of depth_curve.py."""

from __future__ import annotations

import contextlib
import re
import sys
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from batching import PromptFormat  # noqa: E402
from calibration import calibration_error  # noqa: E402
from depth_steps import LAST, OWN  # noqa: E402
from engine.intervals import wilson  # noqa: E402
from engine.positions import relative_change  # noqa: E402
from evaluation import OVERALL, Answer, Decoding, answer  # noqa: E402
from injector import Thought  # noqa: E402
from model import AdapterController, HRMController  # noqa: E402
from reasoning_gym_wrapper import Example  # noqa: E402
from tasks.steps import steps_of  # noqa: E402

ALL = "all"  # every difficulty
QUANTILES = 4  # groups of prompt length
MOST_GROUPS = 12  # values of a difficulty that still make groups
READOUT_FIELDS = (  # of the model's config
    *("use_act", "eval_readout", "segments", "halt_max_segments", "halt_settled", "halt_settled_at"),
)


@dataclass
class Loaded:
    """A checkpoint ready to be measured, with the items that it is measured on.

    has_segments: False of an adapter without a recurrence, which answers in one way alone.
    trained: task -> most steps that it is trained on, of tasks with that knob.
    use_act: the run trained a halting head.
    decoding: how its run decodes answers; the budget of new tokens is set.
    precision: none, bf16 or fp16.
    item_segments: in training each item had as many segments as it needs steps.
    """

    folder: Path
    model: AdapterController
    format: PromptFormat
    examples: list[Example]
    use_act: bool
    decoding: Decoding
    precision: str
    has_segments: bool = True
    trained: Mapping[str, int] = field(default_factory=dict)
    item_segments: bool = False

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of every forward pass."""
        if self.precision == "none":
            return contextlib.nullcontext()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        return torch.autocast(self.model.device.type, dtype=dtype)


# --- groups of items --------------------------------------------------------------------------------------------------


def difficulties(examples: Sequence[Example], prompt: PromptFormat, key: str) -> list[str]:
    """The difficulty group of each item, a label; tasks are grouped each by itself.

    `key` is a name in the items' metadata, `steps` (what an item needs, where its task says it), `length` (quartiles of
    the prompt's tokens), or `auto`: what `own_difficulty` finds, else length.

    Raises:
        ValueError: no item of a task has the metadata `key`.
    """
    labels = [""] * len(examples)
    for places in places_by_task(examples).values():
        own = _labels([examples[place] for place in places], prompt, key)
        for place, label in zip(places, own, strict=True):
            labels[place] = label
    return labels


def places_by_task(examples: Sequence[Example]) -> dict[str, list[int]]:
    """Task -> places of its items; tasks in the order of the items."""
    places: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        places.setdefault(example.task, []).append(place)
    return places


def _labels(examples: Sequence[Example], prompt: PromptFormat, key: str) -> list[str]:
    """The labels of one task's items. Raises ValueError."""
    metadata = [example.entry["metadata"] for example in examples]
    name: str | None = key
    if key == "auto":
        name = own_difficulty(metadata)
    elif key == "length":
        name = None
    elif key == "steps":
        needed = [steps_of(example.entry) for example in examples]
        if any(needed):
            return [f"steps {steps or 'unknown'}" for steps in needed]
    if name is not None and any(name in entry for entry in metadata):
        return [f"{name} {entry.get(name, 'unknown')}" for entry in metadata]

    # A name that no item has: the names that would do are numbers and words.
    if key not in ("auto", "length"):
        names = sorted(name for name, value in metadata[0].items() if isinstance(value, int | str))
        raise ValueError(
            f"items of {examples[0].task} have no {key!r}: --difficulty takes auto, steps, length or one of "
            f"{', '.join(names)}"
        )

    prompts = prompt.prompts([example.question for example in examples])
    return length_labels([len(ids) for ids in prompts])


def own_difficulty(metadata: Sequence[dict[str, Any]]) -> str | None:
    """The first whole number in the items' metadata that says how hard they are; None where there is none.

    It is named as a count (`num_...`) or among the item's difficulties, varies, and takes few values.
    """
    for name, value in metadata[0].items():
        if isinstance(value, bool) or not isinstance(value, int) or name == "source_index":
            continue
        if not name.startswith("num_") and name not in metadata[0].get("difficulty", {}):
            continue

        values = [entry.get(name) for entry in metadata]
        if all(isinstance(value, int) for value in values) and 2 <= len(set(values)) <= MOST_GROUPS:
            return name

    return None


def length_labels(lengths: Sequence[int]) -> list[str]:
    """A label by quartile of prompt length (tokens); equal lengths share a label."""
    # The longest length of each quartile, the last one that of all; two may be the same.
    ordered = sorted(lengths)
    last = len(ordered) - 1
    ends = sorted({ordered[last * quartile // QUANTILES] for quartile in range(1, QUANTILES + 1)})

    labels = []
    for length in lengths:
        place = bisect_left(ends, length)  # the first range that reaches so far
        low = ends[place - 1] + 1 if place else ordered[0]
        labels.append(f"prompt {low}-{ends[place]} tokens")
    return labels


def groups(examples: Sequence[Example], labels: Sequence[str]) -> dict[tuple[str, str], list[int]]:
    """(task, difficulty) -> places of its items, with all difficulties of a task and all tasks together."""
    places_of: dict[tuple[str, str], list[int]] = {}
    tasks = places_by_task(examples)
    for task, places in tasks.items():
        places_of[task, ALL] = places
        by_label: dict[str, list[int]] = {}
        for place in places:
            by_label.setdefault(labels[place], []).append(place)
        for label in sorted(by_label, key=_natural):
            places_of[task, label] = by_label[label]

    if len(tasks) > 1:
        places_of[OVERALL, ALL] = list(range(len(examples)))
    return places_of


def _natural(label: str) -> tuple[float, str]:
    """Sorts `num_terms 10` behind `num_terms 9`; labels without a number come last."""
    digits = re.search(r"\d+", label)
    number = float(digits[0]) if digits else float("inf")
    return number, label


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Trajectory:
    """What the recurrence does on each item, segment by segment; all (segments, n).

    z_high_change, z_low_change: ||z_k - z_(k-1)|| / ||z_k||, norms over the whole prompt.
    answer_change: the same of what the injector writes where the answer begins; 1 after the first segment.
    halt_probability: of the halting head, after each segment.
    """

    z_high_change: torch.Tensor
    z_low_change: torch.Tensor
    answer_change: torch.Tensor
    halt_probability: torch.Tensor


@torch.no_grad()
def trajectory(loaded: Loaded, segments: int, batch_size: int) -> Trajectory:
    """Thinks about every item for `segments` segments, without an answer."""
    # In the order of the items, so that a column of the result is an item's place.
    parts = []
    for start in range(0, len(loaded.examples), batch_size):
        batch = loaded.format.batch(loaded.examples[start : start + batch_size]).to(loaded.model.device)
        with loaded.autocast():
            rows = list(_segments(loaded.model, batch, segments))
        parts.append(torch.stack(rows).cpu())  # (segments, 4, B)

    return Trajectory(*torch.cat(parts, dim=2).unbind(dim=1))


def _segments(model: HRMController, batch: Any, segments: int) -> Iterator[torch.Tensor]:
    """(4, B) after each segment: change of z_H, of z_L, of what is written where the answer begins, halting chance."""
    backbone = model.model
    core = backbone.addon.core
    states = model.encode(batch)
    mask = states.context.mask
    carry = core.initial_carry(mask)
    written = None

    for _ in range(segments):
        before = carry
        carry = backbone.advance(states.features, states.context, before)
        earlier = written
        written = backbone.addon.injector(states.slots, Thought(carry.z_high, states.context))[:, :1]
        yield torch.stack(
            [
                relative_change(before.z_high, carry.z_high, mask),
                relative_change(before.z_low, carry.z_low, mask),
                relative_change(torch.zeros_like(written) if earlier is None else earlier, written),
                core.halt_logits(carry.z_high, mask).float().sigmoid(),
            ]
        )


@dataclass(frozen=True)
class Settled:
    """The rule of the readout `settled`: an example stops where a segment changes `at` by less than `share`."""

    share: float = 0.0
    at: str = "answer"  # or "prompt", as --halt_settled_at


OFF = Settled()


@contextlib.contextmanager
def readout_config(loaded: Loaded, readout: str, segments: int, settled: Settled) -> Iterator[None]:
    """Inside, the model answers by `readout` after (`on`, `settled`: at most) so many segments."""
    config = loaded.model.config
    before = {name: getattr(config, name) for name in READOUT_FIELDS}
    config.use_act = loaded.use_act and readout not in (LAST, OWN)
    config.eval_readout = "best_halt" if readout == "best_halt" else "last"
    config.segments = segments
    config.halt_max_segments = segments
    config.halt_settled = settled.share if readout == "settled" else 0.0
    config.halt_settled_at = settled.at

    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def answers_at(loaded: Loaded, readout: str, segments: int, settled: Settled = OFF) -> list[Answer]:
    """The items' answers by one readout after (`on`, `settled`: at most) so many segments; `settled` is its rule."""
    setting: contextlib.AbstractContextManager = contextlib.nullcontext()
    if loaded.has_segments:
        setting = readout_config(loaded, readout, segments, settled)
    greedy = loaded.decoding.temperature == 0
    decoding = replace(loaded.decoding, item_segments=readout == OWN, confidence=greedy)
    with setting, loaded.autocast():
        return answer(loaded.model, loaded.format, loaded.examples, decoding)


def confidence_of(sure: Sequence[float | None], solved: Sequence[bool]) -> dict[str, float]:
    """The mean probability of answers and its calibration error; nothing where an answer's is not known."""
    known = [chance for chance in sure if chance is not None]
    if len(known) < len(sure):
        return {}
    return {"confidence": sum(known) / len(known), "confidence_error": calibration_error(known, solved)}


def rows_of(
    answers: Sequence[Answer],
    places_of: dict[tuple[str, str], list[int]],
    walk: Trajectory | None,
    readout: str,
    segments: int,
    seconds: float,
    calibrated: bool,
) -> list[dict[str, Any]]:
    """CSV rows of one readout at one number of segments.

    Args:
        answers: one for each item.
        places_of: `groups` of the items.
        walk: what the recurrence did on them; None without one.
        readout: its name.
        segments: how many were run, at most.
        seconds: what answering took.
        calibrated: there is a halting head, so the readout `last` gets its probability and calibration error.
    """
    rows = []
    for (task, label), places in places_of.items():
        solved = [answers[place].solved for place in places]
        low, high = wilson(sum(solved), len(solved))
        row: dict[str, Any] = {
            "task": task,
            "difficulty": label,
            "readout": readout,
            "segments": segments,
            "n": len(places),
            "solved": sum(solved) / len(solved),
            "ci_low": low,
            "ci_high": high,
            "seconds": seconds,
            "segments_used": sum(answers[place].segments for place in places) / len(places),
        }
        row |= confidence_of([answers[place].confidence for place in places], solved)

        # Only `last` reads the state after exactly so many segments, which is what the trajectory is of.
        if readout == "last" and walk is not None:
            for name in ("z_high_change", "z_low_change", "answer_change"):
                row[name] = float(getattr(walk, name)[segments - 1, places].mean())
            if calibrated:
                chances = walk.halt_probability[segments - 1, places].tolist()
                row["halt_probability"] = sum(chances) / len(chances)
                row["ece"] = calibration_error(chances, solved)
        rows.append(row)
    return rows
