"""run_logging: whole rows only, no duplicates after a resume, readable terminal output, a curve."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import logs as run_logging
from engine.logs import EVAL_HEADER, Progress, RunLog, draw_curve
from engine.report import format_table


def row(step: int, task: str = "chain_sum", metric: str = "solved", value: float | None = 0.5) -> dict:
    return {"step": step, "task": task, "metric": metric, "value": value, "n": 256, "ci_low": 0.4, "ci_high": 0.6,
            "bare": 0.02, "segments_used": 3.0, "elapsed_s": 1.5}


def read_csv(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_eval_rows_have_the_fixed_header_six_digits_and_empty_cells_for_none(tmp_path):
    with RunLog(tmp_path / "run", None, [], {}) as log:
        log.eval_rows([row(10, value=1 / 3), {"step": 10, "task": "all", "metric": "mean\nscore", "value": float("nan"),
                                              "n": None}])
    header, first, second = read_csv(tmp_path / "run" / "eval.csv")
    assert tuple(header) == EVAL_HEADER
    assert first == ["10", "chain_sum", "solved", "0.333333", "256", "0.4", "0.6", "0.02", "3", "1.5"]
    assert second[:9] == ["10", "all", "mean score", "", "", "", "", "", ""]
    assert float(second[9]) >= 0


def test_reopening_appends_below_the_same_header(tmp_path):
    for step in (1, 2):
        with RunLog(tmp_path, tmp_path / "deep" / "log.csv", [], {}) as log:
            log.eval_rows([row(step)])
    assert [line[0] for line in read_csv(tmp_path / "deep" / "log.csv")] == ["step", "1", "2"]


def test_a_csv_with_another_header_is_refused_before_anything_is_written(tmp_path):
    foreign = tmp_path / "mine.csv"
    foreign.write_text("step,accuracy\n1,0.95\n")
    with pytest.raises(ValueError, match="mine.csv") as error:
        RunLog(tmp_path / "run", foreign, [], {})
    assert "step,accuracy" in one_line(error) and ",".join(EVAL_HEADER) in str(error.value)
    assert foreign.read_text() == "step,accuracy\n1,0.95\n" and not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"step,accuracy", b"no newline at all", b"\x00\xff\n"])
def test_a_foreign_file_without_a_line_break_is_never_cut(tmp_path, content):
    (tmp_path / "eval.csv").write_bytes(content)
    with pytest.raises(ValueError):
        RunLog(tmp_path, None, [], {})
    assert (tmp_path / "eval.csv").read_bytes() == content


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
rows = st.lists(st.fixed_dictionaries({
    "step": st.integers(0, 10**6), "task": texts, "metric": texts, "n": st.none() | st.integers(0, 999),
    "value": st.none() | st.floats(), "elapsed_s": st.floats(0, 1e6)}), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows, data=st.data())
def test_a_csv_cut_at_any_byte_reopens_with_whole_rows_only(tmp_path_factory, rows, data):
    folder = tmp_path_factory.mktemp("cut")
    with RunLog(folder, None, [], {}) as log:
        log.eval_rows(rows)
    path = folder / "eval.csv"
    whole, content = read_csv(path), path.read_bytes()
    assert len(whole) == len(rows) + 1
    cut = data.draw(st.integers(0, len(content)))
    os.truncate(path, cut)
    with RunLog(folder, None, [], {}) as log:
        kept = read_csv(path)
        assert kept == whole[: len(kept)] and len(kept) == max(1, content[:cut].count(b"\n"))
        log.eval_rows([row(7)])
    assert read_csv(path)[:-1] == kept and read_csv(path)[-1][0] == "7"


def test_a_full_disk_leaves_no_half_row_and_says_so(tmp_path, monkeypatch):
    log = RunLog(tmp_path, None, [], {})
    log.eval_rows([row(1)])
    before = (tmp_path / "eval.csv").read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left") as error:
        log.eval_rows([row(2), row(3)])
    assert "eval.csv" in one_line(error) and (tmp_path / "eval.csv").read_bytes() == before


def test_a_partial_write_is_taken_back(tmp_path):
    """A child may write no more than 4 kB: the kernel itself cuts the write short."""
    code = ("import resource, sys, pathlib; from engine import logs as r\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
            "log = r.RunLog(pathlib.Path(sys.argv[1]), None, [], {})\n"
            "log.eval_rows([{'step': 1, 'task': 'a'}])\n"
            "log.eval_rows([{'step': 2, 'task': 'b' * 90}] * 90)\n")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True,
                          cwd=Path(run_logging.__file__).parent.parent)
    assert done.returncode == 1 and "ValueError: cannot write" in done.stderr
    assert [line[0] for line in read_csv(tmp_path / "eval.csv")] == ["step", "1"]


def test_metrics_are_json_lines_with_elapsed_time_and_null_for_nan(tmp_path):
    import torch

    with RunLog(tmp_path, None, [], {}, elapsed_offset=100.0) as log:
        log.log(3, loss=torch.tensor(0.5), lr=1e-3, bad=float("nan"), worse=[float("inf")], note="x")
        log.elapsed_offset = 500.0
        log.log(4, loss=0.25)
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert 100 <= first.pop("elapsed_s") < 160 and 500 <= second["elapsed_s"] < 560
    assert first == {"step": 3, "loss": 0.5, "lr": 1e-3, "bad": None, "worse": [None], "note": "x"}


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    def record(log: RunLog, steps: range) -> None:
        for step in steps:
            log.log(step, loss=1 / step, elapsed_s=0)
            if step % 2 == 0:
                log.eval_rows([row(step), row(step, task="a,b\u2028c")])
                log.predictions([{"step": step, "id": i, "prediction": "4\u2028\n2\ud800"} for i in range(2)])

    with RunLog(tmp_path / "whole", None, [], {}) as log:
        record(log, range(1, 9))
    with RunLog(tmp_path / "resumed", None, [], {}) as log:
        record(log, range(1, 8))
    for name in ("metrics.jsonl", "predictions.jsonl"):
        with open(tmp_path / "resumed" / name, "a") as file:
            file.write('{"step": 3, "lo')
    with RunLog(tmp_path / "resumed", None, [], {}) as log:
        log.truncate_after(4)
        record(log, range(5, 9))
    for name in ("eval.csv", "metrics.jsonl", "predictions.jsonl"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list(tmp_path.rglob(".tmp*"))


def test_other_ranks_write_nothing(tmp_path):
    with RunLog(tmp_path / "run", None, ["nonsense"], {}, main=False) as log:
        log.log(1, loss=1.0)
        log.eval_rows([row(1)])
        log.predictions([{"step": 1}])
        log.truncate_after(0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, hint", [("wandb", "pip install wandb"), ("trackio", "pip install trackio"),
                                        ("tensorboard", "pip install tensorboard"), ("mlflow", "unknown tracker")])
def test_a_missing_tracker_is_told_before_anything_is_written(tmp_path, monkeypatch, name, hint):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=hint) as error:
        RunLog(tmp_path / "run", None, [name], {})
    one_line(error)
    assert not (tmp_path / "run").exists()


def test_tensorboard_receives_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, None, ["tensorboard"], {"lr": 1e-3}) as log:
        log.log(5, loss=0.5, text="not a number", bad=float("nan"))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(5, 0.5)]
    assert set(events.Tags()["scalars"]) == {"loss", "elapsed_s"}


class FakeTracker:
    """Stands in for wandb and trackio: the same calls as both packages document."""

    def __init__(self) -> None:
        self.calls: list = []

    def init(self, **options) -> FakeTracker:
        self.calls.append(("init", options))
        return self

    def log(self, numbers: dict, step: int | None = None) -> None:
        self.calls.append(("log", step, numbers))

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_are_opened_fed_and_closed(tmp_path, monkeypatch, name):
    fake = FakeTracker()
    monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(run_logging.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with RunLog(tmp_path / "mine", None, [name], {"lr": 1}) as log:
        log.log(2, loss=0.5)
    (_, options), (_, step, numbers), last = fake.calls
    assert options["name"] == "mine" and options["config"] == {"lr": 1}
    assert options.get("mode", "offline") == "offline" and step == 2 and numbers["loss"] == 0.5
    assert last == ("finish",)


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot open the logs") as error:
        RunLog(tmp_path / "file" / "run", None, [], {})
    one_line(error)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_progress_is_a_line_every_15_seconds():
    clock, stream = Clock(), io.StringIO()
    with Progress(2000, "step", "ex", stream=stream, clock=clock) as progress:
        for step in range(1, 401):
            clock.now = step * 0.18
            progress.update(step, loss=0.41199, lr=9.1e-4, rate=620.4)
        progress.say("[not markup]")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 1/2000  loss 0.412") and lines[-2] == "[not markup]"
    assert lines[-1] == "step 400/2000  loss 0.412  lr 9.1e-4  620 ex/s  1:12 elapsed, 4:48 left"
    assert len(lines) == 1 + 4 + 1 + 1  # first, at 15, 30, 45 and 60 s, what was said, the last state


def test_unknown_total_shows_no_time_left_and_a_resumed_run_counts_its_own_steps():
    clock, stream = Clock(), io.StringIO()
    with Progress(None, "step", "step", start=100, stream=stream, clock=clock) as progress:
        clock.now = 3700.0
        progress.update(470, loss=None)
    assert stream.getvalue() == "step 470  loss -  0.1 step/s  1:01:40 elapsed\n"


def test_on_a_terminal_progress_is_one_bar_with_the_same_fields():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(10, "step", "ex", stream=stream) as progress:
        progress.update(5, loss=0.5)
        progress.say("a [sample]")
        progress.update(10, loss=0.25)
    assert "step 10/10" in stream.getvalue() and "loss 0.25" in stream.getvalue()
    assert "a [sample]" in stream.getvalue()


def test_progress_of_other_ranks_is_silent():
    stream = io.StringIO()
    with Progress(10, stream=stream, enabled=False) as progress:
        progress.update(10)
        progress.say("x")
    assert stream.getvalue() == ""


ROWS = [{"task": "chain_sum", "n": 256, "bare": 0.02, "bare_low": 0.008, "bare_high": 0.045, "value": 0.711,
         "low": 0.652, "high": 0.763},
        {"task": "toy", "n": 8, "bare": None, "value": 1.0, "low": None, "high": None},
        {"task": "worse", "n": 10, "bare": 0.5, "bare_low": 0.2, "bare_high": 0.8, "value": 0.5, "low": 0, "high": 1}]


def test_the_closing_table_is_fixed_width_text():
    lines = format_table(ROWS).split("\n")
    assert lines[0].split() == ["task", "n", "bare", "LLM", "LLM", "+", "HRM", "gain"]
    assert lines[1] == "chain_sum          256  2.0 % [0.8, 4.5]     71.1 % [65.2, 76.3]  +69.1"
    assert lines[2].split() == ["toy", "8", "-", "100.0", "%", "-"] and lines[3].endswith("+0.0")
    for line in lines[1:]:
        assert line[lines[0].index("LLM + HRM") - 1] == " " and len(line) == len(lines[0])


def test_the_value_column_takes_another_title():
    assert "LLM + LoRA" in format_table([{**ROWS[0], "label": "LLM + LoRA"}]).split("\n")[0]


def test_the_curve_needs_something_to_draw(tmp_path):
    assert draw_curve(tmp_path) is None
    with RunLog(tmp_path, None, [], {}) as log:
        log.log(1, lr=0.1)
    assert draw_curve(tmp_path) is None and not (tmp_path / "curve.png").exists()


def test_the_curve_is_drawn_from_what_is_there(tmp_path):
    with RunLog(tmp_path, tmp_path / "elsewhere.csv", [], {}) as log:
        for step in range(1, 40):
            log.log(step, loss=float("nan") if step == 5 else 1 / step)
        only_loss = draw_curve(tmp_path)
        assert only_loss is not None
        before = only_loss.read_bytes()
        log.eval_rows([row(0, value=0.1), row(20, value=0.7), row(20, task="b", value=0.2), row(20, metric="mean")])
    after = draw_curve(tmp_path, tmp_path / "elsewhere.csv")
    assert after == tmp_path / "curve.png" and after.read_bytes()[:4] == b"\x89PNG" and after.read_bytes() != before
    assert not list(tmp_path.glob(".tmp*"))


def test_importing_the_module_imports_nothing_heavy():
    code = ("import sys; from engine import logs; print([m for m in ('torch', 'matplotlib', 'rich', 'numpy', 'wandb') "
            "if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(run_logging.__file__).parent.parent)
    assert done.stdout.strip() == "[]"
