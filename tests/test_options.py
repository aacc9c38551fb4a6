"""options: what may be typed, what is refused, and that a dumped configuration reruns a run."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import options
import rules
import train
from flag_table.elsewhere import HERE
from flags import ADAPTERS, ARCHS, FIND
from options import FLAGS, GROUPS, Flag, as_dict, dump, names, parse, problems

ROOT = Path(options.__file__).parent
PUBLISHED = """
--task basic_arithmetic --segments 3 --train_n 2000 --eval_n 256 --batch_size 16
--tasks basic_arithmetic,gsm_symbolic,chain_sum,simple_equations --segments 3 --train_n 4000 --eval_n 512 \
--batch_size 16
--task basic_arithmetic --resume PATH --eval_only --eval_n 1024 --eval_every 1000
--model_name NAME --segments 3 --inner_T 3 --lr 2e-4 --batch_size 2 --max_steps 50
--model_name NAME --segments 4 --inner_T 4 --use_act --batch_size 2 --lr 1e-4 --max_steps 1000
--arch hybrid --dataset datasets/wiki_chunks/processed/ --batch_size 22 --steps 308212 --learning_rate 0.00025 \
--warmup_steps 4000 --lr_scheduler cosine --lr_min_ratio 0.05 --grad_clip 5.0 --val_every 1500 \
--run_name hrm-gated-pretrain --checkpoint_limit 5 --mixed_precision bf16 --eval_batch_size 22 --log_steps 1 \
--dataset_workers 30 --save_best_model --optimizer adamw_8bit --max_seq_len 512 --max_val_samples 20000 \
--eval_loss_patience 3 --patience_grace_steps 10000 --hrm_gate_warmup_steps 8000
--arch hybrid --dataset datasets/hybrid_mix_stageB --batch_size 22 --steps 180000 --learning_rate 0.0002 \
--warmup_steps 2000 --lr_scheduler cosine --lr_min_ratio 0.05 --grad_clip 5.0 --val_every 1500 --run_name hrm-stageB \
--checkpoint_limit 5 --mixed_precision bf16 --eval_batch_size 22 --log_steps 1 --dataset_workers 30 --save_best_model \
--optimizer adamw_8bit --max_seq_len 512 --max_val_samples 20000 --eval_loss_patience 3 --patience_grace_steps 5000 \
--hrm_gate_warmup_steps 1000
--arch hybrid --dataset datasets/hybrid_mix_stageC --batch_size 20 --steps 400000 --learning_rate 0.00018 \
--warmup_steps 3000 --lr_scheduler cosine --lr_min_ratio 0.05 --grad_clip 5.0 --val_every 2000 --run_name hrm-stageC \
--checkpoint_limit 8 --mixed_precision bf16 --eval_batch_size 20 --log_steps 1 --dataset_workers 40 --save_best_model \
--optimizer adamw_8bit --max_seq_len 512 --max_val_samples 25000 --eval_loss_patience 4 --patience_grace_steps 8000 \
--deep_supervision 1 --ds_weight 0.1 --use_halting 1 --halting_weight 0.01
""".strip().splitlines()


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The problems `parse` tells, one per line, without the common prefix; it must exit 2 and print nothing else."""
    with pytest.raises(SystemExit) as caught:
        parse(argv)
    told = capsys.readouterr()
    assert caught.value.code == 2 and told.out == ""
    lines = told.err.splitlines()
    assert lines and all(line.startswith("train.py: error: ") for line in lines)
    return [line.removeprefix("train.py: error: ") for line in lines]


@pytest.fixture
def config(tmp_path: Path):
    """Writes YAML text to a file and gives the arguments that read it."""
    def write(text: str) -> list[str]:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return ["--config", str(path)]
    return write


# --- the table, the parser and the default file agree


HEAVY = "{'torch', 'transformers', 'accelerate', 'reasoning_gym', 'yaml', 'numpy', 'safetensors', 'psutil'}"


