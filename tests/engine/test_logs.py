"""logs: whole rows only, no duplicates after a resume."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.logs import RunLog
from engine.ownership import known_id
from engine.tables import CSV_HEADER, EVAL_HEADER

ROOT = Path(__file__).resolve().parents[2]


def row(step: int, task: str = "chain_sum", metric: str = "solved", value: float | None = 0.5) -> dict:
    return {"step": step, "task": task, "metric": metric, "value": value, "n": 256, "ci_low": 0.4, "ci_high": 0.6,
            "bare": 0.02, "segments_used": 3.0, "elapsed_s": 1.5}


def read_csv(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_eval_rows_have_the_fixed_header_six_digits_and_empty_cells_for_none(tmp_path):
    with RunLog(tmp_path / "run", None, [], {}) as log:
        log.eval_rows([row(10, value=1 / 3), {"step": 10, "task": "all", "metric": "mean\nscore", "value": float("nan"),
                                              "n": None}])
    header, first, second = read_csv(tmp_path / "run" / "eval.csv")
    assert (first.pop(-2), second.pop(-2)) == ("", "")
    assert tuple(header) == CSV_HEADER == (*EVAL_HEADER, "chance", "run")
    assert first.pop() == second.pop() == log.run and log.run.startswith("run-")
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
    foreign.write_text("step,accuracy\n1,0.95\n", encoding="utf-8")
    with pytest.raises(ValueError, match="mine.csv") as error:
        RunLog(tmp_path / "run", foreign, [], {})
    assert "step,accuracy" in one_line(error) and ",".join(CSV_HEADER) in str(error.value)
    assert foreign.read_text(encoding="utf-8") == "step,accuracy\n1,0.95\n" and not (tmp_path / "run").exists()


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
    cut = round(data.draw(st.floats(0, 1)) * len(content))  # the id, and so the length, differs each time
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
                          cwd=ROOT)
    assert done.returncode == 1 and "ValueError: cannot write" in done.stderr
    assert [line[0] for line in read_csv(tmp_path / "eval.csv")] == ["step", "1"]


def test_metrics_are_json_lines_with_elapsed_time_and_null_for_nan(tmp_path):
    import torch

    with RunLog(tmp_path, None, [], {}, elapsed_offset=100.0) as log:
        log.log(3, loss=torch.tensor(0.5), lr=1e-3, bad=float("nan"), worse=[float("inf")], note="x")
        log.elapsed_offset = 500.0
        log.log(4, loss=0.25)
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
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
        with open(tmp_path / "resumed" / name, "a", encoding="utf-8") as file:
            file.write('{"step": 3, "lo')
    with RunLog(tmp_path / "resumed", None, [], {}) as log:
        log.truncate_after(4)
        record(log, range(5, 9))
    for name in ("eval.csv", "metrics.jsonl", "predictions.jsonl"):
        ours = (tmp_path / "resumed" / name).read_text(encoding="utf-8").replace(known_id(tmp_path / "resumed"), "ID")
        whole = (tmp_path / "whole" / name).read_text(encoding="utf-8").replace(known_id(tmp_path / "whole"), "ID")
        assert ours == whole, name
    assert not list(tmp_path.rglob(".tmp*"))


def test_other_ranks_write_nothing(tmp_path):
    with RunLog(tmp_path / "run", None, ["nonsense"], {}, main=False) as log:
        log.log(1, loss=1.0)
        log.eval_rows([row(1)])
        log.predictions([{"step": 1}])
        log.truncate_after(0)
    assert not (tmp_path / "run").exists()


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot open the logs") as error:
        RunLog(tmp_path / "file" / "run", None, [], {})
    one_line(error)


def test_importing_the_modules_imports_nothing_heavy():
    heavy = ("torch", "matplotlib", "rich", "numpy", "wandb", "accelerate")
    code = ("import sys; from engine import figures, logs, progress, trackers; "
            f"print([name for name in {heavy} if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=ROOT)
    assert done.stdout.strip() == "[]"
