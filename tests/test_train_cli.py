"""train.py as a command: every choice runs, bad input is told in one line a problem, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import addon_run as run
import options
import train
from addon import items
from batching import PromptFormat
from engine import loop as run_loop
from reasoning_gym_wrapper import make_tasks
from tiny_runs import ROOT, TINY, error_lines, newest, only_run, records

pytestmark = pytest.mark.usefixtures("no_curve")  # conftest.py

FOREIGN = "step,accuracy\n1,0.95\n"


@pytest.fixture
def refused(call, tmp_path):
    """The problems told for a command line, which must exit with 2 and leave nothing behind."""
    def problems(*more: str) -> list[str]:
        before = sorted(path for path in tmp_path.rglob("*"))
        status, out, err = call(*more)
        assert status == 2 and out == ""
        assert sorted(path for path in tmp_path.rglob("*")) == before
        return error_lines(err)
    return problems


# --- bad input


@pytest.mark.parametrize("sampling", ["steps", "item"])
def test_segments_cannot_follow_steps_that_no_item_states(refused, sampling):
    (line,) = refused("--segments_sampling", sampling, "--tasks", "toy_add,toy_chain", "--task=none")
    assert "toy_add does not say" in line and "toy_chain" in line


@pytest.mark.parametrize("typed,told", [
    ("--d_hh 3", "unknown flag --d_hh; did you mean --d_h?"),
    ("--injector cba", "--injector cba is not legal: expected one of cab, grb"),
    ("--eval_n -3", "--eval_n -3 is not legal: expected an integer >= 1"),
    ("--max_steps -1", "--max_steps -1 is not legal: expected an integer >= 0"),
    ("--batch_size 0", "--batch_size 0 is not legal: expected an integer >= 1 and <= 1048576"),
    ("--d_h 18 --n_heads 4", "--d_h 18 is not divisible by --n_heads 4: choose a multiple of 8, such as 24"),
    ("--task chain_sun", "unknown task 'chain_sun': the nearest names are chain_sum, "),
    ("--task none --tasks toy_add,bix", "unknown task 'bix': the nearest names are "),
    ("--task codeio", "task codeio executes code (it runs generated programs to make its items): type --allow_code_t"),
    ("--task rubiks_cube", "task rubiks_cube has no gold answers, so supervised training has no target: "),
    ("--task_config missing.yaml", "--task_config 'missing.yaml' is no file: "),
    ('--task_config {"min":3}', "task toy_add has no config field min: choose from max_value, min_value"),
    ('--task_config {"max_value":1} --eval_n 50', "task toy_add gave only 4 distinct questions for evaluation, 50 w"),
    ('--task_config {"max_value":1}', "task toy_add: 5000 draws in a row were evaluation questions, nothing is left"),
    ("--max_seq_len 8", "4 of 4 evaluation examples are longer than --max_seq_len 8 tokens (the longest has "),
    ("--max_seq_len 8 --overlong drop", "4 of 4 evaluation examples are longer than --max_seq_len 8 tokens (the lo"),
    ("--max_seq_len 513", "--max_seq_len 513 is more than the 512 positions of "),
    ("--max_new_tokens 512", "a prompt of "),
    ("--lora_layers 3", "--lora_layers 3: "),
    ("--mixed_precision fp16", "--mixed_precision fp16 needs CUDA"),
    ("--device cuda", "--device cuda is not available here: use auto or cpu"),
    ("--device cuda --mixed_precision fp16", "--device cuda is not available here: use auto or cpu"),
    ("--trackers wandb", "--trackers wandb needs a package that is not installed; run: pip install wandb"),
    ("--sentinel 1", "--sentinel '1' is part of the gold answer "),
    ("--system_header rg:plain", "--system_header rg:plain: Reasoning Gym has no prompt of that name; choose from"),
    ("--few_shot 90", "a prompt and an answer of the bare LLM may take "),
    ("--bare_max_new_tokens 500", "a prompt and an answer of the bare LLM may take "),
    ("--resume nowhere", "--resume 'nowhere' does not exist; give a checkpoint, a run or 'auto'; near: none here"),
    ("--resume auto", "--resume auto: no whole checkpoint in any run of "),
    ("--eval_only --run_name mine", "run mine in "),
    ("--eval_only", "--eval_only needs a checkpoint: add --resume PATH or --run_name NAME"),
    ("--train_injector_scale 0", "--train_injector_scale 0 leaves nothing to train"),
    ("--model_name no/such-model", "--model_name no/such-model: no such folder here, and the hub could not give it ("),
])
def test_each_mistake_is_one_line_and_leaves_nothing(refused, typed, told):
    lines = refused(*typed.split())
    assert len(lines) == 1 and lines[0].startswith(told), lines
    assert len(lines[0]) < 400


def test_an_unknown_model_names_the_local_default(refused):
    assert "assets/tiny_host" in refused("--model_name", "no/such-model")[0]


def test_training_items_that_are_too_long_are_counted(refused, monkeypatch, tiny_host):
    config = json.dumps({"min_value": 1, "max_value": 10**9})
    lines = refused("--task_config", config, "--max_seq_len", "33", "--train_n", "50")
    assert len(lines) == 1 and " of 4 evaluation examples are longer than --max_seq_len 33" in lines[0]
    monkeypatch.setattr(items.Reserve, "_draw", lambda self, task, n, seed: short(task, n))
    lines = refused("--task_config", config, "--max_seq_len", "33", "--train_n", "50")
    assert len(lines) == 1 and " of 50 training examples are longer than --max_seq_len 33" in lines[0]
    lines = refused("--task_config", config, "--max_seq_len", "33")
    assert len(lines) == 1 and f" of {items.PROBE} training examples are longer" in lines[0]


def short(task, n: int) -> list:
    """Evaluation items of few digits, whatever the difficulty."""
    easy = make_tasks(["toy_add"], "default")[0].items(1)
    return [next(easy)[1] for _ in range(n)]


def test_overlong_items_are_dropped_on_request(call, monkeypatch, tokenizer):
    seen, plain = [], run.Trainer.step

    def step(self, batches, *rest):
        seen.extend(length for batch in batches for length in batch.attention_mask.sum(1).tolist())
        return plain(self, batches, *rest)

    monkeypatch.setattr(run.Trainer, "step", step)
    monkeypatch.setattr(items.Reserve, "_draw", lambda self, task, n, seed: short(task, n))
    limit = max(PromptFormat(tokenizer).lengths(short(None, 50)))
    flags = ["--task_config", '{"max_value":199}', "--max_seq_len", str(limit)]  # one in four fits
    for train_n in ("0", "40"):
        seen.clear()
        assert call(*flags, "--train_n", train_n)[0] == 2
        status, _, err = call(*flags, "--train_n", train_n, "--overlong", "drop")
        assert status == 0, err
        assert len(seen) == 12 and max(seen) <= limit


def test_a_model_whose_quantised_weights_cannot_be_multiplied_is_one_line(refused, monkeypatch):
    """Whether bitsandbytes' CPU kernel takes a shape depends on the CPU, so the error is that of one that does not."""
    def no_kernel(host):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("host.check_logits", no_kernel)
    (line,) = refused("--load_in", "4bit")
    assert "the model cannot be loaded: mat1 and mat2" in line and "--load_in 4bit" in line