def loaded_by(*argv: str) -> set[str]:
    """Which heavy packages `train.py` imports for a command line, which must end by itself before a run is built."""
    code = (f"import sys, train; status = train.main({list(argv)!r}); "
            f"print(status, *sorted({HEAVY} & set(sys.modules)), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    status, *packages = done.stderr.splitlines()[-1].split()
    assert status == ("0" if "--help" in argv else "2")
    return set(packages)


@pytest.mark.parametrize("argv", [
    ["--help"], ["--help", "all"], ["--help", "--arch", "hybrid"], ["--d_hh", "3"], ["--lr", "nan"], ["--d_h", "100"],
    ["--task", "a", "--tasks", "b"], ["--eval_only"],
], ids=" ".join)
def test_what_the_table_and_the_rules_can_tell_needs_no_import(argv):
    assert loaded_by(*argv) == set()


def test_a_wrong_file_needs_yaml_alone_and_a_missing_checkpoint_no_torch(config, tmp_path):
    assert loaded_by(*config("d_hh: 3\n")) == {"yaml"}
    assert not loaded_by("--resume", str(tmp_path / "nowhere")) & {"torch", "transformers", "numpy", "reasoning_gym"}


def test_help_states_every_flag_with_default_and_legal_range(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks inside a help text
    assert train.main(["--lr", "wrong", "--help", "all"]) == 0
    told = capsys.readouterr().out
    positions = [told.index(f"\n{group}:\n") for group in GROUPS]
    assert positions == sorted(positions)
    lines = told.splitlines()
    for flag in FLAGS:
        start = next(i for i, line in enumerate(lines) if line.startswith(f"  --{flag.name} "))
        text = " ".join(lines[start:start + 2])
        for arch in flag.archs:
            default = flag.default_in(arch)
            told_default = re.search(r"\((?:([\w ]+) only; )?default ([^,;]+)((?:, \w+ [^,;]+)*); ", text)
            own = re.search(rf", {arch} ([^,;]+)", told_default[3])
            assert (own[1] if own else told_default[2]) == str("none" if default in (None, "") else default)
            assert told_default[1] == (None if flag.archs == ARCHS else " and ".join(flag.archs))
        assert f"; {flag.legal})" in text
        assert all(f" --{name} " in text for name in flag.aliases)
    assert told.count("  python train.py") == 3
    width = "width of the HRM; a multiple of 2 x n_heads"
    assert f"{width} (addon and hybrid only; default 128, hybrid 256; an integer >= 8)" in told
    assert "--lr X, --learning_rate X" in told and "--use_act [0|1]" in told and "--injector cab|grb" in told


def flags_in(text: str) -> set[str]:
    """The names of the flags that a help text explains."""
    return {line.split()[0].strip("-") for line in text.splitlines() if re.match("  --[a-z]", line)}


def test_bare_help_shows_the_common_flags_and_how_to_see_the_rest():
    text = train.help_text("common")
    assert flags_in(text) == {flag.name for flag in FLAGS if flag.common}
    assert len(flags_in(text)) <= 28 and len(text.splitlines()) <= 100
    assert "--help --arch hybrid" in text and "--help all" in text


@pytest.mark.parametrize("typed,topic", [
    ("--help", "common"), ("-h", "common"), ("--help all", "all"), ("--help=all", "all"), ("--help hybrid", "hybrid"),
    ("--help --arch hybrid", "hybrid"), ("--arch=enhanced --help", "enhanced"), ("--arch hybrid --help all", "all"),
    ("--help --arch nonsense", "common"), ("--help nonsense", "common"), ("--xyzzy --help", "common"),
])
def test_help_shows_what_is_asked_for(typed, topic, capsys):
    assert train.main(typed.split()) == 0
    told = capsys.readouterr()
    assert told.out == train.help_text(topic) and told.err == ""


@pytest.mark.parametrize("arch", ARCHS)
def test_a_system_s_help_shows_its_flags_with_its_defaults(arch, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    text = train.help_text(arch)
    assert flags_in(text) == {flag.name for flag in FLAGS if arch in flag.archs}
    for flag in (flag for flag in FLAGS if arch in flag.archs):
        default = flag.default_in(arch)
        shown = "none" if default in (None, "") else str(default)
        assert f"{flag.help} (default {shown}; {flag.legal})" in text


# --- a flag is one line in one table


NEW = """TABLE = (
    addon("new_width", "int", 3, "width of something new", low=1, adapters=("hrm", "mlp"), shape=True,
          common=True, before=2, by_arch={"hybrid": 5}),
"""
USE = """
import sys
sys.path[:0] = [{place!r}, {root!r}]
import options, train

opts = options.parse(["--new_width", "7"])
assert (opts.new_width, options.parse([]).new_width) == (7, 3)
assert "new_width: 7" in options.dump(opts)
assert options.read_resolved(options.dump(opts))["new_width"] == 7
assert options.read_resolved("model: {{d_h: 64}}")["new_width"] == 2  # a checkpoint from before the flag

assert options.collect(["--new_width", "0"])[1] == ["--new_width 0 is not legal: expected an integer >= 1"]
assert "does nothing with --adapter lora" in options.collect(["--new_width", "7", "--adapter", "lora"])[1][0]
assert "does nothing with --arch enhanced" in options.collect(["--new_width", "7", "--arch", "enhanced"])[1][0]
told = train.other_shape(opts, {{"new_width": 3}}, "old")
assert told[0].startswith("old was trained with another shape: --new_width 7 (checkpoint: 3)")

assert train.kept({{"new_width": 3, "lr": 0.1, "dry_run": True}}, anew=True) == {{"new_width": 3}}
assert train.kept({{"new_width": 3, "lr": 0.1, "dry_run": True}}, anew=False) == {{"new_width": 3, "lr": 0.1}}

for topic in ("common", "all", "addon"):
    assert "--new_width" in train.help_text(topic)
assert "--new_width" not in train.help_text("hybrid")
"""


def test_a_new_flag_is_one_line_in_one_table(tmp_path):
    """In a copy of the table: parser, record, checks of range, adapter, system and shape, and help know the flag."""
    shutil.copytree(ROOT / "flag_table", tmp_path / "flag_table")
    table = tmp_path / "flag_table" / "model.py"
    text = table.read_text(encoding="utf-8")
    assert text.count("TABLE = (\n") == 1
    table.write_text(text.replace("TABLE = (\n", NEW), encoding="utf-8")
    code = USE.format(place=str(tmp_path), root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_fixes_a_shape_or_a_depth_belongs_to_the_record_of_a_run():
    assert not [flag.name for flag in FLAGS if (flag.shape or flag.depth) and (flag.one_call or not flag.in_file)]
    assert not [flag.name for flag in FLAGS if flag.shape and flag.depth]
    for flag in FLAGS:
        assert set(flag.by_arch) <= set(flag.archs) and set(flag.adapters) <= set(ADAPTERS), flag.name
        assert flag.adapters == ADAPTERS or "addon" in flag.archs, flag.name
        assert all(flag.allows(flag.default_in(arch)) for arch in flag.archs), flag.name
        assert flag.before is None or flag.allows(flag.before), flag.name


# --- rules


class Recording:
    """Options with a random legal value for every flag, which note what is read of them."""

    def __init__(self, draw: random.Random):
        self.draw, self.values = draw, {"explicit": set(FIND)}

    def __getattr__(self, name: str):
        if name not in self.values:
            self.values[name] = self.draw.choice(values_of(FIND[name]))
        return self.values[name]


def values_of(flag: Flag) -> list:
    """Legal values of a flag that differ as much as rules can see: its default, others, small numbers."""
    if flag.type == "bool":
        return [False, True]
    if flag.choices and flag.type == "str":
        return list(flag.choices)
    if flag.type in ("int", "float"):
        return [flag.default, *(value for value in (0, 1, 2, 3, 8, 10, 100) if flag.allows(value))]
    if flag.name == "grad_horizon":
        return ["full", "one_step", "k:2", "segments:1", "segments:2"]
    if flag.name == "attn_implementation":
        return [flag.default, "sdpa", "owner/kernel"]
    return [flag.default, "some"]


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.tell.__name__)
def test_a_rule_reads_the_flags_that_its_decorator_names_and_no_other(rule):
    read, told, draw = set(), set(), random.Random(0)
    for _ in range(2000):
        opts = Recording(draw)
        told.add(rule.tell(opts) is not None)
        read |= opts.values.keys() - {"explicit"}
    assert read == rule.reads
    assert told == {True, False}  # the values were such that the rule has spoken, and has been silent


def test_every_rule_has_its_own_name():
    names = [rule.tell.__name__ for rule in rules.RULES]
    assert len(set(names)) == len(names)


# --- defaults, the default file and published commands


def test_defaults_are_legal_and_names_unique():
    opts = parse([])
    assert problems(opts) == [] and opts.explicit == set()
    spelled = [name for flag in FLAGS for name in (flag.name, *flag.aliases)]
    assert len(spelled) == len(set(spelled))
    assert not set(spelled) & set(GROUPS)
    for flag in FLAGS:
        assert flag.default is None or type(flag.default).__name__ in (flag.type, "str")


def test_default_yaml_equals_the_parsers_defaults():
    path = ROOT / "configs" / "default.yaml"
    assert path.read_text(encoding="utf-8") == dump(parse([]))
    opts = parse(["--config", str(path)])
    assert opts == parse([]) and opts.explicit == {"config"}


@pytest.mark.parametrize("line", PUBLISHED)
def test_published_commands_parse_as_typed(line):
    words = line.split()
    opts = parse(words)
    for name, value in zip(words, words[1:], strict=False):
        if name.startswith("--") and not value.startswith("--"):
            kept = getattr(opts, FIND[name[2:]].name)
            assert type(kept)(value) == kept
    assert opts.explicit == {FIND[word[2:]].name for word in words if word.startswith("--")}


def test_published_switches_and_aliases():
    assert parse(PUBLISHED[4].split()).use_act is True
    assert parse(PUBLISHED[2].split()).eval_only is True
    opts = parse("--learning_rate 2e-4 --steps 7 --val_every 3".split())
    assert (opts.lr, opts.max_steps, opts.eval_every) == (2e-4, 7, 3)
    assert opts.explicit == {"lr", "max_steps", "eval_every"}


# --- the command line


@pytest.mark.parametrize("typed,value", [(["--use_act"], True), (["--use_act", "1"], True), (["--use_act=0"], False),
                                         (["--use_act", "false"], False), (["--use_act", "TRUE"], True),
                                         (["--use_act", "--reset_l", "0"], True)])
def test_switches_take_a_value_or_stand_alone(typed, value):
    assert parse(typed).use_act is value


@pytest.mark.parametrize("typed", ["--grb_gate_init -2.5", "--grb_gate_init=-2.5", "--grb_gate_init -25e-1"])
def test_negative_numbers_are_values(typed):
    assert parse(typed.split()).grb_gate_init == -2.5


def test_later_flags_win_and_values_may_hold_blanks():
    opts = parse(["--d_h", "64", "--d_h=32", "--system_header", "- think, then answer", "--sentinel=--end--"])
    assert (opts.d_h, opts.system_header, opts.sentinel) == (32, "- think, then answer", "--end--")


def test_comma_lists_lose_their_blanks():
    opts = parse(["--tasks", "chain_sum, toy_add", "--trackers", "wandb"])
    assert names(opts.tasks) == ["chain_sum", "toy_add"] and names(opts.trackers) == ["wandb"]
    assert names(None) == names("") == []


def choices() -> list[tuple[str, str]]:
    return [(flag.name, choice) for flag in FLAGS for choice in flag.choices or ()]


@pytest.mark.parametrize("name,choice", choices())
def test_every_choice_is_accepted(name, choice):
    arch = choice if name == "arch" else FIND[name].archs[0]
    data = ["--dataset", "synthetic"] if arch == "hybrid" else ["--use_act"] if choice == "best_halt" else []
    cached = ["--train_n", "8", "--cache_dir", "c"] if choice == "disk" else ["--train_n", "8"]
    data += {"cache_hidden": cached, "cache_dtype": ["--train_n", "8", "--cache_hidden", "ram"],
             "cache_mode": ["--train_n", "8", "--cache_hidden", "disk", "--cache_dir", "c"],
             "segments_sampling": ["--segments", "2"]}.get(name, [])
    assert getattr(parse(["--arch", arch, *data, f"--{name}", choice]), name) == choice


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if len(flag.archs) == 1], ids=lambda flag: flag.name)
def test_a_flag_of_another_system_is_refused(flag, capsys):
    """A flag that would do nothing must not look as if it did."""
    other = next(arch for arch in ARCHS if arch not in flag.archs)
    data = ["--dataset", "synthetic"] if other == "hybrid" else []
    special = {"dev_sets": "a=b", "mix": "a=1", "max_memory": "{}"}
    text = special.get(flag.name) or str(flag.default if flag.default is not None else 1)
    told = refused(["--arch", other, *data, f"--{flag.name}={text}"], capsys)
    assert f"--{flag.name} does nothing with --arch {other}, only with {flag.archs[0]}: leave it out" in told


def test_each_system_has_its_own_defaults_and_a_checkpoints_arch_chooses_them():
    typed = parse(["--arch", "hybrid", "--dataset", "synthetic"])
    own = {flag.name: flag.by_arch["hybrid"] for flag in FLAGS if "hybrid" in flag.by_arch}
    assert own["d_h"] == 256 and {name: getattr(typed, name) for name in own} == own
    assert typed.explicit == {"arch", "dataset"}
    resumed = parse(["--lr", "1"], saved={"arch": "hybrid", "dataset": "synthetic", "batch_size": 7})
    assert (resumed.arch, resumed.d_h, resumed.batch_size, resumed.lr) == ("hybrid", 256, 7, 1.0)


def test_all_problems_of_a_command_line_are_told_at_once(capsys):
    told = refused(["--d_hh", "64", "--eval_n", "-3", "--batch_size", "many", "--injector", "cba", "--use_act", "maybe",
                    "--lr", "nan", "--n_heads", "3", "--d_h", "100", "--task", "a", "--tasks", "b", "stray",
                    "--cab_mem", "-1e-3", "--seed"], capsys)
    assert told == [
        "unknown flag --d_hh; did you mean --d_h?",
        "unexpected argument stray: every value follows its --flag",
        "--batch_size many is not legal: expected an integer >= 1 and <= 1048576",
        "--use_act maybe is not legal: expected 0, 1, true or false",
        "--cab_mem -1e-3 is not legal: expected an integer >= 0",
        "--seed needs a value: expected an integer >= 0 and < 2147483648",
        "--injector cba is not legal: expected one of cab, grb",
        "--eval_n -3 is not legal: expected an integer >= 1",
        "--lr nan is not legal: expected a finite number > 0",
        "--d_h 100 is not divisible by --n_heads 3: choose a multiple of 6, such as 102",
        "--task a and --tasks b are both set: keep one (`none` takes back the other)",
    ]


@pytest.mark.parametrize("typed,problem", [
    ("--use_actt", "unknown flag --use_actt; did you mean --use_act?"),
    ("--xyzzy=3", "unknown flag --xyzzy"),
    ("--per_device_train_batch_size 8", "unknown flag --per_device_train_batch_size; here: --batch_size"),
    ("--gradient-accumulation-steps=2", "unknown flag --gradient-accumulation-steps; here: --grad_accum_steps"),
    ("--batch-size 3", "unknown flag --batch-size; did you mean --batch_size?"),
    ("--push_to_hub", "unknown flag --push_to_hub; here: `python scripts/export_model.py RUN --to DIR --push "
     "USER/NAME`, once the run is done"),
    ("-d_h 3", "unknown flag -d_h; did you mean --d_h?"),
    ("--seg 3", "unknown flag --seg"),  # never an abbreviation of --segments
    ("--config", "--config needs a value: expected text, not empty"),
    ("--config=", "--config '' is not legal: expected text, not empty"),
    ("--sentinel=", "--sentinel '' is not legal: expected text, not empty"),
    ("--tasks=", "--tasks '' is not legal: expected distinct names with commas between"),
    ("--tasks a,a", "--tasks a,a is not legal: expected distinct names with commas between"),
    ("--tasks a,,b", "--tasks a,,b is not legal: expected distinct names with commas between"),
    ("--trackers wandb,tb", "--trackers wandb,tb is not legal: expected distinct names with commas between, "
                            "among tensorboard, wandb, trackio, mlflow, comet_ml, swanlab, aim"),
    ("--d_h none", "--d_h none is not legal: expected an integer >= 8"),
    ("--d_h 64.0", "--d_h 64.0 is not legal: expected an integer >= 8"),
    ("--task_config {bad", "--task_config '{bad' is not legal: expected small, default, a file or a JSON object"),
    ("--run_name ../up", "--run_name ../up is not legal: expected a plain folder name (no slash, not ..)"),
    ("--run_name ..", "--run_name .. is not legal: expected a plain folder name (no slash, not ..)"),
    ("--d_h 24 --n_heads 8", "--d_h 24 is not divisible by twice --n_heads 8: choose a multiple of 16, such as 32"),
    ("--eval_seed 999999999", "--eval_seed 999999999 is not legal: expected an integer >= 1000000000 and < 4294967296"),
    ("--train_inject_over all", "unknown flag --train_inject_over; did you mean --train_injector_scale?"),
    ("--eval_inject_over all", "unknown flag --eval_inject_over; did you mean --eval_injector_scale?"),
    ("--train_injector_scale 0", "--train_injector_scale 0 leaves nothing to train"),
    ("--eval_only --run_name a --dry_run", "--eval_only and --dry_run are both set: keep one"),
    ("--max_steps 0", "training would never end: set --max_steps, --epochs or --max_minutes"),
    ("--epochs 2", "--epochs 2 needs --train_n above 0: fresh items without end have no epochs"),
    ("--segments_sampling growing", "--segments_sampling growing has nothing to draw from with --segments 1: choose at "
     "least 2"),
    ("--segments 2 --supervised_segments 3", "--supervised_segments 3 is more than --segments 2: choose at most 2"),
    ("--act_penalty 0.1", "--act_penalty 0.1 does nothing without --use_act"),
    ("--halt_max_segments 2", "--halt_max_segments 2 does nothing without --use_act"),
    ("--halt_settled 0.1 --segments 2", "--halt_settled 0.1 saves nothing with fewer than 3 segments at evaluation: "
     "choose more by --segments, --eval_segments or, with --use_act, --halt_max_segments"),
    ("--halt_settled 0.1 --segments 4 --use_act --eval_readout best_halt",
     "--halt_settled stops examples and --eval_readout best_halt runs every segment: keep one"),
    ("--halt_settled 0.1 --segments 4 --logit_bias_head", "--halt_settled does not look at the bias of "
     "--logit_bias_head: add --halt_settled_at prompt"),
    ("--carry_state 0", "--carry_state 0 does nothing with one supervised segment: choose more by --segments or "
     "--supervised_segments"),
    ("--eval_only", "--eval_only needs a checkpoint: add --resume PATH or --run_name NAME"),
    ("--adapter lora --d_h 64", "--d_h does nothing with --adapter lora, only with hrm and mlp: "
                                "leave it out"),
    ("--adapter mlp --segments 3", "--segments does nothing with --adapter mlp, only with hrm: leave it out"),
    ("--adapter lora --halt_settled 0.1", "--halt_settled does nothing with --adapter lora, only with hrm: leave it "
                                          "out"),
    ("--virtual_tokens 3", "--virtual_tokens does nothing with --adapter hrm, only with prompt: leave it out"),
    ("--adapter none --dry_run", "--dry_run makes no sense with --adapter none: nothing trains"),
    ("--adapter none --match_params 5", "--match_params makes no sense with --adapter none: nothing trains"),
    ("--cache_hidden ram", "--cache_hidden ram needs --train_n above 0: fresh items without end are never seen twice"),
    ("--cache_hidden ram --train_n 9 --lora_layers 1", "--cache_hidden ram and --lora_layers 1: LoRA changes what the "
                                                       "LLM says at every step; leave one out"),
    ("--cache_hidden ram --train_n 9 --adapter lora", "--cache_hidden ram cannot serve --adapter lora, which takes "
                                                      "part in the LLM's forward pass: leave it out"),
    ("--cache_hidden disk --train_n 9", "--cache_hidden disk needs --cache_dir: a folder, which runs that read the "
                                        "same may share"),
    ("--cache_hidden ram --train_n 9 --cache_dir c", "--cache_dir c does nothing with --cache_hidden ram: choose disk"),
    ("--cache_dtype int8", "--cache_dtype int8 does nothing with --cache_hidden off: choose ram or disk"),
    ("--cache_mode train", "--cache_mode train does nothing with --cache_hidden off: choose disk"),
    ("--cache_mode fill --cache_hidden ram --train_n 9", "--cache_mode fill does nothing with --cache_hidden ram: "
                                                         "choose disk"),
    ("--max_steps 10 --warmup_steps 50", "--warmup_steps 50 is more than --max_steps 10"),
])
def test_each_bad_command_line_has_its_one_line(typed, problem, capsys):
    assert refused(typed.split(), capsys) == [problem]


@pytest.mark.parametrize("typed", [
    "--max_steps 0 --max_minutes 1", "--max_steps 0 --epochs 1 --train_n 8", "--max_steps 0 --dry_run",
    "--max_steps 0 --eval_only --run_name a", "--max_steps 10", "--act_penalty 1 --use_act", "--grad_horizon k:3",
    "--halt_max_segments 2 --use_act", "--system_header=", "--run_name v1.2_lr-3",
    "--seed 1000000000", "--seed 2147483647 --eval_seed 4294967295", "--train_injector_scale 0 --lora_layers 1",
    "--train_injector_scale 0 --eval_only --run_name a", "--trackers=", "--resume auto", "--supervised_segments 0",
    "--task_config runs/tasks.yaml", "--adapter lora --segments 1 --lora_rank 2", "--adapter mlp --cache_hidden ram "
    "--train_n 9", "--adapter prompt --virtual_tokens 3",
])
def test_legal_combinations_pass(typed):
    parse(typed.split())


def beyond(flag: Flag) -> list[float]:
    """The nearest illegal values at both ends of a number's range, and for floats the values that are no number."""
    step = 1 if flag.type == "int" else 1e-9
    low = [] if flag.low is None else [flag.low if flag.exclusive_low else flag.low - step]
    high = [] if flag.high is None else [flag.high if flag.exclusive_high else flag.high + step]
    return low + high + ([math.nan, math.inf, -math.inf] if flag.type == "float" else [])


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag.type in ("int", "float")], ids=lambda flag: flag.name)
def test_numbers_outside_their_range_are_refused(flag, capsys):
    for value in beyond(flag):
        shown = repr(float(value) if flag.type == "float" else value)
        assert refused([f"--{flag.name}", shown], capsys) == [f"--{flag.name} {shown} is not legal: "
                                                              f"expected {flag.legal}"]


