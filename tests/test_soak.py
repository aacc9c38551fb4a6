"""scripts/soak.py: what it draws, keeps and compares; slow: its short form holds."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

import soak
from patience import HANG_S
from soak_runs import ROOT, SYSTEMS, run_differences
from soak_strikes import MOST_IN_CHAIN, deck, moment

COUNTED = {"operations": {"checkpoint": 100, "records": 20, "fill": 10},
           "entries": {"training": [0.2, 0.1], "evaluation": [0.4]}}


def test_every_phase_gets_its_share_of_the_strikes():
    for system in SYSTEMS.values():
        drawn = [phase for number in range(40) for phase in deck(system.phases, random.Random(number))]
        for phase in system.phases:
            assert drawn.count(phase) > len(drawn) / 12, (system.name, phase)
        assert all(len(deck(system.phases, random.Random(number))) <= MOST_IN_CHAIN for number in range(9))


def test_a_moment_lies_within_what_the_uninterrupted_run_has():
    for number in range(200):
        draw = random.Random(number)
        for phase in ("checkpoint", "records", "fill"):
            assert 1 <= moment(phase, COUNTED, draw)["index"] <= COUNTED["operations"][phase]
        for phase in ("training", "evaluation"):
            where = moment(phase, COUNTED, draw)
            assert 0 <= where["delay_s"] <= COUNTED["entries"][phase][where["index"] - 1]


def write_run(folder: Path, losses: list[float], weights: bytes = b"w") -> Path:
    """A run's folder with what is compared."""
    checkpoint = folder / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(weights)
    (checkpoint / "state.json").write_text(json.dumps({"step": 2, "deep": [{"elapsed_s": random.random()}]}))
    lines = [json.dumps({"step": step, "loss": loss, "elapsed_s": random.random()}) for step, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "eval.csv").write_text(f"step,value,elapsed_s,run\n2,0.5,{random.random()},r-{random.random()}\n")
    return folder


def test_two_runs_are_alike_whatever_their_times_and_a_lost_row_or_a_bit_is_seen(tmp_path):
    one = write_run(tmp_path / "one", [1.0, 2.0])
    assert list(run_differences(one, write_run(tmp_path / "same", [1.0, 2.0]))) == []
    assert list(run_differences(one, write_run(tmp_path / "lost", [1.0]))) == ["metrics.jsonl has 1 rows, not 2"]
    assert list(run_differences(one, write_run(tmp_path / "other", [1.0, 2.5]))) == ["metrics.jsonl differs"]
    bit = write_run(tmp_path / "bit", [1.0, 2.0], b"v")
    assert list(run_differences(one, bit)) == ["checkpoints/step-00000002/model.safetensors differs"]
    (bit / "eval.csv").unlink()
    assert "eval.csv is missing" in list(run_differences(one, bit))


def test_rows_that_held_are_kept_and_those_that_failed_are_run_again(tmp_path):
    args = soak.parse(["--rows", str(tmp_path / "rows.csv")])
    rows = soak.Rows(args.rows, again=False)
    cases = [{"case": "chain 0 strike 1", "moment": "x", "why": ""}, {"case": "chain 1 strike 1", "why": "lost"}]
    rows.add(soak.stamped(args, "kills", "hybrid", iter(cases)))
    assert [row["case"] for row in rows.failed] == ["chain 1 strike 1"]
    assert "--only kills --seed 0 --systems hybrid --chain 1" in soak.command_of(rows.failed[0])
    kept = soak.Rows(args.rows, again=False)
    assert kept.has("kills", "hybrid", "chain 0", 0) and not kept.has("kills", "hybrid", "chain 1", 0)
    assert not kept.has("kills", "hybrid", "chain 0", 1) and not soak.Rows(args.rows, again=True).rows


def test_the_short_form_draws_a_few_cases_of_each_part_in_their_order(tmp_path):
    args = soak.parse(["--short", "--rows", str(tmp_path / "rows.csv")])
    run: list[int] = []
    cases = [(f"case {number}", lambda number=number: run.append(number) or {"moment": "x", "why": ""})
             for number in range(50)]
    rows = soak.Rows(args.rows, again=False)
    soak.run_cases(args, rows, "damage", "hybrid", cases, lambda line: None)
    assert len(run) == args.kills == 3 and run == sorted(run)
    soak.run_cases(args, rows, "damage", "hybrid", cases, lambda line: None)
    assert len(run) == 3 and soak.cost_s(args) < soak.cost_s(soak.parse([]))


@pytest.mark.parametrize("words", ["--cases -1", "--only kill", "--systems llama", "--kills 0", "--only ,"])
def test_a_mistake_is_told(words, capsys):
    with pytest.raises(SystemExit) as left:
        soak.parse(words.split())
    assert left.value.code == 2 and "error: --" in capsys.readouterr().err


@pytest.mark.slow
def test_the_short_form_holds(tmp_path):
    words = [sys.executable, "scripts/soak.py", "--short", "--rows", str(tmp_path / "rows.csv")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stdout + done.stderr
