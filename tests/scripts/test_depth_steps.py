"""depth_curve.py --steps: solved against the number of steps, marked where it is more than trained, for any adapter."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

import train
from depth_measures import difficulties
from depth_steps import add_steps, by_task, changed, items_by_steps, read_steps, steps_table, trained_steps
from reasoning_gym_wrapper import EVAL_SEED, Reserve, Task, TaskError
from tiny_runs import arguments, newest, only_run

ROOT = Path(__file__).resolve().parent.parent.parent
spec = importlib.util.spec_from_file_location("depth_curve", ROOT / "scripts" / "depth_curve.py")
script = importlib.util.module_from_spec(spec)
sys.modules["depth_curve"] = script
spec.loader.exec_module(script)

LEVELS = ("--curriculum", "--eval_every=2", "--max_steps=3", "--curriculum_levels=1", "--curriculum_threshold=1")


# What an adapter without segments takes of the tiny runs' flags.
PLAIN = ("--batch_size=4 --max_steps=2 --eval_n=4 --mixed_precision=none --num_threads=1 --device=cpu".split())


def curve(folder, words) -> tuple[Path, list[dict[str, str]]]:
    """A tiny run on toy_chain, and the rows of its curve over 1, 2 and 4 steps, 6 items of each."""
    words = [*words, "--task=toy_chain", "--task_config", '{"max_steps": 2}', "--max_new_tokens=2"]
    assert train.main(words) == 0
    run = only_run(folder)
    assert script.main([str(newest(run)), "--steps", "1,2,4", "--segments", "1,3", "--eval_n", "6", "--num_threads",
                        "1", "--device", "cpu"]) == 0
    with open(run / "depth" / "depth.csv", newline="", encoding="utf-8") as file:
        return run, list(csv.DictReader(file))


def plain(host, folder, adapter) -> list[str]:
    return ["--model_name", str(host), "--save_dir", str(folder), f"--adapter={adapter}", *PLAIN]


@pytest.mark.parametrize(
    ("text", "steps"), [("", []), ("3", [3]), ("1-4,8", [1, 2, 3, 4, 8]), ("8, 1-2,2", [1, 2, 8]), ("12-12", [12])]
)
def test_numbers_of_steps_are_lists_with_ranges(text, steps):
    assert read_steps(text) == steps


@pytest.mark.parametrize("text", ["a", "0", "4-1", "1--3", "1-2-3", "-1", "1.5", "1-9999"])
def test_what_is_no_list_of_steps_is_refused_in_one_line(text, capsys):
    with pytest.raises(SystemExit) as ended:
        script.parse(["runs/x", "--steps=" + text])
    assert ended.value.code == 2 and f"--steps {text!r} is not legal" in capsys.readouterr().err


def test_items_have_the_number_of_steps_that_was_asked_for():
    tasks = [Task("toy_chain", {"max_steps": 2, "nodes": 16, "chains": 4}), Task("toy_automaton")]
    assert trained_steps([*tasks, Task("gcd")]) == {"toy_chain": 2, "toy_automaton": 4}
    examples = items_by_steps(tasks, [1, 9], 5, EVAL_SEED)
    found = [(example.task, example.entry["metadata"]["steps"]) for example in examples]
    assert found == [(task.name, steps) for task in tasks for steps in (1, 9) for _ in range(5)]
    assert all(example.question.count(",") == 15 for example in examples[:10]), "the run's other settings are kept"
    assert len({example.question for example in examples}) == 20


def test_items_may_have_another_shape_than_the_run_s():
    tasks = [Task("toy_chain", {"max_steps": 2})]
    assert changed(tasks, "") == tasks
    (shaped,) = changed(tasks, '{"toy_chain": {"chains": 2, "letters": 18}}')
    assert {name: shaped.config[name] for name in ("chains", "letters", "max_steps")} == {
        "chains": 2, "letters": 18, "max_steps": 1}
    (shaped,) = changed([Task("toy_chain", {"decoys": 2, "max_steps": 4})], '{"chains": 2}')
    assert shaped.config["decoys"] == 0 and len(items_by_steps([shaped], [8], 3, EVAL_SEED)) == 3
    hidden = [Task("toy_chain", {"decoys": 2, "max_steps": 4})]
    assert len(items_by_steps(hidden, [4, 12], 3, EVAL_SEED)) == 6, "decoys go where there is no room"
    with pytest.raises(TaskError, match="has no config field hops"):
        changed(tasks, '{"hops": 3}')
    with pytest.raises(SystemExit):
        script.parse(["runs/x", "--task_config={}"])


def test_a_task_without_steps_and_steps_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="tasks with max_steps in their config: gcd, toy_add has none"):
        items_by_steps([Task("toy_chain"), Task("gcd"), Task("toy_add")], [1], 2, EVAL_SEED)
    with pytest.raises(TaskError, match="leave room for 12 steps, got max_steps 14"):
        items_by_steps([Task("toy_chain")], [14], 2, EVAL_SEED)


def test_the_difficulty_of_a_probe_is_its_steps():
    examples = Reserve([Task("toy_rewrite", {"max_steps": 3})], 30).examples
    labels = difficulties(examples, None, "auto")
    assert labels == [f"steps {example.entry['metadata']['steps']}" for example in examples]


def test_rows_of_more_steps_than_trained_are_marked():
    made = [{"task": task, "difficulty": label, "readout": "last", "segments": 2, "n": 4, "solved": 0.5}
            for task in ("toy_chain", "gcd") for label in ("all", "steps 4", "steps 5")]
    add_steps(made, {"toy_chain": 4})
    marked = {row["difficulty"]: row.get("beyond_training") for row in made if row["task"] == "toy_chain"}
    assert marked == {"all": None, "steps 4": 0, "steps 5": 1}
    assert [row.get("beyond_training") for row in made if row["task"] == "gcd"] == [None, 0, 0]
    assert list(by_task(made)) == ["toy_chain", "gcd"]
    heading, four, five = steps_table(made)[:3]
    assert heading.startswith("toy_chain: solved") and four.split() == ["4", "n", "4", "50.0"]
    assert five.split() == ["5+", "n", "4", "50.0"]


def test_a_curve_has_every_number_of_steps_at_every_number_of_segments(tiny_host, tmp_path, capsys):
    run, rows = curve(tmp_path, arguments(tiny_host, tmp_path))
    parts = [row for row in rows if row["difficulty"] != "all"]
    assert [(row["segments"], row["steps"], row["beyond_training"], row["n"]) for row in parts] == [
        (segments, steps, str(int(steps == "4")), "6") for segments in "13" for steps in "124"]
    assert all(float(row["ci_low"]) <= float(row["solved"]) <= float(row["ci_high"]) for row in parts)
    assert (run / "depth" / "depth.png").read_bytes().startswith(b"\x89PNG")
    out, err = capsys.readouterr()
    assert "are drawn anew" not in err, "the checkpoint records what was trained on"
    assert "toy_chain: solved, %, by steps (+ = more than trained) and segments 1, 3" in out


def test_more_than_the_level_that_a_curriculum_had_reached_is_beyond_training(tiny_host, tmp_path):
    _, rows = curve(tmp_path, arguments(tiny_host, tmp_path, *LEVELS))
    marked = {row["steps"]: row["beyond_training"] for row in rows if row["steps"]}
    assert marked == {"1": "0", "2": "1", "4": "1"}


@pytest.mark.parametrize("adapter", ["lora", "mlp"])
def test_an_adapter_without_segments_answers_once(tiny_host, tmp_path, adapter):
    run, rows = curve(tmp_path, plain(tiny_host, tmp_path, adapter))
    parts = [row for row in rows if row["difficulty"] != "all"]
    assert [(row["segments"], row["steps"]) for row in parts] == [("0", steps) for steps in "124"]
    assert (run / "depth" / "depth.png").exists() and not any(row["z_high_change"] for row in rows)
    with pytest.raises(ValueError, match=rf"an adapter without segments \({adapter}\): it has a curve over the steps"):
        script.main([str(run), "--segments", "1"])


def test_a_run_whose_items_have_their_own_segments_is_measured_so(tiny_host, tmp_path, capsys):
    words = [*arguments(tiny_host, tmp_path), "--segments=4", "--segments_sampling=item"]
    _, rows = curve(tmp_path, words)
    own = [row for row in rows if row["readout"] == "own" and row["steps"]]
    assert [(row["steps"], float(row["segments_used"])) for row in own] == [("1", 1), ("2", 2), ("4", 3)]
    assert "where each item has as many segments as it needs steps" in capsys.readouterr().out
