"""The commands of docs/addon.md as a user types them, on tiny settings; two processes as one."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from patience import HANG_S
from tiny_runs import ROOT, arguments, command, newest, only_run, records, tensors

# What makes a published command small. The embedded LLM of commands that name none is the shipped one.
SMALL = ("--max_steps 2 --train_n 12 --eval_n 3 --batch_size 2 --eval_batch_size 4 --max_new_tokens 4 "
         "--max_seq_len 400 --overlong drop --num_threads 1").split()


def documented_commands() -> list[list[str]]:
    """The words of every `python train.py` and `python generate.py` line of the `Use it` block of docs/addon.md."""
    text = (ROOT / "docs" / "addon.md").read_text(encoding="utf-8").partition("## Use it")[2].partition("\n## ")[0]
    lines = re.findall(r"^    (python3? (?:train|generate)\.py.*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def published() -> list[list[str]]:
    """The five commands that were published, as typed."""
    return [words for words in documented_commands() if "generate.py" not in words and "--dry_run" not in words]


@pytest.fixture(scope="module")
def outcomes(tiny_host, tmp_path_factory):
    """What each of these commands printed: those that train at once, then those that need their run."""
    save_dir = tmp_path_factory.mktemp("readme")
    found: dict[str, tuple[int, str, str]] = {}

    def run_all(commands: list[list[str]]) -> None:
        running = []
        for words in commands:
            own = save_dir / str(len(found) + len(running))
            argv = [str(save_dir / "0") if word == "PATH" else word for word in words[2:]]
            if "--model_name" in argv:
                argv[argv.index("--model_name") + 1] = str(tiny_host)
            if "generate.py" in words:
                argv += ["--max_new_tokens", "4", "--save_dir", str(save_dir / "0")]
            elif "--eval_only" in argv:
                argv[argv.index("--resume") + 1] = str(only_run(save_dir / "0"))
                argv += SMALL
            else:
                argv += [*SMALL, "--save_dir", str(own)]
            running.append((" ".join(words), command(*argv, script=words[1])))
        for text, process in running:
            out, err = process.communicate(timeout=HANG_S)
            found[text] = (process.returncode, out, err)

    later = [words for words in documented_commands() if "PATH" in words or "generate.py" in words]
    run_all([words for words in documented_commands() if words not in later])
    run_all(later)
    return found


def test_the_docs_show_the_five_published_commands():
    words = [" ".join(line[2:]) for line in published()]
    assert len(words) == 5
    assert words[:3] == [
        "--task basic_arithmetic --segments 3 --train_n 2000 --eval_n 256 --batch_size 16",
        "--tasks basic_arithmetic,gsm_symbolic,chain_sum,simple_equations --segments 3 --train_n 4000 --eval_n 512 "
        "--batch_size 16",
        "--task basic_arithmetic --resume PATH --eval_only --eval_n 1024 --eval_every 1000"]
    hub = r"--model_name \S+ "
    assert re.fullmatch(hub + "--segments 3 --inner_T 3 --lr 2e-4 --batch_size 2 --max_steps 50", words[3])
    assert re.fullmatch(hub + "--segments 4 --inner_T 4 --use_act --batch_size 2 --lr 1e-4 --max_steps 1000", words[4])


@pytest.mark.parametrize("text", [" ".join(words) for words in documented_commands()])
def test_a_documented_command_works_as_typed(outcomes, text):
    status, out, err = outcomes[text]
    assert status == 0, err[-2000:]
    assert "Traceback" not in err
    if "generate.py" in text:
        assert out.startswith("> ") and "\nbare LLM" in out and "\nLLM + HRM" in out
    elif "--dry_run" in text:
        assert out == "" and "nothing was written" in err
    else:
        assert out.startswith("task") and "evaluation: " in out and "next:       python generate.py" in out
        checkpoint = re.search(r"^checkpoint: (.*)$", out, re.MULTILINE)[1]
        curve = Path(checkpoint).parent.parent / "curve.png"
        assert (Path(checkpoint) / "adapter_model.safetensors").exists() and curve.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--optimizer adamw --supervised_segments 0 --segments_sampling fixed --ema 0.9",
                                   "--optimizer muon --use_act --grad_accum_steps 2 --train_n 40 --few_shot 2"])
def test_two_processes_train_as_one_with_twice_the_batch(tiny_host, tmp_path, flags):
    flags = [*"--init_state fixed --lr 1e-3 --max_steps 4 --eval_every 2 --eval_n 7".split(), *flags.split()]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    two = subprocess.run([*launch, *arguments(tiny_host, tmp_path / "two", *flags)], cwd=ROOT, capture_output=True,
                         text=True, env=environment, timeout=HANG_S)
    assert two.returncode == 0, two.stderr[-2000:]
    one = command(*arguments(tiny_host, tmp_path / "one", *flags, "--batch_size", "8"))
    _, err = one.communicate(timeout=HANG_S)
    assert one.returncode == 0, err
    assert "2 processes, 8 examples a batch" in two.stderr and two.stdout.count("Wilson") == 1
    folders = [only_run(tmp_path / name) for name in ("two", "one")]
    ours, theirs = (tensors(newest(folder), "adapter_model") for folder in folders)
    near = 1e-4 if "muon" in flags else 1e-5  # Muon orthogonalises in bf16: the order of a sum shows
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=near, msg=name)
    found, expected = (records(folder) for folder in folders)
    metrics = {row["metric"] for row in expected["eval"]}  # one table, whole, of all items
    assert found["eval"] == expected["eval"] and len(found["eval"]) == 2 * len(metrics)
    assert found["predictions"] == expected["predictions"]
    for line, other in zip(found["metrics"], expected["metrics"], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4) and line["tokens"] == other["tokens"]
