"""A run of the add-on: Reasoning Gym tasks, a frozen LLM with an adapter, evaluation by generated answers."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed

from addon.adapters import build_controller
from addon.curriculum import ENOUGH, Curriculum, curriculum_problems
from addon.halting import HaltingAlarm, evaluation_collapse
from addon.hidden_cache import CachePlan, HiddenCache, cache_key, plan_cache
from batching import Batch, EpochStream, PromptConfig, PromptFormat, TrainBatches, training_examples
from engine.logs import format_table
from engine.loop import RunLoop
from engine.machine import Machine, MachineConfig, machine_problems, raised, start_machine
from engine.optimization import OptimConfig
from engine.report import Card, Report
from engine.system import Evaluator, Facts, Hooks, LoopConfig
from evaluation import Answer, Decoding, Evaluation, answer, answer_budget, evaluate, solved_rate
from host import load_config, load_tokenizer
from options import Options, as_dict, names, part, rerun_text
from reasoning_gym_wrapper import (
    Example,
    Reserve,
    beyond_reserve,
    default_tasks,
    make_tasks,
    reserved_sums,
    task_problems,
    task_warnings,
)
from suite.after_run import Subject
from suite.spec import spec_problems
from text_model import CausalTextModel
from training import AddonStepConfig, Trainer

PROBE = 256  # items of an endless stream that are measured against --max_seq_len before training


def task_names(opts: argparse.Namespace) -> list[str]:
    """The chosen tasks, or the default ones."""
    return names(opts.tasks) or ([opts.task] if opts.task else default_tasks())


def task_config(opts: argparse.Namespace) -> str:
    """`--task_config`, which is `small` when no task is named and `default` otherwise."""
    return opts.task_config or ("default" if opts.task or opts.tasks else "small")


def problems(opts: argparse.Namespace, checkpoint: Path | None = None) -> list[str]:
    """Everything wrong with a run of the add-on that can be found without loading a model, one line each."""
    chosen = task_names(opts)
    lines = task_problems(chosen, task_config(opts), opts.allow_code_tasks, not opts.eval_only)
    if opts.curriculum and not lines:
        lines += curriculum_problems(chosen)

    lines += spec_problems(opts.eval_suite, opts.allow_unconfined_code)
    lines += machine_problems(part(MachineConfig, opts), checkpoint)
    return lines + raised([lambda: _check_host(opts)])


def _check_host(opts: argparse.Namespace) -> None:
    """Raises ValueError for an LLM that cannot be read, or has too few layers or positions for the flags."""
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


class AddonData:
    """Held-out items to evaluate on, and the training batches unless --eval_only.

    With --curriculum both change when a task goes up a level.
    """

    def __init__(self, opts: argparse.Namespace, machine: Machine):
        self.opts = opts
        self.machine = machine
        for warning in task_warnings(task_names(opts)):
            machine.say(f"WARNING: {warning}")
        self.format = PromptFormat(
            load_tokenizer(opts.model_name, opts.trust_remote_code),
            opts.prompt_style,
            opts.system_header,
            opts.sentinel,
            opts.max_seq_len,
        )

        # What is evaluated is drawn first: training then keeps off it.
        self.tasks = make_tasks(task_names(opts), opts.task_config)
        self.curriculum = self._curriculum() if opts.curriculum else None
        if self.curriculum:
            self.tasks = self.curriculum.tasks()
            self.reserve = self.curriculum.reserve
            self.eval_examples = self.curriculum.examples()
        else:
            self.reserve = Reserve(self.tasks, opts.eval_n, opts.eval_seed, by_group=opts.group_split)
            self.eval_examples = self.format.fitting(self.reserve.examples, opts.overlong, "evaluation")
        self.budget = answer_budget(self.format, self.held_out, opts.max_new_tokens)

        self.batches: TrainBatches | None = None
        self.plan: CachePlan | None = None
        if not opts.eval_only:
            self.batches = self._batches(self._stream())

    @property
    def held_out(self) -> list[Example]:
        """The items of every evaluation of this run, alike on every rank and at every level."""
        return self.reserve.examples if self.curriculum else self.eval_examples

    def _stream(self) -> Any:
        """The training items; a fixed set is planned for the cache of hidden states, where there is to be one."""
        opts = self.opts
        stream = training_examples(self.tasks, self.reserve, opts.seed, opts.train_n)
        if not isinstance(stream, EpochStream):
            probe = training_examples(self.tasks, self.reserve, opts.seed, 0)
            self.format.fitting([next(probe) for _ in range(PROBE)], opts.overlong, "training")
            return stream

        stream.examples = self.format.fitting(stream.examples, opts.overlong, "training")
        if opts.cache_hidden == "ram":
            config = load_config(opts.model_name, opts.trust_remote_code)
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            self.plan = plan_cache(opts, config, self.format, stream.examples, processes)
            self.machine.say(
                f"--cache_hidden ram: {self.plan.told()}, at most --cache_max_gb {opts.cache_max_gb:g}"
            )
        return stream

    def _batches(self, stream: Any) -> TrainBatches:
        opts = self.opts
        overlong = "drop" if self.curriculum else opts.overlong  # a level's rare long item must not end the run
        return TrainBatches(
            stream, self.format, opts.batch_size, opts.bucket_batches, opts.seed, overlong, self.machine.rank,
            self.machine.world,
        )

    # --- curriculum ---

    def _curriculum(self) -> Curriculum:
        opts = self.opts
        curriculum = Curriculum(
            self.tasks, opts.curriculum_threshold, opts.eval_n, opts.eval_seed, opts.group_split,
            opts.curriculum_levels, lambda examples: self.format.fitting(examples, opts.overlong, "evaluation"),
        )
        for name, level in curriculum.starts.items():
            if level and not (opts.resume or opts.eval_only):
                self.machine.say(
                    f"curriculum: {name} begins at level {level}, the first of {ENOUGH:,} questions or more"
                )
        return curriculum

    def to_levels(self) -> None:
        """Evaluation items and training stream of the curriculum's levels; the stream goes on at its position."""
        self.tasks = self.curriculum.tasks()
        self.eval_examples = self.curriculum.examples()
        if self.batches:
            stream = training_examples(self.tasks, self.reserve, self.opts.seed, 0)
            stream.load_state_dict(self.batches.stream.state_dict())
            self.batches = self._batches(stream)

    # --- what the loop asks ---

    @property
    def size(self) -> int:
        return len(self.batches.stream.examples)

    def next_batches(self) -> list[Batch]:
        return [next(self.batches).to(self.machine.device) for _ in range(self.opts.grad_accum_steps)]

    def state(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state)

    def describe(self, batches: list[Batch]) -> list[dict[str, Any]]:
        return [{"task": e.task, "question": e.question, "target": e.target} for b in batches for e in b.examples]


