"""A run of the add-on: Reasoning Gym tasks, a frozen LLM with an adapter, evaluation by generated answers."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object

from baselines import build_controller
from batching import Batch, PromptFormat, TrainBatches
from checkpointing import step_folder
from evaluation import Answer, Decoding, Evaluation, answer, answer_budget, evaluate
from hidden_cache import CachePlan, HiddenCache, cache_key, plan_cache
from host import load_config, load_tokenizer
from reasoning_gym_wrapper import EpochStream, Reserve, make_tasks, task_warnings, training_examples
from run_logging import Progress, draw_curve, format_table
from run_loop import RunLoop
from run_setup import task_config, task_names
from text_model import CausalTextModel
from training import Trainer

PROBE = 256  # items of an endless stream that are measured against --max_seq_len before training


class Run(RunLoop):
    """The add-on's run: see `RunLoop`."""

    def build_data(self) -> None:
        opts = self.opts
        opts.task_config = task_config(opts)  # going on with other tasks keeps the difficulty
        self.bare: list[Answer] | None = None
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
        self.reserve = Reserve(self.tasks, opts.eval_n, opts.eval_seed)
        self.eval_examples = self.format.fitting(self.reserve.examples, opts.overlong, "evaluation")
        self.budget = answer_budget(self.format, self.eval_examples, opts.max_new_tokens)  # the same on every rank
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
        self.batches = TrainBatches(
            stream, self.format, opts.batch_size, opts.bucket_batches, opts.seed, opts.overlong, self.rank, self.world
        )

    def build_trainer(self) -> Trainer:
        self.model = build_controller(self.opts, str(self.device))
        self._check_positions()
        if self.model.recurrent:
            self.model.config.segments = self.opts.eval_segments or self.opts.segments  # training draws its own number
        trainer = Trainer(self.opts, self.model, self.accelerator, self.precision, self._verdicts)
        if self.plan:
            key = cache_key(self.model, self.format, self.opts)
            trainer.encode = HiddenCache(key, self.plan, self.format, self.say).encoder(self.model, key)
        return trainer

    def _check_positions(self) -> None:
        """Raises ValueError when an answer could outgrow the LLM's positions: some families fail there."""
        positions = getattr(self.model.host.config.get_text_config(), "max_position_embeddings", None)
        longest = max(map(len, self.format.prompts([example.question for example in self.eval_examples])))
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
        self.batches.load_state_dict(position)

    def data_size(self) -> int:
        return len(self.batches.stream.examples)

    def mean_segments(self) -> float:
        if not self.model.recurrent:
            return 1
        return (1 + self.opts.segments) / 2 if self.opts.segments_sampling == "uniform" else self.opts.segments

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
        self.log.eval_rows(evaluation.rows(self.step, self.log.elapsed_s))
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
        notes += [f"{cut} answers were cut at the token limit"] if cut else []
        notes += [f"the scorer raised on {raised} answers, counted as wrong"] if raised else []
        print("; ".join(notes))
        curve = draw_curve(self.folder, self.log.csv_path)
        newest = self.checkpoint if self.opts.eval_only else step_folder(self.folder, self.step)
        print(f"evaluation: {self.log.csv_path}\ncheckpoint: {newest}")
        if curve:
            print(f"curve:      {curve}")
        question = shlex.quote(" ".join(self.eval_examples[0].question.split()))
        print(f"next:       python generate.py --checkpoint {shlex.quote(str(newest))} --compare --prompt {question}")

    def card(self, evaluation: Evaluation | None) -> str:
        """The checkpoint's README.md."""
        names = ", ".join(task.name for task in self.tasks)
        lines = [
            f"---\nlibrary_name: peft\ntags: [{self.opts.adapter}]\n---\n",
            f"# {self.model.title} for {self.opts.model_name}\n",
            f"Step {self.step}; tasks {names} at `{task_config(self.opts)}` difficulty.",
            "Weights of the adapter alone; load with `baselines.load_controller` or `generate.py --checkpoint`.\n",
        ]
        return "\n".join(lines) + (f"\n```\n{self.table(evaluation)}\n```\n" if evaluation else "")
