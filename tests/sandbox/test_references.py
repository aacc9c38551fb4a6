"""Reference programs are run against the tests they come with."""

from __future__ import annotations

import pytest

from sandbox import references
from sandbox.references import failing_references
from sandbox.runner import CodeJob, confinement

confined = pytest.mark.skipif(confinement() is not None, reason=f"no confinement here: {confinement()}")
RIGHT = CodeJob("def f(x): return x + 1", ("assert f(1) == 2",))
WRONG = CodeJob("def f(x): return x", ("assert f(1) == 2",))
BROKEN = CodeJob("def f(x) return x", ("assert f(1) == 2",))
RAISES = CodeJob("import torch", ("assert f(1) == 2",))


@confined
def test_a_row_whose_program_fails_is_named():
    message = failing_references({"line 1": RIGHT, "line 2": WRONG, "line 3": BROKEN, "line 4": RAISES})
    assert "at line 2 (failed: test 1: AssertionError:), line 3 (syntax" in message and "line 4 (error" in message
    assert "at line 1" not in message and "\n" not in message


@confined
def test_right_programs_and_rows_without_one_are_no_problem():
    assert failing_references({"line 1": RIGHT, "line 2": CodeJob("", ("assert f(1) == 2",))}) is None
    assert failing_references({}) is None


@confined
def test_many_wrong_rows_are_counted():
    jobs = {f"line {n}": CodeJob(f"f = {n}", ("assert f == -1",)) for n in range(8)}
    message = failing_references(jobs)
    assert "line 4" in message and "line 5" not in message and "and 3 more" in message


@confined
def test_a_slow_program_is_none_that_fails(monkeypatch):
    monkeypatch.setattr(references, "run_many", lambda jobs: [slow for _ in jobs])
    slow = type("Slow", (), {"status": "timeout", "output": ""})
    assert failing_references({"line 1": CodeJob("while True: pass", ("assert f(1) == 2",))}) is None


def test_nothing_runs_where_nothing_confines(monkeypatch):
    monkeypatch.setattr(references, "confinement", lambda: "no user namespaces")
    monkeypatch.setattr(references, "run_many", None)
    assert failing_references({"line 1": WRONG}) is None