@pytest.mark.parametrize("horizon", ["k:0", "k:", "k:-1", "k:1.5", "FULL", "one_step ", ""])
def test_grad_horizon_names_its_four_forms(horizon, capsys):
    assert "expected one_step, full, k:N or segments:N with N >= 1" in refused([f"--grad_horizon={horizon}"], capsys)[0]


def test_a_flag_already_told_as_wrong_starts_no_second_complaint(capsys):
    assert len(refused(["--d_h", "wide", "--n_heads", "3"], capsys)) == 1
    assert len(refused(["--n_heads", "0"], capsys)) == 1


# --- what is known before the whole is checked, and what a resumed run inherits


def test_what_can_be_read_is_read_and_nothing_is_said(config, capsys):
    file = config("run_name: mine\nd_h: wide\nnonsense: 1\n")
    opts, _ = options.collect([*file, "--save_dir", "there", "--resume", "--eval_n", "0", "--x"])
    assert (opts.run_name, opts.save_dir, opts.resume, opts.d_h, opts.eval_n) == ("mine", "there", None, 128, 256)
    told = capsys.readouterr()
    assert told.out == "" and told.err == ""


def test_collect_hands_back_the_problems_and_legal_options(capsys):
    opts, found = options.collect(["--run_name", "../up", "--d_h", "100", "--n_heads", "3", "--lr", "-1", "--task=x"])
    assert [line.split()[0] for line in found] == ["--lr", "--run_name", "--d_h"]
    assert (opts.run_name, opts.lr, opts.task) == (None, 3e-3, "x")  # a wrong value gives way to the default
    assert capsys.readouterr() == ("", "")
    assert options.collect([]) == (parse([]), [])