@pytest.fixture
def bad_hosts(tiny_host, tmp_path):
    """Folders that are no usable model."""
    places = {name: tmp_path / name for name in ("empty", "weightless", "torn", "no_tokenizer")}
    places["empty"].mkdir()
    for name in ("weightless", "torn", "no_tokenizer"):
        shutil.copytree(tiny_host, places[name])
    (places["weightless"] / "model.safetensors").unlink()
    os.truncate(places["torn"] / "model.safetensors", 5000)
    for path in places["no_tokenizer"].glob("tokenizer*"):
        path.unlink()
    return places


@pytest.mark.parametrize("name,told", [
    ("empty", "holds no weights"), ("weightless", "holds no weights"), ("torn", "the model cannot be loaded"),
    ("no_tokenizer", "its tokenizer cannot be loaded")])
def test_a_folder_that_is_no_model_is_one_line(refused, bad_hosts, name, told):
    lines = refused("--model_name", str(bad_hosts[name]))
    assert len(lines) == 1 and told in lines[0] and str(bad_hosts[name]) in lines[0]


def test_places_that_cannot_be_written_are_told_before_a_model_loads(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("model.load_host", lambda *a: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "foreign.csv").write_text(FOREIGN, encoding="utf-8")
    for typed in (["--save_dir", str(tmp_path / "file")], ["--save_dir", str(tmp_path / "file" / "deep")],
                  ["--log_csv", str(tmp_path / "file" / "eval.csv")]):
        (line,) = refused(*typed)
        assert line.startswith("cannot write ") and str(tmp_path / "file") in line
    (line,) = refused("--log_csv", str(tmp_path / "foreign.csv"))
    assert "foreign.csv has the header 'step,accuracy', expected 'step,task,metric," in line
    (line,) = refused("--log_csv", str(tmp_path))
    assert line.startswith(f"--log_csv {tmp_path} is a folder")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "eval.csv").write_text(FOREIGN, encoding="utf-8")  # the default place counts as well
    (line,) = refused("--run_name", "mine")
    assert "has the header 'step,accuracy'" in line
    assert (tmp_path / "foreign.csv").read_text(encoding="utf-8") == FOREIGN
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def told_at_once(lines: list[str], expected: list[str]) -> None:
    """Each of `expected` is part of one line, and there is no other line."""
    for told in expected:
        assert sum(told in line for line in lines) == 1, (told, lines)
    assert len(lines) == len(expected)


