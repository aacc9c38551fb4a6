"""A run of the hybrid: prepared triples or the synthetic addition, validation loss, generated answers, patience."""

from __future__ import annotations

import argparse
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import Tensor

import options
from engine.loop import RunLoop
from engine.machine import Machine, MachineConfig, machine_problems, start_machine
from engine.memory import check_model
from engine.optimization import OptimConfig
from engine.report import Card, Report
from engine.system import Facts, Hooks, LoopConfig
from hybrid.data import (
    SYNTHETIC,
    HybridData,
    HybridDataConfig,
    data_problems,
    open_data,
    training_batches,
    usable_workers,
)
from hybrid.measure import HybridEvalConfig, HybridEvaluator
from hybrid.model import HybridConfig, HybridModel
from hybrid.text import HybridText
from hybrid.training import HybridStepConfig, HybridTrainer
from suite.after_run import Subject
from suite.measure import read_items
from suite.questions import SuiteError
from suite.spec import parse_suite, spec_problems
from text_data.batches import PreparedBatches
from text_data.synthetic import synthetic_questions
from text_data.trained import TrainedOn, TrainedQuestions, trained_by, trained_on
from text_data.triples import read_meta

# Fields of HybridConfig that have the name of their flag.
SHAPE_FLAGS = (
    *("d_model", "n_heads", "encoder", "encoder_layers", "decoder_layers", "state_size"),
    *("d_h", "h_layers", "l_layers", "h_len", "l_len", "h_cycles", "grad_horizon"),
    *("bridge", "prefix_len", "use_halting", "halt_threshold"),
)


def problems(opts: argparse.Namespace, checkpoint: Path | None = None) -> list[str]:
    """Everything wrong with a run of the hybrid that can be found without building a model, one line each."""
    lines = data_problems(opts.dataset, opts.dev_sets)

    lines += spec_problems(opts.eval_suite, opts.allow_unconfined_code, opts.eval_suite_split)
    if opts.eval_suite and not lines:
        lines += trained_problems(opts)
    return lines + machine_problems(options.part(MachineConfig, opts), checkpoint)


def trained_problems(opts: argparse.Namespace) -> list[str]:
    """One line for each file of the suite of which --dataset has trained on everything."""
    record = training_record(opts.dataset)
    lines = []
    items = parse_suite(opts.eval_suite, opts.eval_suite_split) if record else []
    for item in items:
        if item.path is None:
            continue
        try:
            read_items(item, 0, 0, record)
        except SuiteError as error:
            lines.append(str(error))
    return lines


def training_record(dataset: str | None) -> TrainedOn | None:
    """What a prepared folder records of its training documents; None where there is no folder or no record."""
    if dataset in (None, SYNTHETIC):
        return None
    return trained_on(read_meta(dataset))


