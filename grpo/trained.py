"""What the stages of GRPO take over from a supervised run: the trained model and what belongs to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from addon.peft_files import library_of
from addon_run import AddonRun
from batching import PromptFormat
from engine.checkpoints import newest_checkpoint
from engine.loop import resume_command
from engine.machine import Machine
from engine.optimization import BaseTrainer
from grpo.warm_start import EnhancedRun
from reasoning_gym_wrapper import Task
from text_data.trained import TrainedQuestions


@dataclass(frozen=True)
class TrainedModel:
    """The end of a supervised run.

    Args:
        model: the causal LM that GRPO moves in place, with its averaged weights where there were any.
        prompt_format: renders questions, and holds the tokenizer.
        machine: where the run computes.
        trainer: says what of the model a checkpoint holds, and in which precision it computes. It trains no more.
        text_models: (the model, what it is compared with) as the evaluation suite sees them.
        folder: the run's folder.
        checkpoint: the newest checkpoint; None = there is none.
        step: batches trained.
        elapsed_s: seconds of the run.
        title: the model's name in a checkpoint's card.
        library: the library that loads a checkpoint; "" where none but this program does.
        resume: how the user goes on with an interrupted stage.
        has_tags: whether answers stand in reasoning tags.
        tasks: the tasks that the run trained on, for stages that name none of their own.
        reserved: normalised questions that the run evaluates or sets aside, and never trained on.
        trained: the questions that it and the stages before it trained on.
        budget: tokens of an answer to these tasks; None = unknown.
    """

    model: Any
    prompt_format: PromptFormat
    machine: Machine
    trainer: BaseTrainer
    text_models: Callable[[], tuple[Any, Any]]
    folder: Path
    checkpoint: Path | None
    step: int
    elapsed_s: float
    title: str
    library: str
    resume: str
    has_tags: bool = True
    tasks: Sequence[Task] = ()
    reserved: frozenset[str] = frozenset()
    trained: TrainedQuestions = field(default_factory=TrainedQuestions)
    budget: int | None = None


def trained_addon(run: AddonRun, checkpoint: Path | None) -> TrainedModel:
    """The add-on of `run`, whose weights are those of `checkpoint`."""
    run.trainer.end_training()

    # Its answers are bare: the LLM was never shown reasoning tags.
    return TrainedModel(
        run.model,
        run.format,
        run.machine,
        run.trainer,
        run.text_models,
        folder=run.loop.folder,
        checkpoint=checkpoint,
        step=run.loop.step,
        elapsed_s=run.loop.elapsed_s,
        title=f"HRM add-on for {run.model.config.base_model_name}",
        library=library_of(run.model.config.adapter),
        resume="the same command",
        has_tags=False,
        tasks=run.data.tasks,
        reserved=frozenset(run.data.reserve.questions),
        trained=run.data.trained,
        budget=run.data.budget,
    )


def trained_planner(run: EnhancedRun, checkpoint: Path | None) -> TrainedModel:
    """The planner/worker LM after its warm start; its weights are those of `checkpoint`, or None = the newest."""
    run.trainer.end_training()
    folder = run.loop.folder

    return TrainedModel(
        run.model,
        run.format,
        run.machine,
        run.trainer,
        run.text_models,
        folder=folder,
        checkpoint=checkpoint or newest_checkpoint(folder),
        step=run.loop.step,
        elapsed_s=run.loop.elapsed_s,
        title="Planner/worker LM",
        library="transformers",
        resume=resume_command(folder),
        trained=run.data.trained,
    )
