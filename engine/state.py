"""The state of a run on disk: what a checkpoint of `train.py` holds, and how a run goes on from it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import options
from engine.checkpoints import (
    STEP_NAME,
    Checkpoint,
    mark_best,
    read_checkpoint,
    rotate,
    step_folder,
    write_checkpoint,
)
from engine.files import parse_json, write_text_aside
from engine.optimization import BaseTrainer
from engine.optimizer_state import pack_optimizer, pack_rng, unpack_optimizer, unpack_rng
from engine.ownership import RECORD
from engine.system import LoopConfig

STATE = "training_state"  # stem of the file that training goes on from
CONFIG = "config.resolved.yaml"
OWN_DATA = "own_data.json"  # what own_tasks/record.py keeps of the user's own data
# What a position in the training items depends on.
DATA = (
    *("task", "tasks", "task_config", "train_n", "dataset", "seed"),
    *("data", "question_field", "answer_field", "messages_field", "eval_data", "verifier", "mix"),
)


@dataclass
class RunState:
    """Where a run is, beside its weights."""

    step: int = 0  # batches done
    elapsed_s: float = 0.0
    best: float | None = None  # best value so far of what --save_best_model compares
    stream: dict[str, Any] = field(default_factory=dict)  # position in the training items; empty: they begin anew
    extra: dict[str, Any] = field(default_factory=dict)  # what one system alone needs
    warmup_s: float | None = None  # seconds that the warmup took, where the clock decides how far a run is
    owes_evaluation: bool = False  # the evaluation of this step was left when the run was told to stop
    patience: dict[str, Any] = field(default_factory=dict)  # what `engine.patience` has counted
    left_out: dict[str, Any] = field(default_factory=dict)  # what `engine.nonfinite` has counted


@dataclass(frozen=True)
class Restored:
    """What a checkpoint says of the run that goes on from it."""

    state: RunState
    flags: dict[str, Any]  # of the checkpoint's run, by name
    notes: list[str]  # for the user


def save_run(
    run: Path, config: LoopConfig, trainer: BaseTrainer, state: RunState, card: str, owner: str,
    metric: str = "solved", is_best: bool = False, documents: Mapping[str, str] | None = None,
) -> Path:
    """Writes a checkpoint of the whole run and rotates the older ones. Returns its folder.

    Args:
        run: the run's folder.
        card: text of the checkpoint's README.md.
        owner: text of its run.json.
        metric: what `state.best` measures.
        is_best: True marks this checkpoint as the best one, which rotation keeps.
        documents: file name -> text of what the data keep with it, see `Data.documents`.

    Raises:
        CheckpointError: it cannot be written; nothing half-written is left.
    """
    tensors, document = _training_state(trainer)
    document = dataclasses.asdict(state) | document

    # What users load are the averaged weights, where there is an average.
    with trainer.evaluation_weights():
        weights = {name: tensor.detach().clone() for name, tensor in trainer.weights().items()}

    folder = write_checkpoint(
        step_folder(run, state.step),
        {trainer.stem: weights, STATE: tensors},
        {
            **trainer.documents(),
            **(documents or {}),
            f"{STATE}.json": json.dumps(document),
            CONFIG: config.settings,
            RECORD: owner,
            "README.md": card,
        },
    )

    # The checkpoint is whole: what points at it may follow.
    write_text_aside(run / CONFIG, config.settings)
    if is_best:
        assert state.best is not None
        mark_best(run, folder, metric, state.best)
    rotate(run, config.checkpoint_limit, keep=[folder])
    return folder


def _training_state(trainer: BaseTrainer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and JSON-able values that training needs to go on exactly, beside the weights that users load.

    Tensors are named `raw/NAME` (weights as they train), `ema/NAME` (their average), `INDEX/...` (moments of optimizer
    INDEX) and as `pack_rng` names random states.
    """
    random_states, random_document = pack_rng()
    tensors = _named("raw/", trainer.parameters) | random_states

    optimizer_documents = []
    for index, (optimizer, names) in enumerate(trainer.optimizers):
        moments, optimizer_document = pack_optimizer(optimizer, names)
        tensors |= _named(f"{index}/", moments)
        optimizer_documents.append(optimizer_document)

    ema_updates = 0
    if trainer.ema:
        tensors |= _named("ema/", trainer.ema.average)
        ema_updates = trainer.ema.updates

    document = {
        "optimizers": optimizer_documents,
        "rng": random_document,
        "ema_updates": ema_updates,
        "scaler": trainer.scaler.state_dict(),
    }
    return tensors, document


@contextlib.contextmanager
def put_back(trainer: BaseTrainer) -> Iterator[None]:
    """Inside, training may be tried out: afterwards weights, averages, optimizers and random states are as before."""
    tensors, document = _training_state(trainer)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    document = copy.deepcopy(document)

    try:
        yield
    finally:
        _restore_training(trainer, kept, document)
        unpack_rng(kept, document["rng"])


