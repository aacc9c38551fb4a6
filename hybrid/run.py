"""A run of the hybrid: prepared triples or the synthetic addition, validation loss, generated answers, patience."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedDataParallelKwargs, gather_object, set_seed
from torch import Tensor

import options
from engine.batches import IGNORE
from engine.intervals import wilson
from engine.loop import RunLoop
from engine.machine import Machine, MachineConfig, machine_problems, start_machine
from engine.optimization import OptimConfig
from engine.report import Card, Report, metric_row, percent, prediction_line, text_table
from engine.system import Evaluator, Facts, Hooks, LoopConfig
from hybrid.data import (
    SYNTHETIC,
    HybridData,
    HybridDataConfig,
    data_problems,
    open_data,
    training_batches,
    usable_workers,
    validation_batches,
)
from hybrid.model import HybridConfig, HybridModel
from hybrid.text import HybridText
from hybrid.training import HybridStepConfig, HybridTrainer
from suite.after_run import Subject
from suite.spec import spec_problems
from text_data.synthetic import synthetic_questions

VALIDATION = "validation"
# Fields of HybridConfig that have the name of their flag.
SHAPE_FLAGS = (
    *("d_model", "n_heads", "encoder", "encoder_layers", "decoder_layers", "state_size"),
    *("d_h", "h_layers", "l_layers", "h_len", "l_len", "h_cycles", "grad_horizon"),
    *("bridge", "prefix_len", "use_halting", "halt_threshold"),
)


@dataclass
class Part:
    """Loss over the labelled tokens of one split."""

    loss: float  # nats a token
    tokens: int
    samples: int
    cycles: float | None  # mean HRM cycles; None with the gate shut
    diagnostics: dict[str, float] = field(default_factory=dict)  # of HRM, over the samples; empty with the gate shut

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@dataclass
class HybridEvaluation:
    """Validation and dev sets by name, and the generated answers of the synthetic task."""

    parts: dict[str, Part]
    answers: list[tuple[str, str, str]]  # (prompt, gold, generated)

    @property
    def solved(self) -> int:
        return sum(gold == text for _, gold, text in self.answers)

    def rows(self) -> list[dict[str, Any]]:
        """Long-form CSV rows. A loss's n is its tokens."""
        rows = []
        for name, part in self.parts.items():
            losses = {"loss": part.loss, "perplexity": part.perplexity}
            for metric, value in losses.items():
                rows.append(metric_row(name, metric, value, part.tokens, segments_used=part.cycles))
            for metric, value in part.diagnostics.items():
                rows.append(metric_row(name, metric, value, part.samples, segments_used=part.cycles))

        n = len(self.answers)
        if n:
            cycles = self.parts[VALIDATION].cycles
            interval = wilson(self.solved, n)
            rows.append(
                metric_row(SYNTHETIC, "solved", self.solved / n, n, interval=interval, segments_used=cycles)
            )
        return rows

    def predictions(self) -> list[dict[str, Any]]:
        """One line per held-out addition."""
        return [
            prediction_line(SYNTHETIC, index, prompt, text, float(text == gold))
            for index, (prompt, gold, text) in enumerate(self.answers)
        ]

    def lines(self) -> str:
        """The evaluation for people."""
        table = [("set", "samples", "tokens", "loss", "perplexity", "cycles")]
        for name, part in self.parts.items():
            cycles = "-" if part.cycles is None else f"{part.cycles:.2f}"
            table.append(
                (name, str(part.samples), str(part.tokens), f"{part.loss:.4f}", f"{part.perplexity:.2f}", cycles)
            )
        text = text_table(table, "<>>>>>", (16, 7, 7, 7, 10, 6))

        n = len(self.answers)
        if n:
            rate = percent(self.solved / n, wilson(self.solved, n))
            text += f"\n{SYNTHETIC}: {self.solved} of {n} held-out additions solved, generated: {rate}"
        return text


def problems(opts: argparse.Namespace, checkpoint: Path | None = None) -> list[str]:
    """Everything wrong with a run of the hybrid that can be found without building a model, one line each."""
    lines = data_problems(opts.dataset, opts.dev_sets)
    lines += spec_problems(opts.eval_suite, opts.allow_unconfined_code)
    return lines + machine_problems(options.part(MachineConfig, opts), checkpoint)


