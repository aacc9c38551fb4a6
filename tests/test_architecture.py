"""What lies at the root of the repository, and who may import whom. The rule is held here and nowhere else."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from patience import HANG_S

ROOT = Path(__file__).resolve().parent.parent

# A file imports from earlier rows only, and inside its own package without a circle. A new file inside a package needs
# no line here; docs/architecture.md shows the same table.
ROWS = (
    ("flag_table",),
    ("flags", "rules"),
    ("options",),
    ("sandbox", "engine"),
    ("text_data", "tasks"),
    ("suite", "verify"),
    ("hrm_blocks", "host", "reasoning_gym_wrapper"),
    ("injector", "batching", "own_tasks"),
    ("thinking",),
    ("model", "evaluation"),
    ("text_model",),
    ("addon", "hybrid", "enhanced"),
    ("training",),
    ("addon_run",),
    ("grpo",),
    ("train", "generate"),
)
ROW_OF = {unit: row for row, units in enumerate(ROWS, start=1) for unit in units}
COMMANDS = ROWS[-1]
MOST_ROOT_FILES = 15
# Hidden by a root module or package of the same name even where they are not installed.
HIDEABLE = {
    *("accelerate", "bitsandbytes", "datasets", "evaluate", "numpy", "peft", "reasoning_gym", "safetensors"),
    *("tokenizers", "torch", "transformers", "trl", "wandb", "yaml"),
}


def imports(source: str) -> set[str]:
    """Dotted names of everything the source imports, at any depth, lazily or not; a leading dot: relatively."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def sources() -> dict[str, str]:
    """Dotted module name -> source, of the root and of every package; scripts aside."""
    packages = [unit for unit in ROW_OF if (ROOT / unit).is_dir()]
    paths = [*ROOT.glob("*.py"), *(path for unit in packages for path in (ROOT / unit).rglob("*.py"))]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(paths)}
    return {name: path.read_text(encoding="utf-8") for path, name in names.items()}


def unit_of(module: str) -> str:
    """The row's entry a module belongs to: its package, or itself at the root."""
    return module.split(".")[0]


def breaches(modules: dict[str, str], row_of: dict[str, int]) -> list[str]:
    """Every breach of the table by `modules` {dotted name: source}, one line each."""
    lines = []
    for name, source in sorted(modules.items()):
        unit = unit_of(name)
        if unit not in row_of:
            lines.append(f"{name} is in no row")
            continue
        for other in sorted({unit_of(found) if found[0] != "." else "." for found in imports(source)}):
            if other == ".":
                lines.append(f"{name} imports relatively: write the whole name")
            elif other in row_of and other != unit and row_of[other] >= row_of[unit]:
                lines.append(f"{name} (row {row_of[unit]}) imports {other} (row {row_of[other]})")
    known = {unit_of(name) for name in modules}
    lines += [f"{unit} is in the table and not in the repository" for unit in row_of if unit not in known]
    return lines + circles(modules)


def circles(modules: dict[str, str]) -> list[str]:
    """At most one line: modules that import each other in a circle. A package stands for its `__init__`."""
    short = {name.removesuffix(".__init__"): name for name in modules}
    graph = {}
    for name, source in modules.items():
        graph[name] = {short[found] for found in imports(source) if found in short} - {name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return ["a circle of imports: " + " -> ".join(error.args[1])]
    return []


def test_a_file_imports_from_earlier_rows_only():
    assert breaches(sources(), ROW_OF) == []


@pytest.mark.parametrize(
    ("modules", "line"),
    [
        ({"low": "import high", "high": ""}, "low (row 1) imports high (row 2)"),
        ({"low": "def f():\n    from high import x", "high": ""}, "low (row 1) imports high (row 2)"),
        ({"low.part": "from high.part import x", "high.part": ""}, "low.part (row 1) imports high (row 2)"),
        ({"low": "", "high": "from . import low"}, "high imports relatively: write the whole name"),
        ({"low": "", "high": "", "new": ""}, "new is in no row"),
        ({"low": ""}, "high is in the table and not in the repository"),
        ({"low": "", "high.a": "import high.b", "high.b": "from high import a"},
         "a circle of imports: high.a -> high.b -> high.a"),
    ],
)
def test_the_check_sees_each_kind_of_breach(modules, line):
    row_of = {"low": 1, "high": 2}
    told = breaches(modules, row_of)
    assert len(told) == 1
    assert told == [line] or sorted(told[0].split(": ")[-1].split(" -> ")) == sorted(line.split(": ")[-1].split(" -> "))


def test_earlier_rows_and_the_own_package_may_be_imported():
    high = {"high.__init__": "", "high.a": "from high import b\nfrom low import x", "high.b": ""}
    modules = {"low": "import torch", **high}
    assert breaches(modules, {"low": 1, "high": 2}) == []


def test_nobody_imports_the_commands_or_the_scripts():
    scripts = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "scripts").glob("*.py")}
    for name, source in (sources() | scripts).items():
        assert not {unit_of(found) for found in imports(source)} & set(COMMANDS), name
    for name, source in sources().items():
        assert not {unit_of(found) for found in imports(source)} & {"scripts", *scripts}, name
    assert circles(scripts) == []


def test_few_files_lie_at_the_root():
    assert len(list(ROOT.glob("*.py"))) <= MOST_ROOT_FILES


def test_nothing_of_ours_hides_a_package():
    installed = set(importlib.metadata.packages_distributions())
    ours = {unit_of(name) for name in sources()}
    assert not ours & (set(sys.stdlib_module_names) | installed | HIDEABLE)


def test_train_help_does_not_import_torch():
    command = [sys.executable, "-X", "importtime", "train.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--task_config" in done.stdout and "--segments" in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}
    assert "argparse" in loaded  # the listing is there and is read right
    assert not loaded & {"torch", "transformers", "accelerate", "peft", "reasoning_gym", "numpy"}