def test_what_a_call_says_of_itself_is_named_once():
    assert set(options.INVOCATION) <= {flag.name for flag in FLAGS}


def test_options_are_not_written_to_and_replaced_ones_are_others():
    opts = parse(["--lr", "0.5"])
    with pytest.raises(AttributeError, match=r"options.replace\(opts, lr=...\)"):
        opts.lr = 0.25
    with pytest.raises(AttributeError):
        opts.explicit.add("d_h")
    other = options.replace(opts, lr=0.25)
    assert (opts.lr, other.lr, other.explicit, other.typed) == (0.5, 0.25, {"lr"}, {"lr"})
    assert copy.deepcopy(opts) == opts


@pytest.mark.parametrize("typed,saved,steps", [
    ("", {}, 1900), ("--epochs 2 --train_n 9", {}, 0), ("--max_minutes 1", {}, 0),
    ("--max_minutes 1 --max_steps 5", {}, 5), ("--max_minutes 1", {"max_steps": 5}, 0), ("", {"max_minutes": 1.0}, 0),
    ("", {"max_steps": 5, "max_minutes": 1.0}, 5), ("--max_steps 7", {"max_minutes": 1.0, "max_steps": 0}, 7),
])
def test_typed_epochs_and_minutes_replace_steps(typed, saved, steps):
    opts = parse(typed.split(), saved)
    assert options.resolve(opts).max_steps == steps


