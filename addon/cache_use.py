"""How a run uses a cache of hidden states, by `--cache_mode`: it fills and trains, or does one of the two alone."""

from __future__ import annotations

import functools
import os
import signal
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from addon.cache_plan import GB, CacheConfig, plan_cache
from addon.cache_shards import check_folder
from addon.hidden_cache import HiddenCache, key_of, weights_digest
from addon.kept_head import FILE, KeptHead, check_keepable, controller_on, find_head, head_bytes, keep_head, size_text
from batching import PromptFormat
from engine.loop import resume_command
from engine.machine import Machine
from engine.report import Report
from engine.stopping import StopRequested, interruptible, leavable
from engine.system import Evaluator
from host import DEFAULT_HOST
from model import AdapterConfig, HRMController
from reasoning_gym_wrapper import Example

SEEN_S = 20.0  # seconds until a file must be seen by every machine: network file systems remember what was not there


@dataclass(frozen=True)
class CacheUseConfig(CacheConfig):
    """A cache, and what a run does with it; each field is the flag of its name.

    cache_mode: both (fills what is missing, and trains), fill (alone), or train (from a full one, without the LLM).
    model_name, host_dtype: the LLM, and what its weights are held in.
    eval_only, dry_run: what a run does in place of training.
    The others ask the LLM for something beside what is cached.
    """

    cache_mode: str = "both"
    model_name: str = DEFAULT_HOST
    host_dtype: str = "auto"
    eval_only: bool = False
    dry_run: bool = False
    eval_every: int = 0
    log_samples_every: int = 0
    eval_suite: str | None = None
    patience: int = 0
    save_best_model: bool = False
    retain: str | None = None
    verifier_weight: float = 0.0
    curriculum: bool = False
    device_map: str = "none"
    load_in: str = "none"


def without_llm(config: CacheUseConfig) -> bool:
    """Whether a run never has the LLM in memory."""
    return config.cache_mode == "train" and not config.eval_only


def mode_problems(config: CacheUseConfig, explicit: Collection[str]) -> list[str]:
    """What contradicts --cache_mode, one line each; `explicit` names the flags that the user set."""
    mode = f"--cache_mode {config.cache_mode}"
    if config.load_in != "none" and config.cache_mode != "both" and not config.eval_only:
        return [f"{mode} does not keep the head of an LLM of --load_in {config.load_in}: leave that out, or use "
                "--cache_mode both"]
    if config.cache_mode == "fill" and (config.eval_only or config.dry_run):
        flag = "--eval_only" if config.eval_only else "--dry_run"
        return [f"{mode} fills a cache and does nothing else: leave out {flag}, or use --cache_mode both"]
    if not without_llm(config):
        return []

    # Evaluation by default is left for later; one that is asked for is refused.
    asking: dict[str, Any] = {
        "eval_every": config.eval_every if "eval_every" in explicit else 0,
        "log_samples_every": config.log_samples_every, "eval_suite": config.eval_suite, "patience": config.patience,
        "save_best_model": config.save_best_model, "retain": config.retain, "verifier_weight": config.verifier_weight,
        "curriculum": config.curriculum,
    }
    lines = []
    for name, value in asking.items():
        if value:
            shown = "" if value is True else f" {value}"
            lines.append(f"--{name}{shown} asks the LLM, and {mode} never loads it: leave one out")
    if config.device_map != "none":
        lines.append(f"--device_map {config.device_map} does nothing with {mode}, which never loads the LLM: leave it "
                     "out")
    return lines


def check_shared(folder: Path, machine: Machine) -> None:
    """Whether all processes see one folder: each fills its share, and would wait for ever for another's elsewhere.

    Raises:
        ValueError: they do not. All processes raise it together.
    """
    if machine.world == 1:
        return

    # Where the main process cannot write, nobody has anything to fill.
    mark = machine.of_main(lambda: _marked(folder))
    if mark is None:
        return
    started = time.monotonic()
    while not (folder / mark).exists() and time.monotonic() - started < SEEN_S:
        time.sleep(0.1)

    is_apart = machine.any_process(not (folder / mark).exists())
    if machine.is_main:
        (folder / mark).unlink(missing_ok=True)
    if is_apart:
        raise ValueError(f"--cache_dir {folder} is not the same folder for all {machine.world} processes, which share "
                         "the work: name one that every machine sees, or begin with one process")


