"""Right programs of many kinds pass their tests, as they do in plain Python; no cheat passes one."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox.runner import CodeJob, confinement, run_tests

FOLDER = Path(__file__).parent
UNCONFINED = confinement() is not None


def read_programs(path: Path) -> dict[str, CodeJob]:
    """Name -> program of a file of blocks: `=== name`, then parts headed `--- setup`, `--- code` or `--- test`."""
    programs = {}
    for block in path.read_text(encoding="utf-8").split("=== ")[1:]:
        name, *parts = block.split("\n--- ")
        named = [part.partition("\n")[::2] for part in parts]
        setup = "".join(text for kind, text in named if kind == "setup")
        code = "".join(text for kind, text in named if kind == "code")
        programs[name] = CodeJob(code, tuple(text for kind, text in named if kind == "test"), setup)
    return programs


RIGHT = read_programs(FOLDER / "right_programs.txt")
CHEATS = read_programs(FOLDER / "cheats.txt")


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_program_passes_its_tests(name):
    job = RIGHT[name]
    result = run_tests(job.code, job.tests, job.setup, timeout=30, allow_unconfined=UNCONFINED)
    assert result.passed, result.output


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_passes_no_test(name):
    job = CHEATS[name]
    result = run_tests(job.code, job.tests, job.setup, timeout=30, allow_unconfined=UNCONFINED)
    assert result.passed_tests == 0, result.output


def test_the_programs_are_read_whole():
    assert len(RIGHT) > 100 and len(CHEATS) > 70
    for job in (*RIGHT.values(), *CHEATS.values()):
        assert job.code and job.tests
