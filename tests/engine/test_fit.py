"""fit: a run that nobody has given a length times its first steps, and is then the run of that length."""

from __future__ import annotations

import re
import shutil

import pytest
import yaml

import options
import train
from engine import fit
from engine.system import LoopConfig
from tiny_runs import assert_same_run, error_lines, newest

pytestmark = pytest.mark.usefixtures("no_curve")  # conftest.py

FITS = "--fit_minutes 1e-9 --max_steps 70 --eval_every 0 --save_every 2 --checkpoint_limit 0".split()


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """The fewest steps of a run."""
    monkeypatch.setattr(fit, "LEAST", 5)


def config_of(**values) -> LoopConfig:
    return LoopConfig(settings="", flags={}, **values)


# --- which runs


def resolved(*words: str, saved: dict | None = None) -> options.Options:
    return options.resolve(options.parse(list(words), saved))


def test_the_default_run_sizes_itself_and_no_other():
    assert resolved().fit_minutes == 7.0 and resolved().max_steps == 1900
    assert resolved("--segments", "3", "--seed", "2").fit_minutes == 7.0
    for words in ("--max_steps 1900", "--max_steps 50", "--max_minutes 3", "--epochs 1 --train_n 9", "--task gcd",
                  "--tasks gcd,lcm", "--data rows.jsonl", "--adapter none", "--fit_minutes 0",
                  "--arch hybrid --dataset synthetic", "--arch enhanced"):
        assert resolved(*words.split()).fit_minutes == 0, words


def test_other_runs_size_themselves_when_asked():
    assert resolved("--task", "gcd", "--fit_minutes", "20").fit_minutes == 20
    opts = resolved("--task", "gcd", "--fit_minutes", "20", "--max_steps", "300")
    assert (opts.fit_minutes, opts.max_steps) == (20, 300)


def test_a_typed_length_is_obeyed_whatever_a_file_says(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("fit_minutes: 20\n", encoding="utf-8")
    assert resolved("--config", str(path)).fit_minutes == 20
    opts = resolved("--config", str(path), "--max_steps", "9")
    assert (opts.fit_minutes, opts.max_steps) == (0, 9)


def test_a_record_of_a_run_is_of_its_own_length():
    """Also where that length is the default one, and in records from before the flag."""
    saved = options.read_resolved("fit_minutes: 0.0\nmax_steps: 1900\n")
    assert resolved(saved=saved).fit_minutes == 0
    assert resolved(saved=options.read_resolved("max_steps: 1900\n")).fit_minutes == 0


@pytest.mark.parametrize("more", ["--epochs 1 --train_n 9", "--max_minutes 3", "--max_steps 0 --max_minutes 2"])
def test_two_ways_to_size_a_run_contradict_each_other(more, capsys):
    with pytest.raises(SystemExit):
        options.parse(["--fit_minutes", "5", *more.split()])
    assert "--fit_minutes 5 chooses the steps of a run" in capsys.readouterr().err


# --- how many steps


def test_the_steps_are_those_that_fit():
    config = config_of(max_steps=1900, fit_minutes=7.0)
    assert fit.fitting_steps(config, 1.0) == 420
    assert fit.fitting_steps(config, 0.1) == 1900
    assert fit.fitting_steps(config, 1000.0) == 5
    assert fit.words(config, 1.0, 420) == ("1,900 steps would take 32 minutes here; training 7 minutes, 420 steps "
                                           "(--fit_minutes 7; --max_steps N trains N)")
    assert fit.words(config, 0.1, 1900) == ("1,900 steps take 3.2 minutes here, evaluation aside: training all of them")


# --- the run


def test_a_fitted_run_is_the_run_of_that_length_and_goes_on_as_it(call, capsys, tmp_path):
    runs = tmp_path / "runs"
    status, _, err = call("--run_name", "fitted", *FITS)
    assert status == 0, err
    assert re.search(r"70 steps would take .* here; training .*, 5 steps", err) and "; 5 steps of 4 examples" in err
    path = runs / "fitted" / "config.resolved.yaml"
    record = yaml.safe_load(path.read_text(encoding="utf-8"))["training"]
    assert (record["max_steps"], record["fit_minutes"]) == (5, 0.0)

    # The record alone reruns it, bit for bit.
    assert train.main(["--config", str(path), "--run_name", "again"]) == 0
    assert "would take" not in capsys.readouterr().err
    assert_same_run(runs / "fitted", runs / "again")

    # Resuming keeps the number.
    shutil.copytree(runs / "fitted", runs / "cut")
    shutil.rmtree(newest(runs / "cut"))
    assert train.main(["--resume", str(runs / "cut")]) == 0
    err = capsys.readouterr().err
    assert "would take" not in err and "5 steps of 4 examples, from step 4" in err
    assert_same_run(runs / "fitted", runs / "cut")


def test_a_run_that_goes_on_is_not_sized_again(call, tmp_path):
    assert call("--run_name", "mine", "--max_steps", "2")[0] == 0
    status, _, err = call("--run_name", "mine", "--max_steps", "3", "--fit_minutes", "5")
    assert status == 0 and "WARNING: --fit_minutes is for a new run: this one goes on to 3 steps" in err


def test_a_dry_run_says_what_the_run_would_choose(call, tmp_path):
    status, _, err = call(*FITS, "--dry_run")
    assert status == 0 and re.search(r"70 steps would take .* here; training .*, 5 steps", err)


def test_a_loss_that_is_no_number_is_left_to_training(call, tmp_path):
    status, _, err = call(*FITS, "--lr", "1e30", "--grad_clip", "0", "--warmup_steps", "0")
    assert status in (0, 3) and "Traceback" not in err


def test_grpo_is_not_sized(capsys):
    with pytest.raises(SystemExit):
        options.parse(["--objective", "grpo", "--fit_minutes", "5", "--resume", "a"])
    assert error_lines(capsys.readouterr().err)
