"""By which protocol an evaluation was made: how answers were asked for, given, read and judged.

`evaluations.jsonl` of a run's folder has a line for each evaluation. Rows of the evaluation table belong to the line
of their step and second, since `--eval_only` may measure one checkpoint by several protocols.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import options
from engine.checkpoints import newest_checkpoint
from engine.files import json_lines

EVALUATIONS = "evaluations.jsonl"
CONFIG = "config.resolved.yaml"
Key = tuple[float, float]  # step, and seconds of the run with the digits of the table


@dataclass(frozen=True)
class Protocol:
    """How an evaluation was made.

    flags: the values of the flags that the table calls `protocol`, by name.
    tokens: longest answers in tokens, by who answers; empty where the system does not tell.
    alone: it was one of --eval_only.
    """

    flags: dict[str, Any]
    tokens: dict[str, int] = field(default_factory=dict)
    alone: bool = False

    def other_than(self, flags: Mapping[str, Any]) -> dict[str, Any]:
        """Those of its flags that have another value among `flags`, a run's own."""
        return {name: value for name, value in self.flags.items() if name in flags and flags[name] != value}


def typed(values: Mapping[str, Any], shown: Callable[[str, Any], str] | None = None) -> str:
    """Flags as they are typed, in one line: `--answer_from boxed --few_shot 4`; `shown` makes the text of a value."""
    words = []
    for name, value in values.items():
        text = "none" if value is None else str(int(value)) if isinstance(value, bool) else str(value)
        if shown and value is not None:
            text = shown(name, value)
        words.append(f"--{name} {shlex.quote(' '.join(text.split()))}")
    return " ".join(words)


def protocol_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The protocol among all flags of a call: what the table calls so, and the call's system knows."""
    known = [flag for flag in options.FLAGS if flag.protocol and flags.get("arch") in flag.archs]
    return {flag.name: flags[flag.name] for flag in known if flag.name in flags}


def evaluation_line(rows: Sequence[Mapping[str, Any]], flags: Mapping[str, Any], tokens: Mapping[str, int]) -> dict:
    """A line of `evaluations.jsonl` for rows of one evaluation, which have their step and second."""
    step, second = key_of(rows[0])
    return {
        "step": int(step),
        "elapsed_s": second,
        "tasks": list(dict.fromkeys(row["task"] for row in rows)),
        "eval_only": bool(flags.get("eval_only")),
        "tokens": dict(tokens),
        "protocol": protocol_flags(flags),
    }


def key_of(row: Mapping[str, Any]) -> Key:
    """Which evaluation a row is of; (0, 0) where it does not tell, as in tables of earlier versions."""
    try:
        return float(row["step"]), float(f"{float(row['elapsed_s']):.6g}")
    except (KeyError, TypeError, ValueError):
        return 0.0, 0.0


def read_protocols(folder: Path) -> dict[Key, Protocol]:
    """The protocols of a run's evaluations; those that earlier versions made have none."""
    found = {}
    for _, line in json_lines(Path(folder) / EVALUATIONS, skip_damaged=True):
        if isinstance(line, dict) and isinstance(line.get("protocol"), dict):
            found[key_of(line)] = Protocol(line["protocol"], line.get("tokens") or {}, line.get("eval_only") is True)
    return found


def read_flags(folder: Path) -> dict[str, Any]:
    """The flags of the run, from its folder or else its newest checkpoint; empty where neither has them."""
    places = [folder / CONFIG]
    checkpoint = newest_checkpoint(folder) if folder.is_dir() else None
    if checkpoint:
        places.append(checkpoint / CONFIG)
    for place in places:
        if place.is_file():
            saved = options.read_resolved(place.read_text(encoding="utf-8"))
            arch = saved.get("arch", "addon")
            default = {flag.name: flag.default_in(arch) for flag in options.FLAGS if arch in flag.archs}
            return default | saved

    return {}


def measured_by_others(folder: Path) -> set[Key]:
    """The evaluations by --eval_only whose protocol is not the run's own: they are no points of its curve."""
    protocols = read_protocols(folder)
    flags = read_flags(Path(folder)) if any(protocol.alone for protocol in protocols.values()) else {}
    return {key for key, protocol in protocols.items() if protocol.alone and protocol.other_than(flags)}
