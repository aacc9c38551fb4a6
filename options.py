"""Reads the flags of `train.py`: command line, YAML, cross checks.

Everything here derives from the table in flags.py, whose names it hands on.

Values merge as `defaults <- --config YAML <- command line`, and every problem
found is told at once, before anything heavy is imported: this module needs the standard library and PyYAML only.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

from flags import ADAPTER_FLAGS, ARCHS, FIND, FLAGS, GROUPS, INVOCATION, METAVARS, Flag, default_of, names

__all__ = ["FLAGS", "GROUPS", "INVOCATION", "Flag", "names"]  # handed on, beside what is defined here

PROG = "train.py"
Part = TypeVar("Part")  # a dataclass
BOOLS = {"0": False, "1": True, "false": False, "true": True}
# What YAML may give for each type (else text); PyYAML reads 1e-3 as text.
YAML_TYPES = {"int": int, "float": (int, float, str), "bool": (bool, int), "list": (str, list), "json": (str, dict)}


EPILOG = f"""examples:
  python {PROG}                                                  the defaults: embedded LLM, two tasks
  python {PROG} --task basic_arithmetic --segments 3 --train_n 2000 --eval_n 256 --batch_size 16
  python {PROG} --config runs/NAME/config.resolved.yaml --seed 1

Switches take 0, 1, true or false, or stand alone. Where none is the default, `none` takes back what --config gave.
A value that begins with -- is written --flag=value."""


class Options(argparse.Namespace):
    """All flags by name, plus `explicit`: the names the user set. Equal when all flags but `config` are equal.

    A YAML value equal to the default does not count as set: `config.resolved.yaml` holds every flag.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Options) and as_dict(self) == as_dict(other)


def as_dict(opts: argparse.Namespace) -> dict[str, Any]:
    """Every flag but `config`, in the table's order; JSON can hold it."""
    return {flag.name: getattr(opts, flag.name) for flag in FLAGS if flag.in_file}


def build_parser(collect: bool = False) -> argparse.ArgumentParser:
    """The parser behind `--help`; use `parse` to read a command line.

    Values stay text, which `parse` converts by the table to tell all wrong ones together. `collect`, for the same
    reason, accepts a flag without its value (read as None) and leaves -h aside.
    """
    parser = argparse.ArgumentParser(
        prog=PROG, usage=f"{PROG} [--config FILE.yaml] [--FLAG VALUE ...]", epilog=EPILOG, add_help=not collect,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        description="Train a small HRM add-on on a frozen language model, and measure it against the bare model.")
    sections = {group: parser.add_argument_group(group) for group in GROUPS}
    for flag in FLAGS:
        told = f"{flag.help} ({_defaults(flag)}; {flag.legal})"
        optional = flag.type == "bool" or collect
        sections[flag.group].add_argument(
            *(f"--{name}" for name in (flag.name, *flag.aliases)), dest=flag.name, default=argparse.SUPPRESS,
            nargs="?" if optional else None, const="1" if flag.type == "bool" else None,
            metavar="|".join(flag.choices) if flag.choices and flag.type == "str" else METAVARS[flag.type],
            help=told.replace("%", "%%"))
    return parser


def parse(argv: list[str] | None = None, saved: dict[str, Any] | None = None) -> Options:
    """Flags from defaults, then `saved` (a resumed run's `as_dict`), the YAML of `--config`, and `argv`.

    `argv` None is the process's own command line. Prints every problem to stderr, one line each, and raises
    SystemExit(2) if there is any.
    """
    opts, found = collect(argv, saved)
    for problem in found:
        print(f"{PROG}: error: {problem}".replace("\n", " "), file=sys.stderr)
    if found:
        raise SystemExit(2)
    return opts


def peek(argv: list[str] | None = None) -> Options:
    """The flags as far as they can be read, without a word about what is wrong: for what must be known earlier."""
    return collect(argv)[0]