class HybridTraining:
    """The training batches of one rank, without end; see `engine.system.Data`. Without them where nothing trains."""

    def __init__(
        self, data: HybridData, batches: PreparedBatches | None, machine: Machine, grad_accum_steps: int,
        trained: TrainedQuestions,
    ):
        self.data = data
        self.trained = trained
        self.batches = batches
        self.machine = machine
        self.grad_accum_steps = grad_accum_steps

    @property
    def size(self) -> int:
        return len(self.data.train)

    def next_batches(self) -> list[dict[str, Tensor]]:
        batches = []
        for _ in range(self.grad_accum_steps):
            batch = next(self.batches)
            batches.append({name: tensor.to(self.machine.device) for name, tensor in batch.items()})
        return batches

    def state(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on in the data, or begins them anew where they are other data."""
        # A prepared folder that was made anew makes the old position meaningless, and is no mistake.
        try:
            self.batches.load_state_dict(state)
        except ValueError as error:
            self.machine.say(f"the training data begin anew: {error}")

    def documents(self) -> dict[str, str]:
        """The documents of this stage's folder and of the stages before it."""
        return self.trained.documents()

    def describe(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
        """One entry for each row of each batch: field name -> token ids or mask."""
        examples = []
        for batch in batches:
            for rows in zip(*batch.values(), strict=True):
                examples.append({name: row.tolist() for name, row in zip(batch, rows, strict=True)})
        return examples


@dataclass(frozen=True)
class HybridHooksConfig:
    """What an evaluation of the hybrid shuts; each field is the flag of its name.

    hrm_gate_scale: with eval_only, the largest scale of the gate, 0 to 1; 0 shuts HRM out.
    eval_only: True trains nothing.
    """

    hrm_gate_scale: float = 1.0
    eval_only: bool = False


class HybridHooks(Hooks):
    """Gate and halting beside the loss, and a run that is left alone once it is done.

    `extra` keeps `evaluated`, the step of the newest evaluation.
    """

    def __init__(self, config: HybridHooksConfig, model: HybridModel):
        super().__init__()
        self.config = config
        self.model = model

    def shown(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Gate window and halting sum."""
        if "halt_sum_mean" not in metrics:
            return {"gate": "shut"}
        gate = "{gate_mean:.2f} [{gate_min:.2f}, {gate_max:.2f}]".format_map(metrics)
        return {
            "gate": gate,
            "halt": f"{metrics['halt_sum_mean']:.2f}",
        }

    def after_evaluation(self, step: int, report: Report, share: float | None) -> None:
        """Notes that this step is evaluated."""
        self.extra = {"evaluated": step}

    def nothing_to_do(self, step: int, total_steps: int | None, share: float, early: str | None) -> str | None:
        """A run whose steps are done and evaluated is left as it is."""
        # Steps or patience are left.
        if not early and (total_steps is None or step < total_steps):
            return None

        # Stopped between its last step and the closing evaluation, which is still to be done.
        if self.extra.get("evaluated") != step:
            return None
        more = "raise --steps to go on"
        if early:
            more = f"{early}; --patience 0 goes on"
        return f"has done its {step} steps: nothing to do; {more}"

    def restored(self, before: Mapping[str, Any]) -> list[str]:
        """--hrm_gate_scale 0 shuts the gate of a trained model that is only evaluated."""
        # In training the trainer moves the gate itself, batch by batch.
        if self.config.eval_only:
            self.model.config.gate_scale = min(self.model.config.gate_scale, self.config.hrm_gate_scale)
        return []


class HybridRun:
    """A run of the hybrid, new or going on from `checkpoint`. Every validation is followed by a checkpoint.

    Raises:
        ValueError: the user's mistakes, before anything is written.
    """

    problems = staticmethod(problems)

    def __init__(self, opts: options.Options, checkpoint: Path | None):
        self.opts = opts
        config = options.part(LoopConfig, opts, settings=options.rerun_text(opts), flags=options.as_dict(opts))

        # While the gate is shut HRM takes part in no backward pass.
        self.machine = start_machine(config, [DistributedDataParallelKwargs(find_unused_parameters=True)])
        self.data: HybridData = open_data(options.part(HybridDataConfig, opts))
        self.trained = trained_by(checkpoint, goes_on=False)
        self.unknown = self._note_folder()
        training = HybridTraining(self.data, self._batches(), self.machine, opts.grad_accum_steps, self.trained)

        # The first weights depend on the seed alone, not on what the data drew before.
        set_seed(opts.seed)
        shape = hybrid_config(opts, self.data)
        check_model(lambda: HybridModel(shape))
        self.model = HybridModel(shape).to(self.machine.device)
        self.trainer = HybridTrainer(
            options.part(HybridStepConfig, opts),
            options.part(OptimConfig, opts),
            self.model,
            self.machine.accelerator,
            self.machine.precision,
            self.data.tokenizer_json,
        )

        # Random tokens, which --dry_run tries, have no text.
        self.text: HybridText | None = None
        if self.data.tokenizer_json:
            self.text = self._text()
        evaluator = HybridEvaluator(
            options.part(HybridEvalConfig, opts), self.data, self.model, self.trainer, self.text, self.machine
        )
        hooks = HybridHooks(options.part(HybridHooksConfig, opts), self.model)
        self.loop = RunLoop(config, self.machine, training, self.trainer, evaluator, self._facts(), hooks, checkpoint)

    def go(self) -> int:
        """Runs the command and returns its exit status."""
        return self.loop.go()

    def _batches(self) -> PreparedBatches | None:
        """The training batches of this rank; None where nothing is trained."""
        # The warning about workers comes with --eval_only as well: the flag is as wrong there.
        workers, warning = usable_workers(self.opts.dataset_workers)
        if warning:
            self.machine.say(warning)
        if self.data.train is None:
            return None

        config = options.part(HybridDataConfig, self.opts)
        return training_batches(self.data, config, self.machine.rank, self.machine.world, workers)

    def _text(self, gate_scale: float | None = None) -> HybridText:
        """The model as text in, text out; `gate_scale` 0 shuts its gate."""
        return HybridText(
            self.model,
            self.data.tokenizer_json,
            self.opts.eval_batch_size,
            self.opts.max_seq_len,
            self.trainer.autocast,
            gate_scale,
        )

    def _facts(self) -> Facts:
        """Names and sizes for the introduction, the folder and the checkpoints' README."""
        opts = self.opts
        encoder = self.model.encoder
        count = sum(p.numel() for p in self.model.parameters())
        hrm = sum(p.numel() for p in self.model.hrm_parameters().values())
        size = ""
        if self.data.train is not None:
            size = f", {len(self.data.train)} training samples"

        return Facts(
            label=f"hybrid-{folder_name(opts.dataset or 'random')}",
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
            parts={
                "embeddings": encoder.embed,
                "encoder": encoder.backbone,
                "HRM core": encoder.core,
                "bridge": encoder.bridge,
                "gate": encoder.gate,
                "decoder": self.model.decoder,
            },
            dry_run_step=opts.hrm_gate_warmup_steps,  # before it, a batch costs less
            saves_every_evaluation=True,
            compare=False,
        )

    def text_models(self) -> tuple[HybridText, HybridText | None]:
        """The hybrid, and the same weights with the gate shut (None where it is shut anyway)."""
        if self.model.config.gate_scale == 0:
            return self.text, None

        return self.text, self._text(gate_scale=0.0)

    def sums(self, n: int) -> list[tuple[str, str]]:
        """The sums that the suite asks: those that --dataset synthetic holds out, which training never meets."""
        return synthetic_questions(n or self.opts.eval_n, 0, "val")

    def suite_subject(self) -> Subject | None:
        """What --eval_suite measures; None before the run is finished and on other processes than the main one."""
        if not self.loop.finished or not self.machine.is_main:
            return None

        weights = self.trainer.evaluation_weights
        return Subject(self.text_models, "gate shut", weights, self.loop.record, self.sums, self._trained_on())

    def _note_folder(self) -> list[str]:
        """Adds this run's documents to what is known; returns the places that do not record theirs."""
        unknown = []
        if not self.trained.is_whole:
            unknown.append("the checkpoint of an earlier stage")

        # What is only evaluated was trained on another folder, which its checkpoint knows.
        known = self.opts.eval_only and not unknown
        if known or self.opts.dataset in (None, SYNTHETIC):
            return unknown
        record = training_record(self.opts.dataset)
        if record is None:
            self.trained.is_whole = False
            return [*unknown, self.opts.dataset]
        self.trained.own |= record
        return unknown

    def _trained_on(self) -> Container[str]:
        """All that is known to have been trained on; says so where that is not all."""
        for place in self.unknown:
            self.machine.say(
                f"{place} does not record which documents it trains on: questions of the suite that were trained on "
                "cannot be told"
            )
        return self.trained


def folder_name(dataset: str) -> str:
    """A dataset's name or path as part of a folder's name: letters, digits, `-`, `_` and `.` stay."""
    characters = [c if c.isalnum() or c in "-_." else "-" for c in dataset.strip("/.")]
    return "".join(characters).strip("-")


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
