"""How the LLM computes attention: recorded with what is trained on it, and used wherever that is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from addon.adapters import ADAPTER_CONFIG, load_controller
from engine.checkpoints import read_checkpoint, step_folder, write_checkpoint
from tiny_runs import newest, only_run

pytestmark = pytest.mark.usefixtures("no_curve")  # conftest.py


def attention(folder: Path) -> str:
    return load_controller(folder)[0].host.config._attn_implementation


def with_attention(folder: Path, to: Path, name: str | None) -> Path:
    """A copy of a checkpoint whose record names another attention; None: it is older, and names none."""
    saved = read_checkpoint(folder)
    record = json.loads(saved.documents[ADAPTER_CONFIG])
    record.pop("attn_implementation")
    if name:
        record["attn_implementation"] = name
    place = step_folder(to, 1)
    write_checkpoint(place, saved.tensors, saved.documents | {ADAPTER_CONFIG: json.dumps(record)})
    return place


def test_what_was_trained_with_an_attention_is_answered_with_it(call, tmp_path, capsys):
    """In evaluation and wherever the checkpoint is loaded; an older record takes transformers' choice, as ever."""
    assert call("--attn_implementation", "eager", "--run_name", "A")[0] == 0
    folder = newest(only_run(tmp_path / "runs"))
    assert attention(folder) == "eager"
    assert attention(with_attention(folder, tmp_path / "older", None)) == "sdpa"

    # Typed, another one may be tried; without it the run goes on with its own.
    assert call("--run_name", "A", "--eval_only", "--attn_implementation", "sdpa")[0] == 0
    assert call("--run_name", "A", "--max_steps", "4")[0] == 0
    assert attention(newest(only_run(tmp_path / "runs"))) == "eager"

    # Neither a package that is missing nor code of the hub keeps a checkpoint from being loaded.
    capsys.readouterr()
    for name, reason in (("flash_attention_2", "cannot be loaded"), ("some/kernel", "add --trust_remote_code")):
        assert attention(with_attention(folder, tmp_path / name.replace("/", "-"), name)) == "sdpa"
        told = capsys.readouterr().err
        assert f"was trained with --attn_implementation {name}" in told and reason in told