def collect(argv: list[str] | None = None, saved: dict[str, Any] | None = None) -> tuple[Options, list[str]]:
    """As `parse`, but hands back what is wrong, one line each, to be told with what others find.

    A flag that is wrong has its default. Values of `saved` and of YAML that equal the default do not count as explicit.
    """
    saved, (typed, found) = saved or {}, _read_command_line(sys.argv[1:] if argv is None else list(argv))
    path, file = typed.get("config"), {}
    if path and path.lower() != "none":
        file = _read_config(path, found)
    arch = _arch(typed, file, saved)
    opts = Options(**{flag.name: saved.get(flag.name, default_of(flag, arch)) for flag in FLAGS})
    opts.explicit = {name for name, value in saved.items() if value != default_of(FIND[name], arch)}
    for one, other in (("task", "tasks"), ("tasks", "task")):
        if one in typed or one in file:  # naming tasks anew replaces those of the resumed run
            setattr(opts, other, None)
    opts.typed = {FIND[name].name for name in typed}
    broken: set[str] = set()
    for source, read, where in ((file, _from_yaml, f"{path}: "), (typed, _from_text, "--")):
        for name, raw in source.items():
            flag = FIND[name]
            try:
                value = read(flag, raw)
            except (ValueError, TypeError, OverflowError):
                found.append(f"{where}{name} {_illegal(flag, raw)}")
                broken.add(name)
                continue
            broken.discard(name)
            setattr(opts, name, value)
            if source is typed or value != default_of(flag, arch):
                opts.explicit.add(name)
    found += problems(opts, broken)
    for flag in FLAGS:
        if not flag.allows(getattr(opts, flag.name)):
            setattr(opts, flag.name, default_of(flag, arch))
    return opts, found


def _arch(*sources: dict[str, Any]) -> str:
    """The system that the first source names, where it is one: other defaults depend on it."""
    named = next((source["arch"] for source in sources if source.get("arch")), FIND["arch"].default)
    return named if named in ARCHS else FIND["arch"].default


def _defaults(flag: Flag) -> str:
    """`default 64, hybrid 32`: the defaults of the systems that know the flag."""
    values = {arch: default_of(flag, arch) for arch in flag.archs}
    shown = {arch: "none" if value in (None, "") else str(value) for arch, value in values.items()}
    first, *others = shown
    told = "default " + shown[first] + "".join(f", {a} {shown[a]}" for a in others if shown[a] != shown[first])
    return told if flag.archs == ARCHS else f"{' and '.join(flag.archs)} only; {told}"


def problems(opts: argparse.Namespace, skip: set[str] | frozenset[str] = frozenset()) -> list[str]:
    """Values out of range and flags that contradict each other, one line each; flags in `skip` are not looked at.

    A flag out of range, or of another system or adapter, is told once: the cross checks that read it are left out.
    """
    illegal = [flag for flag in FLAGS if flag.name not in skip and not flag.allows(getattr(opts, flag.name))]
    found = [f"--{flag.name} {_illegal(flag, getattr(opts, flag.name))}" for flag in illegal]
    unsure = {flag.name for flag in illegal} | skip
    typed = getattr(opts, "explicit", set()) - unsure
    idle = {flag.name: f"--{flag.name} does nothing with --arch {opts.arch}, only with {' and '.join(flag.archs)}: "
            "leave it out" for flag in FLAGS
            if flag.name in typed and opts.arch in ARCHS and opts.arch not in flag.archs}
    idle |= {flag.name: f"--{flag.name} does nothing with --adapter {opts.adapter}, only with {' and '.join(known)}: "
             "leave it out" for flag in FLAGS if flag.name in typed and opts.arch == "addon"
             and opts.adapter not in (known := ADAPTER_FLAGS.get(flag.name, (opts.adapter,)))
             and getattr(opts, flag.name) != default_of(flag, opts.arch)}
    told = [tell(opts) for reads, tell in RULES if not (unsure | idle.keys()) & set(reads.split())]
    return found + [line for line in (*told, *idle.values()) if line]