def _marked(folder: Path) -> str | None:
    """The name of a new file in the folder, None where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix=".tmp-shared-", dir=folder)
    except OSError:
        return None
    os.close(handle)
    return Path(path).name


class CacheUse:
    """The cache of a run, planned before any model loads.

    Args:
        config: which, and what for.
        host_config: the LLM's.
        prompt_format: how items are put, with the LLM's tokenizer.
        machine: this process.
        examples: the items.

    Raises:
        ValueError: it is too large, cannot lie where it should or, for training without the LLM, is not all there.
    """

    def __init__(self, config: CacheUseConfig, host_config: Any, prompt_format: PromptFormat, machine: Machine,
                 examples: Sequence[Example]):
        self.config = config
        self.host_config = host_config
        self.format = prompt_format
        self.machine = machine
        self.head: KeptHead | None = None  # in place of the LLM
        self.cache: HiddenCache | None = None
        self.weights = ""  # digest of the LLM's, once it is loaded

        # In RAM each process of this machine holds a cache of its own, since every epoch deals the items anew.
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.plan = plan_cache(config, host_config, prompt_format, examples, processes)
        machine.say(
            f"--cache_hidden {config.cache_hidden}: {self.plan.size_text()}, at most --cache_max_gb "
            f"{config.cache_max_gb:g}"
        )
        if config.cache_mode == "train":
            self._find()
        elif config.cache_hidden == "disk":
            if machine.is_main:
                check_folder(self.plan, head_bytes(host_config) if config.cache_mode == "fill" else 0)
            if not config.dry_run:
                check_shared(Path(str(config.cache_dir)), machine)

    def _find(self) -> None:
        """The full cache, opened, and the head beside it. Raises ValueError."""
        config = self.config
        commit = getattr(self.host_config, "_commit_hash", None)
        self.head = find_head(self.plan, self.format.tokenizer, config.model_name, commit, config.host_dtype)
        self.cache = self._made(self.head.key)
        self.cache.open_whole()
        self.machine.say(size_text(self.head))

    def _made(self, key: str) -> HiddenCache:
        share = (self.machine.rank, self.machine.world)
        return HiddenCache(key, self.plan, self.format, self.machine.say, self.config.model_name, share)

    def controller(self, adapter: AdapterConfig) -> HRMController | None:
        """A new adapter on the head alone; None where the run has the LLM in memory. Raises ValueError."""
        if self.head is None:
            return None
        device = str(self.machine.device)
        return controller_on(self.head, adapter, self.host_config, self.config.model_name, device)

    def serve(self, trainer: Any, model: HRMController) -> Callable[[], None] | None:
        """Lets the cache stand in for the LLM in `trainer`; what is to be done before the first batch, if anything."""
        if self.config.dry_run and self.head is None:
            self.machine.say(
                "--dry_run leaves the cache of hidden states empty: its time is that of a step without it"
            )
            return None
        if self.cache is None:
            self.weights = weights_digest(model.host, whole=self.config.cache_hidden == "disk")
            self.cache = self._made(key_of(self.weights, self.config.hrm_read, self.format.tokenizer, self.plan))
        trainer.encode = self.cache.encoder(model, self.cache.key)
        return functools.partial(self.cache.fill, model)

    def fill_alone(self, model: HRMController) -> int:
        """Fills the cache and keeps the LLM's head beside it. Returns the exit status.

        Raises:
            ValueError: the disk refuses; a head that cannot be kept.
        """
        assert self.cache is not None
        check_keepable(model.host)
        with interruptible() as stop, leavable(True):  # nobody waits for a process that fills
            try:
                self.cache.fill(model)
            except StopRequested:
                self.machine.say("stopped: what is filled stays, and the same command goes on from it")
                return 128 + (stop.signal or signal.SIGTERM)

        if self.machine.is_main:
            written = keep_head(model, self.plan, self.cache.key, self.weights, self.format.pad_id)
            self.machine.say(
                f"the LLM's head and the embeddings of these items, {written / GB:.3f} GB, are in {FILE} beside it: "
                "--cache_mode train in place of fill trains without the LLM in memory"
            )
        return 0


class LaterEvaluator(Evaluator):
    """Stands in for an evaluation where the LLM is not in memory: says how it is done later.

    `folder` gives the run's.
    """

    def __init__(self, folder: Callable[[], Path]):
        self.folder = folder

    def evaluate(self, step: int) -> Report:
        """Measures nothing."""
        words = ("not evaluated: the LLM is not in memory. Where it is, this answers and measures:\n"
                 f"            {resume_command(self.folder())} --eval_only")
        return Report(rows=[], predictions=[], table=words, value=float("nan"))

    def samples(self, turn: int) -> list[str]:
        """None: answers need the LLM."""
        return []
