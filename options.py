"""Reads the flags of `train.py`: the command line, the YAML of `--config`, the saved options of a checkpoint.

Everything here derives from the table in flags.py, whose names it hands on, and from the rules in rules.py. `read`
takes a command line apart once; `settle` merges what it gives as `defaults <- checkpoint <- YAML <- command line` and
finds every problem, to be told at once. Neither imports anything heavy: the standard library, and PyYAML for YAML.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, TypeVar

from flag_table.elsewhere import hint
from flags import ADAPTERS, ARCHS, FIND, FLAGS, GROUPS, INVOCATION, UNWRITABLE, Flag, names
from rules import LENGTH, RULES, is_default_run, shown

__all__ = ["FLAGS", "GROUPS", "INVOCATION", "Flag", "names"]  # handed on, beside what is defined here

PROG = "train.py"
Part = TypeVar("Part")  # a dataclass
FIT_MINUTES = 7.0  # of the default run
BOOLS = {"0": False, "1": True, "false": False, "true": True}
# What YAML may give for each type (else text); PyYAML reads 1e-3 as text.
YAML_TYPES = {"int": int, "float": (int, float, str), "bool": (bool, int), "list": (str, list), "json": (str, dict)}


class Options(argparse.Namespace):
    """All flags by name. Equal when all flags but `config` are equal. Not written to: `replace` gives others.

    explicit: names of the flags that the user set, here or in the run gone on from. A value from a file counts where it
        is not the default, since `config.resolved.yaml` holds every flag.
    typed: names of the flags on the command line.
    """

    def __init__(self, **values: Any):
        vars(self).update(values)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"options are not written to: options.replace(opts, {name}=...) gives others")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Options) and as_dict(self) == as_dict(other)


def replace(opts: Options, **values: Any) -> Options:
    """Options with other values of some flags; `opts` stays as it is."""
    return Options(**vars(opts) | values)


def as_dict(opts: argparse.Namespace) -> dict[str, Any]:
    """Every flag but `config`, in the table's order; JSON can hold it."""
    return {flag.name: getattr(opts, flag.name) for flag in FLAGS if flag.in_file}


def part(kind: type[Part], opts: argparse.Namespace, **given: Any) -> Part:
    """A dataclass made from the flags that its fields are named after; `given` are fields that no flag holds.

    The part of the program that needs it then says by its type what it needs, and never sees the other flags.

    Raises:
        TypeError: a field without a default that is neither a flag nor given.
    """
    values = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]  # the stubs keep the type they ask for private
        if hasattr(opts, field.name):
            values[field.name] = getattr(opts, field.name)
    return kind(**values | given)


# --- what a call gives ---


@dataclass(frozen=True)
class Given:
    """What a command line and its YAML file give, before it is merged with defaults.

    typed: flag -> value of the command line.
    file: flag -> value of the YAML file.
    broken: flags whose value could not be read.
    problems: what is wrong so far, one line each.
    help: the word after `--help`, "" where none follows; None where it is not typed.
    """

    typed: dict[str, Any]
    file: dict[str, Any]
    broken: frozenset[str]
    problems: list[str]
    help: str | None


def read(argv: list[str] | None = None) -> Given:
    """Takes a command line apart, the process's own when None, and reads the YAML file that it names."""
    if argv is None:
        argv = sys.argv[1:]
    problems: list[str] = []
    texts = _read_command_line(argv, problems)
    help_word = texts.pop("help", None)

    path = texts.get("config")
    leaves = {}
    if path and path.lower() != "none":
        leaves = _read_config(path, problems)

    # A flag is broken where its last source is: what is typed stands before what the file says.
    file = _values(leaves, _from_yaml, f"{path}: ", problems)
    typed = _values(texts, _from_text, "--", problems)
    broken = (leaves.keys() - file.keys()) | (texts.keys() - typed.keys())
    return Given(typed, file, frozenset(broken - typed.keys()), problems, help_word)


