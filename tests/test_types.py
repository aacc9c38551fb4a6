"""mypy finds nothing in the modules that are checked, and every module that is not checked is there."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from patience import HANG_S

ROOT = Path(__file__).resolve().parent.parent


def settings() -> dict:
    """The table [tool.mypy]."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]


def unchecked() -> list[str]:
    """Names of the modules whose errors are not reported."""
    return [name for table in settings()["overrides"] if table.get("ignore_errors") for name in table["module"]]


def test_mypy_finds_no_error():
    done = subprocess.run(
        [sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_that_is_not_checked_yet_is_there_and_named_alone():
    assert "tests" not in settings()["files"]
    for name in unchecked():
        assert (ROOT / name.replace(".", "/")).with_suffix(".py").exists(), name


def test_every_package_is_checked():
    packages = {path.parent.name for path in ROOT.glob("*/*.py")} - {"scripts", "tests", "findings", "examples"}
    assert packages <= set(settings()["files"])
