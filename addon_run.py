"""A run of the add-on: Reasoning Gym tasks, a frozen LLM with an adapter, evaluation by generated answers."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from addon.adapters import build_controller
from addon.curriculum import ENOUGH, Curriculum, curriculum_problems
from addon.halting import HaltingAlarm, evaluation_collapse
from addon.hidden_cache import CachePlan, HiddenCache, cache_key, plan_cache
from batching import Batch, EpochStream, PromptFormat, TrainBatches, training_examples
from engine.checkpoints import step_folder
from engine.logs import Progress, draw_curve, format_table
from engine.loop import RunLoop, closing_words
from engine.machine import MachineConfig, machine_problems, raised
from evaluation import Answer, Decoding, Evaluation, answer, answer_budget, evaluate, solved_rate
from host import load_config, load_tokenizer
from options import names, part
from reasoning_gym_wrapper import Example, Reserve, default_tasks, make_tasks, task_problems, task_warnings
from suite.measure import spec_problems
from text_model import CausalTextModel
from training import Trainer

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


class Run(RunLoop):
    """The add-on's run: see `RunLoop`."""

    problems = staticmethod(problems)

    def build_data(self) -> None:
        opts = self.opts
        opts.task_config = task_config(opts)  # going on with other tasks keeps the difficulty
        self.bare: list[Answer] | None = None
        self.halting_alarm = HaltingAlarm()
        for warning in task_warnings(task_names(opts)):
            self.say(f"WARNING: {warning}")
        self.format = PromptFormat(
            load_tokenizer(opts.model_name, opts.trust_remote_code),
            opts.prompt_style,
            opts.system_header,
            opts.sentinel,
            opts.max_seq_len,
        )
        self.tasks = make_tasks(task_names(opts), task_config(opts))
        self.curriculum = self._curriculum() if opts.curriculum else None
        if self.curriculum:
            self.tasks, self.reserve = self.curriculum.tasks(), self.curriculum.reserve
            self.eval_examples = self.curriculum.examples()
        else:
            self.reserve = Reserve(self.tasks, opts.eval_n, opts.eval_seed, by_group=opts.group_split)
            self.eval_examples = self.format.fitting(self.reserve.examples, opts.overlong, "evaluation")
        # The same on every rank and at every level.
        self.budget = answer_budget(self.format, self._all_held_out(), opts.max_new_tokens)
        self.batches: TrainBatches | None = None
        self.plan: CachePlan | None = None
        if opts.eval_only:
            return
        stream = training_examples(self.tasks, self.reserve, opts.seed, opts.train_n)
        if isinstance(stream, EpochStream):
            stream.examples = self.format.fitting(stream.examples, opts.overlong, "training")
            if opts.cache_hidden == "ram":
                config = load_config(opts.model_name, opts.trust_remote_code)
                processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
                self.plan = plan_cache(opts, config, self.format, stream.examples, processes)
                self.say(f"--cache_hidden ram: {self.plan.told()}, at most --cache_max_gb {opts.cache_max_gb:g}")
        else:
            probe = training_examples(self.tasks, self.reserve, opts.seed, 0)
            self.format.fitting([next(probe) for _ in range(PROBE)], opts.overlong, "training")
        self.batches = self._batches(stream)

    def _batches(self, stream: Any) -> TrainBatches:
        opts = self.opts
        overlong = "drop" if self.curriculum else opts.overlong  # a level's rare long item must not end the run
        return TrainBatches(
            stream, self.format, opts.batch_size, opts.bucket_batches, opts.seed, overlong, self.rank, self.world
        )

    # --- curriculum ---

    def _curriculum(self) -> Curriculum:
        opts = self.opts
        self.metric = "mean level + solved"  # a higher level counts more than a better rate below it
        curriculum = Curriculum(self.tasks, opts.curriculum_threshold, opts.eval_n, opts.eval_seed, opts.group_split,
                                opts.curriculum_levels,
                                lambda examples: self.format.fitting(examples, opts.overlong, "evaluation"))
        for name, level in curriculum.starts.items():
            if level and not (opts.resume or opts.eval_only):
                self.say(f"curriculum: {name} begins at level {level}, the first of {ENOUGH:,} questions or more")
        return curriculum

    def _all_held_out(self) -> list[Example]:
        return self.reserve.examples if self.curriculum else self.eval_examples

    def _to_levels(self) -> None:
        """Evaluation items and training stream of the curriculum's levels; the stream goes on at its position."""
        self.tasks, self.eval_examples, self.bare = self.curriculum.tasks(), self.curriculum.examples(), None
        if self.batches:
            stream = training_examples(self.tasks, self.reserve, self.opts.seed, 0)
            stream.load_state_dict(self.batches.stream.state_dict())
            self.batches = self._batches(stream)

    def _saved_levels(self) -> None:
        """Goes to the levels of the checkpoint, unless the run stands there already."""
        before = dict(self.curriculum.levels) if self.curriculum else None
        if before and "curriculum" in self.extra:
            self.curriculum.restore(self.extra["curriculum"])
            if self.curriculum.levels != before:
                self._to_levels()

    def _restore(self, folder: Path) -> None:
        super()._restore(folder)
        self._saved_levels()  # of a run that goes on without its position in the data, or only evaluates

    def after_evaluation(self, evaluation: Evaluation) -> None:
        if self.opts.use_act and self.opts.eval_readout == "last":
            limit = self.opts.halt_max_segments or self.model.config.segments
            alarm = evaluation_collapse([a.segments for a in evaluation.answers], limit, evaluation.solved_rate())
            if alarm:
                self.say(f"WARNING: step {self.step}: {alarm}")
        if self.curriculum and self._progress_share() < 1:
            rates = {name: solved_rate(evaluation.of(name)) for name in self.curriculum.levels}
            if self.curriculum.update(rates):
                self.say(f"step {self.step}: curriculum goes up to level {self.curriculum.told()}")
                self._to_levels()
        if self.curriculum:
            self.extra["curriculum"] = dict(self.curriculum.levels)

    def alarms(self, metrics: dict[str, float]) -> list[str]:
        alarm = self.halting_alarm.update(self.step, metrics)
        return [alarm] if alarm else []

    def build_trainer(self) -> Trainer:
        self.model = build_controller(self.opts, str(self.device))
        self._check_positions()
        if self.model.recurrent:
            self.model.config.segments = self.opts.eval_segments or self.opts.segments  # training draws its own number
        trainer = Trainer(self.opts, self.model, self.accelerator, self.precision, self._verdicts)
        if self.plan and self.opts.dry_run:
            self.say("--dry_run leaves the cache of hidden states empty: its time is that of a step without it")
        elif self.plan:
            key = cache_key(self.model, self.format, self.opts)
            trainer.encode = HiddenCache(key, self.plan, self.format, self.say).encoder(self.model, key)
        return trainer

    def _check_positions(self) -> None:
        """Raises ValueError when an answer could outgrow the LLM's positions: some families fail there."""
        positions = getattr(self.model.host.config.get_text_config(), "max_position_embeddings", None)
        longest = max(map(len, self.format.prompts([example.question for example in self._all_held_out()])))
        longest += self.model.virtual_tokens
        if positions and longest + self.budget > positions:
            raise ValueError(
                f"a prompt of {longest} tokens and an answer of {self.budget} pass the {positions} positions of "
                f"{self.opts.model_name}: lower --max_new_tokens, or --max_seq_len with --overlong drop"
            )

    # --- what the loop asks ---

    def label(self) -> str:
        return "+".join(task_names(self.opts))

    def introduce(self) -> str:
        count = sum(p.numel() for p in self.model.addon_parameters().values())
        host = sum(p.numel() for p in self.model.host.parameters() if not p.requires_grad)
        adapter = f"{self.model.title} ({count / 1e6:.2f} M trainable)"
        return (
            f"{self.opts.model_name} ({host / 1e6:.1f} M frozen) + {adapter} on {self.device}, "
            f"{self.precision} autocast; {', '.join(t.name for t in self.tasks)}"
        )

    def next_batches(self) -> list[Batch]:
        return [next(self.batches).to(self.device) for _ in range(self.opts.grad_accum_steps)]

    def position(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def set_position(self, position: dict[str, Any]) -> None:
        self._saved_levels()
        self.batches.load_state_dict(position)

    def data_size(self) -> int:
        return len(self.batches.stream.examples)

    def mean_segments(self) -> float:
        if not self.model.recurrent:
            return 1
        most, drawn = self.opts.segments, (1 + self.opts.segments) / 2
        fixed = drawn if self.opts.use_act else most
        return {"fixed": fixed, "uniform": drawn, "growing": (1 + drawn) / 2}[self.opts.segments_sampling]

    def parts(self) -> dict[str, Any]:
        return self.model.parts()

    def ended_early(self) -> str | None:
        return "the bare LLM has nothing to train" if self.opts.adapter == "none" else None

    def describe(self, batches: list[Batch]) -> list[dict[str, Any]]:
        return [{"task": e.task, "question": e.question, "target": e.target} for b in batches for e in b.examples]

    def text_models(self) -> tuple[CausalTextModel, CausalTextModel]:
        size, autocast = self.opts.eval_batch_size, self.trainer.autocast
        return (CausalTextModel(self.model, self.format, size, autocast=autocast),
                CausalTextModel(self.model, self.format, size, bare=True))

    def table(self, evaluation: Evaluation) -> str:
        label = f"LLM + {self.model.title}"
        return format_table([{**row, "label": label} for row in evaluation.table()])

    def value(self, evaluation: Evaluation) -> float:
        if self.curriculum:
            return self._level_evaluated + evaluation.solved_rate()
        return evaluation.solved_rate()

    def _verdicts(self, batch: Batch) -> torch.Tensor:
        """(B,) floats: does the task's verifier call the answer that the model generates now solved?"""
        was_training = self.model.training
        self.model.eval()
        with self.trainer.autocast():
            answers = answer(self.model, self.format, batch.examples, self._decoding())
        self.model.train(was_training)
        return torch.tensor([float(a.solved) for a in answers], device=self.device)

    # --- evaluation ---

    def _decoding(self) -> Decoding:
        opts = self.opts
        return Decoding(
            opts.decode_temperature,
            opts.decode_top_p,
            opts.decode_top_k,
            opts.max_new_tokens,
            opts.eval_batch_size,
            opts.seed,
        )

    def evaluate(self) -> Evaluation:
        """Generates and verifies on the whole evaluation set, shared among ranks; writes CSV and predictions."""
        mine = list(range(len(self.eval_examples)))[self.rank :: self.world]
        examples = [self.eval_examples[i] for i in mine]
        decoding = replace(self._decoding(), max_new_tokens=self.budget)
        with self.trainer.evaluation_weights():
            own_bare = [self.bare[i] for i in mine] if self.bare else None
            part = evaluate(self.model, self.format, examples, decoding, own_bare, self.trainer.autocast())
        self.bare = self._gathered(mine, part.bare)
        evaluation = Evaluation(self._gathered(mine, part.answers), self.bare)
        levels = self.curriculum.rows(self.step, self.log.elapsed_s) if self.curriculum else []
        self._level_evaluated = sum(row["value"] for row in levels) / max(len(levels), 1)
        self._levels_told = self.curriculum.told() if self.curriculum else ""
        self.log.eval_rows(evaluation.rows(self.step, self.log.elapsed_s) + levels)
        self.log.predictions(evaluation.predictions(self.step))
        return evaluation

    def _gathered(self, mine: list[int], answers: list[Answer]) -> list[Answer]:
        """The answers of all ranks in the order of the evaluation set."""
        if self.world == 1:
            return answers
        packed = [(i, a.text, a.score, a.finished, a.raised, a.segments) for i, a in zip(mine, answers, strict=True)]
        return [Answer(self.eval_examples[i], *rest) for i, *rest in sorted(gather_object(packed))]

    def show_samples(self, progress: Progress, count: int = 2) -> None:
        """Prompt, target and prediction of a few evaluation items, others each time."""
        start = self.step // self.opts.log_samples_every * count % len(self.eval_examples)
        examples = self.eval_examples[start : start + count]
        self.model.eval()
        with self.trainer.evaluation_weights(), self.trainer.autocast():
            answers = answer(self.model, self.format, examples, self._decoding())
        for a in answers:
            asked = f"[step {self.step}] prompt: {a.example.question!r}"
            progress.say(f"{asked}\n  target: {a.example.target!r}  prediction: {a.text!r}")

    def finish(self, evaluation: Evaluation) -> None:
        """The closing words: table, files, next command."""
        if not self.is_main:
            return
        print(self.table(evaluation))
        cut = sum(not a.finished for a in evaluation.answers)
        raised = sum(a.raised for a in evaluation.answers)
        notes = ["solved = generated answer scored exactly 1.0 by the task's verifier, Wilson 95 % interval"]
        notes += [f"curriculum level: {self._levels_told}"] if self.curriculum else []
        notes += [f"{cut} answers were cut at the token limit"] if cut else []
        notes += [f"the scorer raised on {raised} answers, counted as wrong"] if raised else []
        print("; ".join(notes))
        curve = draw_curve(self.folder, self.log.csv_path)
        newest = self.checkpoint if self.opts.eval_only else step_folder(self.folder, self.step)
        print(closing_words(self.log.csv_path, newest, curve, self.eval_examples[0].question))

    def card(self, evaluation: Evaluation | None) -> str:
        """The checkpoint's README.md."""
        names = ", ".join(task.name for task in self.tasks)
        lines = [
            f"---\nlibrary_name: peft\ntags: [{self.opts.adapter}]\n---\n",
            f"# {self.model.title} for {self.opts.model_name}\n",
            f"Step {self.step}; tasks {names} at `{task_config(self.opts)}` difficulty.",
            "Weights of the adapter alone; load with `addon.adapters.load_controller` or `generate.py --checkpoint`.\n",
        ]
        return "\n".join(lines) + (f"\n```\n{self.table(evaluation)}\n```\n" if evaluation else "")
