"""The floors of the flat layout: who may import whom, held here and nowhere else."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module imports only from lower floors. A new root module gets its line here, with its floor.
FLOORS = {
    "arithmetic_text": 0,
    "checkpointing": 0,
    "code_jail": 0,
    "code_runner": 0,
    "documents": 0,
    "enhanced_config": 0,
    "flags": 0,
    "host": 0,
    "halting": 0,
    "hrm_blocks": 0,
    "ngram_baselines": 0,
    "paired_statistics": 0,
    "prepared_data": 0,
    "reasoning_format": 0,
    "reasoning_gym_wrapper": 0,
    "run_logging": 0,
    "script_tools": 0,
    "suite_data": 0,
    "text_encoder": 0,
    "batching": 1,
    "curriculum": 1,
    "figures": 1,
    "code_judge": 1,
    "enhanced_layers": 1,
    "enhanced_tokenizer": 1,
    "hybrid_blocks": 1,
    "injector": 1,
    "optimization": 1,
    "optimizer_state": 1,
    "options": 1,
    "rewards": 1,
    "ablation": 2,
    "single_pass": 1,
    "training_stream": 1,
    "backbone": 2,
    "enhanced": 2,
    "evaluation": 2,
    "hybrid": 2,
    "hybrid_data": 2,
    "grpo_data": 2,
    "run_state": 2,
    "enhanced_training": 3,
    "grpo_eval": 3,
    "hybrid_text": 3,
    "hybrid_training": 3,
    "model": 3,
    "grpo_stages": 3,
    "suite_scoring": 3,
    "text_model": 3,
    "baselines": 4,
    "eval_suite": 4,
    "hidden_cache": 4,
    "grpo": 4,
    "training": 4,
    "param_matching": 5,
    "run_setup": 5,
    "run_loop": 6,
    "answering": 7,
    "enhanced_run": 7,
    "hybrid_run": 7,
    "run": 7,
    "grpo_run": 8,
    "generate": 9,
    "train": 9,
}
COMMANDS = ("train", "generate")
# Hidden by a root module of the same name even where they are not installed.
HIDEABLE = {
    *("accelerate", "bitsandbytes", "datasets", "evaluate", "numpy", "peft", "reasoning_gym", "safetensors"),
    *("tokenizers", "torch", "transformers", "trl", "wandb", "yaml"),
}


def imports(source: str) -> set[str]:
    """Top-level names of everything the source imports, at any depth, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level if node.level else (node.module or "").split(".")[0])
    return found


def problems(sources: dict[str, str], floors: dict[str, int]) -> list[str]:
    """Every breach of the table by root modules {name: source}."""
    found = [f"{name} is not in the table" for name in sorted(set(sources) - set(floors))]
    found += [f"{name} is in the table and not in the repository" for name in sorted(set(floors) - set(sources))]
    for name in sorted(set(sources) & set(floors)):
        for other in sorted(imports(sources[name])):
            if other.startswith("."):
                found.append(f"{name} imports relatively; root modules are no package")
            if floors.get(other, -1) >= floors[name]:
                found.append(f"{name} (floor {floors[name]}) imports {other} (floor {floors[other]})")
    return found


def sources(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.py"))}


def test_every_root_module_imports_only_from_lower_floors():
    assert problems(sources(ROOT), FLOORS) == []


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ({"low": "import high", "high": ""}, "low (floor 0) imports high (floor 1)"),
        ({"low": "def f():\n    from high import x", "high": ""}, "low (floor 0) imports high (floor 1)"),
        ({"low": "", "high": "import high.part"}, "high (floor 1) imports high (floor 1)"),
        ({"low": "from . import high", "high": ""}, "low imports relatively; root modules are no package"),
        ({"low": "", "high": "", "new": ""}, "new is not in the table"),
        ({"low": ""}, "high is in the table and not in the repository"),
    ],
)
def test_the_check_sees_each_kind_of_breach(broken, told):
    assert problems(broken, {"low": 0, "high": 1}) == [told]


def test_a_lower_floor_may_be_imported():
    assert problems({"low": "import torch", "high": "from low import x"}, {"low": 0, "high": 1}) == []


def test_nobody_imports_the_commands():
    everything = sources(ROOT) | {f"scripts/{name}": text for name, text in sources(ROOT / "scripts").items()}
    for name, text in everything.items():
        assert not imports(text) & set(COMMANDS), name


def test_no_root_module_hides_a_package():
    installed = set(importlib.metadata.packages_distributions())
    hidden = set(sources(ROOT)) & (set(sys.stdlib_module_names) | installed | HIDEABLE)
    assert not hidden


def test_train_help_does_not_import_torch():
    command = [sys.executable, "-X", "importtime", "train.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--task_config" in done.stdout and "--segments" in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}
    assert "argparse" in loaded  # the listing is there and is read right
    assert not loaded & {"torch", "transformers", "accelerate", "peft", "reasoning_gym", "numpy"}
