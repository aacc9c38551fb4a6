"""What a run needs before and around its loop: checks of the configuration, device, precision, signals."""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import options
from addon.curriculum import curriculum_problems
from engine.checkpoints import FOLDER, disk_check
from engine.logs import check_csv, check_trackers
from enhanced.tokenizer import reasoning_tokenizer
from grpo.stages import stages_of
from host import load_config
from hybrid.data import data_problems
from reasoning_gym_wrapper import default_tasks, make_tasks, task_problems
from suite.measure import check_code_runner
from suite.questions import parse_suite, suite_problems


def task_names(opts: argparse.Namespace) -> list[str]:
    """The chosen tasks, or the default ones."""
    return options.names(opts.tasks) or ([opts.task] if opts.task else default_tasks())


def task_config(opts: argparse.Namespace) -> str:
    """`--task_config`, which is `small` when no task is named and `default` otherwise."""
    return opts.task_config or ("default" if opts.task or opts.tasks else "small")


def pick_device(name: str) -> str:
    """The device of `--device`; auto prefers CUDA, then MPS. Raises ValueError for one that is not here."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, available in here.items() if available)
    if not here[name]:
        raise ValueError(f"--device {name} is not available here: use auto or cpu")
    return name


def pick_precision(name: str, device: str) -> str:
    """none, bf16 or fp16; auto is bf16 where the hardware multiplies it natively."""
    if name != "auto":
        return name
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "none"
    flags = Path("/proc/cpuinfo").read_text() if device == "cpu" and Path("/proc/cpuinfo").exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "none"


def run_folder(opts: argparse.Namespace, checkpoint: Path | None) -> Path | None:
    """The folder of the run that `checkpoint` lies in, else of the named one; None: a new one that is still to name."""
    if checkpoint and checkpoint.parent.name == FOLDER and not opts.reset_progress:
        return checkpoint.parent.parent
    return Path(opts.save_dir) / opts.run_name if opts.run_name else None


def check(opts: argparse.Namespace, checkpoint: Path | None = None) -> list[str]:
    """All problems that can be found without loading a model, one line each."""
    checks = [(_check_device, opts), (check_trackers, options.names(opts.trackers))]
    if opts.arch == "hybrid":
        found = data_problems(opts)
    elif opts.arch == "enhanced":
        found = stages_of(opts)[1] + _tokenizer_problems(opts)
    else:
        found = task_problems(task_names(opts), task_config(opts), opts.allow_code_tasks, not opts.eval_only)
        found += curriculum_problems(task_names(opts)) if opts.curriculum and not found else []
        checks.append((_check_host, opts))
        if opts.objective == "grpo" and checkpoint is None:
            found.append("--arch addon --objective grpo needs --resume CHECKPOINT, one trained with --objective ce")
        if opts.objective == "grpo" and not found:
            found += stages_of(opts, make_tasks(task_names(opts), task_config(opts)))[1]
    if opts.eval_suite:
        found += suite_problems(opts.eval_suite) or _code_problems(opts)
    if not opts.dry_run and os.environ.get("RANK", "0") == "0":  # ranks would take away each other's probe
        folder = run_folder(opts, checkpoint) or Path(opts.save_dir)
        csv = Path(opts.log_csv or folder / "eval.csv")
        checks += [(disk_check, place) for place in dict.fromkeys((folder, csv.parent))] + [(check_csv, csv)]
    for problem_of, what in checks:
        try:
            problem_of(what)
        except (ValueError, OSError) as error:
            found.append(str(error))
    return found


def _tokenizer_problems(opts: argparse.Namespace) -> list[str]:
    """At most one line: a tokenizer that cannot hold the reasoning tags."""
    try:
        reasoning_tokenizer(opts.tokenizer)
    except ValueError as error:
        return [str(error)]
    return []


def _code_problems(opts: argparse.Namespace) -> list[str]:
    """At most one line: the suite would run generated code that nothing confines."""
    try:
        check_code_runner(parse_suite(opts.eval_suite), opts.allow_unconfined_code)
    except ValueError as error:
        return [str(error)]
    return []


def _check_device(opts: argparse.Namespace) -> None:
    if pick_device(opts.device) != "cuda" and opts.mixed_precision == "fp16":
        raise ValueError("--mixed_precision fp16 needs CUDA (no loss scaling elsewhere): use bf16, auto or none")


def _check_host(opts: argparse.Namespace) -> None:
    config = load_config(opts.model_name, opts.trust_remote_code).get_text_config()
    if opts.lora_layers > config.num_hidden_layers:
        raise ValueError(
            f"--lora_layers {opts.lora_layers}: {opts.model_name} has only {config.num_hidden_layers} layers"
        )
    positions = getattr(config, "max_position_embeddings", None) or opts.max_seq_len
    virtual = opts.virtual_tokens if opts.adapter == "prompt" else 0
    if opts.max_seq_len + virtual > positions and virtual:
        raise ValueError(
            f"--max_seq_len {opts.max_seq_len} and --virtual_tokens {virtual} are more than the {positions} positions "
            f"of {opts.model_name}: lower one"
        )
    if opts.max_seq_len > positions:
        raise ValueError(
            f"--max_seq_len {opts.max_seq_len} is more than the {positions} positions of {opts.model_name}: lower it"
        )


class Stop:
    """Which signal asked for an orderly end, if any."""

    signal: int | None = None


@contextlib.contextmanager
def interruptible() -> Iterator[Stop]:
    """Inside, Ctrl-C and SIGTERM ask the loop to end after its step; a second one ends at once."""
    stop = Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        stop.signal = number
        for each, handler in before.items():
            signal.signal(each, handler)
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most this process has held, on the GPU where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