def settle(given: Given, saved: Mapping[str, Any] | None = None) -> tuple[Options, list[str]]:
    """Merges defaults, then `saved`, then what a call gives, into (options, everything wrong in one line each).

    `saved` are the options of the run gone on from, see `read_resolved`. A flag that is wrong has its default.
    """
    saved = dict(saved or {})
    arch = _arch(given.typed, given.file, saved)
    default = {flag.name: flag.default_in(arch) for flag in FLAGS}

    # Naming tasks anew replaces those of the run gone on from.
    values = default | saved
    for one, other in (("task", "tasks"), ("tasks", "task")):
        if one in given.typed or one in given.file:
            values[other] = None
    values |= given.file | given.typed

    from_files = [*saved.items(), *given.file.items()]
    explicit = {name for name, value in from_files if value != default[name]} | given.typed.keys()
    opts = Options(**values, explicit=frozenset(explicit), typed=frozenset(given.typed))

    # What is illegal has been told: nobody who goes on with these options shall meet it.
    lines = given.problems + problems(opts, given.broken)
    for flag in FLAGS:
        if not flag.allows(values[flag.name]):
            values[flag.name] = default[flag.name]
    return replace(opts, **values), lines


def collect(argv: list[str] | None = None, saved: Mapping[str, Any] | None = None) -> tuple[Options, list[str]]:
    """`settle` on what `read` gives."""
    return settle(read(argv), saved)


def parse(argv: list[str] | None = None, saved: Mapping[str, Any] | None = None) -> Options:
    """As `collect`, but prints every problem to stderr, one line each, and raises SystemExit(2) if there is any."""
    opts, lines = collect(argv, saved)
    for line in lines:
        print(f"{PROG}: error: {line}".replace("\n", " "), file=sys.stderr)
    if lines:
        raise SystemExit(2)
    return opts


def resolve(opts: Options) -> Options:
    """The options that a run is made of: what several flags decide together is filled in.

    --epochs and --max_minutes replace the default number of steps; typed, they replace that of a file, too.
    --fit_minutes is 7 for the default run, else 0; a typed length is obeyed as it is.
    --task_config is `small` where neither task nor data is named, else `default`; a run that goes on keeps it.
    """
    values: dict[str, Any] = {}
    retyped = {"epochs", "max_minutes"} & opts.typed and "max_steps" not in opts.typed
    if (opts.epochs or opts.max_minutes) and (retyped or "max_steps" not in opts.explicit):
        values["max_steps"] = 0

    if opts.fit_minutes is None or (LENGTH & opts.typed and "fit_minutes" not in opts.typed):
        values["fit_minutes"] = FIT_MINUTES if is_default_run(opts) else 0.0

    if opts.arch == "addon" and not opts.task_config:
        values["task_config"] = "default" if opts.task or opts.tasks or opts.data else "small"
    return replace(opts, **values)


def _arch(*sources: Mapping[str, Any]) -> str:
    """The system that the first source names, where it is one: other defaults depend on it."""
    for source in sources:
        if source.get("arch"):
            return source["arch"] if source["arch"] in ARCHS else FIND["arch"].default
    return FIND["arch"].default


def _values(
    source: Mapping[str, Any], convert: Callable[[Flag, Any], Any], where: str, problems: list[str]
) -> dict[str, Any]:
    """Flag -> value of the flag's type; adds to `problems` what cannot be converted, which is left out."""
    values = {}
    for name, raw in source.items():
        try:
            values[name] = convert(FIND[name], raw)
        except (ValueError, TypeError, OverflowError):
            problems.append(f"{where}{name} {_illegal(FIND[name], raw)}")
    return values


# --- what is wrong ---


def problems(opts: argparse.Namespace, skip: Iterable[str] = ()) -> list[str]:
    """Values out of range and flags that contradict each other, one line each; flags in `skip` are not looked at.

    A flag out of range, or of another system or adapter, is told once: the rules that read it are left out.
    """
    unsure = set(skip)
    lines = []
    for flag in FLAGS:
        value = getattr(opts, flag.name)
        if flag.name not in unsure and not flag.allows(value):
            lines.append(f"--{flag.name} {_illegal(flag, value)}")
            unsure.add(flag.name)

    idle = _idle(opts, getattr(opts, "explicit", frozenset()) - unsure)
    unsure |= idle.keys()
    for rule in RULES:
        line = None if rule.reads & unsure else rule.tell(opts)
        if line:
            lines.append(line)
    return lines + list(idle.values())