def part(kind: type[Part], opts: argparse.Namespace, **given: Any) -> Part:
    """A dataclass made from the flags that its fields are named after; `given` are fields that no flag holds.

    The part of the program that needs it then says by its type what it needs, and never sees the other flags.

    Raises:
        TypeError: a field without a default that is neither a flag nor given.
    """
    values = {each.name: getattr(opts, each.name) for each in fields(kind) if hasattr(opts, each.name)}
    return kind(**values | given)


def dump(opts: argparse.Namespace) -> str:
    """YAML text of every flag that the system knows but `config`, grouped; `--config` on it gives equal options."""
    import yaml
    parts = [f"# Every flag of {PROG}; `python {PROG} --config THIS_FILE` uses them, `--help` explains them."]
    for group in GROUPS:
        leaves = {flag.name: getattr(opts, flag.name) for flag in FLAGS
                  if flag.group == group and flag.in_file and opts.arch in flag.archs}
        if leaves:
            plain = not any(isinstance(v, str) and re.search("[\x85\u2028\u2029]", v) for v in leaves.values())
            # Where a text holds one of YAML's own line breaks, which come back as spaces, all is escaped.
            parts.append(yaml.safe_dump({group: leaves}, sort_keys=False, allow_unicode=plain, width=10**9).rstrip())
    return "\n\n".join(parts) + "\n"


def rerun_text(opts: argparse.Namespace) -> str:
    """`dump` of what starts the run anew: the flags that belong to one call, such as --resume, at their defaults."""
    once = {flag.name: flag.default for flag in FLAGS if flag.name in INVOCATION}
    return dump(Options(**vars(opts) | once))


def with_limits(opts: Options) -> Options:
    """A copy in which typed epochs or minutes have replaced the default steps, as the end of training.

    Steps stay that the user set, in a file as well; but there typed epochs or minutes win over a file's steps.
    """
    if not (opts.epochs or opts.max_minutes):
        return opts
    typed = getattr(opts, "typed", set())
    replaced = bool({"epochs", "max_minutes"} & typed) and "max_steps" not in typed
    if replaced or "max_steps" not in opts.explicit:
        return Options(**vars(opts) | {"max_steps": 0})
    return opts


def read_resolved(text: str) -> dict[str, Any]:
    """The flags in a text that `dump` wrote, as `parse` takes them for `saved`. Raises ValueError for another."""
    import yaml

    try:
        found = {name: _from_yaml(FIND[name], value) for name, value in _leaves(yaml.safe_load(text)) if name in FIND}
    except (yaml.YAMLError, AttributeError, ValueError, TypeError, OverflowError) as error:
        raise ValueError("the checkpoint's config.resolved.yaml cannot be read: restore it or start anew") from error
    if found.get("arch", "addon") == "addon":
        found = {"state_mix": "sum", **found}  # as it was before the flag existed
    adapter = found.get("adapter", "hrm")  # defaults that changed must not look like flags typed for another adapter
    return {name: value for name, value in found.items() if adapter in ADAPTER_FLAGS.get(name, (adapter,))}


