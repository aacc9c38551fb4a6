"""A run of the hybrid: prepared triples or the synthetic addition, validation loss, generated answers, patience."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor

import options
from engine.batches import IGNORE
from engine.checkpoints import step_folder
from engine.intervals import wilson
from engine.logs import Progress, draw_curve
from engine.loop import RunLoop, closing_words
from engine.machine import MachineConfig, machine_problems
from engine.records import question_hash
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
from hybrid.training import HybridTrainer
from suite.measure import spec_problems
from suite.questions import SuiteItem
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

    def rows(self, step: int) -> list[dict[str, Any]]:
        """Long-form CSV rows. A loss's n is its tokens."""
        rows = []
        for name, part in self.parts.items():
            shared = {"step": step, "task": name, "n": part.tokens, "segments_used": part.cycles}
            rows += [{**shared, "metric": "loss", "value": part.loss},
                     {**shared, "metric": "perplexity", "value": part.perplexity}]
            rows += [{**shared, "n": part.samples, "metric": name, "value": value}
                     for name, value in part.diagnostics.items()]
        if self.answers:
            low, high = wilson(self.solved, len(self.answers))
            rows.append({"step": step, "task": "synthetic", "metric": "solved", "n": len(self.answers), "ci_low": low,
                         "value": self.solved / len(self.answers), "ci_high": high,
                         "segments_used": self.parts[VALIDATION].cycles})
        return rows

    def lines(self) -> str:
        """The evaluation for people."""
        width = max(16, *(len(name) for name in self.parts))
        lines = [f"{'set':{width}s}  samples   tokens     loss  perplexity  cycles"]
        for name, part in self.parts.items():
            cycles = "-" if part.cycles is None else f"{part.cycles:.2f}"
            lines.append(f"{name:{width}s}  {part.samples:7d}  {part.tokens:7d}  {part.loss:7.4f}  "
                         f"{part.perplexity:10.2f}  {cycles:>6s}")
        if self.answers:
            low, high = wilson(self.solved, len(self.answers))
            lines.append(f"synthetic: {self.solved} of {len(self.answers)} held-out additions solved, generated: "
                         f"{100 * self.solved / len(self.answers):.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
        return "\n".join(lines)


def problems(opts: argparse.Namespace, checkpoint: Path | None = None) -> list[str]:
    """Everything wrong with a run of the hybrid that can be found without building a model, one line each."""
    lines = data_problems(opts.dataset, opts.dev_sets)
    lines += spec_problems(opts.eval_suite, opts.allow_unconfined_code)
    return lines + machine_problems(options.part(MachineConfig, opts), checkpoint)


class HybridRun(RunLoop):
    """The hybrid's run: see `RunLoop`. Every validation is followed by a checkpoint."""

    problems = staticmethod(problems)
    metric = "negative_validation_loss"
    unit = "tok"
    compared_with = "gate shut"
    handlers = (DistributedDataParallelKwargs(find_unused_parameters=True),)  # while the gate is shut HRM is idle

    # --- set up ---

    def build_data(self) -> None:
        config = options.part(HybridDataConfig, self.opts)
        self.data: HybridData = open_data(config)
        workers, warning = usable_workers(self.opts.dataset_workers)
        if warning:
            self.say(warning)
        self.batches = None
        if self.data.train is not None:
            self.batches = training_batches(self.data, config, self.rank, self.world, workers)

    def build_trainer(self) -> HybridTrainer:
        self.model = HybridModel(hybrid_config(self.opts, self.data)).to(self.device)
        trainer = HybridTrainer(self.opts, self.model, self.accelerator, self.precision, self.data.tokenizer_json)
        self.text = None
        if self.data.tokenizer_json:
            self.text = HybridText(self.model, self.data.tokenizer_json, self.opts.eval_batch_size,
                                   self.opts.max_seq_len, trainer.autocast)
        return trainer

    def _restore(self, folder: Path) -> None:
        super()._restore(folder)
        if self.opts.eval_only:  # --hrm_gate_scale 0 shuts the gate of a trained model
            self.model.config.gate_scale = min(self.model.config.gate_scale, self.opts.hrm_gate_scale)

    # --- what the loop asks ---

    def label(self) -> str:
        dataset = self.opts.dataset or "random"
        return "hybrid-" + "".join(c if c.isalnum() or c in "-_." else "-" for c in dataset.strip("/.")).strip("-")

    def introduce(self) -> str:
        count = sum(p.numel() for p in self.model.parameters())
        hrm = sum(p.numel() for p in self.model.hrm_parameters().values())
        size = f", {len(self.data.train)} training samples" if self.data.train is not None else ""
        what = f"hybrid ({self.opts.encoder}, {self.opts.bridge}), {count / 1e6:.2f} M parameters"
        where = f"{self.device}, {self.precision} autocast"
        return f"{what}, {hrm / 1e6:.2f} M of them HRM, on {where}; {self.opts.dataset or 'random tokens'}{size}"

    def next_batches(self) -> list[dict[str, Tensor]]:
        return [{name: tensor.to(self.device) for name, tensor in next(self.batches).items()}
                for _ in range(self.opts.grad_accum_steps)]

    def position(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def set_position(self, position: dict[str, Any]) -> None:
        """Goes on in the data, or begins them anew where batches of another shape are asked for."""
        try:
            self.batches.load_state_dict(position)
        except ValueError as error:
            self.say(f"the training data begin anew: {error}")

    def data_size(self) -> int:
        return len(self.data.train)

    def describe(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
        return [{name: row.tolist() for name, row in zip(batch, rows, strict=True)}
                for batch in batches for rows in zip(*batch.values(), strict=True)]

    def parts(self) -> dict[str, Any]:
        encoder = self.model.encoder
        return {"embeddings": encoder.embed, "encoder": encoder.backbone, "HRM core": encoder.core,
                "bridge": encoder.bridge, "gate": encoder.gate, "decoder": self.model.decoder}

    def text_models(self) -> tuple[HybridText, HybridText | None]:
        """The hybrid, and the same weights with the gate shut."""
        shut = HybridText(self.model, self.data.tokenizer_json, self.opts.eval_batch_size, self.opts.max_seq_len,
                          self.trainer.autocast, gate_scale=0.0)
        return self.text, None if self.model.config.gate_scale == 0 else shut

    def suite_items(self, items: list[SuiteItem]) -> list[SuiteItem]:
        """The synthetic sums are those that --dataset synthetic holds out."""
        held = tuple(synthetic_questions(self.opts.eval_suite_n or self.opts.eval_n, 0, "val"))
        return [SuiteItem(SYNTHETIC, pairs=held) if item.name == SYNTHETIC and not item.path else item
                for item in items]

    def shown(self, metrics: dict[str, float]) -> dict[str, str]:
        """Gate window and halting sum beside the loss."""
        if "halt_sum_mean" not in metrics:
            return {"gate": "shut"}
        low, high = metrics["gate_min"], metrics["gate_max"]
        return {"gate": f"{metrics['gate_mean']:.2f} [{low:.2f}, {high:.2f}]",
                "halt": f"{metrics['halt_sum_mean']:.2f}"}

    def table(self, evaluation: HybridEvaluation) -> str:
        return evaluation.lines()

    def value(self, evaluation: HybridEvaluation) -> float:
        return -evaluation.parts[VALIDATION].loss

    def saves_after_evaluation(self) -> bool:
        return True

    def is_done(self) -> bool:
        early = self.ended_early()
        if not early and (self.total_steps is None or self.step < self.total_steps):
            return False
        if self.extra.get("evaluated") != self.step:  # stopped before the closing evaluation: that is still to be done
            return False
        more = f"{early}; --eval_loss_patience 0 goes on" if early else "raise --steps to go on"
        self.say(f"{self.folder} has done its {self.step} steps: nothing to do; {more}")
        return True

    # --- patience ---

    def after_evaluation(self, evaluation: HybridEvaluation) -> None:
        """Counts consecutive rises of the validation loss, once the grace steps are over."""
        loss, before = evaluation.parts[VALIDATION].loss, self.extra.get("validation_loss")
        rose = before is not None and (loss > before or math.isnan(loss))
        counts = rose and self.step > self.opts.patience_grace_steps
        self.extra |= {"validation_loss": loss, "rises": self.extra.get("rises", 0) + 1 if counts else 0}

    def ended_early(self) -> str | None:
        rises, patience = self.extra.get("rises", 0), self.opts.eval_loss_patience
        if not patience or rises < patience:
            return None
        return f"the validation loss rose {rises} times in a row (--eval_loss_patience {patience})"

    # --- evaluation ---

    @torch.no_grad()
    def evaluate(self) -> HybridEvaluation:
        """Loss over the whole validation split and each dev set, and the synthetic task's generated answers."""
        was_training = self.model.training
        self.model.eval()
        with self.trainer.evaluation_weights():
            sets = {VALIDATION: self.data.val, **self.data.dev}
            parts = {name: self._part(part) for name, part in sets.items()}
            evaluation = HybridEvaluation(parts, self._answers())
        self.model.train(was_training)
        self.extra["evaluated"] = self.step
        self.log.eval_rows(evaluation.rows(self.step))
        self.log.predictions([
            {"step": self.step, "id": f"synthetic/{i:05d}", "task": "synthetic", "prompt_hash": question_hash(prompt),
             "prediction": text, "score": float(text == gold)}
            for i, (prompt, gold, text) in enumerate(evaluation.answers)
        ])
        return evaluation

    def _part(self, part: Any) -> Part:
        opts, sums, rows = self.opts, [0.0, 0.0], []
        batches = validation_batches(part, opts.eval_batch_size, self.data.pad_id, opts.max_val_samples, self.rank,
                                     self.world)
        for batch in batches:
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
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
        if self.world > 1:
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
        mine = list(range(len(self.data.questions)))[self.rank :: self.world]
        texts = self.text.generate([self.data.questions[i][0] for i in mine], self.opts.max_new_tokens or 8)
        found = list(zip(mine, texts, strict=True))
        if self.world > 1:
            found = sorted(gather_object(found))
        return [(*self.data.questions[i], text) for i, text in found]

    def show_samples(self, progress: Progress, count: int = 2) -> None:
        """The first labels of a few validation samples beside what the model generates for them."""
        if self.text is None:
            return
        start = self.step // self.opts.log_samples_every * count % len(self.data.val)
        for index in range(start, min(start + count, len(self.data.val))):
            triple = self.data.val[index]
            prompt, target = self.text.decode(triple.encoder_ids), self.text.decode(triple.labels)
            with self.trainer.evaluation_weights():
                text = self.text.generate_ids([triple.encoder_ids], min(len(triple.labels) + 4, 64))[0]
            progress.say(f"[step {self.step}] prompt: {prompt[-200:]!r}\n  target: {target[:200]!r}  prediction: "
                         f"{text[:200]!r}")

    def finish(self, evaluation: HybridEvaluation) -> None:
        """The closing words: table, files, next command."""
        if not self.is_main:
            return
        print(self.table(evaluation))
        newest = self.checkpoint if self.opts.eval_only else step_folder(self.folder, self.step)
        curve = draw_curve(self.folder, self.log.csv_path)
        question = self.data.questions[0][0] if self.data.questions else None
        print(closing_words(self.log.csv_path, newest, curve, question, compare=False))

    def card(self, evaluation: HybridEvaluation | None) -> str:
        """The checkpoint's README.md."""
        lines = ["---\nlibrary_name: transformers\ntags: [hrm]\n---\n", "# HRM hybrid encoder-decoder\n",
                 f"Step {self.step}; {self.opts.encoder} encoder, {self.opts.bridge} bridge, trained on "
                 f"{self.opts.dataset}.",
                 "`import hybrid` registers the architecture; then AutoModelForSeq2SeqLM loads this folder, or use "
                 "`generate.py --checkpoint`.\n"]
        return "\n".join(lines) + (f"\n```\n{evaluation.lines()}\n```\n" if evaluation else "")


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