def _idle(opts: argparse.Namespace, explicit: Set[str]) -> dict[str, str]:
    """Of the flags that the user set: flag -> what to tell where the system or the adapter does not know it."""
    lines = {}
    for name, flag in FIND.items():
        if name not in explicit:
            continue
        other_arch = opts.arch in ARCHS and opts.arch not in flag.archs
        other_adapter = opts.arch == "addon" and opts.adapter in ADAPTERS and opts.adapter not in flag.adapters
        # A default that another adapter's run has saved is no flag that the user asked for.
        changes = getattr(opts, name) != flag.default_in(opts.arch)

        if other_arch:
            chosen = f"--arch {opts.arch}, only with {' and '.join(flag.archs)}"
            lines[name] = f"--{name} does nothing with {chosen}: leave it out"
        elif other_adapter and changes:
            chosen = f"--adapter {opts.adapter}, only with {' and '.join(flag.adapters)}"
            lines[name] = f"--{name} does nothing with {chosen}: leave it out"
    return lines


def _illegal(flag: Flag, value: Any) -> str:
    if value is None:
        return f"needs a value: expected {flag.legal}"
    if isinstance(value, str) and UNWRITABLE.search(value):
        return f"{shown(value)} is not legal: expected UTF-8 text, without NUL and half characters (lone surrogates)"
    return f"{shown(value)} is not legal: expected {flag.legal}"


# --- a run's own record of its options ---


def dump(opts: argparse.Namespace) -> str:
    """YAML text of every flag that the system knows but `config`, grouped; `--config` on it gives equal options."""
    import yaml

    parts = [f"# Every flag of {PROG}; `python {PROG} --config THIS_FILE` uses them, `--help` explains them."]
    for group in GROUPS:
        known = [flag for flag in FLAGS if flag.group == group and flag.in_file and opts.arch in flag.archs]
        leaves = {flag.name: getattr(opts, flag.name) for flag in known}
        if not leaves:
            continue
        # YAML's own line breaks come back as spaces: where a text holds one, all is escaped.
        plain = not any(isinstance(value, str) and re.search("[\x85\u2028\u2029]", value) for value in leaves.values())
        text = yaml.safe_dump({group: leaves}, sort_keys=False, allow_unicode=plain, width=10**9)
        parts.append(text.rstrip())
    return "\n\n".join(parts) + "\n"


def rerun_text(opts: Options) -> str:
    """`dump` of what starts the run anew: the flags that belong to one call, such as --resume, at their defaults."""
    once = {flag.name: flag.default for flag in FLAGS if flag.one_call}
    return dump(replace(opts, **once))


def read_resolved(text: str) -> dict[str, Any]:
    """The flags in a text that `dump` wrote, as `settle` takes them for `saved`. Raises ValueError for another text.

    A text from before a flag existed, or before a default changed, means what it meant then.
    """
    import yaml

    try:
        leaves = _leaves(yaml.safe_load(text))
        values = {FIND[name].name: _from_yaml(FIND[name], value) for name, value in leaves if name in FIND}
    except (yaml.YAMLError, AttributeError, ValueError, TypeError, OverflowError) as error:
        raise ValueError("the checkpoint's config.resolved.yaml cannot be read: restore it or start anew") from error

    arch = values.get("arch", FIND["arch"].default)
    older = {flag.name: flag.before for flag in FLAGS if flag.before is not None and arch in flag.archs}
    values = older | values
    # A default that has changed since must not look like a flag set for another adapter.
    adapter = values.get("adapter", FIND["adapter"].default)
    return {name: value for name, value in values.items() if adapter in FIND[name].adapters}


# --- YAML ---


def load_yaml(path: str) -> tuple[Any, list[str]]:
    """(tree, keys written twice in one mapping, one line each) of a YAML file. Raises OSError, ValueError."""
    import yaml

    twice: list[str] = []

    class StrictLoader(yaml.SafeLoader):
        """Sees the keys that are written twice, of which PyYAML would drop one in silence."""

        def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            keys = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if key.value in keys:
                    twice.append(f"{path}: line {key.start_mark.line + 1}: {shown(key.value)} is given twice")
                keys.add(key.value)
            return node

    with open(path, encoding="utf-8") as file:
        try:
            return yaml.load(file, Loader=StrictLoader), twice
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error