def test_all_problems_of_the_command_line_are_told_at_once(refused, tmp_path):
    (tmp_path / "run.yaml").write_text("model: {d_hh: 3, inner_T: 0}\nlr: fast\n", encoding="utf-8")
    lines = refused("--config", str(tmp_path / "run.yaml"), "--tasks", "toy_add,nope", "--task", "none",
                    "--batch_size", "-1", "--d_h", "18", "--n_heads", "4", "--stesp", "3", "--inner_T", "0",
                    "--resume", "nowhere")
    told_at_once(lines, ["unknown flag --stesp", "unknown key d_hh", "lr fast is not legal",
                         "--inner_T 0 is not legal", "--batch_size -1 is not legal", "--d_h 18 is not divisible",
                         "--resume 'nowhere' does not exist"])


def test_all_problems_of_a_run_are_told_at_once(refused, tmp_path, bad_hosts):
    (tmp_path / "foreign.csv").write_text(FOREIGN, encoding="utf-8")
    lines = refused("--tasks", "toy_add,nope,codeio", "--task", "none", "--mixed_precision", "fp16",
                    "--save_dir", str(tmp_path / "foreign.csv"), "--trackers", "trackio",
                    "--log_csv", str(tmp_path / "foreign.csv"), "--model_name", str(bad_hosts["empty"]))
    told_at_once(lines, ["unknown task 'nope'", "codeio executes", "fp16 needs CUDA", "holds no weights",
                         "pip install trackio", "cannot write ", "has the header 'step,accuracy'"])


def test_a_broken_checkpoint_is_told_with_the_wrong_flags(refused):
    lines = refused("--resume", "nowhere", "--batch_size", "0")
    assert [line.split()[0] for line in lines] == ["--batch_size", "--resume"]