@pytest.mark.parametrize("typed,saved,config", [
    ("", {}, "small"), ("--task gcd", {}, "default"), ("--tasks gcd,lcm", {}, "default"),
    ("--task gcd", {"task_config": "small"}, "small"), ("--task_config x.yaml", {}, "x.yaml"),
    ("--arch hybrid --dataset synthetic", {}, None),
])
def test_a_run_has_a_difficulty_of_its_tasks(typed, saved, config):
    assert options.resolve(parse(typed.split(), saved)).task_config == config


def test_saved_options_lie_between_defaults_and_yaml(config):
    saved = {"d_h": 64, "lr": 0.5, "segments": 8, "batch_size": 64}
    opts = parse([*config("lr: 0.25\n"), "--segments", "2"], saved)
    assert (opts.d_h, opts.lr, opts.segments, opts.batch_size, opts.n_heads) == (64, 0.25, 2, 64, 4)
    assert opts.explicit == {"config", "d_h", "lr", "segments"}  # as in YAML: a saved default is not a choice


@pytest.mark.parametrize("saved,typed,expected", [
    ({"task": "a"}, "", ("a", None)), ({"tasks": "a,b"}, "", (None, "a,b")),
    ({"task": "a"}, "--tasks b,c", (None, "b,c")), ({"tasks": "a,b"}, "--task c", ("c", None)),
])
def test_naming_tasks_anew_replaces_those_of_the_resumed_run(saved, typed, expected):
    opts = parse(typed.split(), saved)
    assert (opts.task, opts.tasks) == expected


