"""`train.py --objective grpo` as a command: the add-on's stage, the warm start's records, all five stages."""

from __future__ import annotations

import csv
import importlib.machinery
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import engine.loop
import generate
import options
import train
from engine.files import json_lines
from grpo import rewards, stage_loop
from grpo.rewards import text_of
from grpo.run import GrpoRun
from grpo.stages import PUBLISHED
from patience import HANG_S
from sandbox.runner import confinement
from tasks.plugins import LOADED, PLUGINS
from tiny_rows import PLUGIN
from tiny_runs import arguments, command, error_lines, newest, tensors

ROOT = Path(options.__file__).parent
SUMS = {"chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}}
ENHANCED = (
    "--arch enhanced --objective grpo --d_model 16 --n_heads 2 --n_planner_layers 1 --n_worker_layers 1 --max_cycles 2 "
    "--thought_dim 8 --batch_size 4 --max_steps 2 --warmup_steps 1 --eval_n 2 --mixed_precision none --log_steps 1 "
    "--num_threads 1 --device cpu --report 0 --max_completion_length 4"
).split()


@pytest.fixture(autouse=True)
def no_curve(monkeypatch):
    """Drawing takes longer than a tiny run."""
    monkeypatch.setattr(engine.loop, "draw_curve", lambda *arguments: None)
    monkeypatch.setattr(stage_loop, "draw_curve", lambda *arguments: None)


def rows_of(run: Path) -> dict[tuple[str, str, str], list[str]]:
    """(step, task, metric) -> the values in the CSV."""
    found: dict[tuple[str, str, str], list[str]] = {}
    with open(run / "eval.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault((row["step"], row["task"], row["metric"]), []).append(row["value"])
    return found


def everything_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def length_reward(prompts, completions, completion_ids=None, **columns) -> list[float]:
    """Differs inside groups, whatever a random model writes."""
    return [len(text_of(completion)) % 7 / 6 for completion in completions]


def test_the_add_on_goes_on_from_its_deep_supervision_checkpoint_and_moves_alone(
    tiny_host, tmp_path, capsys, monkeypatch
):
    deep = arguments(tiny_host, tmp_path, "--segments", "2", "--supervised_segments", "0", "--run_name", "deep")
    assert train.main(deep) == 0
    checkpoint = newest(tmp_path / "deep")
    before = tensors(checkpoint, "adapter_model")
    monkeypatch.setitem(rewards.REWARDS, "brevity", length_reward)
    stages = {"task": {"size": 4, "eval_n": 2, "rewards": {"verifier": 1, "brevity": 1}}}
    words = ["--objective", "grpo", "--resume", str(checkpoint), "--save_dir", str(tmp_path), "--grpo_lr", "1e-6",
             "--num_generations", "4", "--max_completion_length", "6", "--stages", json.dumps(stages), "--report", "1"]
    opts, found_checkpoint, problems = train.understand(options.read(words))
    assert problems == [] and opts.supervised_segments == 0
    run = GrpoRun(opts, found_checkpoint)
    assert run.go() == 0
    assert run.stage_loop.progress.step == 3 + 2 and newest(tmp_path / "deep").name == "step-00000005"
    after = tensors(newest(tmp_path / "deep"), "adapter_model")
    assert after.keys() == before.keys()
    change = {name: (after[name] - before[name]).abs().max() for name in before}
    assert 0 < max(change.values()) < 1e-4  # two steps of 1e-6 away from the checkpoint's weights
    host = AutoModelForCausalLM.from_pretrained(tiny_host).state_dict()
    assert host.keys() == run.supervised.model.host.state_dict().keys()
    assert all(torch.equal(tensor, host[name]) for name, tensor in run.supervised.model.host.state_dict().items())
    rows = rows_of(tmp_path / "deep")
    for metric in ("solved", "mean_length", "reward_verifier", "reward_brevity"):
        assert len(rows["3", "task", metric]) == len(rows["5", "task", metric]) == 1
    assert ("3", "toy_add", "solved") in rows  # the deep supervision's own
    page = (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    assert "start of the stage" in page and "<td>task</td>" in page
    capsys.readouterr()

    kept = everything_in(tmp_path)
    assert train.main(["--arch", "enhanced", "--objective", "grpo", "--resume", str(checkpoint)]) == 2
    (line,) = error_lines(capsys.readouterr().err)
    assert "is a checkpoint of --arch addon, not of --arch enhanced" in line
    assert everything_in(tmp_path) == kept

    again = ["--resume", str(newest(tmp_path / "deep")), "--reset_progress", "--run_name", "anew"]
    anew = [*arguments(tiny_host, tmp_path), *words, *again]
    assert train.main(anew) == 0
    assert newest(tmp_path / "anew").name == "step-00000002"
    assert everything_in(tmp_path / "deep") == {path: kept[path] for path in kept if "deep" in path.parts}


def test_patience_ends_supervised_training_of_the_planner(tmp_path, tiny_host, capsys):
    stages = json.dumps({"format": {"size": 2, "epochs": 1, "levels": [SUMS]}})
    words = [*ENHANCED, "--objective", "ce", "--tokenizer", str(tiny_host), "--stages", stages, "--save_dir",
             str(tmp_path), "--eval_every", "1", "--max_steps", "6", "--patience", "1", "--lr", "1e-30"]
    assert train.main(words) == 0
    assert "training ended at step 2: the solved rate was no better than the best before" in capsys.readouterr().err


def stand_in_for_wandb(monkeypatch) -> list[tuple[str, dict]]:
    """Installs a module with wandb's three calls; returns what they are called with."""
    calls: list[tuple[str, dict]] = []
    run = types.SimpleNamespace(log=lambda numbers, step: calls.append(("log", numbers | {"step": step})),
                                finish=lambda: calls.append(("finish", {})))
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.init = lambda **options: calls.append(("init", options)) or run
    module.Table = lambda **cells: cells
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return calls


def test_a_stage_s_start_is_recorded_though_the_warm_start_s_evaluation_was_cut_short(tmp_path, tiny_host, monkeypatch):
    """The second run is followed by wandb, too, offline."""
    stages = json.dumps({"format": {"size": 2, "epochs": 1, "levels": [SUMS]}})
    words = [*ENHANCED, "--tokenizer", str(tiny_host), "--stages", stages, "--save_dir", str(tmp_path)]
    assert train.main([*words, "--run_name", "whole"]) == 0
    name = "step-00000002"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / name, tmp_path / "cut" / "checkpoints" / name)
    calls = stand_in_for_wandb(monkeypatch)
    assert train.main([*words, "--run_name", "cut", "--trackers", "wandb"]) == 0
    assert calls[0][0] == "init" and calls[0][1]["mode"] == "offline" and calls[-1][0] == "finish"
    assert [numbers["step"] for _, numbers in calls if "reward_format" in numbers] == [3, 4]
    assert [numbers["step"] for _, numbers in calls if "eval/format/solved" in numbers] == [2, 4]
    assert [len(numbers["predictions"]["data"]) for _, numbers in calls if "predictions" in numbers] == [2, 2]
    whole, cut = rows_of(tmp_path / "whole"), rows_of(tmp_path / "cut")
    for step in ("2", "4"):
        for metric in ("solved", "format_rate", "mean_length", "reward_format", "reward_brevity"):
            assert cut[step, "format", metric] == whole[step, "format", metric]
            assert len(cut[step, "format", metric]) == 1


def test_a_tokenizer_that_loses_the_stages_texts_is_refused(tmp_path, tiny_host, capsys):
    lossy = tmp_path / "lossy"
    shutil.copytree(tiny_host, lossy)
    document = json.loads((lossy / "tokenizer.json").read_text(encoding="utf-8"))
    document["normalizer"] = {"type": "Lowercase"}
    (lossy / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    path = tmp_path / "own.jsonl"
    path.write_text("".join(f'{{"prompt": "Say N{i}", "answer": "N{i}"}}\n' for i in range(10)), encoding="utf-8")
    stages = json.dumps({"format": {"size": 4, "epochs": 1, "levels": str(path)}})
    words = [*ENHANCED, "--tokenizer", str(lossy), "--stages", stages, "--save_dir", str(tmp_path / "runs")]
    for objective in ("ce", "grpo"):
        assert train.main([*words, "--objective", objective]) == 2
        (line,) = error_lines(capsys.readouterr().err)
        assert line.startswith(f"stage format: --tokenizer {lossy}: 0 of 2 rows (0.0 %) come back")
        assert not list((tmp_path / "runs").glob("*/checkpoints/*"))
    assert train.main([*words, "--dry_run", "--min_roundtrip", "0"]) == 0
    assert "0 of 2 rows (0.0 %) come back" in "".join(capsys.readouterr())


@pytest.mark.parametrize("content", ["", "{", '"a"', "\udcff", "[" * 5000])
def test_a_damaged_file_of_a_stage_counts_as_missing(tmp_path, content):
    path = tmp_path / "begun_at.json"
    assert stage_loop.read_own(path) is None
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert stage_loop.read_own(path) in (None, "a")
    path.write_text("3", encoding="utf-8")
    assert stage_loop.read_own(path) == 3


# --- plugins ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def plugin(tmp_path) -> Path:
    """A file with the task `stage_doubles`, which says when it runs."""
    forget_plugins()
    path = tmp_path / "doubling.py"
    path.write_text(PLUGIN + "TASKS = {'stage_doubles': (Doubles, Config)}\nprint('RAN')\n", encoding="utf-8")
    return path


def forget_plugins() -> None:
    """As a new process: no plugin has run."""
    PLUGINS.clear()
    LOADED.clear()


def level_file(folder: Path) -> str:
    """A YAML file of levels that names the plugin's task."""
    path = folder / "levels.yaml"
    path.write_text("- stage_doubles: {top: 40}\n", encoding="utf-8")
    return str(path)


def test_the_planner_trains_on_a_plugin_s_task_and_runs_the_file_only_where_it_is_typed(
    tmp_path, tiny_host, plugin, capsys
):
    stages = json.dumps({"format": {"size": 2, "epochs": 1, "levels": [{"stage_doubles": {"top": 40}}]}})
    runs = tmp_path / "runs"
    words = [*ENHANCED, "--tokenizer", str(tiny_host), "--stages", stages, "--save_dir", str(runs), "--run_name", "r"]
    assert train.main([*words, "--plugin", str(plugin), "--checkpoint_limit", "0"]) == 0
    assert "RAN" in capsys.readouterr().out

    # The warm start's checkpoint and the stage's keep where it lies, and no file of flags does.
    warm, last = (runs / "r" / "checkpoints" / name for name in ("step-00000002", "step-00000004"))
    for checkpoint in (warm, last):
        record = json.loads((checkpoint / "own_data.json").read_text(encoding="utf-8"))["plugin"]
        assert (record["path"], record["tasks"]) == (str(plugin), ["stage_doubles"])
        assert str(plugin) not in (checkpoint / "config.resolved.yaml").read_text(encoding="utf-8")

    # Answering needs no task. By the checkpoint alone the file runs in no other call either.
    forget_plugins()
    assert generate.main(["--checkpoint", str(last), "--prompt", "Twice 3?", "--device", "cpu"]) == 0
    assert "RAN" not in capsys.readouterr().out
    evaluates = ["--resume", str(last), "--eval_only"]
    for call in (evaluates, ["--resume", str(warm)], ["--resume", str(warm), "--objective", "ce"]):
        assert train.main(call) == 2
        said = capsys.readouterr()
        (line,) = error_lines(said.err)
        assert line == (f"task stage_doubles comes from a plugin, which runs only when it is typed: add --plugin "
                        f"{plugin}")
        assert "RAN" not in said.out

    # Where it is typed the run goes on, and is told that the file is another.
    plugin.write_text(plugin.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    for call in (evaluates, ["--resume", str(last)]):
        forget_plugins()
        assert train.main([*call, "--plugin", str(plugin)]) == 0
        said = capsys.readouterr()
        assert "RAN" in said.out and "--plugin doubling.py has changed since the checkpoint" in said.out + said.err


def test_a_plugin_that_no_stage_needs_any_more_need_not_be_typed(tmp_path, tiny_host, plugin):
    def stages(levels) -> list[str]:
        return ["--stages", json.dumps({"format": {"size": 2, "epochs": 1, "levels": levels}})]

    words = [*ENHANCED, "--objective", "ce", "--tokenizer", str(tiny_host), "--save_dir", str(tmp_path / "runs"),
             "--run_name", "r"]
    assert train.main([*words, *stages(level_file(tmp_path)), "--plugin", str(plugin)]) == 0
    forget_plugins()
    resumed = ["--resume", str(newest(tmp_path / "runs" / "r")), "--eval_only"]
    assert train.main(resumed) == 2
    assert train.main([*resumed, *stages([SUMS])]) == 0


def test_a_stage_of_the_add_on_may_name_a_plugin_s_task(tmp_path, tiny_host, plugin, capsys):
    runs = tmp_path / "runs"
    assert train.main(arguments(tiny_host, runs, "--segments", "2", "--run_name", "deep")) == 0
    stages = {"task": {"size": 2, "eval_n": 2, "levels": level_file(tmp_path), "rewards": {"verifier": 1}}}
    words = ["--objective", "grpo", "--resume", str(runs / "deep"), "--num_generations", "2", "--grpo_batch_size", "2",
             "--grpo_accum_steps", "1", "--max_completion_length", "4", "--stages", json.dumps(stages)]
    assert train.main(words) == 2 and "unknown task 'stage_doubles'" in capsys.readouterr().err
    assert train.main([*words, "--plugin", str(plugin)]) == 0 and "RAN" in capsys.readouterr().out

    forget_plugins()
    again = ["--objective", "grpo", "--resume", str(runs / "deep"), "--eval_only"]
    assert train.main(again) == 2
    said = capsys.readouterr()
    assert error_lines(said.err)[0].endswith(f"add --plugin {plugin}") and "RAN" not in said.out


@pytest.mark.slow
def test_all_five_stages_run_as_a_command_with_what_each_leaves_behind(tmp_path, tiny_host):
    stages = json.dumps({name: {"size": 2, "epochs": 1, "eval_n": 5} for name in PUBLISHED})
    words = ["--config", "configs/enhanced_grpo.yaml", *ENHANCED, "--tokenizer", str(tiny_host), "--stages", stages,
             "--max_seq_len", "4096", "--checkpoint_limit", "0", "--save_dir", str(tmp_path), "--run_name", "r"]
    words += ["--allow_unconfined_code"] if confinement() is not None else []
    first = command(*words)
    out, told = first.communicate(timeout=HANG_S)
    assert first.returncode == 0, told
    run, rows = tmp_path / "r", rows_of(tmp_path / "r")
    for index, (name, published) in enumerate(PUBLISHED.items()):
        start, end = str(2 + 2 * index), str(4 + 2 * index)
        measured = ["solved", "format_rate", "mean_length", *(f"reward_{reward}" for reward in published["rewards"])]
        for metric in measured:
            assert len(rows[start, name, metric]) == len(rows[end, name, metric]) == 1, (name, metric)
        assert (run / "checkpoints" / f"step-{int(end):08d}" / "model.safetensors").exists()
        assert len(list(json_lines(run / "samples" / f"{name}.jsonl"))) == 5
        assert f"\n{name} " in out
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["stage"] for line in logged if "stage" in line] == [name for name in PUBLISHED for _ in range(2)]

    again = command(*words)
    _, told = again.communicate(timeout=HANG_S)
    assert again.returncode == 0
    assert [line for line in told.splitlines() if "skipped" in line] == [
        f"stage {name} is finished, skipped" for name in PUBLISHED]
    assert rows_of(run) == rows
    shown = command("--checkpoint", str(run), "--prompt", "1 + 1", "--compare", "--max_new_tokens", "4",
                    script="generate.py")
    out, _ = shown.communicate(timeout=HANG_S)
    assert shown.returncode == 0 and "thought" in out and "solution" in out


def test_the_frame_of_a_template_that_writes_the_time_is_that_of_training(tiny_host, tmp_path, capsys):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for path in tiny_host.glob("tokenizer*"):
        shutil.copy(path, folder)
    dated = "{{ strftime_now('%f') }}{% for m in messages %}|{{ m['role'] }}|{{ m['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(
        dated + "{% if add_generation_prompt %}|assistant|{% endif %}", encoding="utf-8"
    )
    note = "the prompts stay as they were in training"
    stages = json.dumps({"format": {"size": 4, "eval_n": 2, "levels": [SUMS], "rewards": {"format": 1}}})
    words = [*ENHANCED, "--objective", "ce", "--tokenizer", str(folder), "--stages", stages, "--save_dir",
             str(tmp_path / "runs"), "--run_name", "run", "--warmup_steps", "0"]
    assert train.main(words) == 0 and note not in "".join(capsys.readouterr())
    first = newest(tmp_path / "runs" / "run")
    kept = (first / "frame.json").read_text(encoding="utf-8")
    assert json.loads(kept)["prefix"].endswith("|user|")

    # Going on, evaluating and answering ask in the words of training.
    assert train.main(["--resume", str(first), "--max_steps", "3"]) == 0 and note in capsys.readouterr().err
    later = newest(tmp_path / "runs" / "run")
    assert later != first and (later / "frame.json").read_text(encoding="utf-8") == kept
    assert train.main(["--resume", str(later), "--eval_only"]) == 0 and note in capsys.readouterr().err
    assert generate.main(["--checkpoint", str(later), "--prompt", "1 + 1", "--device", "cpu"]) == 0
    assert note in capsys.readouterr().err
