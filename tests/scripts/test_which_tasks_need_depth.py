"""scripts/which_tasks_need_depth.py: what is compared, what is left out, the verdicts, a tiny grid from end to end."""

from __future__ import annotations

import csv
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import ablation_grid
from ablation_grid import GridError, read_grid
from ablation_results import ArmResult
from depth_settings import Setting, settings_of
from depth_verdicts import Comparison, comparisons, markdown, rows_of, segments_of, verdict
from engine.intervals import Interval, mean_interval
from tasks.plugins import load_plugin
from tiny_rows import PLUGIN, sums, write

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = {
    **{"d_h": 16, "n_heads": 2, "batch_size": 4, "max_steps": 2, "eval_n": 6, "eval_batch_size": 6},
    **{"max_new_tokens": 4, "mixed_precision": "none", "log_steps": 1, "device": "cpu", "warmup_steps": 1},
}
DEEP = {
    **{"h_layers": 0, "inner_T": 1, "state_mix": "sum"},
    **{"segments": 2, "grad_horizon": "segments:2", "supervised_segments": 1},
}

spec = importlib.util.spec_from_file_location("which", ROOT / "scripts" / "which_tasks_need_depth.py")
script = importlib.util.module_from_spec(spec)
sys.modules["which"] = script
spec.loader.exec_module(script)


def grid_file(folder: Path, **changes) -> Path:
    tree = {
        "arms": {"single_pass": {"adapter": "mlp"}, "deep": DEEP},
        "tasks": ["toy_chain"],
        "seeds": [0],
        "difficulties": {"toy_chain": {"short": {"max_steps": 2}}},
        "common": TINY,
        **changes,
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path


def arm(name: str, *rates: float, **changes) -> ArmResult:
    """An arm's result whose seeds solved these shares of 200 items."""
    solved = mean_interval(list(rates))
    result = ArmResult(name, "toy_chain@short", "toy_chain", dict(enumerate(rates)), solved, None, 1.0, 4.0, 100, None,
                       0.0, 200, 0.5)
    return replace(result, **changes)


def compared(deep: list[float], base: list[float], items: tuple[float, float], **changes) -> Comparison:
    """A comparison with this interval over items."""
    gains = [ours - theirs for ours, theirs in zip(deep, base, strict=True)]
    seeds = mean_interval(gains)
    ours = arm("deep", *deep, difference=Interval(seeds.value, *items, 200))
    setting = Setting("toy_chain@short", 200, 60, 2, 0.2)
    return Comparison("toy_chain@short", "toy_chain", setting, "deep", 2, ours, arm("single_pass", *base), None, seeds,
                      8, **changes)


# --- what is compared -------------------------------------------------------------------------------------------------


def test_the_shipped_grid_compares_the_loop_with_a_single_pass_of_no_fewer_layers():
    grid = read_grid(ROOT / "configs" / "depth" / "real_tasks.yaml")
    assert segments_of(grid) == {"single_pass": 0, "hrm_1": 1, "hrm_n": 6, "hrm_2x3": 3}
    assert all(len(settings) == 2 for settings in grid.difficulties.values())
    assert set(grid.tasks) == set(grid.difficulties) and len(grid.seeds) == 3


def test_the_shipped_grid_of_two_layers_compares_arms_of_equal_parameters():
    grid = read_grid(ROOT / "configs" / "depth" / "real_tasks_two_layers.yaml")
    assert segments_of(grid) == {"single_pass": 0, "hrm_n": 3} and len(grid.seeds) == 3

    # The single pass has one layer in L and one in H, the loop two in L.
    assert grid.arms["single_pass"]["h_layers"] + 1 == grid.arms["hrm_n"]["l_layers"] == 2
    assert grid.arms["hrm_n"]["h_layers"] == 0


def test_the_shipped_grid_of_bare_grids_compares_arms_of_equal_parameters_and_examples():
    load_plugin(str(ROOT / "examples" / "bare_grids.py"))
    grid = read_grid(ROOT / "configs" / "depth" / "bare_grids.yaml")
    assert segments_of(grid) == {"single_pass": 0, "hrm_2x4": 4} and len(grid.seeds) == 3
    assert grid.arms["single_pass"]["h_layers"] + 1 == grid.arms["hrm_2x4"]["l_layers"] == 2
    assert grid.arms["hrm_2x4"]["h_layers"] == 0


def test_each_difficulty_is_a_run_of_its_own_with_its_own_settings(tmp_path):
    difficulties = {"toy_chain": {"short": {"max_steps": 2}, "long": {"max_steps": 4}}}
    path = grid_file(tmp_path, difficulties=difficulties, tasks=["toy_chain", "toy_add"])
    jobs = ablation_grid.jobs_of(read_grid(path))

    names = [job.name for job in jobs if job.arm == "deep"]
    assert names == ["deep--toy_chain@short--seed0", "deep--toy_chain@long--seed0", "deep--toy_add--seed0"]
    assert jobs[3].flags["task_config"] == {"toy_chain": {"max_steps": 4}} and "task_config" not in jobs[5].flags


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"difficulties": {"toy_chain": {"short": {"max_stepz": 2}}}}, "toy_chain has no config field max_stepz"),
        ({"difficulties": {"toy_chian": {"short": {}}}}, "unknown task 'toy_chian'"),
        ({"difficulties": {"toy_chain": {"a/b": {}}}}, "difficulty 'a/b' of toy_chain is no plain name"),
        ({"difficulties": {"toy_chain": 3}}, "difficulties .* is not legal: expected task names"),
        ({"arms": {"single_pass": {"adapter": "mlp"}, "one": {}}}, "no arm has segments: give one of them 2 or more"),
        ({"baseline": "deep"}, "baseline deep has 2 segments: name the single pass"),
        ({"arms": {"single_pass": {"adapter": "mlp", "batch_size": 8}, "deep": DEEP}}, "batch_size differs between"),
        ({"arms": {"single_pass": {"adapter": "mlp", "steps": 9}, "deep": DEEP}, "common": {}}, "max_steps differs"),
        ({"minutes": 1, "common": {}}, "minutes: arms are compared at equal examples"),
    ],
)
def test_a_grid_that_compares_something_else_is_refused(tmp_path, changes, told):
    with pytest.raises(GridError, match=f"(?s){told}"):
        segments_of(read_grid(grid_file(tmp_path, **changes)))


