"""scripts/report.py: a run's page from the command line, and the page that each run leaves."""

from __future__ import annotations

import json

import pytest

import report
from script_tools import run_script
from tiny_runs import only_run

pytestmark = pytest.mark.usefixtures("no_curve")


def test_a_run_leaves_its_page_and_the_script_makes_it_anew(call, tmp_path, capsys):
    status, out, err = call("--report", "1", "--few_shot", "1")
    run = only_run(tmp_path / "runs")
    assert status == 0 and f"report:     {run / 'report.html'}" in out.splitlines(), err
    text = (run / "report.html").read_text(encoding="utf-8")
    line = json.loads((run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert line["question"].replace("'", "&#39;") in text and "bare LLM, 1-shot" in text and "--max_steps" in text
    assert {"gold", "answer", "bare_prediction", "bare_answer", "few_shot_prediction"} <= line.keys()

    assert report.main([str(run), "--to", str(tmp_path / "other.html"), "--samples", "2"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'other.html'}\n"
    assert "Wrong (4, 2 shown)" in (tmp_path / "other.html").read_text(encoding="utf-8")


def test_a_page_that_fails_fails_no_run(call, monkeypatch, tmp_path):
    monkeypatch.setattr("engine.page.page", lambda *anything: 1 / 0)
    status, out, err = call("--report", "1")
    assert status == 0 and "report:" not in out and "WARNING: the page of the run could not be written" in err
    assert not (only_run(tmp_path / "runs") / "report.html").exists()


def test_the_suite_that_follows_a_run_is_on_its_page(call, tmp_path):
    assert call("--report", "1", "--eval_suite", "synthetic", "--eval_suite_n", "3")[0] == 0
    assert "suite/synthetic" in (only_run(tmp_path / "runs") / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("argv,told", [
    (["nowhere"], "is no folder: give the folder of a run"), (["."], "is no run: it holds no config.resolved.yaml"),
    ([".", "--samples", "-1"], "--samples -1 is not legal: expected 0 or more"),
    ([".", "--to", "."], "--to . is a folder: name the file")])
def test_a_mistake_is_one_line(argv, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = run_script(lambda: report.main(argv))
    except SystemExit as left:
        status = left.code
    err = capsys.readouterr().err
    assert status == 2 and told in err.splitlines()[-1] and list(tmp_path.iterdir()) == []
