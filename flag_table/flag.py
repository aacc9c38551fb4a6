"""`Flag`, one flag of `train.py`, and the short forms that the tables of this package are written in.

This package needs the standard library only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

# The systems, and the sets of them that share flags.
ARCHS = ("addon", "hybrid", "enhanced")
ADDON = ("addon",)
HYBRID = ("hybrid",)
ENHANCED = ("enhanced",)
HRM = ("addon", "hybrid")  # built of H and L blocks
OWN_WEIGHTS = ("hybrid", "enhanced")  # train all their weights, no LLM is loaded
REASONERS = ("addon", "enhanced")  # can be trained with rewards

# What can train beside the add-on's frozen LLM, and the sets of adapters that share flags.
ADAPTERS = ("hrm", "lora", "prompt", "mlp", "none")
LEARNING = ("hrm", "lora", "prompt", "mlp")
RECURRENT = ("hrm",)
BLOCKS = ("hrm", "mlp")  # read hidden states and inject: the HRM, and its blocks in a single pass

# What YAML reads as a truth value although a person means a choice of that name.
SWITCHED = {True: ("on", "yes", "true"), False: ("off", "no", "none", "false")}
METAVARS = {"int": "N", "float": "X", "bool": "0|1", "str": "TEXT", "path": "PATH", "list": "A,B", "json": "TEXT"}
UNWRITABLE = re.compile("[\0\ud800-\udfff]")  # no text file holds these; bytes that are not UTF-8 come as halves


def names(text: str | None) -> list[str]:
    """The names in a comma list as `tasks` and `trackers` hold it: "a,b" -> ["a", "b"], "" and None -> []."""
    return text.split(",") if text else []


def json_ok(text: str) -> bool:
    """False only for text that begins as a JSON object and is not one: `small`, `default` and paths pass."""
    if not text.lstrip().startswith("{"):
        return True

    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


@dataclass(frozen=True)
class Flag:
    """One flag of the command line: what it may hold, what it does, who knows it. Each field is a column of the table.

    Values have the flag's type; a list is kept as text with commas between, JSON as text.
    """

    name: str  # typed as --name
    type: str  # a key of METAVARS
    default: Any
    help: str  # what it does; units, and what 0 means where it matters
    group: str = ""  # heading of --help and of YAML files; the table fills it in
    choices: tuple[str, ...] | None = None  # the legal texts; of a list, the legal names
    low: float | None = None  # ends of a number's range, legal themselves unless excluded
    high: float | None = None
    exclusive_low: bool = False
    exclusive_high: bool = False
    aliases: tuple[str, ...] = ()  # further names
    nullable: bool = False  # None is legal, typed as `none`
    pattern: str = ".+"  # text only: what the whole value must match
    form: str = "text, not empty"  # text only: `pattern` in words
    in_file: bool = True  # False: on the command line only, and never dumped
    file_turns_on: bool = True  # False: a switch that runs foreign code; a file may be foreign, and leaves it off
    archs: tuple[str, ...] = ARCHS  # the systems that know it
    by_arch: Mapping[str, Any] = field(default_factory=dict, hash=False)  # system -> its default, where it differs
    adapters: tuple[str, ...] = ADAPTERS  # the add-on's adapters that know it
    shape: bool = False  # fixes the shape of the weights: a checkpoint brings it, and another value is refused
    depth: bool = False  # how often blocks run: a checkpoint's weights bring it, and another value may be typed
    before: Any = None  # what checkpoints mean that are older than the flag; None: the default
    protocol: bool = False  # how answers are asked for, given, read or judged: each evaluation keeps it
    one_call: bool = False  # said of one call: no record of a run keeps it
    common: bool = False  # shown by the short --help

    def default_in(self, arch: str) -> Any:
        """The default in one system."""
        return self.by_arch.get(arch, self.default)

    @property
    def legal(self) -> str:
        """The legal values in words, as help and error messages give them."""
        if self.type == "bool":
            return "0, 1, true or false"

        if self.type == "list":
            among = f", among {', '.join(self.choices)}" if self.choices else ""
            return "distinct names with commas between" + among
        if self.choices:
            return f"one of {', '.join(self.choices)}"

        if self.type in ("int", "float"):
            return self._range
        return self.form

    @property
    def _range(self) -> str:
        ends = []
        if self.low is not None:
            ends.append(f"{'>' if self.exclusive_low else '>='} {self.low}")
        if self.high is not None:
            ends.append(f"{'<' if self.exclusive_high else '<='} {self.high}")

        kind = "an integer" if self.type == "int" else "a finite number"
        return f"{kind} {' and '.join(ends)}".rstrip()

    def spelled(self, value: Any) -> Any:
        """A value of a YAML file as the flag's own choice: `cache_hidden: off` is read as false there, and means off.

        Other values, and truth values where no choice has such a name, come back as they are.
        """
        if self.type != "str" or not isinstance(value, bool):
            return value

        for word in SWITCHED[value]:
            if word in (self.choices or ()):
                return word
        return value

    def allows(self, value: Any) -> bool:
        """True when `value`, already of the right type, is legal for this flag alone."""
        if value is None:
            return self.nullable
        if isinstance(value, str) and UNWRITABLE.search(value):
            return False
        if self.type == "bool":
            return True
        if self.type in ("int", "float"):
            return self._in_range(value)

        if self.choices:
            picked = names(value) if self.type == "list" else [value]
            return set(picked) <= set(self.choices)

        matches = re.fullmatch(self.pattern, value, re.DOTALL) is not None
        return matches and (self.type != "json" or json_ok(value))

    def _in_range(self, value: float) -> bool:
        if self.type == "float" and not math.isfinite(value):
            return False
        if self.low is not None and (value < self.low or (value == self.low and self.exclusive_low)):
            return False
        return self.high is None or value < self.high or (value == self.high and not self.exclusive_high)


# Flags that not every system knows.
addon = partial(Flag, archs=ADDON)
hybrid = partial(Flag, archs=HYBRID)
enhanced = partial(Flag, archs=ENHANCED)
with_hrm = partial(Flag, archs=HRM)
own_weights = partial(Flag, archs=OWN_WEIGHTS)
reasoner = partial(Flag, archs=REASONERS)