def _named(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors without their graph, their names behind `prefix`."""
    return {prefix + name: tensor.detach() for name, tensor in tensors.items()}


def load_run(folder: Path, config: LoopConfig, trainer: BaseTrainer) -> Restored:
    """Restores a checkpoint into `trainer`: weights alone for --eval_only and --reset_progress, else the whole state.

    Raises:
        ValueError: a broken checkpoint, another base model, another shape.
    """
    stems = [trainer.stem]
    if not (config.eval_only or config.reset_progress):
        stems.append(STATE)
    saved = read_checkpoint(folder, stems)
    trainer.load(saved, folder)
    flags = options.read_resolved(saved.documents[CONFIG])

    if config.reset_progress:
        trainer.restart_ema()
        note = f"weights of {folder}; step, optimizer and training items begin anew"
        return Restored(RunState(), flags, [note])
    if config.eval_only:
        trainer.ema = None  # the saved weights are the averaged ones already

    state, document = _saved_state(saved, folder)
    if config.eval_only or not document:
        return Restored(state, flags, [])

    # A position in other items than these would mean nothing.
    notes = []
    places = _same_bytes(saved.documents, trainer.documents())
    if any(config.flags[name] != value for name, value in flags.items() if name in DATA and name not in places):
        state.stream = {}
        notes.append("the training items are not those of the checkpoint: they begin anew")

    _restore_training(trainer, saved.tensors[STATE], document)
    notes += unpack_rng(saved.tensors[STATE], document["rng"])
    return Restored(state, flags, notes)


def _same_bytes(before: Mapping[str, str], now: Mapping[str, str]) -> set[str]:
    """The flags of own data that name the bytes that they named when the checkpoint was written, wherever they lie."""
    digests = []
    for documents in (before, now):
        record = json.loads(documents.get(OWN_DATA, "{}"))
        digests.append({source["flag"][2:]: source["sha256"] for source in record.get("data", {}).get("sources", [])})

    return {name for name, digest in digests[0].items() if digests[1].get(name) == digest}


def peek(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(`RunState.extra`, flags by name) of a checkpoint whose weights are not read yet.

    Both are empty where it has none, or cannot be read: `load_run` tells what is wrong with it.
    """
    try:
        document = parse_json((folder / f"{STATE}.json").read_bytes())
        flags = options.read_resolved((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}, {}
    return document.get("extra", {}), flags


def _saved_state(saved: Checkpoint, folder: Path) -> tuple[RunState, dict[str, Any]]:
    """The run's state in a checkpoint, and the whole document it comes from.

    Somebody may have passed on the weights alone, which is enough to evaluate them: then the folder's name tells the
    step, and the document is empty.
    """
    text = saved.documents.get(f"{STATE}.json")
    if text is None:
        named = STEP_NAME.fullmatch(folder.name)
        step = int(named[1]) if named else 0
        return RunState(step), {}

    document = json.loads(text)
    names = {part.name for part in dataclasses.fields(RunState)}
    return RunState(**{name: value for name, value in document.items() if name in names}), document


def _restore_training(trainer: BaseTrainer, tensors: dict[str, torch.Tensor], document: dict[str, Any]) -> None:
    """Weights as they train, their average, optimizers and loss scaler; see `_training_state`."""
    with torch.no_grad():
        for name, parameter in trainer.parameters.items():
            raw = tensors[f"raw/{name}"]
            parameter.copy_(raw)
            # A run that turns averaging on only now starts its average from the raw weights.
            if trainer.ema:
                trainer.ema.average[name].copy_(tensors.get(f"ema/{name}", raw))
    if trainer.ema:
        trainer.ema.updates = document["ema_updates"]

    _restore_optimizers(trainer, tensors, document["optimizers"])
    if document["scaler"]:  # empty from a run without fp16
        trainer.scaler.load_state_dict(document["scaler"])


def _restore_optimizers(
    trainer: BaseTrainer, tensors: dict[str, torch.Tensor], documents: list[dict[str, Any]]
) -> None:
    """Moments and counts of every optimizer. Raises ValueError where the checkpoint has others than the trainer."""
    if len(documents) != len(trainer.optimizers):
        kinds = " + ".join(document["class"] for document in documents)
        raise ValueError(f"the checkpoint was trained with {kinds}: resume with that --optimizer or start a new run")

    for index, (optimizer, names) in enumerate(trainer.optimizers):
        prefix = f"{index}/"
        own = {}
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                own[name.removeprefix(prefix)] = tensor

        # The run's options stay, those typed on resume among them: loading would bring back the checkpoint's.
        wanted: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            wanted.append({key: group[key] for key in ("weight_decay", "betas") if key in group})
        unpack_optimizer(optimizer, names, own, documents[index])
        for group, values in zip(optimizer.param_groups, wanted, strict=True):
            group.update(values)