def test_saved_options_are_checked_with_what_is_typed(capsys):
    with pytest.raises(SystemExit):
        parse(["--segments", "2"], {"supervised_segments": 3, "segments": 3})
    assert "--supervised_segments 3 is more than --segments 2" in capsys.readouterr().err


def test_read_resolved_gives_what_dump_wrote():
    opts = parse(["--d_h", "64", "--tasks", "a,b", "--lr", "3e-4", "--task_config", '{"a": 1}', "--use_act"])
    known = {flag.name for flag in FLAGS if "addon" in flag.archs} - {"virtual_tokens"}  # another adapter's
    assert options.read_resolved(dump(opts)) == {name: value for name, value in as_dict(opts).items() if name in known}
    assert parse([], options.read_resolved(dump(opts))) == opts
    assert options.read_resolved("model: {d_h: 64, a_flag_of_tomorrow: 3}") == {
        "d_h": 64, "state_mix": "sum", "lr_fall": "whole_run", "verifier_strict": False, "host_dtype": "stored",
        "min_roundtrip": 0.0, "fit_minutes": 0.0, "halt_settled_at": "prompt"}


def test_a_file_from_before_a_flag_or_a_default_means_what_it_meant():
    """Runs without gates stay so, and a default of HRM's that has changed is no flag typed for another adapter."""
    assert parse([], options.read_resolved("model: {d_h: 64}")).state_mix == "sum"
    saved = options.read_resolved("adapter: {adapter: mlp}\nmodel: {d_h: 64, init_state: fixed}")
    assert options.collect([], saved)[1] == [] and saved == {
        "adapter": "mlp", "d_h": 64, "lr_fall": "whole_run", "verifier_strict": False, "host_dtype": "stored",
        "min_roundtrip": 0.0, "fit_minutes": 0.0}
    assert "state_mix" not in options.read_resolved("model: {arch: hybrid, d_h: 64}")


@pytest.mark.parametrize("text", ["", "- a", "d_h: [", "d_h: wide", "d_h: 1e999", "lr: {a: 1}x", "seed: 2024-99-99"])
def test_read_resolved_refuses_another_text_in_one_line(text):
    with pytest.raises(ValueError, match="config.resolved.yaml cannot be read") as error:
        options.read_resolved(text)
    assert "\n" not in str(error.value)


# --- YAML


def test_yaml_lies_between_defaults_and_command_line(config):
    opts = parse([*config("lr: 0.5\nsegments: 8\ntask: toy_add\n"), "--segments", "2"])
    assert (opts.lr, opts.segments, opts.task, opts.d_h) == (0.5, 2, "toy_add", 128)
    assert opts.explicit == {"config", "lr", "segments", "task"}


def test_yaml_nests_are_for_the_reader_only(config):
    nested = config("model: {hrm: {d_h: 64, injector: {injector: grb}}}\ntraining:\n  learning_rate: 1e-4\ndata:\n")
    opts = parse(nested)
    assert (opts.d_h, opts.injector, opts.lr) == (64, "grb", 1e-4)


def test_yaml_values_are_read_by_the_flags_type(config):
    opts = parse(config("lr: 1e-3\ngrad_clip: 2\nuse_act: 1\nreset_l: yes\ntasks: [chain_sum, toy_add]\ntrackers: []\n"
                        "task_config: {min_terms: 2, max_terms: 3}\nlog_csv: null\nsystem_header: none\n"))
    assert (opts.lr, opts.grad_clip, opts.use_act, opts.reset_l) == (1e-3, 2.0, True, True)
    assert type(opts.grad_clip) is float
    assert (opts.tasks, opts.trackers, opts.log_csv) == ("chain_sum,toy_add", "", None)
    assert opts.task_config == '{"min_terms": 2, "max_terms": 3}'
    assert opts.system_header == "none"  # in YAML only null is none


@pytest.mark.parametrize("leaf,value", [("cache_hidden: off", "off"), ("cache_hidden: no", "off"),
                                        ("load_in: off", "none"), ("mixed_precision: no", "none"),
                                        ("adapter: false", "none")])
def test_a_choice_that_yaml_reads_as_a_truth_value_is_that_choice(leaf, value, config):
    name = leaf.partition(":")[0]
    assert getattr(parse(config(leaf + "\n")), name) == value
    assert options.read_resolved(leaf + "\n")[name] == value