# Cross checks: the flags each reads (so that a flag already told as wrong stays out), and what to say, or None.
RULES: tuple[tuple[str, Callable[[argparse.Namespace], str | None]], ...] = (
    # One condition for two needs: heads of whole width (d_h / n_heads), and of even width (RoPE turns pairs).
    ("d_h n_heads arch", lambda o: f"--d_h {o.d_h} is not divisible by {'' if o.d_h % o.n_heads else 'twice '}"
     f"--n_heads {o.n_heads}: choose a multiple of {2 * o.n_heads}, such as "
     f"{-(-o.d_h // (2 * o.n_heads)) * 2 * o.n_heads}"
     if o.arch != "enhanced" and o.d_h % (2 * o.n_heads) else None),
    ("task tasks", lambda o: f"--task {_show(o.task)} and --tasks {_show(o.tasks)} are both set: keep one "
     "(`none` takes back the other)" if o.task is not None and o.tasks is not None else None),
    ("max_steps epochs max_minutes eval_only dry_run", lambda o: "training would never end: set --max_steps, --epochs "
     "or --max_minutes" if not (o.max_steps or o.epochs or o.max_minutes or o.eval_only or o.dry_run) else None),
    ("epochs train_n arch", lambda o: f"--epochs {o.epochs} needs --train_n above 0: fresh items without end have no "
     "epochs" if o.epochs > 0 and o.train_n == 0 and o.arch == "addon" else None),
    ("curriculum train_n", lambda o: f"--curriculum needs fresh items: --train_n {o.train_n} is a fixed set, choose 0"
     if o.curriculum and o.train_n else None),
    ("curriculum eval_every eval_only dry_run", lambda o: "--curriculum raises levels by evaluations: set --eval_every "
     "above 0" if o.curriculum and not (o.eval_every or o.eval_only or o.dry_run) else None),
    ("supervised_segments segments", lambda o: f"--supervised_segments {o.supervised_segments} is more than --segments "
     f"{o.segments}: choose at most {o.segments}" if o.supervised_segments > o.segments else None),
    ("carry_state segments supervised_segments", lambda o: "--carry_state 0 does nothing with one supervised segment: "
     "choose more by --segments or --supervised_segments"
     if not o.carry_state and not o.eval_only and (o.supervised_segments or o.segments) < 2 else None),
    ("segments_sampling segments", lambda o: f"--segments_sampling {o.segments_sampling} has nothing to draw from with "
     f"--segments {o.segments}: choose at least 2" if o.segments_sampling != "fixed" and o.segments < 2 else None),
    ("share_hl h_layers l_layers", lambda o: f"--share_hl makes one block of H and L: --h_layers {o.h_layers} and "
     f"--l_layers {o.l_layers} must be equal" if o.share_hl and o.h_layers != o.l_layers else None),
    ("act_penalty use_act", lambda o: f"--act_penalty {o.act_penalty} does nothing without --use_act"
     if o.act_penalty > 0 and not o.use_act else None),
    ("halt_detach use_act", lambda o: "--halt_detach does nothing without --use_act"
     if o.halt_detach and not o.use_act else None),
    ("eval_readout use_act", lambda o: f"--eval_readout {o.eval_readout} needs a halting head: add --use_act"
     if o.eval_readout != "last" and not o.use_act else None),
    ("halt_settled eval_readout", lambda o: "--halt_settled stops examples and --eval_readout best_halt runs every "
     "segment: keep one" if o.halt_settled > 0 and o.eval_readout == "best_halt" else None),
    ("halt_settled segments eval_segments halt_max_segments", lambda o: f"--halt_settled {o.halt_settled} "
     "saves nothing with fewer than 3 segments at evaluation: choose more by --segments, --eval_segments or, with "
     "--use_act, --halt_max_segments" if o.halt_settled > 0
     and (o.halt_max_segments or o.eval_segments or o.segments) < 3 else None),
    ("halt_max_segments use_act", lambda o: f"--halt_max_segments {o.halt_max_segments} does nothing without --use_act"
     if o.halt_max_segments > 0 and not o.use_act else None),
    ("train_injector_scale lora_layers eval_only", lambda o: "--train_injector_scale 0 leaves nothing to train"
     if o.train_injector_scale == 0 and not o.lora_layers and not o.eval_only else None),
    ("eval_only dry_run", lambda o: "--eval_only and --dry_run are both set: keep one"
     if o.eval_only and o.dry_run else None),
    ("eval_only resume run_name", lambda o: "--eval_only needs a checkpoint: add --resume PATH or --run_name NAME"
     if o.eval_only and o.resume is None and o.run_name is None else None),
    ("adapter dry_run match_params", lambda o: f"{'--dry_run' if o.dry_run else '--match_params'} makes no sense with "
     "--adapter none: nothing trains" if o.adapter == "none" and (o.dry_run or o.match_params) else None),
    ("adapter cache_hidden", lambda o: f"--cache_hidden {o.cache_hidden} cannot serve --adapter {o.adapter}, which "
     "takes part in the LLM's forward pass: leave it out" if o.cache_hidden != "off" and o.adapter not in ("hrm", "mlp")
     else None),
    ("cache_hidden lora_layers", lambda o: f"--cache_hidden {o.cache_hidden} and --lora_layers {o.lora_layers}: LoRA "
     "changes what the LLM says at every step; leave one out" if o.cache_hidden != "off" and o.lora_layers else None),
    ("cache_hidden train_n", lambda o: f"--cache_hidden {o.cache_hidden} needs --train_n above 0: fresh items without "
     "end are never seen twice" if o.cache_hidden != "off" and o.train_n == 0 else None),
    ("arch d_model n_heads", lambda o: f"--d_model {o.d_model} is not a multiple of {2 * o.n_heads}, twice --n_heads"
     if o.arch in ("hybrid", "enhanced") and o.d_model % (2 * o.n_heads) else None),
    ("arch dataset dry_run", lambda o: "--arch hybrid needs --dataset: synthetic, or a folder of prepared triples "
     "(only --dry_run works on random data)" if o.arch == "hybrid" and o.dataset is None and not o.dry_run else None),
    ("deep_supervision ds_weight", lambda o: "--deep_supervision with --ds_weight 0 does nothing: raise the weight"
     if o.deep_supervision and o.ds_weight == 0 else None),
    ("reset_progress resume run_name eval_only", lambda o: "--reset_progress needs --resume CHECKPOINT, whose weights "
     "it takes" if o.reset_progress and o.resume is None else "--reset_progress and --eval_only are both set: keep one"
     if o.reset_progress and o.eval_only else None),
    ("objective grpo_batch_size grpo_accum_steps num_generations", lambda o: f"--grpo_batch_size {o.grpo_batch_size} x "
     f"--grpo_accum_steps {o.grpo_accum_steps} = {o.grpo_batch_size * o.grpo_accum_steps} completions a step are not "
     f"divisible by --num_generations {o.num_generations}: change one" if o.objective == "grpo"
     and o.grpo_batch_size * o.grpo_accum_steps % o.num_generations else None),
    ("objective logit_bias_head", lambda o: "--objective grpo does not see the bias of --logit_bias_head: start from a "
     "checkpoint without it" if o.objective == "grpo" and o.logit_bias_head else None),
    ("objective adapter", lambda o: f"--objective grpo cannot train --adapter {o.adapter}: start from a checkpoint of "
     "--adapter hrm or mlp" if o.objective == "grpo" and o.adapter not in ("hrm", "mlp") else None),
    ("objective sentinel", lambda o: "--objective grpo cannot stop at --sentinel: start from a checkpoint without it"
     if o.objective == "grpo" and o.sentinel else None),
    # The default warmup gives way to a short run by itself; only a typed one is a contradiction. The hybrid's published
    # commands are tried with fewer steps: there half of the run warms up.
    ("arch warmup_steps max_steps", lambda o: f"--warmup_steps {o.warmup_steps} is more than --max_steps {o.max_steps}"
     if o.arch == "addon" and "warmup_steps" in getattr(o, "explicit", ()) and 0 < o.max_steps < o.warmup_steps
     else None),
)


