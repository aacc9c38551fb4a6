"""A run of the add-on: Reasoning Gym tasks, a frozen LLM with an adapter, evaluation by generated answers."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from accelerate.utils import set_seed

import options
from addon.adapters import (
    ADAPTER_CONFIG,
    build_controller,
    config_class,
    record_of,
    saved_format,
    trained_revision,
)
from addon.bare import BareConfig, BareLLM, bare_problems
from addon.cache_use import CacheUse, CacheUseConfig, LaterEvaluator, mode_problems, without_llm
from addon.curriculum import curriculum_problems
from addon.draws import draws_of, trained_of
from addon.evaluator import AddonEvaluator
from addon.hooks import AddonHooks
from addon.host_dtype import host_parameters, pick_dtype
from addon.items import AddonData, AddonDataConfig
from addon.large import SizeConfig, size_warnings
from addon.llm_check import check_llm, idle_template, llm_config
from addon.param_matching import check_size
from addon.peft_files import library_of
from addon.retain import RetainConfig, Retained, retain_problems
from batching import PromptConfig, PromptFormat
from engine.checkpoints import read_checkpoint
from engine.loop import RunLoop
from engine.machine import MachineConfig, errors_of, machine_problems, pick_device, start_machine
from engine.optimization import OptimConfig
from engine.placement import SpreadConfig, check_spread, spread_text
from engine.report import Card
from engine.sharding import ShardConfig, check_sharding, shard_text, sharding_asked
from engine.system import Evaluator, Facts, LoopConfig
from evaluation import Decoding
from host import HostConfig, load_tokenizer
from model import AdapterConfig, AdapterController, HRMAddonConfig
from own_tasks.choice import own_problems, steps_problems, tasks_with_own
from own_tasks.record import changes, data_before, document_of, plugin_problems, read_record
from own_tasks.table import OwnDataConfig
from own_tasks.task import OwnTask, name_of_data
from own_tasks.trusted import functions_of
from reasoning_gym_wrapper import Task, default_tasks, reserved_sums, task_problems, task_warnings
from suite.after_run import Subject
from suite.spec import spec_problems
from tasks.chance import chance_warnings
from tasks.limits import JudgeConfig
from tasks.plugins import load_plugin
from text_data.frames import header_text, template_text, template_values
from text_data.roundtrip import ROWS_TRIED, check_round_trip
from text_model import CausalTextModel
from training import AddonStepConfig, Trainer, mean_segments


def task_names(opts: argparse.Namespace) -> list[str]:
    """The chosen tasks, or the default ones; none beside own data that stand alone."""
    if opts.tasks:
        return options.names(opts.tasks)
    if opts.task:
        return [opts.task]
    return [] if opts.data else default_tasks()


def all_names(opts: argparse.Namespace, checkpoint: Path | None = None) -> list[str]:
    """The names of the chosen tasks, own data among them, which need not be there any more."""
    names = task_names(opts)
    if opts.data:
        before = data_before(checkpoint)
        names.append(before[1] if before else name_of_data(opts.data))
    return names


def own_config(opts: argparse.Namespace, checkpoint: Path | None) -> OwnDataConfig:
    """The own data that the flags describe; the rows of the checkpoint that the run goes on from keep their name."""
    return options.part(OwnDataConfig, opts, before=data_before(checkpoint))


def chosen_tasks(opts: argparse.Namespace, checkpoint: Path | None = None) -> list[Task | OwnTask]:
    """The tasks that the flags describe, own data among them. Raises ValueError."""
    own = own_config(opts, checkpoint)
    return tasks_with_own(task_names(opts), task_config(opts), own, options.part(JudgeConfig, opts))


def task_config(opts: argparse.Namespace) -> str:
    """`--task_config`, which is `small` when neither task nor data is named and `default` otherwise."""
    if opts.task_config:
        return opts.task_config
    return "default" if opts.task or opts.tasks or opts.data else "small"


def adapter_config(opts: argparse.Namespace) -> AdapterConfig:
    """The shape and settings of the adapter that the flags describe."""
    kind = config_class(opts.adapter)
    if kind is HRMAddonConfig:
        return options.part(kind, opts, verifier_head=opts.verifier_weight > 0)
    return options.part(kind, opts)


def problems(opts: argparse.Namespace, checkpoint: Path | None = None) -> list[str]:
    """Everything wrong with a run of the add-on that can be found without loading a model, one line each."""
    # A plugin adds tasks that may be named.
    chosen = task_names(opts)
    lines = plugin_problems(checkpoint, [*chosen, *options.names(opts.reserve_tasks)], opts.plugin)
    if lines:
        return lines

    # A task that only evaluates need not have gold answers.
    lines = task_problems(chosen, task_config(opts), opts.allow_code_tasks, not opts.eval_only)
    own = own_config(opts, checkpoint)
    limits = options.part(JudgeConfig, opts)
    is_fixed = not opts.train_n and (opts.epochs > 0 or opts.cache_hidden != "off")
    lines += own_problems(chosen, own, opts.mix, opts.eval_n, not opts.eval_only, limits, is_fixed)
    lines += reserve_problems(opts)
    if opts.curriculum and not lines:
        lines += curriculum_problems(chosen)
    if opts.segments_sampling in ("steps", "item") and not opts.eval_only and not lines:
        lines += steps_problems(chosen, task_config(opts), own, limits)
    lines += bare_problems(chosen, opts.few_shot)
    lines += errors_of(header_text, opts.system_header)
    lines += errors_of(template_values, opts.chat_template_kwargs)
    lines += idle_template(opts)
    if opts.chat_template and checkpoint is None:
        lines += errors_of(template_text, opts.chat_template)
    if not opts.eval_only:
        lines += retain_problems(opts.retain)
    lines += mode_problems(options.part(CacheUseConfig, opts), opts.explicit)

    lines += spec_problems(opts.eval_suite, opts.allow_unconfined_code, opts.eval_suite_split)
    lines += machine_problems(options.part(MachineConfig, opts), checkpoint, can_shard=True)
    if not lines:
        lines += errors_of(check_sharding, options.part(ShardConfig, opts), pick_device(opts.device))
    if not lines:
        lines += errors_of(check_spread, options.part(SpreadConfig, opts), pick_device(opts.device))
    lines += errors_of(check_llm, opts)
    if lines:
        return lines
    return errors_of(check_size, options.part(HostConfig, opts), adapter_config(opts), opts.max_seq_len)


def reserve_problems(opts: argparse.Namespace) -> list[str]:
    """What is wrong with --reserve_tasks, one line each. Nothing is trained on them, so they need no gold answers."""
    if not opts.reserve_tasks:
        if opts.reserve_config:
            return ["--reserve_config needs --reserve_tasks: it is the difficulty of those tasks"]
        return []
    config = opts.reserve_config or task_config(opts)
    problems = task_problems(options.names(opts.reserve_tasks), config, opts.allow_code_tasks, False)
    return [f"--reserve_tasks: {line}" for line in problems]


class AddonRun:
    """A run of the add-on, new or going on from `checkpoint`.

    Raises:
        ValueError: the user's mistakes, before anything is written.
    """

    problems = staticmethod(problems)

    def __init__(self, opts: options.Options, checkpoint: Path | None):
        # The difficulty is kept with the run, so that it stays the same when a resumed run names other tasks.
        # So are the LLM's commit and what its weights are held in, whatever machine goes on with the run.
        opts = with_trained_revision(opts, checkpoint)
        opts, line = self._with_dtype(options.replace(opts, task_config=task_config(opts)))
        self.opts = opts
        config = loop_config(opts)
        self.machine = start_machine(config)

        # The items come before the model: a mistake in them is told before gigabytes are loaded.
        self._say_warnings(task_warnings(task_names(opts), opts.verifier_strict))
        self.format, note = prompt_format(opts, checkpoint)
        for text in filter(None, (line, note)):
            self.machine.say(text)
        limits = options.part(JudgeConfig, opts)
        own = own_config(opts, checkpoint)
        data_config = options.part(AddonDataConfig, opts, tasks=task_names(opts), own=own, limits=limits)
        self.plugin = load_plugin(opts.plugin) if opts.plugin else None
        self.data = AddonData(
            data_config, self.format, self.machine, draws_of(checkpoint, config), trained_of(checkpoint, config)
        )
        self._tell_of_own_data(checkpoint)
        if self.machine.is_main:
            self._say_warnings(chance_warnings(self.data.chances()))
        self.bare = BareLLM(options.part(BareConfig, opts), self.data)
        self.bare.formats()
        self._check_roundtrip()
        self.cache = self._cache()
        opts = self.opts

        # The first weights depend on the seed alone, not on how many items were drawn before.
        set_seed(opts.seed)
        self.model = self._model()
        self._check_positions()
        if self.model.recurrent:
            self.model.config.segments = opts.eval_segments or opts.segments  # training draws its own number
        self.trainer = self._trainer()

        # --verifier_weight asks the evaluator for verdicts while it trains.
        self.evaluator = AddonEvaluator(
            self.data, self.model, self.trainer, decoding(opts), self.machine, self.bare,
            measures_loss=opts.patience > 0 and opts.patience_on != "solved",
        )
        self.trainer.answer_verdicts = self.evaluator.verdicts
        self.loop = RunLoop(
            loop_config(opts), self.machine, self.data, self.trainer, self._evaluation(), self._facts(), self._hooks(),
            checkpoint,
        )
        if checkpoint is None and not opts.eval_only:  # once nothing can be wrong any more
            self._show_example()

    @classmethod
    def weights_of(cls, opts: options.Options, checkpoint: Path) -> AddonRun:
        """The run as --eval_only sets it up: the weights of `checkpoint`, nothing to train them on."""
        return cls(options.replace(opts, eval_only=True), checkpoint)

    def go(self) -> int:
        """Runs the command and returns its exit status."""
        if self.cache and self.opts.cache_mode == "fill":
            return self.cache.fill_alone(self.model)
        return self.loop.go()

    def _say_warnings(self, warnings: Iterable[str]) -> None:
        for warning in warnings:
            self.machine.say(f"WARNING: {warning}")

    def _show_example(self) -> None:
        reader = self.model.title if self.opts.adapter in ("hrm", "mlp") else ""
        self.machine.say("\n".join(self.format.shown(self.data.eval_examples[0], reader)))

    def _tell_of_own_data(self, checkpoint: Path | None) -> None:
        """Says what was left out of the user's own data, and what has changed since the checkpoint."""
        lines = self.data.own.notes() if self.data.own else []
        if not self.opts.reset_progress:
            lines += changes(read_record(checkpoint), self.data.own, self.plugin)
        for line in lines:
            self.machine.say(line)

    def _check_roundtrip(self) -> None:
        """Says how much of the tasks' texts the LLM's tokenizer loses. Raises ValueError below --min_roundtrip."""
        rows = []
        for example in self.data.eval_examples[:ROWS_TRIED]:
            rows.append([text.strip() for text in (example.question, example.target) if text])
        place = f"--model_name {self.opts.model_name}"
        check_round_trip(self.format.tokenizer, rows, self.opts.min_roundtrip, place, self.machine.say)

    def _check_positions(self) -> None:
        """Raises ValueError when an answer could outgrow the LLM's positions: some families fail there."""
        # Known only now: the evaluation items and the model's virtual tokens both count.
        positions = getattr(self.model.host.config.get_text_config(), "max_position_embeddings", None)
        questions = [example.question for example in self.data.held_out]
        longest = max(map(len, self.format.prompts(questions))) + self.model.virtual_tokens
        if positions and longest + self.data.budget > positions:
            raise ValueError(
                f"a prompt of {longest} tokens and an answer of {self.data.budget} pass the {positions} positions of "
                f"{self.opts.model_name}: lower --max_new_tokens, or --max_seq_len with --overlong drop"
            )

        # The bare LLM may be given solved examples and more room.
        longest = self.bare.longest()
        if positions and longest > positions:
            raise ValueError(
                f"a prompt and an answer of the bare LLM may take {longest} tokens, which pass the {positions} "
                f"positions of {self.opts.model_name}: lower --bare_max_new_tokens or --few_shot"
            )

    def _with_dtype(self, opts: options.Options) -> tuple[options.Options, str]:
        """The options with what the LLM's weights are held in, and a line for the user, "" where there is no need."""
        # Without the LLM, its head is held in what the cache was filled in, and evaluation is left for later.
        if without_llm(options.part(CacheUseConfig, opts)):
            return options.replace(opts, eval_every=0), ""
        dtype, line = pick_dtype(options.part(HostConfig, opts), pick_device(opts.device))
        return options.replace(opts, host_dtype=dtype), line

    def _cache(self) -> CacheUse | None:
        """The cache of hidden states, known before any model loads; None without one."""
        opts = self.opts
        if opts.cache_hidden == "off" or opts.eval_only:
            return None
        config = options.part(CacheUseConfig, opts)
        cache = CacheUse(config, llm_config(opts), self.format, self.machine, self.data.fixed_examples)
        if cache.head:  # it is held as the whole LLM was
            self.opts = options.replace(opts, **cache.head.facts.flags(opts.attn_implementation))
        return cache

    def _model(self) -> AdapterController:
        """A new adapter on the LLM, or on what is kept of it."""
        config = adapter_config(self.opts)
        kept = self.cache.controller(config) if self.cache else None
        host = options.part(HostConfig, self.opts)
        return kept or build_controller(host, config, str(self.machine.device), sharding_asked())

    def _trainer(self) -> Trainer:
        """What trains the adapter; a cache of hidden states stands in for the LLM where there is one."""
        opts = self.opts
        trainer = Trainer(
            options.part(AddonStepConfig, opts),
            options.part(OptimConfig, opts),
            options.part(PromptConfig, opts),
            self.model,
            self.machine.accelerator,
            self.machine.precision,
        )
        trainer.frame = self.format.frame
        trainer.more_documents = document_of(self.data.own, self.plugin, functions_of(options.as_dict(opts)))
        if opts.retain and not opts.eval_only:
            trainer.retained = Retained(options.part(RetainConfig, opts), self.format)
        if self.cache:
            self.data.before_first = self.cache.serve(trainer, self.model)
        return trainer

    def _evaluation(self) -> Evaluator:
        """The evaluator, or one for later where the LLM is not in memory."""
        return LaterEvaluator(lambda: self.loop.folder) if self.cache and self.cache.head else self.evaluator

    def _hooks(self) -> AddonHooks:
        """Halting is judged where it decides alone when an example stops."""
        opts = self.opts
        most_segments = 0
        if opts.use_act and opts.eval_readout == "last":
            most_segments = opts.halt_max_segments or self.model.config.segments
        return AddonHooks(self.data, self.machine, most_segments, trains=opts.adapter != "none")

    def _facts(self) -> Facts:
        """Names and sizes for the introduction, the folder and the checkpoints' README."""
        opts = self.opts
        count = sum(p.numel() for p in self.model.addon_parameters().values())
        host = host_parameters(self.model.host)
        for text in filter(None, (spread_text(self.model.host), shard_text(self.model.host))):
            self.machine.say(text)
        if self.machine.is_main and not opts.eval_only:
            self._say_warnings(size_warnings(options.part(SizeConfig, opts), host))
        names = [task.name for task in self.data.tasks]
        tasks = ", ".join(names)
        metric = "solved"
        if self.data.curriculum:
            metric = "mean level + solved"
        segments = 1.0
        if self.model.recurrent:
            segments = mean_segments(options.part(AddonStepConfig, opts))

        return Facts(
            label="+".join(names),
            introduction=f"{opts.model_name} ({host / 1e6:.1f} M frozen) + {self.model.title} ({count / 1e6:.2f} M "
            f"trainable) on {self.machine.device}, {self.machine.precision} autocast; {tasks}",
            card=Card(
                library_of(opts.adapter),
                [opts.adapter],
                f"{self.model.title} for {opts.model_name}",
                f"; tasks {tasks} at `{opts.task_config}` difficulty.",
                "Weights of the adapter alone; load with `addon.adapters.load_controller` or `generate.py "
                f"--checkpoint`{', or with peft alone' if library_of(opts.adapter) else ''}.",
            ),
            metric=metric,
            parts=self.model.parts(),
            segments=segments,
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
            self.text_models, "bare LLM", self.trainer.evaluation_weights, self.loop.record, reserved_sums,
            self.data.trained,
        )


