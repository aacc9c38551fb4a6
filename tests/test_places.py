"""Places as users have them: a home and a model folder that cannot be written, names with spaces and commas."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from patience import HANG_S
from tiny_runs import TINY, command, newest

ROWS = [f'{{"question": "What is {a} + {a + 1}?", "answer": "{2 * a + 1}"}}\n' for a in range(40)]


def as_a_user() -> list[str]:
    """What a command line begins with so that permissions hold for it: root's ignore them."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root without setpriv: permissions cannot be tried")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


def frozen(folder: Path) -> Path:
    """The folder and all in it, without the right to write."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


@pytest.fixture
def places(tiny_host, tmp_path) -> dict[str, Path]:
    """A home and a model that cannot be written, own data, a table and a place for runs, all with odd names."""
    home = tmp_path / "my home, read only"
    home.mkdir()
    model = Path(shutil.copytree(tiny_host, tmp_path / "a model, of two layers"))
    data = tmp_path / "own data, all.jsonl"
    data.write_text("".join(ROWS), encoding="utf-8")
    made = {"home": frozen(home), "model": frozen(model), "data": data, "runs": tmp_path / "all runs, mine",
            "csv": tmp_path / "tables, all" / "of 1, 2.csv", "cache": tmp_path / "hidden states, cached"}
    yield made
    for name in ("home", "model"):
        made[name].chmod(0o755)


def test_a_run_needs_no_home_and_no_right_to_write_its_model_and_takes_any_name(places):
    words = ["--model_name", str(places["model"]), "--save_dir", str(places["runs"]), *TINY, "--report", "1"]
    own = ["--data", str(places["data"]), "--eval_n", "4", "--run_name", "a run, of mine",
           "--log_csv", str(places["csv"]), "--cache_hidden", "disk", "--cache_dir", str(places["cache"]),
           "--train_n", "16"]
    task = words.index("--task")
    words = [*words[:task], *words[task + 2 :], *own]

    def told(script: str, *argv: str) -> tuple[str, str]:
        process = command(*argv, script=script, prefix=as_a_user(), HOME=str(places["home"]), MPLCONFIGDIR="",
                          XDG_CACHE_HOME="", XDG_CONFIG_HOME="")
        out, err = process.communicate(timeout=HANG_S)
        assert process.returncode == 0, err
        return out, err

    # Train, go on by the command that a stopped run names, and answer from what is there.
    out, err = told("train.py", *words)
    assert "matplotlib" not in err.lower() and "WARNING" not in err
    run = places["runs"] / "a run, of mine"
    assert (run / "curve.png").exists() and (run / "report.html").exists() and places["csv"].exists()
    assert f"'{newest(run)}'" in out, "the next command can be pasted into a shell"
    told("train.py", "--resume", str(run), "--max_steps", "4")
    assert newest(run).name == "step-00000004"
    out, _ = told("generate.py", "--checkpoint", str(run), "--prompt", "1 + 1", "--max_new_tokens", "2")
    assert "LLM + HRM" in out
    assert list(places["home"].iterdir()) == []


def test_the_permissions_hold_for_the_command(places):
    done = subprocess.run([*as_a_user(), "touch", str(places["home"] / "x")], check=False, capture_output=True)
    assert done.returncode != 0 and list(places["home"].iterdir()) == []
