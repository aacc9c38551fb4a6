"""The machine a run is on: device, precision, places to write, memory, and what is wrong with them."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object

from engine.checkpoints import FOLDER, disk_check
from engine.hardware import multiplies_bf16
from engine.ownership import check_free
from engine.sharding import TRUE
from engine.tables import check_csv
from engine.trackers import check_trackers
from engine.watch import start_watch
from flags import names

# What accelerate is told by ACCELERATE_USE_NAME; the variables are set by `accelerate launch`.
ENGINES = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM",
           "PARALLELISM_CONFIG": "tensor, context or sharded parallelism"}


@dataclass(frozen=True)
class MachineConfig:
    """Where a run computes and writes; each field is the flag of its name.

    device: auto, cpu, cuda or mps.
    mixed_precision: auto, none, bf16 or fp16.
    num_threads: threads of torch on the CPU; 0 = as torch chooses.
    trackers: comma list of where else to log; "" = nowhere.
    save_dir: folder of all runs.
    run_name: the run's folder in it; None = still to be named.
    log_csv: the evaluation table; None = eval.csv in the run's folder.
    resume: the checkpoint or run to go on from, as typed; None = none is named.
    reset_progress: True begins a new run from the weights of a checkpoint.
    dry_run: True writes nothing.
    eval_only: True evaluates a checkpoint, beside a process that trains it as well.
    ddp_timeout_s: seconds without an answer from a process's machine after which it counts as dead; 0 = nobody
        watches.
    """

    device: str = "auto"
    mixed_precision: str = "auto"
    num_threads: int = 0
    trackers: str = ""
    save_dir: str = "runs"
    run_name: str | None = None
    log_csv: str | None = None
    resume: str | None = None
    reset_progress: bool = False
    dry_run: bool = False
    eval_only: bool = False
    ddp_timeout_s: float = 45.0


def pick_device(name: str) -> str:
    """The device of `--device`; auto prefers CUDA, then MPS. Raises ValueError for one that is not here."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, available in here.items() if available)
    if not here[name]:
        raise ValueError(f"--device {name} is not available here: use auto or cpu")
    return name


def pick_precision(name: str, device: str) -> str:
    """none, bf16 or fp16; auto is bf16 where the hardware multiplies it natively, else none."""
    if name != "auto":
        return name

    # Emulated, bf16 is slower than float32.
    return "bf16" if multiplies_bf16(device) else "none"


def run_folder(config: MachineConfig, checkpoint: Path | None) -> Path | None:
    """The folder of the run that `checkpoint` lies in, else of the named one; None: a new one that is still to name."""
    if checkpoint and checkpoint.parent.name == FOLDER and not config.reset_progress:
        return checkpoint.parent.parent
    if config.run_name:
        return Path(config.save_dir) / config.run_name
    return None


def machine_problems(config: MachineConfig, checkpoint: Path | None = None, can_shard: bool = False) -> list[str]:
    """What is wrong with device, trackers and places to write, one line each. Leaves nothing behind.

    Args:
        config: the flags of the run.
        checkpoint: the checkpoint that the run goes on from; None for a new run.
        can_shard: the run has a frozen LLM that FSDP may share, as `engine.sharding.check_sharding` says.
    """
    lines = errors_of(check_engines, can_shard)
    lines += errors_of(check_device, config.device, config.mixed_precision)
    lines += errors_of(check_trackers, names(config.trackers))
    if config.dry_run or os.environ.get("RANK", "0") != "0":  # ranks would take away each other's probe
        return lines

    # The run's folder and the CSV are tried before anything is written to them.
    folder = run_folder(config, checkpoint) or Path(config.save_dir)
    csv = Path(config.log_csv or folder / "eval.csv")
    for place in dict.fromkeys((folder, csv.parent)):
        lines += errors_of(disk_check, place)
    if not config.eval_only:
        lines += errors_of(check_free, folder)
    return lines + errors_of(check_csv, csv)


def check_engines(can_shard: bool = False) -> None:
    """Raises ValueError where the environment asks accelerate for an engine that this run does not train with."""
    for name, engine in ENGINES.items():
        value = os.environ.get(f"ACCELERATE_USE_{name}", "")
        if value.lower() in TRUE and not (can_shard and name == "FSDP"):
            raise ValueError(
                f"ACCELERATE_USE_{name}={value} asks for {engine}, which this run does not train with: several "
                "processes train by DDP, and with --arch addon FSDP version 2 may share the LLM; unset it, or choose "
                "multi-GPU or FSDP in accelerate's config"
            )


def errors_of(check: Callable[..., object], *arguments: Any) -> list[str]:
    """At most one line: the message of the ValueError or OSError that `check(*arguments)` raises."""
    try:
        check(*arguments)
    except (ValueError, OSError) as error:
        return [str(error)]
    return []


def check_device(device: str, mixed_precision: str) -> None:
    """Raises ValueError for a device that is not here, or a precision that it cannot train in."""
    if pick_device(device) != "cuda" and mixed_precision == "fp16":
        raise ValueError("--mixed_precision fp16 needs CUDA (no loss scaling elsewhere): use bf16, auto or none")


@dataclass(frozen=True)
class Machine:
    """Where a run computes, and which of its processes this one is."""

    accelerator: Accelerator
    precision: str  # none, bf16 or fp16: what autocast computes in

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """True for the process that writes files and talks to the user."""
        return self.accelerator.is_main_process

    def say(self, text: str) -> None:
        """A line for the user on stderr, from one process."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    def any_process(self, flag: bool) -> bool:
        """True on all processes as soon as `flag` is true on one."""
        if self.world == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(int(flag), device=self.device), "sum"))

    def wait(self) -> None:
        """Waits until all processes are here."""
        self.accelerator.wait_for_everyone()

    def of_main(self, read: Callable[[], Any]) -> Any:
        """What `read()` returns in the main process, alike in all; it travels as a pickle between them."""
        if self.world == 1:
            return read()
        return gather_object([read() if self.is_main else None])[0]

    def mean_of_processes(self, value: float) -> float:
        """The mean of every process's `value`, alike on all."""
        return float(self.accelerator.reduce(torch.tensor(value, device=self.device), "mean"))


def start_machine(config: MachineConfig, handlers: Sequence[Any] = ()) -> Machine:
    """Takes the device and joins the other processes of the run. `handlers` are accelerate's.

    Raises:
        ValueError: the device is not available here.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    # Before anything is computed: torch divides its work among these threads.
    device = pick_device(config.device)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=list(handlers))
    machine = Machine(accelerator, pick_precision(config.mixed_precision, device))

    # One that dies must not leave the others waiting.
    start_watch(machine, config.ddp_timeout_s)
    return machine


def peak_memory(device: torch.device) -> int:
    """Bytes: the most this process has held, on the GPU where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)

    unit = 1 if sys.platform == "darwin" else 1024  # of what the system counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