class HybridTraining:
    """The training batches of one rank, without end; see `engine.system.Data`."""

    def __init__(self, opts: argparse.Namespace, data: HybridData, machine: Machine):
        self.machine = machine
        self.data = data
        self.grad_accum_steps = opts.grad_accum_steps
        workers, warning = usable_workers(opts.dataset_workers)
        if warning:
            machine.say(warning)
        self.batches = None
        if data.train is not None:
            config = options.part(HybridDataConfig, opts)
            self.batches = training_batches(data, config, machine.rank, machine.world, workers)

    @property
    def size(self) -> int:
        return len(self.data.train)

    def next_batches(self) -> list[dict[str, Tensor]]:
        return [
            {name: tensor.to(self.machine.device) for name, tensor in next(self.batches).items()}
            for _ in range(self.grad_accum_steps)
        ]

    def state(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on in the data, or begins them anew where batches of another shape are asked for."""
        try:
            self.batches.load_state_dict(state)
        except ValueError as error:
            self.machine.say(f"the training data begin anew: {error}")

    def describe(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
        examples = []
        for batch in batches:
            for rows in zip(*batch.values(), strict=True):
                examples.append({name: row.tolist() for name, row in zip(batch, rows, strict=True)})
        return examples


class HybridEvaluator(Evaluator):
    """Loss over the validation split and each dev set, and the synthetic task's generated answers."""

    def __init__(
        self, opts: argparse.Namespace, data: HybridData, model: HybridModel, trainer: HybridTrainer,
        text: HybridText | None, machine: Machine,
    ):
        self.opts = opts
        self.data = data
        self.model = model
        self.trainer = trainer
        self.text = text
        self.machine = machine

    @torch.no_grad()
    def evaluate(self, step: int) -> Report:
        """Every split whole, in order; each rank its share of the rows."""
        was_training = self.model.training
        self.model.eval()
        with self.trainer.evaluation_weights():
            sets = {VALIDATION: self.data.val, **self.data.dev}
            parts = {name: self._part(part) for name, part in sets.items()}
            evaluation = HybridEvaluation(parts, self._answers())
        self.model.train(was_training)

        question = self.data.questions[0][0] if self.data.questions else None
        loss = evaluation.parts[VALIDATION].loss
        return Report(
            evaluation.rows(), evaluation.predictions(), evaluation.lines(), -loss, question=question,
            details=evaluation,
        )

    def _part(self, part: Any) -> Part:
        """Loss and diagnostics over one split."""
        opts, sums, rows = self.opts, [0.0, 0.0], []
        batches = validation_batches(part, opts.eval_batch_size, self.data.pad_id, opts.max_val_samples,
                                     self.machine.rank, self.machine.world)
        for batch in batches:
            batch = {name: tensor.to(self.machine.device) for name, tensor in batch.items()}
            with self.trainer.autocast():
                encoded = self.model.encoder(batch["encoder_ids"], batch["encoder_mask"])
                out = self.model(attention_mask=batch["encoder_mask"], encoder_outputs=encoded,
                                 decoder_input_ids=batch["decoder_input_ids"])
            labels = batch["labels"]
            losses = torch.nn.functional.cross_entropy(out.logits.float().flatten(0, 1), labels.flatten(),
                                                       ignore_index=IGNORE, reduction="sum")
            sums = [sums[0] + float(losses), sums[1] + int((labels != IGNORE).sum())]
            found = (encoded.cycles_used, encoded.gate, encoded.halt_sum, encoded.z_norm)
            rows += zip(*([0.0] * len(labels) if value is None else value.float().tolist() for value in found),
                        strict=True)
        if self.machine.world > 1:
            shares = gather_object([(sums, rows)])
            sums, rows = [sum(share[0][i] for share in shares) for i in (0, 1)], [r for s in shares for r in s[1]]
        if not rows:
            raise ValueError(f"{part.path} has no good line: see them with scripts/validate_dataset.py")
        cycles, gate, halt, norm = torch.tensor(rows, dtype=torch.float64).unbind(dim=1)
        loss = sums[0] / max(sums[1], 1)
        if self.model.config.gate_scale == 0:
            return Part(loss, int(sums[1]), len(rows), None)
        return Part(loss, int(sums[1]), len(rows), float(cycles.mean()), {
            "gate_mean": float(gate.mean()), "gate_min": float(gate.min()), "gate_max": float(gate.max()),
            "halt_sum_mean": float(halt.mean()), "halt_sum_std": float(halt.std(correction=0)),
            "z_norm": float(norm.mean()),
        })

    def _answers(self) -> list[tuple[str, str, str]]:
        if not self.data.questions:
            return []
        mine = list(range(len(self.data.questions)))[self.machine.rank :: self.machine.world]
        texts = self.text.generate([self.data.questions[i][0] for i in mine], self.opts.max_new_tokens or 8)
        found = list(zip(mine, texts, strict=True))
        if self.machine.world > 1:
            found = sorted(gather_object(found))
        return [(*self.data.questions[i], text) for i, text in found]

    def samples(self, turn: int, count: int = 2) -> list[str]:
        """The first labels of a few validation samples beside what the model generates for them."""
        if self.text is None:
            return []
        texts = []
        start = turn * count % len(self.data.val)
        for index in range(start, min(start + count, len(self.data.val))):
            triple = self.data.val[index]
            prompt, target = self.text.decode(triple.encoder_ids), self.text.decode(triple.labels)
            with self.trainer.evaluation_weights():
                text = self.text.generate_ids([triple.encoder_ids], min(len(triple.labels) + 4, 64))[0]
            texts.append(f"prompt: {prompt[-200:]!r}\n  target: {target[:200]!r}  prediction: {text[:200]!r}")
        return texts


class HybridHooks(Hooks):
    """Gate and halting beside the loss, patience, and a run that is left alone once it is done.

    `extra` keeps the step of the newest evaluation, its validation loss, and how often in a row the loss has risen.
    """

    def __init__(self, opts: argparse.Namespace, model: HybridModel):
        super().__init__()
        self.opts = opts
        self.model = model

    def shown(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Gate window and halting sum."""
        if "halt_sum_mean" not in metrics:
            return {"gate": "shut"}
        low, high = metrics["gate_min"], metrics["gate_max"]
        return {
            "gate": f"{metrics['gate_mean']:.2f} [{low:.2f}, {high:.2f}]",
            "halt": f"{metrics['halt_sum_mean']:.2f}",
        }

    def after_evaluation(self, step: int, report: Report, share: float | None) -> None:
        """Counts consecutive rises of the validation loss, once the grace steps are over."""
        self.extra["evaluated"] = step
        if share is None:
            return
        loss = report.details.parts[VALIDATION].loss
        before = self.extra.get("validation_loss")
        rose = before is not None and (loss > before or math.isnan(loss))
        counts = rose and step > self.opts.patience_grace_steps
        self.extra["validation_loss"] = loss
        self.extra["rises"] = self.extra.get("rises", 0) + 1 if counts else 0

    def ended_early(self) -> str | None:
        rises = self.extra.get("rises", 0)
        patience = self.opts.eval_loss_patience
        if not patience or rises < patience:
            return None
        return f"the validation loss rose {rises} times in a row (--eval_loss_patience {patience})"

    def nothing_to_do(self, step: int, total_steps: int | None, share: float) -> str | None:
        early = self.ended_early()
        if not early and (total_steps is None or step < total_steps):
            return None
        if self.extra.get("evaluated") != step:  # stopped before the closing evaluation: that is still to be done
            return None
        more = f"{early}; --eval_loss_patience 0 goes on" if early else "raise --steps to go on"
        return f"has done its {step} steps: nothing to do; {more}"

    def restored(self, before: Mapping[str, Any]) -> list[str]:
        """--hrm_gate_scale 0 shuts the gate of a trained model that is only evaluated."""
        if self.opts.eval_only:
            self.model.config.gate_scale = min(self.model.config.gate_scale, self.opts.hrm_gate_scale)
        return []


class HybridRun:
    """A run of the hybrid, new or going on from `checkpoint`. Every validation is followed by a checkpoint.

    Raises:
        ValueError: the user's mistakes, before anything is written.
    """

    problems = staticmethod(problems)

    def __init__(self, opts: options.Options, checkpoint: Path | None):
        self.opts = opts
        config = options.part(
            LoopConfig, opts, settings=options.rerun_text(opts), flags=options.as_dict(opts)
        )
        # While the gate is shut HRM takes part in no backward pass.
        self.machine = start_machine(config, [DistributedDataParallelKwargs(find_unused_parameters=True)])
        self.data: HybridData = open_data(options.part(HybridDataConfig, opts))
        training = HybridTraining(opts, self.data, self.machine)

        set_seed(opts.seed)
        self.model = HybridModel(hybrid_config(opts, self.data)).to(self.machine.device)
        self.trainer = HybridTrainer(
            options.part(HybridStepConfig, opts),
            options.part(OptimConfig, opts),
            self.model,
            self.machine.accelerator,
            self.machine.precision,
            self.data.tokenizer_json,
        )
        self.text = self._text() if self.data.tokenizer_json else None
        evaluator = HybridEvaluator(opts, self.data, self.model, self.trainer, self.text, self.machine)
        hooks = HybridHooks(opts, self.model)
        self.loop = RunLoop(
            config, self.machine, training, self.trainer, evaluator, self._facts(), hooks, checkpoint
        )

    def go(self) -> int:
        """Runs the command and returns its exit status."""
        return self.loop.go()

    def _text(self, gate_scale: float | None = None) -> HybridText:
        return HybridText(self.model, self.data.tokenizer_json, self.opts.eval_batch_size, self.opts.max_seq_len,
                          self.trainer.autocast, gate_scale)

    def _facts(self) -> Facts:
        opts = self.opts
        dataset = opts.dataset or "random"
        count = sum(p.numel() for p in self.model.parameters())
        hrm = sum(p.numel() for p in self.model.hrm_parameters().values())
        size = f", {len(self.data.train)} training samples" if self.data.train is not None else ""
        encoder = self.model.encoder
        return Facts(
            label="hybrid-" + "".join(c if c.isalnum() or c in "-_." else "-" for c in dataset.strip("/.")).strip("-"),
            introduction=f"hybrid ({opts.encoder}, {opts.bridge}), {count / 1e6:.2f} M parameters, {hrm / 1e6:.2f} M "
            f"of them HRM, on {self.machine.device}, {self.machine.precision} autocast; "
            f"{opts.dataset or 'random tokens'}{size}",
            card=Card(
                "transformers",
                ["hrm"],
                "HRM hybrid encoder-decoder",
                f"; {opts.encoder} encoder, {opts.bridge} bridge, trained on {opts.dataset}.",
                "`import hybrid` registers the architecture; then AutoModelForSeq2SeqLM loads this folder, or use "
                "`generate.py --checkpoint`.",
            ),
            metric="negative_validation_loss",
            unit="tok",
            parts={"embeddings": encoder.embed, "encoder": encoder.backbone, "HRM core": encoder.core,
                   "bridge": encoder.bridge, "gate": encoder.gate, "decoder": self.model.decoder},
            dry_run_step=opts.hrm_gate_warmup_steps,  # before it, a batch costs less
            saves_every_evaluation=True,
            compare=False,
        )

    def text_models(self) -> tuple[HybridText, HybridText | None]:
        """The hybrid, and the same weights with the gate shut."""
        return self.text, None if self.model.config.gate_scale == 0 else self._text(gate_scale=0.0)

    def sums(self, n: int) -> list[tuple[str, str]]:
        """The sums that the suite asks: those that --dataset synthetic holds out, which training never meets."""
        return synthetic_questions(n or self.opts.eval_n, 0, "val")

    def suite_subject(self) -> Subject | None:
        """What --eval_suite measures; None before the run is finished and on other processes than the main one."""
        if not self.loop.finished or not self.machine.is_main:
            return None
        return Subject(self.text_models, "gate shut", self.trainer.evaluation_weights, self.loop.record, self.sums)


def hybrid_config(opts: argparse.Namespace, data: HybridData) -> HybridConfig:
    """The shape that the flags describe, for the data's vocabulary."""
    return HybridConfig(
        vocab_size=data.vocab_size,
        pad_token_id=data.pad_id,
        bos_token_id=data.bos_id,
        eos_token_id=data.eos_id,
        l_steps=opts.inner_T,
        tie_word_embeddings=opts.tie_embeddings,
        **{name: getattr(opts, name) for name in SHAPE_FLAGS},
    )
