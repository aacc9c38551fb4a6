"""The state of a run on disk: what a checkpoint of `train.py` holds, and how a run goes on from it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import options
from engine.checkpoints import (
    STEP_NAME,
    mark_best,
    read_checkpoint,
    rotate,
    step_folder,
    write_checkpoint,
)
from engine.files import write_text_aside
from engine.optimization import BaseTrainer
from engine.optimizer_state import pack_optimizer, pack_rng, unpack_optimizer, unpack_rng
from engine.system import LoopConfig

STATE, CONFIG = "training_state", "config.resolved.yaml"
# What a position in the training items depends on.
DATA = ("task", "tasks", "task_config", "train_n", "dataset", "seed")


@dataclass
class RunState:
    """Where a run is, beside its weights."""

    step: int = 0  # batches done
    elapsed_s: float = 0.0
    best: float | None = None  # best value so far of what --save_best_model compares
    stream: dict[str, Any] = field(default_factory=dict)  # position in the training items; empty: they begin anew
    extra: dict[str, Any] = field(default_factory=dict)  # what one system alone needs


@dataclass(frozen=True)
class Restored:
    """What a checkpoint says of the run that goes on from it."""

    state: RunState
    flags: dict[str, Any]  # of the checkpoint's run, by name
    notes: list[str]  # for the user


def save_run(
    run: Path, config: LoopConfig, trainer: BaseTrainer, state: RunState, card: str, metric: str = "solved",
    is_best: bool = False,
) -> Path:
    """Writes a checkpoint of the whole run and rotates the older ones. `metric` is what `state.best` measures.

    Raises:
        CheckpointError: it cannot be written; nothing half-written is left.
    """
    rng, rng_document = pack_rng()
    tensors = {f"raw/{name}": p.detach() for name, p in trainer.parameters.items()} | rng
    optimizer_documents = []
    for index, (optimizer, names) in enumerate(trainer.optimizers):
        moments, optimizer_document = pack_optimizer(optimizer, names)
        tensors |= {f"{index}/{name}": tensor for name, tensor in moments.items()}
        optimizer_documents.append(optimizer_document)
    if trainer.ema:
        tensors |= {f"ema/{name}": tensor for name, tensor in trainer.ema.average.items()}
    with trainer.evaluation_weights():
        weights = {name: tensor.detach().clone() for name, tensor in trainer.weights().items()}
    document = {
        **dataclasses.asdict(state),
        "optimizers": optimizer_documents,
        "rng": rng_document,
        "ema_updates": trainer.ema.updates if trainer.ema else 0,
        "scaler": trainer.scaler.state_dict(),
    }
    folder = write_checkpoint(
        step_folder(run, state.step),
        {trainer.stem: weights, STATE: tensors},
        {
            **trainer.documents(),
            f"{STATE}.json": json.dumps(document),
            CONFIG: config.settings,
            "README.md": card,
        },
    )
    write_text_aside(run / CONFIG, config.settings)
    if is_best:
        mark_best(run, folder, metric, state.best)
    rotate(run, config.checkpoint_limit, keep=[folder])
    return folder


def load_run(folder: Path, config: LoopConfig, trainer: BaseTrainer) -> Restored:
    """Restores a checkpoint into `trainer`: weights alone for --eval_only and --reset_progress, else the whole state.

    Raises:
        ValueError: a broken checkpoint, another base model, another shape.
    """
    weights_alone = config.eval_only or config.reset_progress
    stems = [trainer.stem] if weights_alone else [trainer.stem, STATE]
    saved = read_checkpoint(folder, stems)
    trainer.load(saved, folder)
    flags = options.read_resolved(saved.documents[CONFIG])

    if config.reset_progress:
        trainer.restart_ema()
        return Restored(
            RunState(), flags, [f"weights of {folder}; step, optimizer and training items begin anew"]
        )
    if config.eval_only:
        trainer.ema = None  # the saved weights are the averaged ones already

    # Somebody may have passed on the weights alone; then the folder's name tells the step.
    if f"{STATE}.json" not in saved.documents:
        named = STEP_NAME.fullmatch(folder.name)
        return Restored(RunState(int(named[1]) if named else 0), flags, [])

    document = json.loads(saved.documents[f"{STATE}.json"])
    names = {part.name for part in dataclasses.fields(RunState)}
    state = RunState(**{name: value for name, value in document.items() if name in names})
    if config.eval_only:
        return Restored(state, flags, [])

    notes = []
    if any(config.flags[name] != value for name, value in flags.items() if name in DATA):
        state.stream = {}
        notes.append("the training items are not those of the checkpoint: they begin anew")
    _restore_training(trainer, saved.tensors[STATE], document)
    notes += unpack_rng(saved.tensors[STATE], document["rng"])
    return Restored(state, flags, notes)


def _restore_training(trainer: BaseTrainer, tensors: dict[str, torch.Tensor], document: dict[str, Any]) -> None:
    with torch.no_grad():
        for name, parameter in trainer.parameters.items():
            raw = tensors[f"raw/{name}"]
            parameter.copy_(raw)
            if trainer.ema:  # a run that turns averaging on only now starts its average from the raw weights
                trainer.ema.average[name].copy_(tensors.get(f"ema/{name}", raw))
    if trainer.ema:
        trainer.ema.updates = document["ema_updates"]
    _restore_optimizers(trainer, tensors, document["optimizers"])
    if document["scaler"]:  # empty from a run without fp16
        trainer.scaler.load_state_dict(document["scaler"])


def _restore_optimizers(trainer: BaseTrainer, tensors: dict[str, torch.Tensor], documents: list[dict[str, Any]]
                        ) -> None:
    if len(documents) != len(trainer.optimizers):
        kinds = " + ".join(document["class"] for document in documents)
        raise ValueError(f"the checkpoint was trained with {kinds}: resume with that --optimizer or start a new run")
    for index, (optimizer, names) in enumerate(trainer.optimizers):
        prefix = f"{index}/"
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        groups = optimizer.param_groups
        asked = [{key: group[key] for key in ("weight_decay", "betas") if key in group} for group in groups]
        unpack_optimizer(optimizer, names, own, documents[index])
        for group, values in zip(groups, asked, strict=True):
            group.update(values)  # the run's options, those typed on resume among them
