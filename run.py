"""One run of `train.py`: check everything, build, train, evaluate, save, resume."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import signal
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed

import options
from batching import Batch, PromptFormat, TrainBatches
from checkpointing import atomic_write_text, step_folder
from evaluation import Answer, Decoding, Evaluation, answer, answer_budget, evaluate
from host import load_tokenizer
from model import build_model
from reasoning_gym_wrapper import EpochStream, Reserve, make_tasks, task_warnings, training_examples
from run_logging import Progress, RunLog, draw_curve, format_table
from run_setup import interruptible, peak_memory, pick_device, pick_precision, run_folder, task_config, task_names
from run_state import RunState, load_run, save_run
from training import NonFiniteError, Trainer, learning_rate

NON_FINITE_EXIT = 3
PROBE = 256  # items of an endless stream that are measured against --max_seq_len before training


# --- the run ----------------------------------------------------------------------------------------------------------


class Run:
    """A run from its options (see `run_setup.check`), new or going on from `checkpoint`.

    Raises:
        ValueError: the user's mistakes, before anything is written.
    """

    def __init__(self, opts: argparse.Namespace, checkpoint: Path | None):
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        opts.task_config = task_config(opts)  # going on with other tasks keeps the difficulty
        self.opts, self.checkpoint = opts, checkpoint
        device = pick_device(opts.device)
        if opts.num_threads:
            torch.set_num_threads(opts.num_threads)
        self.accelerator = Accelerator(cpu=device == "cpu")
        self.device = self.accelerator.device
        self.precision = pick_precision(opts.mixed_precision, device)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.folder = self._folder()
        self._build_data()
        set_seed(opts.seed)
        self.model = build_model(opts, str(self.device))
        self._check_positions()
        self.model.config.segments = opts.eval_segments or opts.segments  # training draws its own number
        self.trainer = Trainer(opts, self.model, self.accelerator, self.precision, self._verdicts)
        self.step, self.elapsed, self.best = 0, 0.0, None
        self.bare: list[Answer] | None = None
        self._last_evaluated = -1
        if checkpoint:
            self._restore(checkpoint)
        self.total_steps = self._total_steps()

    def _folder(self) -> Path:
        """The run's folder: that of the checkpoint it goes on from, else a named or dated one."""
        tasks = "+".join(task_names(self.opts))[:60]
        name = gather_object([f"{tasks}-{datetime.now():%Y%m%d-%H%M%S}"])[0]
        return run_folder(self.opts, self.checkpoint) or Path(self.opts.save_dir) / name

    def _build_data(self) -> None:
        opts = self.opts
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
        if opts.eval_only:
            return
        stream = training_examples(self.tasks, self.reserve, opts.seed, opts.train_n)
        if isinstance(stream, EpochStream):
            stream.examples = self.format.fitting(stream.examples, opts.overlong, "training")
        else:
            probe = training_examples(self.tasks, self.reserve, opts.seed, 0)
            self.format.fitting([next(probe) for _ in range(PROBE)], opts.overlong, "training")
        self.batches = TrainBatches(
            stream, self.format, opts.batch_size, opts.bucket_batches, opts.seed, opts.overlong, self.rank, self.world
        )

    def _check_positions(self) -> None:
        """Raises ValueError when an answer could outgrow the LLM's positions: some families fail there."""
        positions = getattr(self.model.host.config.get_text_config(), "max_position_embeddings", None)
        longest = max(map(len, self.format.prompts([example.question for example in self.eval_examples])))
        if positions and longest + self.budget > positions:
            raise ValueError(
                f"a prompt of {longest} tokens and an answer of {self.budget} pass the {positions} positions of "
                f"{self.opts.model_name}: lower --max_new_tokens, or --max_seq_len with --overlong drop"
            )

    def _total_steps(self) -> int | None:
        """Batches of the whole run; None: only time limits it. Typed epochs or minutes replace the default steps."""
        opts = self.opts
        steps = opts.max_steps
        if (opts.epochs or opts.max_minutes) and "max_steps" not in opts.explicit:
            steps = opts.max_steps = 0
        if opts.epochs and self.batches is not None:
            per_step = opts.batch_size * opts.grad_accum_steps * self.world
            by_epochs = math.ceil(opts.epochs * len(self.batches.stream.examples) / per_step)
            steps = min(steps, by_epochs) if steps else by_epochs
        return steps or None

    def say(self, text: str) -> None:
        """A line for the user, from one rank."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    # --- commands ---

    def go(self) -> int:
        """Trains, evaluates and saves, or what --eval_only and --dry_run ask for. Returns the exit status."""
        opts = self.opts
        self._introduce()
        if opts.dry_run:
            return self._dry_run()
        csv = Path(opts.log_csv) if opts.log_csv else None
        with RunLog(
            self.folder, csv, options.names(opts.trackers), options.as_dict(opts), self.is_main, self.elapsed
        ) as self.log:
            if opts.eval_only:
                self._finish(self.evaluate())
                return 0
            if self.checkpoint:
                self.log.truncate_after(self.step, evaluate=self._progress_share() >= 1)
            status = self._train()
            if status:
                return status
            if self._last_evaluated != self.step:
                self.save()  # an evaluation cut short must not cost what was trained
                self.evaluate()
            evaluation = self._evaluation
            self.save(evaluation)
            self._finish(evaluation)
        return 0

    def _introduce(self) -> None:
        count = sum(p.numel() for p in self.model.addon_parameters().values())
        host = sum(p.numel() for p in self.model.host.parameters())
        limit = f"{self.total_steps} steps" if self.total_steps else f"{self.opts.max_minutes} minutes"
        work = "evaluation only" if self.opts.eval_only else f"{limit} of {self.opts.batch_size} examples"
        start = f", from step {self.step}" if self.step else ""
        self.say(
            f"{self.opts.model_name} ({host / 1e6:.1f} M frozen) + HRM ({count / 1e6:.2f} M trainable) on "
            f"{self.device}, {self.precision} autocast; {', '.join(t.name for t in self.tasks)}; {work}{start}"
        )
        if self.world > 1:
            self.say(f"{self.world} processes, {self.opts.batch_size * self.world} examples a batch")

    def _dry_run(self) -> int:
        """One forward and backward on one real batch: loss, parameter counts, estimated time and memory of the run."""
        times = []
        for step in range(3):  # the first call pays for warming up
            batches = self._next_batches()
            started = time.perf_counter()
            try:
                metrics = self.trainer.step(batches, step, lr=0.0)
            except NonFiniteError as error:
                self.say(f"{options.PROG}: {error}: training would stop here; nothing was written")
                return NON_FINITE_EXIT
            times.append((time.perf_counter() - started) / metrics["segments"])
        mean_segments = (1 + self.opts.segments) / 2 if self.opts.segments_sampling == "uniform" else self.opts.segments
        seconds = min(times) * mean_segments
        steps = self.total_steps
        asked = f"{self.opts.max_minutes} minutes"
        total = f"about {seconds * steps / 60:.1f} minutes for {steps} steps" if steps else asked
        self.say(f"loss {metrics['loss']:.4f}, gradient norm {metrics['grad_norm']:.3f}")
        for name, module in self.model.model.addon.named_children():
            self.say(f"  {name:16s} {sum(p.numel() for p in module.parameters() if p.requires_grad):>12,} parameters")
        self.say(f"{seconds:.2f} s a step of {self.opts.batch_size} examples: {total}, evaluation aside")
        self.say(f"peak memory {peak_memory(self.device) / 2**30:.2f} GiB; nothing was written")
        return 0

    # --- training ---

    def _next_batches(self) -> list[Batch]:
        """The micro-batches of this rank for one batch."""
        return [next(self.batches).to(self.device) for _ in range(self.opts.grad_accum_steps)]

    def _progress_share(self) -> float:
        """How much of the run is done, 0 to 1, by the limit that is nearer; alike on all ranks, which end together."""
        by_steps = self.step / self.total_steps if self.total_steps else 0.0
        by_time = 0.0
        if self.opts.max_minutes:
            seconds = torch.tensor(self.log.elapsed_s, device=self.device)
            by_time = float(self.accelerator.reduce(seconds, "mean")) / (60 * self.opts.max_minutes)
        return min(max(by_steps, by_time), 1.0)

    def _train(self) -> int:
        """The loop. Returns 0 when done, or the exit status of an early but orderly end."""
        opts = self.opts
        warmup = min(opts.warmup_steps, (self.total_steps or opts.warmup_steps * 2) // 2)
        progress = Progress(self.total_steps, "step", "ex", start=self.step, enabled=self.is_main)
        with interruptible() as stop, progress:
            clock, seen = time.monotonic(), 0
            while self._progress_share() < 1:
                batches = self._next_batches()
                lr = learning_rate(opts, self.step, self._progress_share(), warmup)
                try:
                    metrics = self.trainer.step(batches, self.step, lr)
                except NonFiniteError as error:
                    return self._not_finite(error, batches)
                self.step += 1
                seen += metrics["examples"]
                rate = seen / (time.monotonic() - clock)
                progress.update(self.step, loss=metrics["answer_loss"], lr=lr, rate=rate)
                self._after_step(metrics, rate, progress)
                if self._anyone(stop.signal is not None):
                    self.save()
                    self.say(f"stopped at step {self.step}, saved; go on with: python train.py --resume {self.folder}")
                    return 128 + (stop.signal or signal.SIGTERM)
        return 0

    def _anyone(self, flag: bool) -> bool:
        """True on all ranks as soon as it is on one."""
        if self.world == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(int(flag), device=self.device), "sum"))

    def _after_step(self, metrics: dict[str, float], rate: float, progress: Progress) -> None:
        opts, step = self.opts, self.step
        if step % opts.log_steps == 0 or step == self.total_steps:
            self.log.log(step, **metrics, examples_per_second=rate)
        if opts.log_samples_every and step % opts.log_samples_every == 0:
            self._show_samples(progress)
        evaluation = None
        if opts.eval_every and step % opts.eval_every == 0:
            evaluation = self.evaluate()
            progress.say(f"step {step}\n{format_table(evaluation.table())}")
        if (opts.save_every and step % opts.save_every == 0) or (evaluation and self._is_best(evaluation)):
            self.save(evaluation)

    def _not_finite(self, error: NonFiniteError, batches: list[Batch]) -> int:
        """Keeps the weights, which are those before the bad step, and the batch that would have spoilt them."""
        self.save()
        path = self.folder / "bad_batch.json"
        items = [{"task": e.task, "question": e.question, "target": e.target} for b in batches for e in b.examples]
        if self.is_main:
            atomic_write_text(path, json.dumps({"step": self.step, "examples": items}, indent=1))
        self.say(f"{options.PROG}: {error}: stopped before the step; the weights are saved, the batch is in {path}")
        return NON_FINITE_EXIT

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
        self._last_evaluated, self._evaluation = self.step, evaluation
        return evaluation

    def _gathered(self, mine: list[int], answers: list[Answer]) -> list[Answer]:
        """The answers of all ranks in the order of the evaluation set."""
        if self.world == 1:
            return answers
        packed = [(i, a.text, a.score, a.finished, a.raised, a.segments) for i, a in zip(mine, answers, strict=True)]
        return [Answer(self.eval_examples[i], *rest) for i, *rest in sorted(gather_object(packed))]

    def _show_samples(self, progress: Progress, count: int = 2) -> None:
        """Prompt, target and prediction of a few evaluation items, others each time."""
        start = self.step // self.opts.log_samples_every * count % len(self.eval_examples)
        examples = self.eval_examples[start : start + count]
        self.model.eval()
        with self.trainer.evaluation_weights(), self.trainer.autocast():
            answers = answer(self.model, self.format, examples, self._decoding())
        for a in answers:
            asked = f"[step {self.step}] prompt: {a.example.question!r}"
            progress.say(f"{asked}\n  target: {a.example.target!r}  prediction: {a.text!r}")

    def _is_best(self, evaluation: Evaluation) -> bool:
        return self.opts.save_best_model and (self.best is None or evaluation.solved_rate() > self.best)

    def _finish(self, evaluation: Evaluation) -> None:
        """The closing words: table, files, next command."""
        if not self.is_main:
            return
        print(format_table(evaluation.table()))
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

    # --- checkpoints ---

    def save(self, evaluation: Evaluation | None = None) -> None:
        """Writes the whole state of the run at this step; only add-on weights, never the LLM's."""
        if not self.is_main:
            return
        is_best = evaluation is not None and self._is_best(evaluation)
        if is_best:
            self.best = evaluation.solved_rate()
        state = RunState(self.step, self.log.elapsed_s, self.best, self.batches.state_dict())
        save_run(self.folder, self.opts, self.trainer, state, self._card(evaluation), is_best)

    def _restore(self, folder: Path) -> None:
        state, notes = load_run(folder, self.opts, self.trainer)
        self.step, self.elapsed, self.best = state.step, state.elapsed_s, state.best
        if self.batches is not None and state.stream:
            self.batches.load_state_dict(state.stream)
        for note in notes:
            self.say(note)

    def _card(self, evaluation: Evaluation | None) -> str:
        """The checkpoint's README.md."""
        names = ", ".join(task.name for task in self.tasks)
        lines = [
            "---\nlibrary_name: peft\ntags: [hrm]\n---\n",
            f"# HRM add-on for {self.opts.model_name}\n",
            f"Step {self.step}; tasks {names} at `{task_config(self.opts)}` difficulty.",
            "Weights of the add-on alone; load with `model.load_adapter` or `generate.py --checkpoint`.\n",
        ]
        return "\n".join(lines) + (f"\n```\n{format_table(evaluation.table())}\n```\n" if evaluation else "")