def test_segments_of_the_command_line_are_those_of_the_deep_arms_and_of_their_gradient(tmp_path):
    grid = script.grid_of(script.parse([str(grid_file(tmp_path)), "--segments", "5", "--steps", "9"]))
    assert grid.arms["deep"] == DEEP | {"segments": 5, "grad_horizon": "segments:5"}
    assert grid.arms["single_pass"] == {"adapter": "mlp"} and grid.common["max_steps"] == 9


def test_tasks_of_the_command_line_bring_their_own_difficulties(tmp_path):
    hard = tmp_path / "hard.yaml"
    hard.write_text("toy_chase: {max_steps: 5}\n", encoding="utf-8")
    given = ["--tasks", "toy_chase", "--task_config", '{"toy_chase": {"max_steps": 2}}', "--task_config", str(hard)]
    grid = script.grid_of(script.parse([str(grid_file(tmp_path)), *given]))
    assert grid.difficulties == {"toy_chase": {"1": {"max_steps": 2}, "hard": {"max_steps": 5}}}
    with pytest.raises(SystemExit):
        script.parse(["--task_config", "small"])


def test_own_rows_a_plugin_and_any_flag_come_from_the_command_line(tmp_path):
    rows = tmp_path / "mine.jsonl"
    write(rows, sums(40))
    path = str(grid_file(tmp_path))
    grid = script.grid_of(script.parse([path, "--data", str(rows), "--set", "verifier=number", "--set", "lr=0.1"]))
    assert (grid.tasks, grid.common["lr"], grid.common["verifier"]) == (["data"], "0.1", "number")
    jobs = ablation_grid.jobs_of(grid)
    assert [job.flags["data"] for job in jobs] == [str(rows)] * 2 and "tasks" not in jobs[0].flags
    (setting,) = settings_of(jobs).values()
    assert (setting.trained, setting.n) == ("data", TINY["eval_n"])

    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN + 'TASKS = {"which_doubles": (Doubles, Config)}\n', encoding="utf-8")
    grid = script.grid_of(script.parse([path, "--tasks", "which_doubles", "--plugin", str(plugin)]))
    assert next(iter(settings_of(ablation_grid.jobs_of(grid)))) == "which_doubles"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--data", "a.jsonl", "--tasks", "toy_add"], "one of them says what is trained on"),
        (["--set", "lr"], "expected NAME=VALUE"),
        (["--segments", "1"], "--segments 1 is not legal: expected at least 2"),
    ],
)
def test_a_command_line_that_says_two_things_is_refused(argv, told, capsys):
    with pytest.raises(SystemExit) as left:
        script.parse(argv)
    assert left.value.code == 2 and told in capsys.readouterr().err


