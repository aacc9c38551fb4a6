"""Every flag of `train.py`: its default, legal range and help, in one table.

The argparse parser, the checking of YAML files, the range checks and `configs/default.yaml` all derive from
`FLAGS`; a new flag is one line there. Values merge as `defaults <- --config YAML <- command line`, and every problem
found is told at once, before anything heavy is imported: this module needs the standard library and PyYAML only.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

PROG = "train.py"
BOOLS = {"0": False, "1": True, "false": False, "true": True}
# What YAML may give for each type (else text); PyYAML reads 1e-3 as text.
YAML_TYPES = {"int": int, "float": (int, float, str), "bool": (bool, int), "list": (str, list), "json": (str, dict)}
METAVARS = {"int": "N", "float": "X", "bool": "0|1", "str": "TEXT", "path": "PATH", "list": "A,B", "json": "TEXT"}


@dataclass(frozen=True)
class Flag:
    """One flag: what it may hold (`legal`) and how it is explained. Everything else in this module reads this."""

    name: str
    type: str  # a key of METAVARS; "list" is kept as comma-separated text, "json" as text
    default: Any
    help: str
    group: str = ""
    choices: tuple[str, ...] | None = None
    low: float | None = None
    high: float | None = None
    exclusive_low: bool = False
    exclusive_high: bool = False
    aliases: tuple[str, ...] = ()
    nullable: bool = False
    pattern: str = ".+"  # text only: what the whole value must match
    form: str = "text, not empty"  # text only: `pattern` in words
    in_file: bool = True  # False: command line only, and never dumped

    @property
    def legal(self) -> str:
        """The legal values in words, as help and error messages give them."""
        if self.type == "bool":
            return "0, 1, true or false"
        if self.type == "list":
            return "distinct names with commas between" + (f", among {', '.join(self.choices)}" if self.choices else "")
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.type not in ("int", "float"):
            return self.form
        ends = ((">", self.low, self.exclusive_low), ("<", self.high, self.exclusive_high))
        told = [f"{sign}{'' if exclusive else '='} {end}" for sign, end, exclusive in ends if end is not None]
        return f"{'an integer' if self.type == 'int' else 'a finite number'} {' and '.join(told)}".rstrip()

    def allows(self, value: Any) -> bool:
        """True when `value`, already of the right type, is legal for this flag alone."""
        if value is None:
            return self.nullable
        if self.type == "bool":
            return True
        if self.type in ("int", "float"):
            above = self.low is None or value > self.low or (value == self.low and not self.exclusive_low)
            below = self.high is None or value < self.high or (value == self.high and not self.exclusive_high)
            return above and below and (self.type == "int" or math.isfinite(value))
        if self.choices:
            return all(name in self.choices for name in (names(value) if self.type == "list" else [value]))
        return re.fullmatch(self.pattern, value, re.DOTALL) is not None and (self.type != "json" or _json_ok(value))


_TABLE: dict[str, tuple[Flag, ...]] = {
    "model": (
        Flag("arch", "str", "addon", "system to train", choices=("addon",)),
        Flag("model_name", "path", "assets/tiny_host", "frozen LLM: a local folder or a Hugging Face hub name"),
        Flag("load_in", "str", "none", "quantisation of the frozen LLM", choices=("none", "8bit", "4bit")),
        Flag("trust_remote_code", "bool", False, "run Python code that comes with the hub model"),
        Flag("d_h", "int", 128, "width of the HRM; a multiple of 2 x n_heads", low=8),
        Flag("h_layers", "int", 1, "layers of the slow block H", low=1, high=64),
        Flag("l_layers", "int", 1, "layers of the fast block L", low=1, high=64),
        Flag("n_heads", "int", 4, "attention heads of the HRM", low=1),
        Flag("segments", "int", 1, "recurrence segments in training", low=1, high=256),
        Flag("inner_T", "int", 2, "L steps before each H step", low=1, high=64),
        Flag("reset_l", "bool", False, "start z_L anew at each segment"),
        Flag("grad_horizon", "str", "full", "calls with gradient: the last of L and H, all, or the last N inner",
             pattern="one_step|full|k:[1-9][0-9]*", form="one_step, full or k:N with N >= 1"),
        Flag("hrm_input", "str", "tokens", "all prompt tokens, or mean and last", choices=("tokens", "pooled")),
        Flag("hrm_read", "str", "embed+last", "LLM states that HRM reads", choices=("embed+last", "last", "all")),
        Flag("init_state", "str", "fixed", "first z_H and z_L: random vectors in training and fixed buffers at "
             "evaluation, or the published fixed buffers in both", choices=("random", "fixed")),
        Flag("injector", "str", "cab", "z_H enters the LLM by cross-attention or gated bias", choices=("cab", "grb")),
        Flag("cab_mem", "int", 0, "learned memory tokens that cab reads; 0 = all of z_H", low=0),
        Flag("cab_gate_init", "float", 1.0, "initial gate of cab, a factor"),
        Flag("grb_gate_init", "float", 0.0, "initial gate of grb, a logit"),
        Flag("logit_bias_head", "bool", False, "add a gated bias over the vocabulary, computed from z_H"),
        Flag("lora_layers", "int", 0, "besides HRM, LoRA on this many top layers of the LLM", low=0),
        Flag("lora_rank", "int", 8, "rank of that LoRA", low=1),
        Flag("use_act", "bool", False, "learn to halt, and halt examples at evaluation"),
        Flag("act_penalty", "float", 0.0, "weight of the sum of 1 - p_halt; needs use_act", low=0),
        Flag("halt_max_segments", "int", 0, "most segments at evaluation with use_act; 0 = segments", low=0),
    ),
    "data": (
        Flag("task", "str", None, "one Reasoning Gym task by name, or toy_add", nullable=True),
        Flag("tasks", "list", None, "several tasks, mixed in equal parts", nullable=True),
        Flag("task_config", "json", None, "settings of the tasks; none = small when no task is named, else default",
             nullable=True, form="small, default, a file or a JSON object"),
        Flag("train_n", "int", 0, "training items; 0 = fresh items without end", low=0),
        Flag("eval_n", "int", 256, "evaluation items of each task", low=1),
        Flag("allow_code_tasks", "bool", False, "allow tasks whose verifier executes code"),
        Flag("sentinel", "str", None, "text appended to every target, at which generation stops", nullable=True),
        Flag("system_header", "str", None, "text put before every prompt", nullable=True, pattern=".*", form="text"),
        Flag("prompt_style", "str", "auto", "auto = chat if the LLM has a template", choices=("auto", "chat", "plain")),
        Flag("max_seq_len", "int", 512, "most tokens of a prompt", low=8),
        Flag("overlong", "str", "error", "what to do with longer prompts", choices=("error", "drop")),
        Flag("seed", "int", 0, "seed of weights, training items and order", low=0, high=2**31, exclusive_high=True),
        Flag("eval_seed", "int", 10**9, "evaluation items are drawn from it; every training seed lies far below",
             low=10**9, high=2**32, exclusive_high=True),
    ),
    "training": (
        Flag("batch_size", "int", 64, "examples per batch", low=1),
        Flag("bucket_batches", "int", 1, "batches drawn together and grouped by length, against padding; 1 = off", low=1),
        Flag("lr", "float", 3e-3, "peak learning rate", low=0, exclusive_low=True, aliases=("learning_rate",)),
        Flag("max_steps", "int", 1750, "batches to train; 0 = until epochs or max_minutes", low=0, aliases=("steps",)),
        Flag("epochs", "int", 0, "passes over train_n items; 0 = off", low=0),
        Flag("max_minutes", "float", 0.0, "stop training after this time; 0 = off", low=0),
        Flag("grad_accum_steps", "int", 1, "micro-batches per batch", low=1),
        Flag("grad_clip", "float", 1.0, "largest gradient norm; 0 = off", low=0),
        Flag("weight_decay", "float", 0.1, "weight decay", low=0),
        Flag("beta1", "float", 0.9, "first beta of AdamW", low=0, high=1, exclusive_high=True),
        Flag("beta2", "float", 0.95, "second beta of AdamW", low=0, high=1, exclusive_high=True),
        Flag("optimizer", "str", "muon", "muon = Muon on hidden matrices, AdamW on the rest",
             choices=("muon", "adamw", "adamw_8bit")),
        Flag("lr_scheduler", "str", "cosine", "after the warmup", choices=("cosine", "linear", "constant")),
        Flag("warmup_steps", "int", 50, "batches of linear warmup", low=0),
        Flag("lr_min_ratio", "float", 0.0, "final learning rate as a share of lr", low=0, high=1),
        Flag("mixed_precision", "str", "auto", "autocast; auto = bf16 where the hardware has it, fp16 needs CUDA",
             choices=("auto", "none", "bf16", "fp16")),
        Flag("ema", "float", 0.998, "decay of the weights evaluated; 0 = off", low=0, high=1, exclusive_high=True),
        Flag("segments_sampling", "str", "fixed", "all, or 1 to all, drawn per batch", choices=("fixed", "uniform")),
        Flag("supervised_segments", "int", 0, "0 = every segment has a loss and an optimizer step (deep supervision); "
             "N = only the last N, the earlier ones run without gradient", low=0),
        Flag("verifier_weight", "float", 0.0, "weight of the head that learns the verifier's verdict; 0 = off", low=0),
        Flag("verifier_every", "int", 50, "batches between the answers generated for that head", low=1),
        Flag("train_injector_scale", "float", 1.0, "factor on the injection in training; 0 = bare LLM", low=0),
        Flag("dry_run", "bool", False, "one real batch: loss, parameter counts, estimated time and memory; then stop"),
    ),
    "evaluation": (
        Flag("eval_only", "bool", False, "evaluate a checkpoint, named by resume or run_name, and stop"),
        Flag("eval_every", "int", 350, "batches between evaluations; 0 = only at the end", low=0, aliases=("val_every",)),
        Flag("eval_batch_size", "int", 128, "examples per evaluation batch", low=1),
        Flag("eval_segments", "int", 0, "segments at evaluation; 0 = as trained", low=0),
        Flag("eval_injector_scale", "float", 1.0, "factor on the injection at evaluation; 0 = bare LLM", low=0),
        Flag("decode_temperature", "float", 0.0, "sampling temperature; 0 = greedy", low=0),
        Flag("decode_top_p", "float", 1.0, "nucleus sampling; 1 = off", low=0, high=1, exclusive_low=True),
        Flag("decode_top_k", "int", 0, "sample among the k likeliest tokens; 0 = off", low=0),
        Flag("max_new_tokens", "int", 0, "longest answer; 0 = longest evaluation target and a margin", low=0),
        Flag("log_csv", "path", None, "evaluation table; none = eval.csv in the run folder", nullable=True),
        Flag("log_samples_every", "int", 0, "batches between printed samples; 0 = off", low=0),
    ),
    "run": (
        Flag("config", "path", None, "YAML of flags, overridden by the command line", nullable=True, in_file=False),
        Flag("run_name", "str", None, "folder in save_dir; none = named by task and time", nullable=True,
             pattern=r"\w[^/\\\x00-\x1f]{0,99}", form="a plain folder name (no slash, not ..)"),
        Flag("save_dir", "path", "runs", "folder of all runs"),
        Flag("save_every", "int", 0, "batches between checkpoints; 0 = only at the end", low=0),
        Flag("resume", "path", None, "checkpoint to go on from, or auto = the newest of the run", nullable=True),
        Flag("checkpoint_limit", "int", 3, "checkpoints kept; 0 = all", low=0),
        Flag("save_best_model", "bool", False, "also keep the checkpoint with the best solved rate"),
        Flag("log_steps", "int", 20, "batches between progress lines", low=1),
        Flag("trackers", "list", "", "where else to log", choices=("tensorboard", "wandb", "trackio")),
        Flag("device", "str", "auto", "device", choices=("auto", "cpu", "cuda", "mps")),
        Flag("num_threads", "int", 0, "CPU threads; 0 = torch's choice", low=0),
    ),
}
GROUPS = tuple(_TABLE)
INVOCATION = ("run_name", "resume", "eval_only", "dry_run")  # said of one call: no record of a run keeps them
FLAGS: tuple[Flag, ...] = tuple(replace(flag, group=group) for group, flags in _TABLE.items() for flag in flags)
_FIND = {name: flag for flag in FLAGS for name in (flag.name, *flag.aliases)}

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


def names(text: str | None) -> list[str]:
    """The names in a comma list as `tasks` and `trackers` hold it: "a,b" -> ["a", "b"], "" and None -> []."""
    return text.split(",") if text else []


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
        default = "none" if flag.default in (None, "") else str(flag.default)
        told = f"{flag.help} (default {default}; {flag.legal})"
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
    opts = Options(**{flag.name: saved.get(flag.name, flag.default) for flag in FLAGS})
    opts.explicit = {name for name, value in saved.items() if value != _FIND[name].default}
    for one, other in (("task", "tasks"), ("tasks", "task")):
        if one in typed or one in file:  # naming tasks anew replaces those of the resumed run
            setattr(opts, other, None)
    broken: set[str] = set()
    for source, read, where in ((file, _from_yaml, f"{path}: "), (typed, _from_text, "--")):
        for name, raw in source.items():
            flag = _FIND[name]
            try:
                value = read(flag, raw)
            except (ValueError, TypeError, OverflowError):
                found.append(f"{where}{name} {_illegal(flag, raw)}")
                broken.add(name)
                continue
            broken.discard(name)
            setattr(opts, name, value)
            if source is typed or value != flag.default:
                opts.explicit.add(name)
    found += problems(opts, broken)
    for flag in FLAGS:
        if not flag.allows(getattr(opts, flag.name)):
            setattr(opts, flag.name, flag.default)
    return opts, found


def problems(opts: argparse.Namespace, skip: set[str] | frozenset[str] = frozenset()) -> list[str]:
    """Values out of range and flags that contradict each other, one line each; flags in `skip` are not looked at.

    A flag out of range is told once: the cross checks that read it are left out.
    """
    illegal = [flag for flag in FLAGS if flag.name not in skip and not flag.allows(getattr(opts, flag.name))]
    found = [f"--{flag.name} {_illegal(flag, getattr(opts, flag.name))}" for flag in illegal]
    unsure = {flag.name for flag in illegal} | skip
    told = [tell(opts) for reads, tell in RULES if not unsure & set(reads.split())]
    return found + [line for line in told if line]


def dump(opts: argparse.Namespace) -> str:
    """YAML text of every flag but `config`, grouped; `--config` on it gives equal options."""
    import yaml
    parts = [f"# Every flag of {PROG}; `python {PROG} --config THIS_FILE` uses them, `--help` explains them."]
    for group in GROUPS:
        leaves = {flag.name: getattr(opts, flag.name) for flag in FLAGS if flag.group == group and flag.in_file}
        parts.append(yaml.safe_dump({group: leaves}, sort_keys=False, allow_unicode=True, width=10**9).rstrip())
    return "\n\n".join(parts) + "\n"


def read_resolved(text: str) -> dict[str, Any]:
    """The flags in a text that `dump` wrote, as `parse` takes them for `saved`. Raises ValueError for another."""
    import yaml

    try:
        return {name: _from_yaml(_FIND[name], value) for name, value in _leaves(yaml.safe_load(text)) if name in _FIND}
    except (yaml.YAMLError, AttributeError, ValueError, TypeError, OverflowError) as error:
        raise ValueError("the checkpoint's config.resolved.yaml cannot be read: restore it or start anew") from error


# Cross checks: the flags each reads (so that a flag already told as wrong stays out), and what to say, or None.
RULES: tuple[tuple[str, Callable[[argparse.Namespace], str | None]], ...] = (
    # One condition for two needs: heads of whole width (d_h / n_heads), and of even width (RoPE turns pairs).
    ("d_h n_heads", lambda o: f"--d_h {o.d_h} is not divisible by {'' if o.d_h % o.n_heads else 'twice '}--n_heads "
     f"{o.n_heads}: choose a multiple of {2 * o.n_heads}, such as {-(-o.d_h // (2 * o.n_heads)) * 2 * o.n_heads}"
     if o.d_h % (2 * o.n_heads) else None),
    ("task tasks", lambda o: f"--task {_show(o.task)} and --tasks {_show(o.tasks)} are both set: keep one "
     "(`none` takes back the other)" if o.task is not None and o.tasks is not None else None),
    ("max_steps epochs max_minutes eval_only dry_run", lambda o: "training would never end: set --max_steps, --epochs "
     "or --max_minutes" if not (o.max_steps or o.epochs or o.max_minutes or o.eval_only or o.dry_run) else None),
    ("epochs train_n", lambda o: f"--epochs {o.epochs} needs --train_n above 0: fresh items without end have no epochs"
     if o.epochs > 0 and o.train_n == 0 else None),
    ("supervised_segments segments", lambda o: f"--supervised_segments {o.supervised_segments} is more than --segments "
     f"{o.segments}: choose at most {o.segments}" if o.supervised_segments > o.segments else None),
    ("act_penalty use_act", lambda o: f"--act_penalty {o.act_penalty} does nothing without --use_act"
     if o.act_penalty > 0 and not o.use_act else None),
    ("halt_max_segments use_act", lambda o: f"--halt_max_segments {o.halt_max_segments} does nothing without --use_act"
     if o.halt_max_segments > 0 and not o.use_act else None),
    ("train_injector_scale lora_layers eval_only", lambda o: "--train_injector_scale 0 leaves nothing to train"
     if o.train_injector_scale == 0 and not o.lora_layers and not o.eval_only else None),
    ("eval_only dry_run", lambda o: "--eval_only and --dry_run are both set: keep one"
     if o.eval_only and o.dry_run else None),
    ("eval_only resume run_name", lambda o: "--eval_only needs a checkpoint: add --resume PATH or --run_name NAME"
     if o.eval_only and o.resume is None and o.run_name is None else None),
    # The default warmup gives way to a short run by itself; only a typed one is a contradiction.
    ("warmup_steps max_steps", lambda o: f"--warmup_steps {o.warmup_steps} is more than --max_steps {o.max_steps}"
     if "warmup_steps" in getattr(o, "explicit", ()) and 0 < o.max_steps < o.warmup_steps else None),
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
        found.append(f"--config {_show(path)} cannot be read: {' '.join(reason.split())}")
        return values
    for key, value in leaves:
        flag = _FIND.get(key)
        if flag is None:
            found.append(f"{path}: unknown key {_show(key)}{_nearest(str(key))}")
        elif not flag.in_file:
            found.append(f"{path}: {key} belongs on the command line only")
        elif flag.name in values:
            found.append(f"{path}: {flag.name} is given twice, under different nests or names")
        else:
            values[flag.name] = value
    return values


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
        if isinstance(value, dict) and value and not (key in _FIND and _FIND[key].type == "json"):
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


def _json_ok(text: str) -> bool:
    """False only for text that means to be a JSON object and is not: small, default and paths pass."""
    try:
        return not text.lstrip().startswith("{") or isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _illegal(flag: Flag, value: Any) -> str:
    return f"{'needs a value' if value is None else f'{_show(value)} is not legal'}: expected {flag.legal}"


def _show(value: Any) -> str:
    """A value on one line, quoted where blanks or control characters would mislead, cut where it is long."""
    text = value if isinstance(value, str) and re.fullmatch(r"[\w./:,+=@<>-]+", value) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _nearest(name: str, prefix: str = "") -> str:
    near = difflib.get_close_matches(name, _FIND, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
