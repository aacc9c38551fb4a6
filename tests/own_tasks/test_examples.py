"""The example of the README and examples/own_data.py run as they stand, with fewer steps."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap

import pytest

from test_architecture import ROOT
from tiny_runs import TINY, command

FEW = ["--max_steps", "2", "--eval_n", "4"]


def readme_example() -> str:
    """The block of code under the README's heading."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Your own data\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^(?:    .*)?$", section, re.MULTILINE)
    return textwrap.dedent("\n".join(lines)).strip()


def test_the_example_of_the_readme_has_twelve_lines():
    assert sum(bool(line.strip()) for line in readme_example().splitlines()) == 12


def test_the_example_of_the_readme_runs(tiny_host, tmp_path):
    # Tiny flags in place of its number of steps; the folder of its runs is the one it is started in.
    small = " ".join([*TINY[2:], *FEW, "--model_name", str(tiny_host)])
    code = readme_example().replace("--eval_n 100 --max_steps 300", small)
    assert code != readme_example()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**__import__("os").environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert re.search(r"^mine +4 ", done.stdout, re.MULTILINE) and "> A pen costs 2" in done.stdout


@pytest.fixture
def example_data():
    """What the example writes below the repository's folder, removed afterwards if it was not there."""
    path = ROOT / "runs" / "prices.jsonl"
    existed = path.exists()
    yield path
    if not existed:
        path.unlink(missing_ok=True)


def test_the_example_runs_and_its_run_goes_on_without_a_flag(tiny_host, tmp_path, example_data):
    small = [*TINY[2:], *FEW, "--model_name", str(tiny_host), "--save_dir", str(tmp_path)]
    code = ("import examples.own_data as example, generate, sys; ask = generate.main\n"
            f"generate.main = lambda argv: ask([*argv, '--save_dir', {str(tmp_path)!r}])\n"
            "sys.exit(example.main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", code, *small], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^prices +4 ", done.stdout, re.MULTILINE) and "> A cup costs $3" in done.stdout
    process = command("--resume", str(tmp_path / "prices"), "--eval_only")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert re.search(r"^prices +4 ", out, re.MULTILINE)