def _read_command_line(argv: list[str]) -> tuple[dict[str, str | None], list[str]]:
    """The text typed for each flag (None: the flag came without its value), and what is not a flag. May print help."""
    parts: list[str] = []
    for part in argv:  # argparse takes -1e-3 and -inf for flags; joined by = they are values
        if parts and re.fullmatch(r"--\w+", parts[-1]) and re.match(r"-(\d|\.|inf|nan)", part, re.IGNORECASE):
            parts[-1] += f"={part}"
        else:
            parts.append(part)
    typed, rest = build_parser(collect=True).parse_known_args(parts)
    if not {"-h", "--help"}.isdisjoint(rest):
        build_parser().parse_args(["--help"])
    following = set(zip(parts, parts[1:], strict=False))
    found, unknown = [], ""
    for part in rest:
        if part.startswith("-"):
            unknown, name = part, part.partition("=")[0]
            found.append(f"unknown flag {_show(name)}{_nearest(name.lstrip('-'), '--')}")
        elif (unknown, part) not in following:  # else it was the value of the unknown flag, already told
            found.append(f"unexpected argument {_show(part)}: every value follows its --flag")
    return vars(typed), found


def _read_config(path: str, found: list[str]) -> dict[str, Any]:
    """The leaves of a YAML file by flag name (values not checked yet); adds to `found` what is wrong with the file."""
    values: dict[str, Any] = {}
    try:
        tree = _load_strict(path, found)
        if not isinstance(tree, dict | None):
            raise ValueError(f"it must hold `name: value` lines, not a {type(tree).__name__}")
        leaves = list(_leaves(tree or {}))
    except (OSError, ValueError, RecursionError) as error:  # missing, not YAML, not UTF-8, a mapping inside itself
        reason = getattr(error, "strerror", None) or str(error)
        found.append(f"--config {path} cannot be read: {' '.join(reason.split())}")
        return values
    for key, value in leaves:
        flag = FIND.get(key)
        if flag is None:
            found.append(f"{path}: unknown key {_show(key)}{_nearest(str(key))}")
        elif not flag.in_file:
            found.append(f"{path}: {key} belongs on the command line only")
        elif flag.name in values:
            found.append(f"{path}: {flag.name} is given twice, under different nests or names")
        else:
            values[flag.name] = value
    return values