# --- what is left out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"prompt_tokens": 301}, "prompts of up to 301 tokens, more than 300"),
        ({"answer_tokens": 162}, "answers of 162 tokens, more than 100"),
        ({"chance": 0.52}, "one constant answer solves 52 % of the items"),
    ],
)
def test_a_task_is_left_out_with_the_reason(changes, told):
    assert replace(Setting("a", 100, 300, 4, 0.3), **changes).refusal() == told


def test_a_task_is_looked_at_through_the_items_it_is_evaluated_on(tmp_path):
    jobs = ablation_grid.jobs_of(read_grid(grid_file(tmp_path)))
    (setting,) = settings_of(jobs).values()
    assert setting.trained == "toy_chain@short" and setting.n == TINY["eval_n"]
    assert 20 < setting.prompt_tokens < 80 and setting.steps in {(1, 2), (1, 1), (2, 2)} and setting.chance < 1


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (compared([0.6, 0.62, 0.61], [0.4, 0.41, 0.42], (0.1, 0.3)), "depth pays: +20.0 points over 3 seeds"),
        (compared([0.6, 0.9, 0.5], [0.5, 0.5, 0.5], (0.1, 0.3)), "no difference shown: +16.7 points"),  # seeds disagree
        (compared([0.51, 0.52, 0.53], [0.5, 0.51, 0.52], (-0.1, 0.1)), "no difference shown: +1.0 points"),  # items do
        (compared([0.6], [0.4], (0.1, 0.3)), "depth is ahead so far: +20.0 points; 3 seeds would tell"),
        (compared([0.4], [0.6], (-0.3, -0.1)), "depth is behind so far: -20.0 points; 3 seeds would tell"),
        (compared([0.4, 0.4, 0.41], [0.6, 0.6, 0.6], (-0.3, -0.1)), "depth costs: -19.7 points over 3 seeds"),
        (compared([0.99], [1.0], (-0.03, 0.0)), "nothing to gain: both solve at least 98 %"),
        (compared([0.21], [0.15], (0.01, 0.1)), "nothing learnt: neither arm is above chance (20 %); train for longer"),
        (replace(compared([0.6], [0.4], (0.1, 0.3)), deep=None), "not finished"),
        (replace(compared([0.6], [0.4], (0.1, 0.3)), refused="too long"), "not measured: too long"),
        (
            replace(compared([0.6], [0.4], (0.1, 0.3)), base=arm("single_pass", 0.4, trainable=99)),
            "no fair comparison: deep has 100 parameters, the single pass 99",
        ),
    ],
)
def test_the_verdict_says_no_more_than_was_shown(found, told):
    assert verdict(found) == told


def test_where_depth_pays_stands_at_the_top_and_every_row_has_its_verdict(tmp_path):
    grid = read_grid(grid_file(tmp_path))
    settings = {}
    results = []
    for name, ours in (("costs", 0.3), ("pays", 0.8), ("left_out", 0.9)):
        settings[name] = Setting(name, 200, 60, 2, 0.2)
        deep = [ours, ours + 0.01, ours]
        over_items = Interval(ours - 0.5, *sorted((ours - 0.52, ours - 0.48)), 200)
        results.append(arm("single_pass", 0.5, 0.5, 0.51, train_tasks=name, task=name))
        results.append(arm("deep", *deep, train_tasks=name, task=name, difference=over_items))

    rows = rows_of(comparisons(results, grid, settings, {"left_out": "too long"}))
    assert [row["trained"] for row in rows] == ["pays", "costs", "left_out"]
    assert (rows[0]["seeds"], rows[0]["examples"], rows[0]["parameters"]) == (3, 8, 100)
    text = markdown(rows)
    assert "| pays | 50.3 | - | 80.3 (N = 2) | +30.0 [" in text and "- left_out: not measured: too long" in text


# --- from end to end --------------------------------------------------------------------------------------------------


def test_a_tiny_grid_is_trained_told_and_not_trained_again(tmp_path, capsys):
    argv = [str(grid_file(tmp_path)), "--output", str(tmp_path / "out"), "--threads", "1"]
    assert script.main(argv) == 0
    with open(tmp_path / "out" / "which.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["trained"], row["task"], row["segments"], row["examples"]) == ("toy_chain@short", "toy_chain", "2", "8")
    assert 0 < int(row["parameters"]) <= int(row["parameters_single_pass"])
    assert float(row["cpu_minutes"]) > 0 and row["verdict"]

    # The second call finds its runs, and tells the same.
    table = (tmp_path / "out" / "which.md").read_text(encoding="utf-8")
    capsys.readouterr()
    assert script.main(argv) == 0
    out, err = capsys.readouterr()
    assert "2 runs are finished already" in err and table in out