def loop_config(opts: options.Options) -> LoopConfig:
    """What the loop needs of the flags, and the text that alone reruns the run."""
    return options.part(LoopConfig, opts, settings=options.rerun_text(opts), flags=options.as_dict(opts))


def prompt_format(opts: argparse.Namespace, checkpoint: Path | None) -> tuple[PromptFormat, str | None]:
    """(how questions become prompts, with the LLM's tokenizer; a note to the user or None).

    A run that goes on from a checkpoint writes around each question what the checkpoint keeps.

    Raises:
        ValueError: the tokenizer cannot be loaded (HostError), or serve (see `PromptFormat`).
    """
    tokenizer = load_tokenizer(opts.model_name, opts.trust_remote_code, opts.revision)
    rows = llm_config(opts).get_text_config().vocab_size
    config = options.part(PromptConfig, opts)
    if checkpoint is None:
        return PromptFormat(tokenizer, config, rows), None

    # A checkpoint of another system is refused where its weights are read.
    documents = read_checkpoint(checkpoint, stems=[]).documents
    if ADAPTER_CONFIG not in documents:
        return PromptFormat(tokenizer, config, rows), None
    return saved_format(record_of(documents), tokenizer, rows, config)


def with_trained_revision(opts: options.Options, checkpoint: Path | None) -> options.Options:
    """The options with the LLM's commit that a checkpoint's weights were trained on, whatever the hub has today."""
    if checkpoint is None or opts.revision is not None:
        return opts
    documents = read_checkpoint(checkpoint, stems=[]).documents
    return options.replace(opts, revision=trained_revision(documents, opts.model_name))


def decoding(opts: argparse.Namespace) -> Decoding:
    """How answers are generated at evaluation and for verdicts."""
    return Decoding(
        temperature=opts.decode_temperature,
        top_p=opts.decode_top_p,
        top_k=opts.decode_top_k,
        max_new_tokens=opts.max_new_tokens,
        batch_size=opts.eval_batch_size,
        seed=opts.seed,
        item_segments=opts.segments_sampling == "item" and not opts.eval_segments,
    )