def load_yaml(path: str) -> tuple[Any, list[str]]:
    """(tree, keys written twice in one mapping, one line each) of a YAML file. Raises OSError, ValueError."""
    found: list[str] = []
    return _load_strict(path, found), found


def _load_strict(path: str, found: list[str]) -> Any:
    """The YAML tree; adds to `found` the keys written twice in one mapping, which PyYAML would drop in silence."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
            node, seen = super().compose_mapping_node(anchor), set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    found.append(f"{path}: line {key.start_mark.line + 1}: {_show(key.value)} is given twice")
                seen.add(key.value)
            return node

    with open(path, encoding="utf-8") as file:
        try:
            return yaml.load(file, Loader=StrictLoader)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error


def _leaves(tree: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """(key, value) of every leaf. Nests are for the reader; a mapping is a value only where the flag takes JSON."""
    for key, value in tree.items():
        if isinstance(value, dict) and value and not (key in FIND and FIND[key].type == "json"):
            yield from _leaves(value)
        elif value not in (None, {}) or key not in GROUPS:  # a group whose lines are all commented out is not a leaf
            yield key, value


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
    if flag.type == "bool" and text.lower() not in BOOLS:
        raise ValueError("not a switch")
    return {"int": int, "float": float, "bool": lambda text: BOOLS[text.lower()]}.get(flag.type, str)(text)


def _from_yaml(flag: Flag, value: Any) -> Any:
    """The typed value of a YAML leaf. Raises ValueError, TypeError or OverflowError when it is of another type."""
    if value is None and flag.nullable:
        return None
    if not isinstance(value, YAML_TYPES.get(flag.type, str)):
        raise TypeError("wrong type")
    if isinstance(value, dict):
        value = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if isinstance(value, list):
        value = ",".join(value)
    # Read as on the command line (so a bool is no number), except that null, not the word none, means none here.
    return _from_text(replace(flag, nullable=False), str(value))


def _illegal(flag: Flag, value: Any) -> str:
    return f"{'needs a value' if value is None else f'{_show(value)} is not legal'}: expected {flag.legal}"


def _show(value: Any) -> str:
    """A value on one line, quoted where blanks or control characters would mislead, cut where it is long."""
    text = value if isinstance(value, str) and re.fullmatch(r"[\w./:,+=@<>-]+", value) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _nearest(name: str, prefix: str = "") -> str:
    near = difflib.get_close_matches(name, FIND, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
