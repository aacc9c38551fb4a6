"""scripts/ablate.py: grids, equal minutes, runs that are skipped and resumed, the table, and an orderly Ctrl-C."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import ablation_grid as ablation
import ablation_minutes
import ablation_results
import options
from ablation_grid import GridError, Job, read_grid
from patience import HANG_S
from tiny_rows import PLUGIN, sums, write

ROOT = Path(__file__).resolve().parent.parent.parent
GRIDS = sorted((ROOT / "configs" / "ablation").glob("*.yaml"))
TINY = {
    **{"d_h": 16, "n_heads": 2, "inner_T": 1, "batch_size": 4, "max_steps": 3, "eval_n": 6, "eval_batch_size": 6},
    **{"max_new_tokens": 4, "mixed_precision": "none", "log_steps": 1, "device": "cpu", "warmup_steps": 1},
}

spec = importlib.util.spec_from_file_location("ablate", ROOT / "scripts" / "ablate.py")
script = importlib.util.module_from_spec(spec)
sys.modules["ablate"] = script
spec.loader.exec_module(script)


def grid_file(folder: Path, **changes) -> Path:
    tree = {"arms": {"cab": {}, "grb": {"injector": "grb"}}, "tasks": ["toy_add"], "seeds": [0], **changes}
    path = folder / "grid.yaml"
    kept = {key: value for key, value in tree.items() if value is not None}
    path.write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
    return path


def command(*argv: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, "scripts/ablate.py", *argv], cwd=ROOT, text=True, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def table(output: Path) -> list[dict[str, str]]:
    with open(output / "results.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_shipped_grid_is_legal_and_compares_with_one_of_its_arms(path):
    arms = yaml.safe_load(path.read_text(encoding="utf-8"))["arms"]
    needed = {name for flags in arms.values() for name in flags or {}}
    if needed - set(options.FIND):
        pytest.skip(f"this train.py has no {', '.join(sorted(needed - set(options.FIND)))}")
    grid = read_grid(path)
    assert grid.baseline in grid.arms and len(grid.seeds) >= 3
    if path.stem in ("recipe", "small_data", "few_examples_why"):  # equal batches, or a length of each arm's own
        assert all("max_steps" in job.flags for job in ablation.jobs_of(grid))
    elif grid.steps:  # a length of each arm's own on each task; the bare LLM does not train
        assert all(job.steps or job.arm == "bare" for job in ablation.jobs_of(grid))
    else:
        assert grid.minutes
    assert len(ablation.jobs_of(grid)) == len(grid.arms) * len(grid.tasks) * len(grid.seeds)


def test_the_grids_asked_for_are_shipped():
    assert {path.stem for path in GRIDS} >= {"baselines", "injector", "hrm_read", "grad_horizon", "segments", "inner_T",
                                             "tokens_vs_pooled", "shared_hl", "ema"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"arms": {"cab": {"injektor": "cab"}}}, r"arm cab: unknown flag --injektor; did you mean --injector\?"),
        ({"arms": {"a": {"d_h": 30}, "b": {"segments": 0}}}, "arm a: --d_h 30 is not divisible.*\narm b: --segments 0"),
        ({"arms": {"cab": {"seed": 1}}}, "arm cab: seed is set by the grid's own keys: leave it out"),
        ({"common": {"steps": 3, "max_steps": 4}}, "common: max_steps is given twice, under different names"),
        ({"common": {"max_steps": 3}, "minutes": 1}, "common: max_steps is set by the grid's own keys"),
        ({"tasks": ["chain_summ"]}, "unknown task 'chain_summ': the nearest names are chain_sum"),
        ({"tasks": ["toy_add", "toy_add"]}, "task toy_add is given twice"),
        ({"baseline": "lora"}, "baseline lora is not an arm: choose from cab, grb"),
        ({"arms": {"a/b": {}}}, "arm 'a/b' is no plain name"),
        ({"seeds": ["x"], "minutes": -1}, "seeds .* is not legal.*\nminutes -1 is not legal: expected a number above"),
        ({"arms": None, "seed": [0]}, "unknown key seed: .*\narms is missing"),
        ({"steps": {"toy_add": {"cab": 0}}}, "steps .* is not legal: expected task names, each with a mapping of arm"),
        ({"steps": {"toy_add": {"lora": 3}}}, "steps of toy_add: lora is not an arm: choose from cab, grb"),
        ({"steps": {"toy_add": {"cab": 3}}, "minutes": 1}, "steps and minutes both fix the length of a run"),
    ],
)
def test_a_grid_that_cannot_run_is_refused_with_every_reason(tmp_path, changes, told):
    with pytest.raises(GridError, match=f"(?s){told}"):
        read_grid(grid_file(tmp_path, **changes))


@pytest.mark.parametrize("changes", [{"common": {"trust_remote_code": True}}, {"common": {"plugin": "theirs.py"}},
                                     {"arms": {"cab": {"trust_remote_code": 1}}}])
def test_no_grid_file_turns_foreign_code_on(tmp_path, changes):
    (name,) = {**changes.get("common", {}), **changes.get("arms", {}).get("cab", {})}
    with pytest.raises(GridError, match=f"grid.yaml: .*{name} runs foreign code and belongs on the command line only"):
        read_grid(grid_file(tmp_path, **changes))
    read_grid(grid_file(tmp_path, common={"trust_remote_code": False}))


def test_a_verifier_that_a_grid_file_names_must_be_typed(tmp_path, monkeypatch):
    (tmp_path / "grid_judge.py").write_text("def near(answer, entry): return 1.0\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    write(tmp_path / "rows.jsonl", sums(40))
    path = grid_file(tmp_path, tasks=["data"], common={"data": "rows.jsonl", "verifier": "grid_judge:near"})
    ablate = [str(path), "--set", "lr=0.1"]
    with pytest.raises(GridError, match="grid_judge:near is named by a file .* type --set trust_functions=grid_judge"):
        read_grid(path, flags=script.typed_flags(script.parse(ablate)))
    assert "grid_judge" not in sys.modules
    args = script.parse([*ablate, "--set", "trust_functions=grid_judge:near"])
    assert read_grid(path, flags=script.typed_flags(args)).common["trust_functions"] == "grid_judge:near"


def test_tasks_of_a_plugin_and_flags_of_every_arm_are_typed(tmp_path):
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN + 'TASKS = {"ablate_doubles": (Doubles, Config)}\n', encoding="utf-8")
    given = ["--tasks", "ablate_doubles", "--plugin", str(plugin), "--set", "trust_remote_code=1"]
    args = script.parse([str(grid_file(tmp_path)), *given])
    grid = read_grid(args.grid, script.changes(args), args.arms, script.typed_flags(args))
    assert (grid.common["plugin"], grid.common["trust_remote_code"]) == (str(plugin), "1")
    opts, lines = options.collect(ablation.arguments(ablation.jobs_of(grid)[0].flags))
    assert not lines and opts.trust_remote_code and opts.plugin == str(plugin)

    # Evaluated once more, the run brings its own flags, but none of these.
    again = ablation.typed_alone(ablation.jobs_of(grid)[0].flags)
    assert again == {"plugin": str(plugin), "trust_remote_code": "1"}


def test_an_arm_written_twice_is_told_and_a_missing_file_too(tmp_path):
    path = grid_file(tmp_path)
    path.write_text(path.read_text(encoding="utf-8").replace("  grb:", "  cab:"), encoding="utf-8")
    with pytest.raises(GridError, match="line 3: cab is given twice"):
        read_grid(path)
    with pytest.raises(GridError, match="nowhere.yaml cannot be read: No such file"):
        read_grid(tmp_path / "nowhere.yaml")


def test_steps_fix_the_length_of_an_arm_on_a_task_and_leave_the_others_to_their_flags(tmp_path):
    path = grid_file(tmp_path, tasks=["toy_add", "chain_sum"], common={"max_steps": 7}, steps={"toy_add": {"grb": 3}})
    lengths = {(job.task, job.arm): job.steps for job in ablation.jobs_of(read_grid(path))}
    assert lengths == {("toy_add", "cab"): 7, ("toy_add", "grb"): 3, ("chain_sum", "cab"): 7, ("chain_sum", "grb"): 7}

    # A task that is left out today keeps its place in the file, and so does an arm.
    assert len(ablation.jobs_of(read_grid(path, {"tasks": ["chain_sum"]}, only=["cab"]))) == 1


def test_a_part_of_the_arms_can_be_run_by_itself(tmp_path):
    path = grid_file(tmp_path)
    whole, part = read_grid(path), read_grid(path, only=["grb"])
    assert (list(whole.arms), whole.baseline) == (["cab", "grb"], "cab")
    assert (part.arms, part.baseline) == ({"grb": whole.arms["grb"]}, "grb")
    assert read_grid(path, only=["cab"]).baseline == "cab"
    with pytest.raises(GridError, match="'gbr' is no arm of .*: choose from cab, grb"):
        read_grid(path, only=["cab", "gbr"])


@given(st.dictionaries(st.sampled_from(["lr", "segments", "use_act", "task_config", "sentinel", "steps"]),
                       st.one_of(st.none(), st.booleans(), st.integers(1, 9), st.floats(0.1, 9),
                                 st.dictionaries(st.just("max_value"), st.integers(1, 9)))))
@settings(max_examples=60, deadline=None)
def test_flags_survive_the_command_line_as_yaml_means_them(flags):
    """A flag of an arm means what the same line means in a `--config` file."""
    by_yaml = {f.name: f.default for f in options.FLAGS}
    wrong = False
    for name, value in flags.items():
        flag = options.FIND[name]
        try:
            by_yaml[flag.name] = options._from_yaml(flag, value)
            wrong |= not flag.allows(by_yaml[flag.name])
        except (ValueError, TypeError, OverflowError):
            wrong = True
    opts, found = options.collect(ablation.arguments(ablation.plain_flags(flags)))
    if not wrong and not found:
        assert {f.name: getattr(opts, f.name) for f in options.FLAGS} == by_yaml


def test_off_and_no_in_a_grid_are_choices_where_a_flag_has_them(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("arms: {plain: {mixed_precision: no}, bf16: {mixed_precision: bf16}}\ntasks: [toy_add]\n"
                    "seeds: [0]\ncommon: {cache_hidden: off, reset_l: off}\n", encoding="utf-8")
    flags = ablation.jobs_of(read_grid(path))[0].flags
    assert (flags["mixed_precision"], flags["cache_hidden"], flags["reset_l"]) == ("none", "off", False)


# --- equal minutes ----------------------------------------------------------------------------------------------------


@given(st.floats(0.05, 60), st.floats(0.001, 5))
def test_steps_fill_the_minutes_and_the_warmup_fits_into_them(minutes, seconds):
    job = ablation_minutes.with_steps(Job("a", "toy_add", 0, {"warmup_steps": 50}), minutes, seconds)
    assert abs(job.steps * seconds - 60 * minutes) <= seconds
    assert job.flags["warmup_steps"] <= max(50, job.steps) and job.flags["warmup_steps"] <= max(job.steps, 1)


def test_a_speed_is_that_of_the_batches_after_the_first_ones(tmp_path):
    slow_start = [10.0, 11.0, 11.5, 12.0, 12.5, 13.0, 13.5, 14.0]
    lines = [json.dumps({"step": i + 1, "elapsed_s": t}) for i, t in enumerate(slow_start)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9, "ela', encoding="utf-8")
    assert ablation_results.seconds_per_step(tmp_path) == pytest.approx(0.5)
    (tmp_path / "metrics.jsonl").write_text("", encoding="utf-8")
    assert ablation_results.seconds_per_step(tmp_path) is None
    untrained = Job("none", "toy_add", 0, {})
    assert ablation_minutes.with_steps(untrained, 5, None) == untrained


# --- a whole ablation -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny_host, tmp_path_factory):
    """A grid on the tiny host of which one arm can run and one cannot: (grid file, output, exit status)."""
    folder = tmp_path_factory.mktemp("ablation")
    arms = {"cab": {}, "bad": {"model_name": str(folder / "nowhere")}}
    path = grid_file(folder, common={**TINY, "model_name": str(tiny_host)}, arms=arms, seeds=[0, 1])
    return path, folder / "out", script.main([str(path), "--output", str(folder / "out"), "--threads", "1", "--seeds",
                                              "0"])


def test_a_grid_leaves_one_row_per_run_and_task_a_table_and_a_figure(finished):
    path, output, status = finished
    rows = table(output)
    assert [(row["arm"], row["seed"], row["task"], row["status"]) for row in rows] == [
        ("cab", "0", "toy_add", "finished"), ("bad", "0", "", "failed")]
    run = output / "runs" / rows[0]["run"]
    with open(run / "eval.csv", newline="", encoding="utf-8") as file:
        (solved,) = [r for r in csv.DictReader(file) if r["metric"] == "solved"]
    assert (rows[0]["solved"], rows[0]["n"], rows[0]["steps"]) == (solved["value"], "6", "3")
    (checkpoint,) = (run / "checkpoints").iterdir()
    state = load_file(checkpoint / "training_state.safetensors")
    assert int(rows[0]["trainable"]) == sum(t.numel() for name, t in state.items() if name.startswith("raw/")) > 1000
    assert float(rows[0]["train_minutes"]) > 0
    summary = (output / "summary.md").read_text(encoding="utf-8")
    assert "| cab | 1 |" in summary and "reference" in summary and "**1 runs are not finished yet.**" in summary
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_fails_is_told_in_the_words_of_train_py(finished):
    path, output, status = finished
    assert status == 1
    log = output / "logs" / "bad--toy_add--seed0.log"
    assert script.last_words(log).startswith("train.py: error: ") and "nowhere" in script.last_words(log)
    assert "Traceback" not in log.read_text(encoding="utf-8")


def test_a_second_call_skips_finished_runs_and_refuses_other_flags(finished, capsys, tmp_path):
    path, output, _ = finished
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    good = {**tree, "arms": {"cab": tree["arms"]["cab"]}}
    other = tmp_path / "grid.yaml"
    other.write_text(yaml.safe_dump(good), encoding="utf-8")
    stamp = (output / "runs" / "cab--toy_add--seed0" / "eval.csv").stat().st_mtime_ns
    assert script.main([str(other), "--output", str(output), "--threads", "1", "--seeds", "0"]) == 0
    assert "1 runs are finished already" in capsys.readouterr().err
    assert stamp == (output / "runs" / "cab--toy_add--seed0" / "eval.csv").stat().st_mtime_ns
    other.write_text(yaml.safe_dump({**good, "common": {**tree["common"], "max_steps": 4}}), encoding="utf-8")
    with pytest.raises(GridError, match=r"made with other flags: max_steps 3 \(now 4\); delete it or take another"):
        script.main([str(other), "--output", str(output), "--threads", "1", "--seeds", "0"])


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", "[" * 5000])
def test_a_damaged_record_is_told_in_one_line_with_what_to_do(tmp_path, content):
    assert ablation_results.read_record(tmp_path) is None and script.read_speeds(tmp_path / "calibration.json") == {}
    path = tmp_path / ablation_results.RECORD
    path.write_text(content, encoding="utf-8")
    with pytest.raises(GridError, match=f"^{path} .*delete the folder") as error:
        ablation_results.read_record(tmp_path)
    assert "\n" not in str(error.value)
    if content == "{}":
        assert script.read_speeds(path) == {}
        return
    with pytest.raises(GridError, match=f"^{path} .*delete it") as error:
        script.read_speeds(path)
    assert "\n" not in str(error.value)


def test_a_run_that_never_began_may_take_other_flags(finished):
    """Its arm could not be loaded: the user corrects the grid and calls again."""
    path, output, _ = finished
    jobs = [job for job in ablation.jobs_of(read_grid(path)) if job.name == "bad--toy_add--seed0"]
    corrected = [Job(job.arm, job.task, job.seed, job.flags | {"model_name": "elsewhere"}) for job in jobs]
    assert script.finished(corrected, output / "runs") == set()


def fake_run(runs: Path, name: str, task: str, scores: list[float]) -> None:
    (runs / name).mkdir(parents=True)
    lines = [{"step": step, "id": f"{task}/{i:05d}", "task": task, "prompt_hash": f"h{i}", "score": s if step else 0.0}
             for step in (0, 5) for i, s in enumerate(scores)]
    (runs / name / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_finished_runs_are_evaluated_again_on_more_items_without_training(tiny_host, tmp_path, capsys):
    """Also where the number of batches was measured, with as many processes as there may be now; and on fewer."""
    shape = {name: TINY[name] for name in ("d_h", "n_heads", "inner_T")}
    common = {name: value for name, value in TINY.items() if name not in (*shape, "max_steps")}
    path = grid_file(tmp_path, common={**common, "model_name": str(tiny_host)}, minutes=0.002, calibration_steps=8,
                     arms={"cab": {**shape, "segments": 2}, "bare": {"adapter": "none"}}, tasks=["toy_add+chain_sum"])
    call = [str(path), "--output", str(tmp_path / "out")]
    run = tmp_path / "out" / "runs" / "cab--toy_add+chain_sum--seed0"
    assert script.main([*call, "--threads", "1"]) == 0
    trained = (run / "metrics.jsonl").read_text(encoding="utf-8")

    def evaluated():
        return {(row["arm"], row["task"]): row["n"] for row in table(tmp_path / "out")}

    assert set(evaluated().values()) == {"6", "12"}
    capsys.readouterr()
    for n in (9, 4):
        assert script.main([*call, "--threads", "2", "--eval_n", str(n)]) == 0
        err = capsys.readouterr().err
        assert err.count(f"evaluated on {n} items") == 2
        assert "WARNING" not in err
        assert evaluated() == {(arm, task): str(n * (1 + (task == "overall"))) for arm in ("cab", "bare")
                               for task in ("toy_add", "chain_sum", "overall")}
        assert len(ablation_results.item_scores(run, "toy_add")) == n
        assert len(ablation_results.item_scores(run, "overall")) == 2 * n
        assert {row["segments_used"] for row in table(tmp_path / "out") if row["arm"] == "cab"} == {"2"}
    assert (run / "metrics.jsonl").read_text(encoding="utf-8") == trained
    assert script.main([*call, "--threads", "2", "--eval_n", "4"]) == 0
    assert "evaluated on" not in capsys.readouterr().err


def test_an_evaluation_that_fails_is_told_and_counted(tiny_host, tmp_path, capsys):
    path = grid_file(tmp_path, common={**TINY, "model_name": str(tiny_host)}, arms={"cab": {}})
    call = [str(path), "--output", str(tmp_path / "out"), "--threads", "1"]
    assert script.main(call) == 0
    for weights in (tmp_path / "out" / "runs").glob("*/checkpoints/*/adapter_model.safetensors"):
        weights.unlink()
    assert script.main([*call, "--eval_n", "9"]) == 1
    assert "was not evaluated again, exit status 2: train.py: error: " in capsys.readouterr().err


def test_the_table_pairs_the_same_items_and_averages_over_seeds(tmp_path):
    rows = []
    for arm, solved in (("base", [[1, 0, 0, 0.5], [1, 1, 0, 0]]), ("better", [[1, 1, 1, 0.99], [1, 1, 1, 0]])):
        for seed, scores in enumerate(solved):
            fake_run(tmp_path, f"{arm}{seed}", "gcd", scores)
            rate = sum(score == 1 for score in scores) / 4
            rows.append({"arm": arm, "train_tasks": "gcd", "task": "gcd", "seed": seed, "solved": rate, "ci_low": 0,
                         "ci_high": 1, "run": f"{arm}{seed}", "bare": 0.25, "train_minutes": 1.0, "steps": 5,
                         "trainable": 10, "segments_used": 1, "n": 4})
    base, better = ablation_results.summarise(rows, tmp_path, "base")
    assert base.difference is None and base.solved.value == pytest.approx(0.375)
    assert (base.solved.low, base.solved.high) == (0.0, 1.0)  # t over two seeds would say -121 to 196 %
    assert better.rates == {0: 0.75, 1: 0.75} and better.solved.low == better.solved.high == 0.75
    assert better.difference.value == pytest.approx(0.375) and better.difference.n == 4
    assert 0 <= better.difference.low <= 0.375 <= better.difference.high <= 1
    grid = ablation.Grid("g", {"base": {}, "better": {}}, ["gcd"], [0, 1], baseline="base")
    text = ablation_results.markdown([base, better], grid, left=1)
    assert "| bare LLM | | 25.0 |" in text and "| better | 2 | 75.0 [75.0, 75.0] | +37.5 [" in text
    assert "1 runs are not finished yet" in text


def interrupted(path: Path, output: Path) -> tuple[int, str]:
    """Starts a grid, waits until its first run trains, sends Ctrl-C. Returns (exit status, stderr)."""
    process = command(str(path), "--output", str(output), "--threads", "1")
    deadline = time.monotonic() + HANG_S
    while not list(output.glob("runs/*/metrics.jsonl")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    with pytest.raises(GridError, match="another ablation, or a run it left, is at work"):
        script.main([str(path), "--output", str(output), "--threads", "1"])
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=HANG_S)
    return process.returncode, told


def test_ctrl_c_ends_the_runs_in_order(tiny_host, tmp_path):
    common = {**TINY, "model_name": str(tiny_host), "max_steps": 100_000}
    path, output = grid_file(tmp_path, common=common), tmp_path / "out"
    status, told = interrupted(path, output)
    assert status == 130 and "1 runs end after their batch" in told and "Traceback" not in told
    (checkpoint,) = output.glob("runs/cab--*/checkpoints/step-*")
    assert int(checkpoint.name.removeprefix("step-")) > 0
    assert [row["status"] for row in table(output)] == ["interrupted", "waiting"]
    assert not list(output.glob("runs/grb--*/checkpoints")), "the next run must not begin"
    assert script.finished(ablation.jobs_of(read_grid(path)), output / "runs") == set()


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was(tiny_host, tmp_path):
    common = {**TINY, "model_name": str(tiny_host), "max_steps": 100_000}
    path, output = grid_file(tmp_path, common=common, arms={"cab": {}}), tmp_path / "out"
    interrupted(path, output)
    (checkpoint,) = output.glob("runs/cab--*/checkpoints/step-*")
    reached = int(checkpoint.name.removeprefix("step-"))
    (job,) = ablation.jobs_of(read_grid(path))
    ended = Job(job.arm, job.task, job.seed, job.flags | {"max_steps": reached + 1})
    ablation_results.write_record(output / "runs" / job.name, ended.flags, "waiting")
    with script.stoppable() as stop, script.Runner(output, 1, 1, stop) as runner:
        assert script.train_all(read_grid(path), [ended], runner) == 0
    assert f"from step {reached}" in (output / "logs" / "cab--toy_add--seed0.log").read_text(encoding="utf-8")
    (row,) = table(output)
    assert (row["status"], row["steps"]) == ("finished", str(reached + 1))


@pytest.mark.slow
def test_equal_minutes_measure_the_speed_first_and_anneal_fully(tiny_host, tmp_path):
    common = {**{k: v for k, v in TINY.items() if k != "max_steps"}, "model_name": str(tiny_host)}
    path = grid_file(tmp_path, common=common, arms={"cab": {}}, minutes=0.01, calibration_steps=8)
    assert script.main([str(path), "--output", str(tmp_path / "out"), "--threads", "1"]) == 0
    (seconds,) = json.loads((tmp_path / "out" / "calibration.json").read_text(encoding="utf-8")).values()
    (row,) = table(tmp_path / "out")
    assert int(row["steps"]) == max(round(0.6 / seconds), 1)
    metrics = (tmp_path / "out" / "runs" / row["run"] / "metrics.jsonl").read_text(encoding="utf-8")
    last = json.loads(metrics.splitlines()[-1])
    assert last["step"] == int(row["steps"])
    assert "0.01 minutes of training per run" in (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert not list((tmp_path / "out" / "calibration").iterdir())