class AddonEvaluator(Evaluator):
    """Generated answers to the held-out items, verified by their tasks, beside those of the bare LLM."""

    def __init__(self, data: AddonData, model: Any, trainer: Trainer, decoding: Decoding, machine: Machine):
        self.data = data
        self.model = model
        self.trainer = trainer
        self.decoding = decoding
        self.machine = machine
        self._bare: list[Answer] | None = None  # to the items below, which do not change with training
        self._bare_examples: list[Example] | None = None

    def evaluate(self, step: int) -> Report:
        """Generates and verifies on the whole evaluation set, shared among ranks."""
        examples = self.data.eval_examples
        mine = list(range(len(examples)))[self.machine.rank :: self.machine.world]
        own_bare = None
        if self._bare is not None and self._bare_examples is examples:
            own_bare = [self._bare[i] for i in mine]

        decoding = replace(self.decoding, max_new_tokens=self.data.budget)
        with self.trainer.evaluation_weights():
            share = [examples[i] for i in mine]
            part = evaluate(self.model, self.data.format, share, decoding, own_bare, self.trainer.autocast())
        self._bare = self._gathered(mine, part.bare)
        self._bare_examples = examples
        return self._report(Evaluation(self._gathered(mine, part.answers), self._bare))

    def _gathered(self, mine: list[int], answers: list[Answer]) -> list[Answer]:
        """The answers of all ranks in the order of the evaluation set."""
        if self.machine.world == 1:
            return answers
        packed = [(i, a.text, a.score, a.finished, a.raised, a.segments) for i, a in zip(mine, answers, strict=True)]
        return [Answer(self.data.eval_examples[i], *rest) for i, *rest in sorted(gather_object(packed))]

    def _report(self, evaluation: Evaluation) -> Report:
        curriculum = self.data.curriculum
        rows = evaluation.rows()
        value = evaluation.solved_rate()
        if curriculum:
            levels = curriculum.rows()
            rows += levels
            value += sum(row["value"] for row in levels) / max(len(levels), 1)

        cut = sum(not answer.finished for answer in evaluation.answers)
        raised = sum(answer.raised for answer in evaluation.answers)
        notes = ["solved = generated answer scored exactly 1.0 by the task's verifier, Wilson 95 % interval"]
        if curriculum:
            notes.append(f"curriculum level: {curriculum.told()}")
        if cut:
            notes.append(f"{cut} answers were cut at the token limit")
        if raised:
            notes.append(f"the scorer raised on {raised} answers, counted as wrong")

        label = f"LLM + {self.model.title}"
        table = format_table([{**row, "label": label} for row in evaluation.table()])
        question = self.data.eval_examples[0].question
        return Report(rows, evaluation.predictions(), table, value, "; ".join(notes), question, evaluation)

    def samples(self, turn: int, count: int = 2) -> list[str]:
        """Prompt, target and prediction of a few evaluation items, others each time."""
        start = turn * count % len(self.data.eval_examples)
        examples = self.data.eval_examples[start : start + count]
        self.model.eval()
        with self.trainer.evaluation_weights(), self.trainer.autocast():
            answers = answer(self.model, self.data.format, examples, self.decoding)
        return [
            f"prompt: {a.example.question!r}\n  target: {a.example.target!r}  prediction: {a.text!r}" for a in answers
        ]

    def verdicts(self, batch: Batch) -> torch.Tensor:
        """(B,) floats: does the task's verifier call the answer that the model generates now solved?"""
        was_training = self.model.training
        self.model.eval()
        with self.trainer.autocast():
            answers = answer(self.model, self.data.format, batch.examples, self.decoding)
        self.model.train(was_training)
        return torch.tensor([float(a.solved) for a in answers], device=self.machine.device)


