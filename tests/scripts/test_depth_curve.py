"""scripts/depth_curve.py, calibration.py and addon/halting.py: what is measured at each depth, calibration, alarms."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import export_card
import generate
import options
import train
from addon import halting
from addon.halting import HaltingAlarm, collapse, evaluation_collapse
from calibration import calibration_error, reliability
from depth_measures import MOST_GROUPS, QUANTILES, difficulties, length_labels, own_difficulty
from engine.positions import last_column, relative_change
from injector import Slots
from reasoning_gym_wrapper import Task
from tasks.plugins import LOADED, PLUGINS
from text_data.trained import TrainedQuestions, trained_by
from tiny_rows import PLUGIN
from tiny_runs import arguments, newest, only_run, tiny_model

ROOT = Path(__file__).resolve().parent.parent.parent
spec = importlib.util.spec_from_file_location("depth_curve", ROOT / "scripts" / "depth_curve.py")
script = importlib.util.module_from_spec(spec)
sys.modules["depth_curve"] = script
spec.loader.exec_module(script)


# --- calibration and alarm --------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60), st.integers(1, 20))
@settings(deadline=None)
def test_the_calibration_error_is_that_of_its_definition(pairs, bins):
    total = 0.0
    for b in range(bins):
        inside = [(p, r) for p, r in pairs if min(int(p * bins), bins - 1) == b]
        if inside:
            mean = sum(p for p, _ in inside) / len(inside)
            total += len(inside) / len(pairs) * abs(mean - sum(r for _, r in inside) / len(inside))
    chances, right = [p for p, _ in pairs], [r for _, r in pairs]
    assert calibration_error(chances, right, bins) == pytest.approx(total, abs=1e-9)
    held = reliability(chances, right, bins)
    assert sum(b.n for b in held) == len(pairs) and sum(b.right for b in held) == sum(right)
    assert all(b.low - 1e-9 <= b.probability <= b.high + 1e-9 for b in held)


def test_a_calibrated_head_has_a_small_error_and_a_sure_liar_a_large_one():
    draw = random.Random(0)
    chances = [draw.random() for _ in range(20_000)]
    assert calibration_error(chances, [draw.random() < p for p in chances]) < 0.02
    assert calibration_error([0.99] * 100, [False] * 100) == pytest.approx(0.99)
    with pytest.raises(ValueError, match=r"one outcome per probability|\[0, 1\]"):
        reliability([0.5], [])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        reliability([1.5], [True])


@pytest.mark.parametrize(
    ("probability", "deviation", "right", "told"),
    [
        (0.005, 0.001, 0.5, "collapsed to nothing"),
        (0.995, 0.001, 0.5, "collapsed to all"),
        (0.005, 0.001, 0.02, None),  # hardly anything is right: nobody should halt
        (0.995, 0.001, 0.99, None),
        (0.5, 0.001, 0.5, None),
        (0.01, 0.1, 0.5, None),  # it tells examples apart
    ],
)
def test_an_alarm_is_raised_only_where_halting_ignores_what_is_right(probability, deviation, right, told):
    found = collapse(probability, deviation, right)
    assert (found is None) if told is None else told in found


def test_the_alarm_looks_at_a_hundred_batches_at_a_time():
    alarm, told = HaltingAlarm(), []
    for step in range(1, 301):
        chance = 0.0 if step <= 200 else 0.6
        metrics = {"halt_probability": chance, "halt_deviation": 0.0, "teacher_forced_exact": 0.6}
        if alarm.update(step, metrics):
            told.append(step)
    assert told == [100, 200]
    assert HaltingAlarm().update(halting.EVERY, {"loss": 1.0}) is None


@pytest.mark.parametrize(
    ("used", "limit", "solved", "told"),
    [([4, 4], 4, 0.5, "to nothing"), ([1, 1], 4, 0.5, "to all"), ([1, 4], 4, 0.5, None), ([4, 4], 4, 0.0, None),
     ([1, 1], 4, 1.0, None), ([1, 1], 1, 0.5, None), ([], 4, 0.5, None)],
)
def test_segments_used_at_evaluation_tell_a_collapse(used, limit, solved, told):
    found = evaluation_collapse(used, limit, solved)
    assert (found is None) if told is None else told in found


def test_a_run_tells_its_alarms(tiny_host, tmp_path, monkeypatch, capsys):
    """A new head (bias -5) halts nobody; that is a collapse as soon as anything counts as right."""
    monkeypatch.setattr(halting, "EVERY", 2)
    monkeypatch.setattr(halting, "SETTLED", -1.0)
    more = ("--use_act", "--max_steps=2", "--eval_every=1", "--segments=2", "--supervised_segments=1")
    assert train.main(arguments(tiny_host, tmp_path, *more)) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING: step")]
    assert sum("step 2: halting has collapsed to nothing: mean probability 0.007" in line for line in told) == 1
    assert [line[:16] for line in told if "no example halted before segment 2 at evaluation" in line] == [
        "WARNING: step 1:", "WARNING: step 2:"]
    lines = (only_run(tmp_path) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(0 <= json.loads(line)["halt_deviation"] < 0.02 for line in lines)


# --- groups -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 400), min_size=1, max_size=50))
def test_length_groups_are_ranges_that_hold_their_items(lengths):
    labels = length_labels(lengths)
    for length, label in zip(lengths, labels, strict=True):
        low, high = map(int, label.removeprefix("prompt ").removesuffix(" tokens").split("-"))
        assert low <= length <= high
    assert len(set(labels)) <= QUANTILES


def test_difficulty_is_a_number_that_the_task_gives_its_items():
    chain = [{"source_index": i, "num_terms": 2 + i % 2, "num_digits": 1, "difficulty": {}} for i in range(4)]
    assert own_difficulty(chain) == "num_terms"
    assert own_difficulty([{**entry, "num_terms": 2} for entry in chain]) is None
    assert own_difficulty([{"source_index": i, "a": i} for i in range(4)]) is None
    many = [{"num_terms": i} for i in range(MOST_GROUPS + 1)]
    assert own_difficulty(many) is None


# --- measuring --------------------------------------------------------------------------------------------------------


def test_relative_change_looks_at_readable_positions_alone():
    torch.manual_seed(0)
    before, after = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[False, True, True], [True, True, True]])
    found = relative_change(before, after, mask)
    expected = [(after[0, 1:] - before[0, 1:]).norm() / after[0, 1:].norm(),
                (after[1] - before[1]).norm() / after[1].norm()]
    torch.testing.assert_close(found, torch.stack(expected))
    assert torch.equal(relative_change(after, after, mask), torch.zeros(2))


def thinker(tiny_host, **changes):
    """A backbone whose halting head is random, with features of a left-padded batch."""
    model = tiny_model(tiny_host, use_act=True, segments=4, **changes)
    torch.nn.init.normal_(model.model.addon.core.halt.weight)
    mask = torch.tensor([[False, False, True, True, True], [True] * 5, [False, True, True, True, True]])
    features = torch.randn(3, 5, model.model.addon.read.in_features)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model, features, model.model.addon.core.context(mask, positions)


def slots_of(rows: int) -> Slots:
    """Random states at two positions that predict an answer."""
    return Slots(torch.randn(rows, 2, 32), torch.randn(rows, 2, 32), torch.tensor([[5, 6]] * rows))


def test_best_halt_answers_from_the_segment_of_the_highest_halting_score(tiny_host):
    model, features, context = thinker(tiny_host, eval_readout="best_halt")
    with torch.no_grad():
        carry, states = None, []
        for _ in range(4):
            carry = model.model.advance(features, context, carry)
            states.append(carry.z_high)
        read = torch.stack([z[torch.arange(3), last_column(context.mask)] for z in states])
        # A head for which the first example is best at the start and the second at the end.
        head, fallen = model.model.addon.core.halt, read[0] - read[3]
        head.weight.copy_((fallen[0] - fallen[1])[None])
        z, used = model.model.think(features, context, slots_of(3))
        best = head(read).squeeze(-1).argmax(dim=0)
    assert best[0] != best[1], "the case must have something to choose"
    torch.testing.assert_close(z, torch.stack([states[k][i] for i, k in enumerate(best.tolist())]))
    assert used.tolist() == [4, 4, 4]


@pytest.mark.parametrize("detach", [False, True])
def test_a_detached_halting_head_reads_z_without_reshaping_it(tiny_host, detach):
    model, features, context = thinker(tiny_host, halt_detach=detach)
    model.train()
    from model import HostStates

    out = model.segment(HostStates(features, context, slots_of(3)), torch.ones(3, 2, dtype=torch.int64), None, None)
    out.metrics["halt_logits"].sum().backward()
    core = model.model.addon.core
    assert float(core.halt.weight.grad.abs().max()) > 0
    touched = any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in core.h_block.parameters())
    assert touched != detach


def test_items_are_grouped_by_the_steps_that_they_need():
    items = Task("rotten_oranges", {"min_n": 3, "max_n": 3}).items(0)
    examples = [example for _, example in itertools.islice(items, 40)]
    answers = [int(example.target) for example in examples]
    assert min(answers) == -1 and max(answers) >= 3
    labels = difficulties(examples, None, "steps")
    assert labels == [f"steps {'unknown' if answer < 0 else max(answer, 1)}" for answer in answers]

    # A task that says no steps takes none of its names for them.
    sums = [example for _, example in itertools.islice(Task("chain_sum", {}).items(0), 3)]
    with pytest.raises(ValueError, match="items of chain_sum have no 'steps'"):
        difficulties(sums, None, "steps")


def test_a_curve_over_the_steps_of_a_real_task_has_a_column_of_them(tiny_host, tmp_path):
    grids = ("--task=rotten_oranges", "--task_config", '{"min_n": 2, "max_n": 3}', "--eval_n=12", "--max_steps=1")
    assert train.main(arguments(tiny_host, tmp_path, *grids)) == 0
    run = only_run(tmp_path)
    assert script.main([str(newest(run)), "--segments", "1", "--num_threads", "1", "--difficulty", "steps"]) == 0
    with open(run / "depth" / "depth.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    known = [row for row in rows if row["difficulty"] not in ("all", "steps unknown")]
    assert known and all(row["difficulty"] == f"steps {row['steps']}" for row in known)
    assert sum(int(row["n"]) for row in rows if row["difficulty"] != "all") == 12


READOUTS = ("last", "on", "best_halt", "settled")


@pytest.fixture(scope="module")
def measured(tiny_host, tmp_path_factory):
    """A tiny run with a halting head and its depth curve: (run, rows of depth.csv, what was printed)."""
    folder = tmp_path_factory.mktemp("depth")
    more = ("--state_mix=sum", "--use_act", "--segments=2", "--max_steps=2", "--task_config", '{"max_value": 30}',
            "--eval_n=8")
    assert train.main(arguments(tiny_host, folder, *more)) == 0
    run = only_run(folder)
    assert script.main([str(newest(run)), "--segments", "1,2,3", "--num_threads", "1", "--device", "cpu",
                        "--halt_settled", "0.999"]) == 0
    with open(run / "depth" / "depth.csv", newline="", encoding="utf-8") as file:
        return run, list(csv.DictReader(file))


def test_every_readout_is_measured_at_every_depth_and_difficulty(measured):
    run, rows = measured
    whole = [row for row in rows if row["difficulty"] == "all"]
    assert [(row["readout"], row["segments"]) for row in whole] == [
        (readout, k) for readout in READOUTS for k in "123"]
    assert all(row["n"] == "8" and float(row["ci_low"]) <= float(row["solved"]) <= float(row["ci_high"])
               for row in whole)
    for readout in READOUTS:
        parts = [row for row in rows if row["readout"] == readout and row["segments"] == "2"
                 and row["difficulty"] != "all"]
        assert sum(int(row["n"]) for row in parts) == 8
    last = [row for row in whole if row["readout"] == "last"]
    assert [float(row["segments_used"]) for row in last] == [1, 2, 3]
    assert all(0 < float(row["z_high_change"]) < 10 and 0 <= float(row["ece"]) <= 1 for row in last)
    assert [float(row["answer_change"]) == 1 for row in last] == [True, False, False]
    for row in rows:
        assert 0 < float(row["confidence"]) <= 1 and 0 <= float(row["confidence_error"]) <= 1
        assert float(row["confidence_error"]) >= abs(float(row["confidence"]) - float(row["solved"])) - 1e-6
    assert all(float(row["segments_used"]) <= int(row["segments"]) for row in whole)
    used = {(row["readout"], row["segments"]): float(row["segments_used"]) for row in whole}
    assert used["settled", "3"] < used["on", "3"] == 3, "this head stops nobody, the second segment changes less"
    for name in ("depth.png", "reliability.png"):
        assert (run / "depth" / name).read_bytes().startswith(b"\x89PNG")


def test_items_that_training_was_not_kept_off_are_those_it_did_not_meet(measured, capsys, tmp_path, monkeypatch):
    run, _ = measured
    asked = []
    fitting = script.PromptFormat.fitting
    monkeypatch.setattr(script.PromptFormat, "fitting", lambda self, examples, *rest: (
        asked.extend(example.question for example in examples), fitting(self, examples, *rest))[1])
    assert script.main([str(run), "--segments", "1", "--eval_n", "12", "--output", str(tmp_path)]) == 0
    record = trained_by(newest(run), goes_on=True)
    assert "WARNING" not in capsys.readouterr().err and len(asked) == 12
    assert len(record.own) and not any(question in record for question in asked)

    # A checkpoint of an earlier version does not say what it has met.
    monkeypatch.setattr(script, "trained_in", lambda *arguments, **named: TrainedQuestions(is_whole=False))
    for n, told in ((8, False), (9, True)):
        assert script.main([str(run), "--segments", "1", "--eval_n", str(n), "--output", str(tmp_path)]) == 0
        assert ("training kept off the first 8 evaluation items" in capsys.readouterr().err) == told


def test_the_trained_depth_is_the_evaluation_of_the_run_itself(measured):
    """Two segments without halting, at most two with it: the run evaluated the latter."""
    run, rows = measured
    with open(run / "eval.csv", newline="", encoding="utf-8") as file:
        (solved,) = [row for row in csv.DictReader(file) if row["metric"] == "solved"]
    (ours,) = [row for row in rows if (row["readout"], row["segments"], row["difficulty"]) == ("on", "2", "all")]
    assert (ours["solved"], ours["n"], ours["segments_used"]) == (solved["value"], solved["n"], solved["segments_used"])


def test_a_run_on_a_plugin_s_task_is_measured_where_the_plugin_is_typed(tiny_host, tmp_path, capsys):
    path = tmp_path / "doubling.py"
    path.write_text(PLUGIN + "TASKS = {'curve_doubles': (Doubles, Config)}\n", encoding="utf-8")
    more = ("--plugin", str(path), "--task", "curve_doubles", "--run_name", "r")
    assert train.main(arguments(tiny_host, tmp_path / "runs", *more)) == 0
    PLUGINS.clear()
    LOADED.clear()

    run = str(tmp_path / "runs" / "r")
    with pytest.raises(ValueError, match=f"runs only when it is typed: add --plugin {path}"):
        script.main([run, "--segments", "1", "--device", "cpu"])
    path.write_text(path.read_text(encoding="utf-8") + "# later\n", encoding="utf-8")
    assert script.main([run, "--segments", "1", "--device", "cpu", "--plugin", str(path)]) == 0
    told = capsys.readouterr()
    assert "--plugin doubling.py has changed since the checkpoint" in told.err and "curve_doubles" in told.out

    # What needs no task needs no plugin, and a card names the file alone.
    PLUGINS.clear()
    assert generate.main(["--checkpoint", run, "--prompt", "Twice 2?", "--max_new_tokens", "2"]) == 0
    source = SimpleNamespace(opts=options.parse(["--task", "curve_doubles"]), folder=newest(Path(run)), base="llm")
    assert export_card.command(source).endswith("--plugin doubling.py")


@pytest.mark.parametrize(
    ("argv", "told"),
    [(["nowhere"], "nowhere"), (["x", "--segments", "0"], "expected at least 1"),
     (["x", "--segments", "a"], "expected whole numbers"), (["x", "--halt_settled", "2"], "a share from 0 (off) to 1"),
     (["x", "--halt_settled_at", "prompt"], "does nothing without --halt_settled"),
     (["x", "--halt_settled", "0.1", "--segments", "2"], "saves nothing with fewer than 3 --segments")],
)
def test_a_mistake_is_one_line(argv, told, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["depth_curve.py", *argv])
    try:
        status = script.run_script(script.main)
    except SystemExit as ended:
        status = ended.code
    assert status == 2 and told in capsys.readouterr().err
