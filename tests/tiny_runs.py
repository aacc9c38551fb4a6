"""Tiny runs of `train.py` on the tiny host, in this process or in one of their own, and what they leave behind."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator

import options
import train
from addon.adapters import build_controller
from addon_run import adapter_config
from batching import PromptConfig
from engine.files import json_lines
from engine.optimization import OptimConfig
from host import HostConfig
from model import AdapterController, HRMController
from tiny_families import randomise
from training import AddonStepConfig, Trainer

ROOT = Path(train.__file__).parent
TINY = (
    "--task toy_add --d_h 16 --n_heads 2 --segments 2 --inner_T 1 --batch_size 4 --max_steps 3 --eval_n 4 "
    "--eval_batch_size 4 --max_new_tokens 4 --mixed_precision none --log_steps 1 --num_threads 1 --device cpu "
    "--report 0"
).split()


def arguments(host: Path, save_dir: Path, *more: str) -> list[str]:
    """A whole command line; later flags win."""
    return ["--model_name", str(host), "--save_dir", str(save_dir), *TINY, *more]


def tiny_model(host: Path, **changes) -> HRMController:
    """A controller on the tiny host as a run builds it, its zero factors random as after training."""
    opts = options.parse(TINY)
    opts = options.replace(opts, **{"model_name": str(host), "init_state": "fixed", **changes})
    torch.manual_seed(0)
    return randomise(controller_of(opts)).eval()


def controller_of(opts: options.Options) -> AdapterController:
    """The adapter that the flags describe, as a run builds it, on the CPU."""
    return build_controller(options.part(HostConfig, opts), adapter_config(opts), "cpu")


def tiny_trainer(
    opts: options.Options,
    controller: Any,
    precision: str = "none",
    verdicts: Any = None,
    accelerator: Accelerator | None = None,
) -> Trainer:
    """A trainer of the controller as a run with `opts` builds it."""
    parts = [options.part(kind, opts) for kind in (AddonStepConfig, OptimConfig, PromptConfig)]
    return Trainer(*parts, controller, accelerator or Accelerator(cpu=True), precision, verdicts)


def command(
    *argv: str, script: str = "train.py", prefix: Sequence[str] = (), **environment: str
) -> subprocess.Popen:
    """The command in a process of its own, as a user types it behind `prefix`; stdout and stderr are pipes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
    return subprocess.Popen([*prefix, sys.executable, script, *argv], cwd=ROOT, encoding="utf-8", env=environment,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def only_run(save_dir: Path) -> Path:
    """The one run folder in `save_dir`."""
    (folder,) = [path for path in save_dir.iterdir() if path.is_dir()]
    return folder


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def tensors(checkpoint: Path, stem: str = "training_state") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(checkpoint / f"{stem}.safetensors")


def records(run: Path) -> dict[str, list]:
    """What a run recorded, without its id and the columns that hold wall-clock time."""
    with open(run / "eval.csv", newline="", encoding="utf-8") as file:
        own = ("elapsed_s", "run")
        rows = [{key: value for key, value in row.items() if key not in own} for row in csv.DictReader(file)]
    names = ("metrics.jsonl", "predictions.jsonl")  # a hybrid leaves no predictions
    lines = {name: [line for _, line in json_lines(run / name)] if (run / name).exists() else [] for name in names}
    timed = ("elapsed_s", "examples_per_second", "tokens_per_second")
    steps = [{key: value for key, value in line.items() if key not in timed} for line in lines["metrics.jsonl"]]
    return {"eval": rows, "metrics": steps, "predictions": lines["predictions.jsonl"]}


def assert_same_run(one: Path, other: Path, stem: str = "adapter_model") -> None:
    """Bit for bit: weights, optimizer, averages, random state, position in the data, figures and answers."""
    assert newest(one).name == newest(other).name
    for part in (stem, "training_state"):
        ours, theirs = tensors(newest(one), part), tensors(newest(other), part)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    states = [json.loads((newest(run) / "training_state.json").read_text(encoding="utf-8")) for run in (one, other)]
    assert states[0] | {"elapsed_s": 0} == states[1] | {"elapsed_s": 0}
    assert records(one) == records(other)


def error_lines(text: str, prog: str = "train.py") -> list[str]:
    """The problems told on stderr, which may hold nothing else but warnings of ours."""
    lines = [line for line in text.splitlines() if not line.startswith("WARNING: ")]
    assert all(line.startswith(f"{prog}: error: ") for line in lines), text
    assert not re.search(r"Traceback|File \"", text)
    return [line.removeprefix(f"{prog}: error: ") for line in lines]