class AddonHooks(Hooks):
    """Alarms of the halting head, and the levels of the curriculum."""

    def __init__(self, opts: argparse.Namespace, data: AddonData, model: Any, machine: Machine):
        super().__init__()
        self.opts = opts
        self.data = data
        self.model = model
        self.machine = machine
        self.halting_alarm = HaltingAlarm()

    def alarms(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        alarm = self.halting_alarm.update(step, metrics)
        return [alarm] if alarm else []

    def after_evaluation(self, step: int, report: Report, share: float | None) -> None:
        """Says when halting has collapsed; raises levels while there is training left to use them."""
        if share is None:
            return
        evaluation = report.details
        if self.opts.use_act and self.opts.eval_readout == "last":
            limit = self.opts.halt_max_segments or self.model.config.segments
            segments = [answer.segments for answer in evaluation.answers]
            alarm = evaluation_collapse(segments, limit, evaluation.solved_rate())
            if alarm:
                self.machine.say(f"WARNING: step {step}: {alarm}")

        curriculum = self.data.curriculum
        if not curriculum:
            return
        if share < 1:
            rates = {name: solved_rate(evaluation.of(name)) for name in curriculum.levels}
            if curriculum.update(rates):
                self.machine.say(f"step {step}: curriculum goes up to level {curriculum.told()}")
                self.data.to_levels()
        self.extra["curriculum"] = dict(curriculum.levels)

    def ended_early(self) -> str | None:
        return "the bare LLM has nothing to train" if self.opts.adapter == "none" else None

    def restored(self, before: Mapping[str, Any]) -> list[str]:
        """Goes to the checkpoint's levels; notes evaluation items that its run may have trained on."""
        curriculum = self.data.curriculum
        if curriculum and "curriculum" in self.extra:
            levels = dict(curriculum.levels)
            curriculum.restore(self.extra["curriculum"])
            if curriculum.levels != levels:
                self.data.to_levels()

        opts = self.opts
        same = all(getattr(opts, name) == before.get(name) for name in ("eval_seed", "task_config"))
        reserved = before.get("eval_n", 0)
        if same and opts.eval_n <= reserved:
            return []
        chosen = names(opts.tasks) or [opts.task]  # None: the default tasks, which have no groups
        return beyond_reserve(chosen, reserved, before.get("group_split", False))


class AddonRun:
    """A run of the add-on, new or going on from `checkpoint`.

    Raises:
        ValueError: the user's mistakes, before anything is written.
    """

    problems = staticmethod(problems)

    def __init__(self, opts: Options, checkpoint: Path | None):
        # The difficulty is kept with the run, so that it stays the same when a resumed run names other tasks.
        opts = Options(**vars(opts) | {"task_config": task_config(opts)})
        self.opts = opts
        config = part(LoopConfig, opts, settings=rerun_text(opts), flags=as_dict(opts))
        self.machine = start_machine(config)
        self.data = AddonData(opts, self.machine)
        self.format = self.data.format

        set_seed(opts.seed)
        self.model = build_controller(opts, str(self.machine.device))
        self._check_positions()
        if self.model.recurrent:
            self.model.config.segments = opts.eval_segments or opts.segments  # training draws its own number
        self.trainer = self._trainer()

        decoding = Decoding(
            opts.decode_temperature,
            opts.decode_top_p,
            opts.decode_top_k,
            opts.max_new_tokens,
            opts.eval_batch_size,
            opts.seed,
        )
        self.evaluator = AddonEvaluator(self.data, self.model, self.trainer, decoding, self.machine)
        self.trainer.answer_verdicts = self.evaluator.verdicts
        hooks = AddonHooks(opts, self.data, self.model, self.machine)
        self.loop = RunLoop(
            config, self.machine, self.data, self.trainer, self.evaluator, self._facts(), hooks, checkpoint
        )

    @classmethod
    def weights_of(cls, opts: Options, checkpoint: Path) -> AddonRun:
        """The run as --eval_only sets it up: the weights of `checkpoint`, nothing to train them on."""
        return cls(Options(**vars(opts) | {"eval_only": True}), checkpoint)

    def go(self) -> int:
        """Runs the command and returns its exit status."""
        return self.loop.go()

    def _check_positions(self) -> None:
        """Raises ValueError when an answer could outgrow the LLM's positions: some families fail there."""
        positions = getattr(self.model.host.config.get_text_config(), "max_position_embeddings", None)
        questions = [example.question for example in self.data.held_out]
        longest = max(map(len, self.format.prompts(questions))) + self.model.virtual_tokens
        if positions and longest + self.data.budget > positions:
            raise ValueError(
                f"a prompt of {longest} tokens and an answer of {self.data.budget} pass the {positions} positions of "
                f"{self.opts.model_name}: lower --max_new_tokens, or --max_seq_len with --overlong drop"
            )

    def _trainer(self) -> Trainer:
        opts = self.opts
        trainer = Trainer(
            part(AddonStepConfig, opts),
            part(OptimConfig, opts),
            part(PromptConfig, opts),
            self.model,
            self.machine.accelerator,
            self.machine.precision,
        )
        plan = self.data.plan
        if plan and opts.dry_run:
            self.machine.say(
                "--dry_run leaves the cache of hidden states empty: its time is that of a step without it"
            )
        elif plan:
            key = cache_key(self.model, self.format, opts)
            trainer.encode = HiddenCache(key, plan, self.format, self.machine.say).encoder(self.model, key)
        return trainer

    def _facts(self) -> Facts:
        opts = self.opts
        count = sum(p.numel() for p in self.model.addon_parameters().values())
        host = sum(p.numel() for p in self.model.host.parameters() if not p.requires_grad)
        tasks = ", ".join(task.name for task in self.data.tasks)
        return Facts(
            label="+".join(task_names(opts)),
            introduction=f"{opts.model_name} ({host / 1e6:.1f} M frozen) + {self.model.title} ({count / 1e6:.2f} M "
            f"trainable) on {self.machine.device}, {self.machine.precision} autocast; {tasks}",
            card=Card(
                "peft",
                [opts.adapter],
                f"{self.model.title} for {opts.model_name}",
                f"; tasks {tasks} at `{opts.task_config}` difficulty.",
                "Weights of the adapter alone; load with `addon.adapters.load_controller` or `generate.py "
                "--checkpoint`.",
            ),
            # A higher level counts more than a better rate below it.
            metric="mean level + solved" if self.data.curriculum else "solved",
            parts=self.model.parts(),
            segments=mean_segments(opts) if self.model.recurrent else 1.0,
        )

    def text_models(self) -> tuple[CausalTextModel, CausalTextModel]:
        """The model and the bare LLM as text in, text out."""
        size = self.opts.eval_batch_size
        model = CausalTextModel(self.model, self.format, size, autocast=self.trainer.autocast)
        return model, CausalTextModel(self.model, self.format, size, bare=True)

    def suite_subject(self) -> Subject | None:
        """What --eval_suite measures; None before the run is finished and on other processes than the main one."""
        if not self.loop.finished or not self.machine.is_main:
            return None
        return Subject(
            self.text_models, "bare LLM", self.trainer.evaluation_weights, self.loop.record, reserved_sums
        )


def mean_segments(opts: argparse.Namespace) -> float:
    """Segments of an average batch, as `training.segments_of_step` draws them."""
    most = opts.segments
    drawn = (1 + most) / 2
    fixed = drawn if opts.use_act else most
    return {"fixed": fixed, "uniform": drawn, "growing": (1 + drawn) / 2}[opts.segments_sampling]