def test_an_unexpected_error_of_the_disk_is_one_line(call, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device", "curve.png")

    monkeypatch.setattr(run_loop, "draw_curve", full)
    status, _, err = call()
    assert status == 2 and "train.py: error: [Errno 28] No space left on device: 'curve.png'" in err


def test_a_traceback_is_shown_to_those_who_ask(call, monkeypatch):
    monkeypatch.setenv("HRM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="longer than"):
        call("--max_seq_len", "8")


def test_help_exits_with_0(capsys):
    assert train.main(["--resume", "nowhere", "--help"]) == 0
    assert "--segments" in capsys.readouterr().out


# --- what runs


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(call, tmp_path):
    (tmp_path / "runs").mkdir()
    status, out, err = call("--dry_run", "--max_steps", "500", "--logit_bias_head")
    assert status == 0 and out == "" and list((tmp_path / "runs").iterdir()) == []
    for told in ("one example as the LLM reads it", "loss ", "gradient norm ", "injector ", "vocabulary_bias ",
                 "s a step of 4 examples: about ", "minutes for 500 steps", "peak memory ", "nothing was written"):
        assert told in err
    status, _, err = call("--dry_run", "--max_steps", "0", "--max_minutes", "3")
    assert status == 0 and "3.0 minutes" in err
    status, _, err = call("--dry_run", "--run_name", "new")
    assert status == 0 and list((tmp_path / "runs").iterdir()) == []


def test_a_dry_run_of_a_broken_model_ends_as_training_would(call, monkeypatch, tmp_path):
    monkeypatch.setattr(run.Trainer, "_update", lambda self, step, loss: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("--dry_run")

    def spoilt(self, step, loss):
        raise run_loop.NonFiniteError("batch 0: loss nan")

    monkeypatch.setattr(run.Trainer, "_update", spoilt)
    status, _, err = call("--dry_run")
    assert status == 3 and "batch 0: loss nan" in err and not (tmp_path / "runs").exists()


UNUSABLE_HERE = {("device", "cuda"), ("device", "mps"), ("mixed_precision", "fp16"), ("trackers", "wandb"),
                 ("trackers", "trackio"), ("trackers", "mlflow"), ("trackers", "comet_ml"), ("trackers", "swanlab"),
                 ("trackers", "aim")}
# Beside the choices: switches, and numbers that turn a part on.
OURS = [flag for flag in options.FLAGS if "addon" in flag.archs]
MORE = [*((flag.name, text) for flag in OURS for text in "01" if flag.type == "bool" and flag.name != "reset_progress"),
        *(("grad_horizon", text) for text in ("one_step", "full", "k:1", "k:3")),
        *(tuple(pair.split()) for pair in (
            "cab_mem 3", "lora_layers 1", "supervised_segments 0", "supervised_segments 2", "verifier_weight 0.5",
            "eval_segments 5", "eval_injector_scale 0", "train_injector_scale 0.5", "grad_accum_steps 2", "grad_clip 0",
            "ema 0", "ema 0.9", "decode_temperature 0.7", "decode_top_p 0.5", "decode_top_k 3", "max_new_tokens 0",
            "eval_every 1", "save_every 1", "checkpoint_limit 0", "log_samples_every 1", "epochs 1", "warmup_steps 0",
            "max_minutes 0.5", "segments 1", "inner_T 3", "h_layers 2", "l_layers 2", "sentinel ##", "train_n 5",
            "system_header hm", "lr_min_ratio 0.5", "weight_decay 0", "eval_seed 1000000001", "seed 2147483647",
            "eval_suite synthetic", "virtual_tokens 3", "system_header rg:simple", "bare_max_new_tokens 9",
            "few_shot 2", "segments_stretch 3", "carry_noise 0.1"))]
# What only HRM knows, as it is by default, so that the other adapters may be asked for.
DEFAULTS = "--d_h 128 --n_heads 4 --segments 1 --inner_T 2 --max_seq_len 400".split()  # room for virtual tokens
SAMPLED = ["--decode_temperature", "1"]
WITH = {"epochs": ["--train_n", "6"], "eval_only": ["--run_name", "done"], "decode_top_p": SAMPLED,
        "decode_top_k": SAMPLED, "eval_suite": ["--eval_suite_n", "3"],
        "verifier_weight": ["--verifier_every", "1"],
        "adapter": DEFAULTS, "virtual_tokens": [*DEFAULTS, "--adapter", "prompt"],
        "cache_hidden": ["--train_n", "6"], "cache_dtype": ["--train_n", "6", "--cache_hidden", "ram"],
        "recompute_segments": ["--segments", "3", "--grad_horizon", "segments:2"],
        "supervised_segments": ["--segments", "2"], "carry_state": ["--segments", "2"],
        "halt_settled": ["--segments", "3"], "halt_settled_at": ["--segments", "3", "--halt_settled", "0.1"],
        "segments_sampling": ["--task", "toy_chain"],
        "segments_stretch": ["--task", "toy_chain", "--segments_sampling", "steps"],
        "prompt_gate": ["--retain", str(ROOT / "tests" / "sandbox" / "cheats.txt")],
        "eval_readout": ["--use_act"], "halt_detach": ["--use_act"],
        "curriculum": ["--task", "gcd", "--curriculum_levels", "1"],
        "load_in": ["--model_name", str(ROOT / "assets" / "tiny_host")]}  # 4 bit needs a width of 64
# What a run records in place of a choice that depends on the machine: the tiny host is saved in fp32.
RESOLVED = {("host_dtype", "auto"): "fp32"}
CHOICES = [(flag.name, choice) for flag in OURS for choice in flag.choices or ()
           if choice not in ("hybrid", "enhanced", "grpo")  # runs of other systems have tests of their own
           and (flag.name, choice) not in (("cache_mode", "fill"), ("cache_mode", "train"))]  # addon/test_cache_mode.py


@pytest.mark.parametrize("name,value", CHOICES + MORE, ids=lambda text: str(text))
def test_every_choice_of_every_flag_runs(call, refused, tmp_path, name, value):
    flags = [f"--{name}={value}", *WITH.get(name, [])]
    if value == "disk":
        flags += ["--cache_dir", str(tmp_path / "cache")]
    if (name, value) in UNUSABLE_HERE:
        assert len(refused(*flags)) == 1
        return
    if (name, value) == ("eval_only", "1"):
        assert call("--run_name", "done", "--max_steps", "1")[0] == 0
    status, out, err = call("--max_steps", "2", *flags)
    assert status == 0, err
    assert "Traceback" not in err
    if (name, value) == ("dry_run", "1"):
        return
    folder = only_run(tmp_path / "runs")
    if name != "eval_only":
        saved = options.read_resolved((folder / "config.resolved.yaml").read_text(encoding="utf-8"))
        typed = getattr(options.parse([*TINY, *flags]), name)
        assert name in options.INVOCATION or saved[name] == RESOLVED.get((name, value), typed)
    assert out.startswith("task") and len(records(folder)["predictions"]) >= 4
    assert (newest(folder) / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("combination", [
    "--use_act --act_penalty 0.1 --halt_max_segments 3 --supervised_segments 0 --segments 3",
    "--injector grb --hrm_input pooled --hrm_read all --reset_l --logit_bias_head --use_act --verifier_weight 0.1",
    "--cab_mem 2 --lora_layers 2 --grad_horizon one_step --inner_T 2 --grad_accum_steps 2 --mixed_precision bf16",
    f"--model_name {ROOT}/assets/tiny_host --load_in 4bit --lora_layers 1 --optimizer adamw_8bit --eval_every 1 "
    "--save_best_model",
])
def test_parts_run_together(call, combination):
    status, _, err = call(*combination.split(), "--max_steps", "2")
    assert status == 0, err


def test_samples_are_printed_every_k_steps(call):
    status, _, err = call("--max_steps", "5", "--log_samples_every", "2", "--eval_n", "5")
    assert status == 0
    samples = [line for line in err.splitlines() if "prompt: " in line]
    assert [line.split()[1] for line in samples] == ["2]", "2]", "4]"]  # two items a time, then the one left
    assert len(set(samples)) == 3 and all("'What is " in line for line in samples)
    assert sum("  target: '" in line and "prediction: '" in line for line in err.splitlines()) == 3


def test_a_yaml_file_runs_and_the_command_line_wins(call, tmp_path):
    settings = "training: {max_steps: 9, lr: 0.01}\nmodel: {injector: grb}\n"
    (tmp_path / "mine.yaml").write_text(settings, encoding="utf-8")
    status, _, err = call("--config", str(tmp_path / "mine.yaml"), "--max_steps", "2")
    assert status == 0, err
    saved = options.read_resolved((only_run(tmp_path / "runs") / "config.resolved.yaml").read_text(encoding="utf-8"))
    assert (saved["max_steps"], saved["lr"], saved["injector"]) == (2, 0.01, "grb")


def test_the_closing_words_name_files_that_exist_and_a_command_that_runs(call, tmp_path, capsys):
    import shlex

    import generate

    status, out, _ = call()
    assert status == 0
    lines = out.splitlines()
    assert lines[0].split() == ["task", "n", "answers", "of", "strict", "extracted", "cut", "gain", "chance"]
    assert lines[1].split()[:4] == ["toy_add", "4", "bare", "LLM"] and lines[2].split()[:3] == ["LLM", "+", "HRM"]
    assert "Wilson 95 % interval" in lines[3]
    told = {line.split(":")[0]: line.split(":", 1)[1].strip() for line in lines[4:]}
    assert Path(told["evaluation"]).is_file() and Path(told["checkpoint"]).is_dir()
    words = shlex.split(told["next"])
    assert words[:2] == ["python", "generate.py"] and words[-1].startswith("What is ") and words[-1].endswith("?")
    assert generate.main(words[2:]) == 0 and "LLM + HRM" in capsys.readouterr().out