def _read_config(path: str, problems: list[str]) -> dict[str, Any]:
    """The leaves of a YAML file by flag name, not checked yet; adds to `problems` what is wrong with the file."""
    values: dict[str, Any] = {}
    try:
        tree, twice = load_yaml(path)
        problems += twice
        if not isinstance(tree, dict | None):
            raise ValueError(f"it must hold `name: value` lines, not a {type(tree).__name__}")
        leaves = list(_leaves(tree or {}))
    except (OSError, ValueError, RecursionError) as error:  # missing, not YAML, not UTF-8, a mapping inside itself
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, RecursionError):
            reason = "it is nested too deeply, or holds itself"
        problems.append(f"--config {path} cannot be read: {' '.join(reason.split())}")
        return values

    for key, value in leaves:
        flag = FIND.get(key)
        if flag is None:
            problems.append(f"{path}: unknown key {shown(key)}{hint(str(key), FIND)}")
        elif not flag.in_file or (value and not flag.file_turns_on):
            typed = f": type --{flag.name} in each call" if flag.in_file else ""
            problems.append(f"{path}: {key} belongs on the command line only{typed}")
        elif flag.name in values:
            problems.append(f"{path}: {flag.name} is given twice, under different nests or names")
        else:
            values[flag.name] = value
    return values


def _leaves(tree: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """(key, value) of every leaf. Nests are for the reader; a mapping is a value only where the flag takes JSON."""
    for key, value in tree.items():
        takes_json = key in FIND and FIND[key].type == "json"
        if isinstance(value, dict) and value and not takes_json:
            yield from _leaves(value)
        elif value not in (None, {}) or key not in GROUPS:  # a group whose lines are all commented out is not a leaf
            yield key, value


def _from_yaml(flag: Flag, value: Any) -> Any:
    """The typed value of a YAML leaf. Raises ValueError, TypeError or OverflowError when it is of another type."""
    if value is None and flag.nullable:
        return None
    value = flag.spelled(value)
    kinds: Any = YAML_TYPES.get(flag.type, str)
    if not isinstance(value, kinds):
        raise TypeError("wrong type")

    if isinstance(value, dict):
        value = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if isinstance(value, list):
        value = ",".join(value)
    # Read as on the command line (so a bool is no number), except that null, not the word none, means none here.
    return _from_text(dataclasses.replace(flag, nullable=False), str(value))


# --- the command line ---


def _read_command_line(argv: Iterable[str], problems: list[str]) -> dict[str, str | None]:
    """The text typed for each flag, None where it came without its value; adds to `problems` what is not a flag.

    `--help` comes as the flag `help`, with the word that follows it.
    """
    texts: dict[str, str | None] = {}
    words = deque(argv)
    while words:
        word = words.popleft()
        if not _is_flag(word):
            problems.append(f"unexpected argument {shown(word)}: every value follows its --flag")
            continue

        # An unknown flag takes its value along: what follows it is no second problem.
        name, equals, value = word.partition("=")
        text = value if equals else None
        if not equals and words and not _is_flag(words[0]):
            text = words.popleft()

        flag = FIND.get(name.removeprefix("--"))
        if name in ("-h", "--help"):
            texts["help"] = text or ""
        elif flag is None or not name.startswith("--"):
            problems.append(f"unknown flag {shown(name)}{hint(name, FIND, '--')}")
        elif flag.type == "bool" and text is None:
            texts[flag.name] = "1"  # a switch that stands alone
        else:
            texts[flag.name] = text
    return texts


def _is_flag(word: str) -> bool:
    """Whether a word stands for a flag: it begins with - and is neither a number nor a sentence."""
    name = word.partition("=")[0]
    if name.startswith("--") and name[2:] in FIND:
        return True
    number = re.match(r"-(\d|\.|inf|nan)", word, re.IGNORECASE)
    return word.startswith("-") and word != "-" and " " not in word and not number


def _from_text(flag: Flag, text: str | None) -> Any:
    """The typed value of command-line text. Raises ValueError (or OverflowError) when it is not of the flag's type."""
    if text is None:
        raise ValueError("no value")
    if flag.nullable and text.lower() == "none":
        return None

    if flag.type == "list":
        parts = [part.strip() for part in text.split(",")]
        if len(set(parts)) < len(parts) or ("" in parts and len(parts) > 1):
            raise ValueError("a name is missing or given twice")
        return ",".join(parts)
    if flag.type == "bool":
        if text.lower() not in BOOLS:
            raise ValueError("not a switch")
        return BOOLS[text.lower()]
    return {"int": int, "float": float}.get(flag.type, str)(text)