def test_a_truth_value_that_is_no_choice_is_refused(config, capsys):
    assert "on_bad_line False is not legal" in refused(config("arch: hybrid\non_bad_line: off\n"), capsys)[0]
    assert "cache_hidden True is not legal" in refused(config("cache_hidden: on\n"), capsys)[0]


def test_none_on_the_command_line_takes_a_yaml_value_back(config):
    opts = parse([*config("task: toy_add\n"), "--task", "none", "--tasks", "a,b"])
    assert opts.task is None and opts.tasks == "a,b"


@pytest.mark.parametrize("leaf", ["d_h: '64'", "d_h: 64.0", "d_h: true", "d_h: [64]", "d_h: 1e2", "lr: true", "lr: no",
                                  "lr: [1]", "use_act: 2", "use_act: 'maybe'", "use_act: 1.0", "task: 12", "task: [a]",
                                  "task: on", "injector: 1", "run_name: 2024-01-01", "tasks: [a, 1]", "tasks: {}",
                                  "task_config: 3", "task_config: {a: 2024-01-01}", "task_config: {a: .nan}",
                                  "seed: null", "lr:", "model_name: null", "d_h: {}", "trackers: null"])
def test_wrong_yaml_types_are_refused_by_name(leaf, config, capsys):
    argv, name = config(leaf + "\n"), leaf.partition(":")[0]
    told = refused(argv, capsys)
    assert len(told) == 1 and told[0].startswith(f"{argv[1]}: {name} ") and ": expected " in told[0]


def test_all_problems_of_a_yaml_file_are_told_with_those_of_the_command_line(config, capsys):
    argv = config("d_hh: 64\nsegments: 3\nsegments: 4\nmodel:\n  lr: 0.1\ntrain: {learning_rate: 0.2}\nn_heads: four\n"
                  "3: x\nconfig: other.yaml\nmodl:\neval_n: 0\n")
    path = argv[1]
    assert refused([*argv, "--batch_size", "0", "--stesp=2"], capsys) == [
        "unknown flag --stesp; did you mean --steps?",
        f"{path}: line 3: segments is given twice",
        f"{path}: unknown key d_hh; did you mean d_h?",
        f"{path}: lr is given twice, under different nests or names",
        f"{path}: unknown key 3",
        f"{path}: config belongs on the command line only",
        f"{path}: unknown key modl; did you mean d_model?",
        f"{path}: n_heads four is not legal: expected an integer >= 1",
        "--eval_n 0 is not legal: expected an integer >= 1",
        "--batch_size 0 is not legal: expected an integer >= 1 and <= 1048576",
    ]


@pytest.mark.parametrize("text", ["lr: [1", "- lr\n", "just words", "a: 1\n---\nb: 2\n", "seed: 2024-99-99",
                                  "lr: \t1\n\tx", "model: &m {inner: *m}", "lr: !!python/object:os.system {}", "\x00",
                                  "[" * 3000, "seed: 1" + "0" * 5000])
def test_files_that_are_no_mapping_have_one_line(text, config, capsys):
    argv = config(text)
    told = refused(argv, capsys)
    assert len(told) == 1 and told[0].startswith(f"--config {argv[1]} cannot be read: ")


def test_unreadable_files_have_one_line_beside_the_other_problems(tmp_path, capsys):
    (tmp_path / "latin.yaml").write_bytes(b"task: \xff\n")
    missing = str(tmp_path / "missing.yaml")
    assert refused(["--config", missing, "--d_h", "0"], capsys) == [
        f"--config {missing} cannot be read: No such file or directory",
        "--d_h 0 is not legal: expected an integer >= 8"]
    assert "Is a directory" in refused(["--config", str(tmp_path)], capsys)[0]
    assert "utf-8" in refused(["--config", str(tmp_path / "latin.yaml")], capsys)[0]


@pytest.mark.parametrize("flag", ["save_dir", "system_header", "model_name", "tasks"])
@pytest.mark.parametrize("half", ["\\ud83d", "\\0"])
def test_text_that_no_file_can_hold_is_refused(flag, half, config, capsys):
    (line,) = refused(config(f'{flag}: "a{half}"'), capsys)
    assert f"{flag} 'a" in line and "expected UTF-8 text" in line
    (line,) = refused([f"--{flag}", f"a{chr(0xdcff)}"], capsys)  # as Python hands on a byte that is not UTF-8
    assert line.startswith(f"--{flag} ") and "expected UTF-8 text" in line


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "model:\n", "\ufefflr: 0.5\n", "a: &a {lr: 1.0}\n"])
def test_files_with_little_in_them_pass(text, config):
    parse(config(text))


# --- a resolved configuration reruns the run


def legal_values(flag: Flag) -> st.SearchStrategy:
    """Any legal value of one flag."""
    words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
    if flag.choices:
        picked = st.sampled_from(flag.choices)
        return st.lists(picked, unique=True).map(",".join) if flag.type == "list" else picked
    if flag.type == "bool":
        return st.booleans()
    if flag.type == "int":
        return st.integers(flag.low, flag.high and flag.high - flag.exclusive_high)
    if flag.type == "float":
        return st.floats(flag.low, flag.high, exclude_min=flag.exclusive_low, exclude_max=flag.exclusive_high,
                         allow_nan=False, allow_infinity=False)
    if flag.type == "list":
        return st.lists(st.sampled_from(["chain_sum", "toy_add", "gcd"]), unique=True, min_size=1).map(",".join)
    special = {"grad_horizon": ["one_step", "full", "k:1", "k:12"], "task_config": ["small", '{"a": [1]}', "x.yaml"],
               "max_memory": ['{"cpu": "1GiB"}', '{"0": 1}']}
    text = st.sampled_from(special[flag.name]) if flag.name in special else words
    return st.none() | text if flag.nullable else text


@st.composite
def settings_of_a_run(draw) -> dict:
    """A few flags with legal values, as a user would set them; together they have no problem."""
    in_file = [flag for flag in FLAGS if flag.in_file and flag.file_turns_on]
    chosen = draw(st.lists(st.sampled_from(in_file), unique=True, max_size=10))
    values = {flag.name: draw(legal_values(flag)) for flag in chosen}
    opts = options.Options(**{**vars(parse([])), **values, "explicit": set(values)})
    assume(not problems(opts))
    return values


