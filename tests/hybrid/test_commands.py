"""The commands of docs/hybrid.md, in their order, as a user types them: files made small, steps cut."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from patience import HANG_S
from tiny_runs import ROOT, command, newest, only_run, tensors

TRAIN = ("--steps 2 --batch_size 2 --eval_batch_size 2 --eval_n 4 --d_model 16 --d_h 16 --n_heads 2 --encoder_layers 1 "
         "--decoder_layers 1 --state_size 4 --num_threads 1 --mixed_precision none").split()
STORY = ("The number of birds on the old wall was {0}. When the wind rose, {1} of them left for the warm side of the "
         "hill and the rest stayed to sing until the evening came. ")


def documented_commands() -> list[list[str]]:
    """The words of every command of docs/hybrid.md."""
    text = (ROOT / "docs" / "hybrid.md").read_text(encoding="utf-8")
    return [shlex.split(line, comments=True) for line in re.findall(r"^    python (.*)$", text, re.MULTILINE)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A folder with what the commands name: a text, and GSM8K in its published form."""
    folder = tmp_path_factory.mktemp("hybrid")
    (folder / "text").mkdir()
    documents = ["".join(STORY.format(i + j, j) for j in range(3)) for i in range(60)]
    (folder / "text" / "birds.txt").write_text("\n\n".join(documents), encoding="utf-8")
    rows = [{"question": f"Ann has {i} pens and buys {i + 1}. How many has she?",
             "answer": f"She has {i} + {i + 1} = <<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1} pens.\n#### {2 * i + 1}"}
            for i in range(60)]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def small(words: list[str], folder: Path) -> list[str]:
    """The same command on the small files of `folder`."""
    script, argv = words[0], list(words[1:])
    for index, word in enumerate(argv):
        if word.startswith(("raw/", "text/", "prepared/")):
            argv[index] = str(folder / word)
        elif word.startswith("runs/"):
            argv[index] = str(folder / word)
        elif word == "RUN":
            argv[index] = str(folder / "runs" / "hrm-stageC")
        elif word.startswith("perplexity="):
            files = {"perplexity": "text/birds.txt", "gsm8k": "gsm8k.jsonl"}
            argv[index] = ",".join(f"{name}={folder / path}" for name, path in files.items()) + ",synthetic"
    if script.endswith("build_reasoning_dataset.py"):
        argv += ["--source", str(folder / "gsm8k.jsonl")]
    if script.endswith("prepare_language_dataset.py"):
        argv[argv.index("--val-ratio") + 1 if "--val-ratio" in argv else len(argv) :] = []
        argv += (["0.2"] if argv[-1] == "--val-ratio" else ["--val-ratio", "0.2"])
        argv += [] if "--tokenizer" in argv else ["--vocab-size", "300"]
    if script.endswith("merge_prepared_batches.py"):
        argv[argv.index("--train-samples") + 1], argv[argv.index("--val-samples") + 1] = "40", "8"
    if script == "train.py":
        argv += [*TRAIN, "--save_dir", str(folder / "runs")]
    if script == "train.py" and "--eval_only" in argv:
        argv = [*argv[: argv.index("--steps")], "--eval_suite_n", "2", "--max_new_tokens", "4", "--num_threads", "1"]
    if script == "generate.py":
        argv += ["--save_dir", str(folder / "runs"), "--max_new_tokens", "4"]
    return [script, *argv]


@pytest.mark.slow
def test_the_documented_commands_run_from_raw_files_to_the_suite(sources):
    commands = documented_commands()
    assert [sum(words[0].endswith(name) for words in commands) for name in (
        "train.py", "generate.py", "build_reasoning_dataset.py", "merge_prepared_batches.py")] == [6, 1, 1, 1]
    for words in commands:
        script, *argv = small(words, sources)
        process = command(*argv, script=script)
        out, err = process.communicate(timeout=HANG_S)
        assert process.returncode == 0, f"{script} {argv}: {err[-2000:]}"
        assert "Traceback" not in err, err
        if script == "generate.py":
            assert out.startswith("> What is 12 + 7?\ngate shut") and "\nhybrid" in out
    stages = ["hrm-gated-pretrain", "hrm-stageB", "hrm-stageC"]
    assert {folder.name for folder in (sources / "runs").iterdir()} >= set(stages)
    rows = (sources / "runs" / "hrm-stageC" / "eval.csv").read_text(encoding="utf-8")
    assert all(f"suite/{name}," in rows for name in ("perplexity", "gsm8k", "synthetic"))
    first = (sources / "runs" / stages[0] / "eval.csv").read_text(encoding="utf-8")
    assert "gate_mean" in rows and "gate_mean" not in first


@pytest.mark.slow
def test_two_processes_train_the_hybrid_as_one_with_twice_the_batch(tmp_path):
    """Through the gate's opening: while it is shut HRM takes part in no backward."""
    shared = ("--arch hybrid --dataset synthetic --hrm_gate_warmup_steps 2 --deep_supervision --use_halting "
              "--grad_accum_steps 2 --optimizer adamw --val_every 3 --steps 6 --log_steps 1").split()
    tiny = [*TRAIN[4:], "--steps", "6", "--device", "cpu"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    two = subprocess.run([*launch, *shared, *tiny, "--batch_size", "4", "--save_dir", str(tmp_path / "two")], cwd=ROOT,
                         capture_output=True, text=True, env=environment, timeout=HANG_S)
    assert two.returncode == 0, two.stderr[-2000:]
    one = command(*shared, *tiny, "--batch_size", "8", "--save_dir", str(tmp_path / "one"))
    _, err = one.communicate(timeout=HANG_S)
    assert one.returncode == 0, err
    folders = [only_run(tmp_path / name) for name in ("two", "one")]
    ours, theirs = (tensors(newest(folder), "model") for folder in folders)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5, msg=name)
    rows = [(folder / "eval.csv").read_text(encoding="utf-8").splitlines() for folder in folders]
    assert len(rows[0]) == len(rows[1]) > 8
    for line, other in zip(*([row.split(",") for row in part[1:]] for part in rows), strict=True):
        assert line[:3] + line[4:5] == other[:3] + other[4:5]
        assert float(line[3]) == pytest.approx(float(other[3]), rel=1e-3, abs=1e-5)
