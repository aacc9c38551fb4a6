"""What a run needs before and around its loop: checks of the configuration, device, precision, signals."""

from __future__ import annotations

import argparse
import contextlib
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import options
from checkpointing import disk_check
from host import load_config
from reasoning_gym_wrapper import default_tasks, task_problems


class ConfigurationError(ValueError):
    """Everything that is wrong with a configuration, one line each, found before any model loads."""

    def __init__(self, problems: list[str]):
        super().__init__("; ".join(problems))
        self.problems = problems


def task_names(opts: argparse.Namespace) -> list[str]:
    """The chosen tasks, or the default ones."""
    return options.names(opts.tasks) or ([opts.task] if opts.task else default_tasks())


def task_config(opts: argparse.Namespace) -> str:
    """`--task_config`, which is `small` when no task is named and `default` otherwise."""
    return opts.task_config or ("default" if opts.task or opts.tasks else "small")


def pick_device(name: str) -> str:
    """The device of `--device`; auto prefers CUDA, then MPS."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def pick_precision(name: str, device: str) -> str:
    """none, bf16 or fp16; auto is bf16 where the hardware multiplies it natively."""
    if name != "auto":
        return name
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "none"
    flags = Path("/proc/cpuinfo").read_text() if device == "cpu" and Path("/proc/cpuinfo").exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "none"


def check(opts: argparse.Namespace, device: str) -> None:
    """Raises ConfigurationError with all problems that can be found without loading a model."""
    found = task_problems(task_names(opts), task_config(opts), opts.allow_code_tasks, supervised=not opts.eval_only)
    if opts.mixed_precision == "fp16" and device != "cuda":
        found.append("--mixed_precision fp16 needs a CUDA device (no loss scaling elsewhere): use bf16, auto or none")
    if device == "cuda" and not torch.cuda.is_available() or device == "mps" and not torch.backends.mps.is_available():
        found.append(f"--device {device} is not available here: use auto or cpu")
    if opts.log_csv and Path(opts.log_csv).is_dir():
        found.append(f"--log_csv {opts.log_csv} is a folder: name a file")
    try:
        config = load_config(opts.model_name, opts.trust_remote_code).get_text_config()
        if opts.lora_layers > config.num_hidden_layers:
            found.append(f"--lora_layers {opts.lora_layers}: {opts.model_name} has only {config.num_hidden_layers} layers")
    except ValueError as error:
        found.append(str(error))
    if not opts.dry_run:
        try:
            disk_check(Path(opts.save_dir))
        except ValueError as error:
            found.append(str(error))
    if found:
        raise ConfigurationError(found)


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