QUICK = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


@QUICK
@given(values=settings_of_a_run())
@example(values={"model_name": "a\x85b\u2028"})
def test_dump_then_parse_gives_equal_options(values, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "config.resolved.yaml"
    opts = parse([f"--{name}={value}" for name, value in values.items() if value is not None])
    path.write_text(dump(opts), encoding="utf-8")
    again = parse(["--config", str(path)])
    assert again == opts
    assert all(type(a) is type(b) for a, b in zip(as_dict(again).values(), as_dict(opts).values(), strict=True))
    assert dump(again) == dump(opts)


@QUICK
@given(under=settings_of_a_run(), over=settings_of_a_run())
@example(under={}, over={"arch": "enhanced"})
def test_command_line_beats_yaml_beats_defaults(under, over, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "under.yaml"
    under, over = ({k: v for k, v in x.items() if not (v is None or isinstance(v, str) and v.lower() == "none")}
                   for x in (under, over))
    expected = {**as_dict(parse([])), **under, **over}
    elsewhere = {flag.name: None for flag in FLAGS if not flag.in_file}  # on the command line only
    assume(not problems(options.Options(**expected, **elsewhere, explicit=set(under) | set(over))))
    path.write_text(dump(options.Options(**{**as_dict(parse([])), **under})), encoding="utf-8")
    opts = parse(["--config", str(path), *(f"--{name}={value}" for name, value in over.items())])
    assert as_dict(opts) == expected

    # A file that holds another system's defaults sets them: they are not those of the system that is typed.
    foreign = {flag.name for flag in FLAGS if flag.default_in(opts.arch) != flag.default_in(under.get("arch", "addon"))}
    assert over.keys() <= opts.explicit <= over.keys() | under.keys() | foreign | {"config"}


def test_resolved_file_of_a_short_run_keeps_the_default_warmup_a_default(tmp_path):
    path = tmp_path / "config.resolved.yaml"
    short = parse(["--max_steps", "10"])
    path.write_text(dump(short), encoding="utf-8")
    again = parse(["--config", str(path)])
    assert again == short and again.explicit == {"config", "max_steps"}


def test_dump_groups_all_leaves_and_leaves_the_config_out():
    import yaml
    text = dump(parse(["--d_h", "64"]))
    assert text.startswith("# ")
    tree = yaml.safe_load(text)
    assert list(tree) == [group for group in GROUPS if group not in ("hybrid", "enhanced")]
    assert tree["model"]["d_h"] == 64
    known = [flag.name for flag in FLAGS if "addon" in flag.archs and flag.in_file]
    assert [name for group in tree.values() for name in group] == known


def test_equality_looks_at_every_flag_but_not_at_where_it_came_from(config):
    assert parse(["--lr", "3e-3"]) == parse([]) == parse(config("lr: 0.003\n"))
    assert parse(["--lr", "2e-3"]) != parse([])
    assert "explicit" not in as_dict(parse([])) and "config" not in as_dict(parse([]))


# --- names of other trainers


def test_what_is_proposed_for_another_trainers_name_exists():
    for name, here in HERE.items():
        assert name not in FIND, f"{name} is a flag of ours"
        for flag in re.findall(r"--(\w+)", here):
            assert flag in FIND or flag in ("to", "push", "private", "nproc_per_node"), (name, flag)


def test_the_usual_arguments_of_hugging_faces_trainer_are_answered():
    """Those that its examples type; a version that renames one is seen here."""
    from transformers import TrainingArguments

    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    usual = {"output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
             "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
             "optim", "max_grad_norm", "bf16", "fp16", "logging_steps", "report_to", "eval_strategy", "eval_steps",
             "save_steps", "save_strategy", "save_total_limit", "load_best_model_at_end", "resume_from_checkpoint",
             "push_to_hub", "hub_model_id", "seed", "run_name", "gradient_checkpointing", "deepspeed", "fsdp"}
    assert usual <= theirs and usual <= HERE.keys() | FIND.keys()


def test_a_yaml_file_with_another_trainers_names_is_answered_too(tmp_path, capsys):
    (tmp_path / "theirs.yaml").write_text("num_train_epochs: 3\n", encoding="utf-8")
    (line,) = refused(["--config", str(tmp_path / "theirs.yaml")], capsys)
    assert line.endswith("theirs.yaml: unknown key num_train_epochs; here: --epochs, which needs --train_n or --data")


def test_the_hybrids_old_name_of_patience_is_read_everywhere(tmp_path):
    """On the command line, in YAML files and in checkpoints from before."""
    hybrid = ["--arch", "hybrid", "--dataset", "synthetic"]
    assert parse([*hybrid, "--eval_loss_patience", "7"]).patience == 7
    (tmp_path / "old.yaml").write_text("training: {eval_loss_patience: 6}\n", encoding="utf-8")
    assert parse([*hybrid, "--config", str(tmp_path / "old.yaml")]).patience == 6
    saved = options.read_resolved("arch: hybrid\neval_loss_patience: 5\n")
    opts, told = options.collect(["--dataset", "synthetic"], saved)
    assert told == [] and (opts.patience, opts.patience_on) == (5, "rise")


@pytest.mark.parametrize("typed,told", [
    ("--patience 2 --eval_every 0", "--patience 2 counts evaluations amid training: set --eval_every above 0"),
    ("--arch enhanced --patience 2 --eval_every 5 --patience_on loss", "--patience_on loss: --arch enhanced measures"),
    ("--arch hybrid --dataset folder --patience_on solved", "--patience_on solved: --arch hybrid solves questions of"),
])
def test_patience_waits_for_something_that_is_measured(typed, told, capsys):
    (line,) = refused(typed.split(), capsys)
    assert line.startswith(told)
    assert parse("--arch hybrid --dataset synthetic --eval_every 0".split()).patience == 3, "the default gives way"
