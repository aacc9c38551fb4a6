"""One stage of GRPO on TRL's `GRPOTrainer`, for the planner/worker LM and for the frozen LLM with its add-on.

TRL imports slowly (7 s): import this module where GRPO really runs. GRPO is DeepSeekMath's (arXiv 2402.03300): several
completions of each question are sampled, and those rewarded above their group's mean become likelier.

Three things differ from TRL's habits. Prompts are rendered as everywhere in this repository. Completions are generated
in evaluation mode with every cycle run, so that generated and scored log-probabilities are those of one function. The
add-on is shown where the prompt ends.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer

from batching import PromptFormat
from engine.nonfinite import LeftOut
from engine.optimization import MAX_SCALER_SKIPS, NonFiniteError, spoilt
from engine.schedule import ScheduleConfig, learning_rate
from evaluation import stop_ids
from grpo.problems import Problem
from grpo.rewards import repetition, text_of
from grpo.stage_folder import STATE, aside_of, bytes_of, forget_older, newest_state, save_reference, written_aside
from grpo.stages import Stage
from model import HRMController, prompt_before

__all__ = ["StageRun", "StageTrainer", "end_of_prompt", "rollout_mode", "train_stage", "trl_config"]

WARMUP_STEPS = 5
ALIKE = 1e-6  # total rewards nearer to each other than this are equal
LEFT_OUT = "left_out"  # key of the entries in TRL's history, by which an interrupted stage goes on counting
PATIENCE = 5  # logged steps without a difference inside any group before that is said
NOTHING_LEARNT = (
    "WARNING: stage {stage}, step {step}: for {count} logged steps the {group} completions of every question were "
    "rewarded alike, so nothing is learnt: take easier questions, a higher temperature, or a reward with more grades"
)
# TRL's name -> ours, where it says more.
RENAMED = {
    "completions/mean_length": "mean_length",
    "completions/clipped_ratio": "truncated",
    "completions/repetition": "repetition",
    "clip_ratio/region_mean": "clip_ratio",
}
DROPPED = ("num_tokens", "total_flos", "train_runtime", "train_samples_per_second", "train_steps_per_second")


@dataclass
class StageRun:
    """What a stage is run with. `log` and `stopped` connect it to the run around it.

    Args:
        stage: what to train on and how.
        folder: where the states lie that an interrupted stage goes on from.
        functions: reward functions with TRL's signature.
        weights: the weight of each of them.
        log: called as `log(step, numbers)` with the metrics of every logged optimizer step of the stage.
        stopped: whether somebody asked for an orderly end after the step at hand.
        precision: none, bf16 or fp16.
        device: device type, such as cpu or cuda.
        left_out: what follows a gradient that is no number, and how often that was.
    """

    stage: Stage
    folder: Path
    functions: Sequence[Callable[..., list[float]]]
    weights: Sequence[float]
    log: Callable[[int, dict[str, float]], None]
    stopped: Callable[[], bool]
    precision: str = "none"
    device: str = "cpu"
    left_out: LeftOut = field(default_factory=LeftOut)


def trl_config(run: StageRun) -> GRPOConfig:
    """TRL's configuration of a stage."""
    stage = run.stage
    config = stage.config
    return GRPOConfig(
        output_dir=str(run.folder),
        num_train_epochs=float(stage.epochs),
        learning_rate=config.grpo_lr,
        per_device_train_batch_size=config.grpo_batch_size,
        gradient_accumulation_steps=config.grpo_accum_steps,
        num_generations=config.num_generations,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        loss_type=config.loss_type,
        beta=config.beta,
        reward_weights=list(run.weights),
        max_grad_norm=config.grad_clip or math.inf,
        weight_decay=0.0,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        bf16=run.precision == "bf16",
        fp16=run.precision == "fp16",
        use_cpu=run.device == "cpu",
        gradient_checkpointing=False,
        disable_dropout=True,
        shuffle_dataset=len(stage.levels) == 1,  # else the order is the rising difficulty
        remove_unused_columns=False,
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.grpo_save_every,
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
        ddp_find_unused_parameters=True,
    )


class StageTrainer(GRPOTrainer):
    """TRL's trainer with the prompts of `PromptFormat`, rollouts in evaluation mode, and two more metrics.

    Args:
        prompt_format: renders questions, and holds the tokenizer.
        cycles: cycles (add-on: segments) of a token where the model does not count them.
        schedule: the learning rate's shape over the stage.
        args, kwargs: as TRL takes them.
    """

    _aside: Path | None = None  # where a state is being written

    def __init__(self, *args: Any, prompt_format: PromptFormat, cycles: int, schedule: ScheduleConfig, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.format = prompt_format
        self.cycles = cycles
        self.schedule = schedule
        self.segments: list[torch.Tensor] = []  # (B,) of each rollout: a halting head may end them early

        # TRL stops at the ends of generation_config and tokenizer alone, and scores what stands before the first.
        self.eos_token_ids = stop_ids(self.accelerator.unwrap_model(self.model), prompt_format)
        self.generation_config.eos_token_id = self.eos_token_ids
        self.generation_kwargs["eos_token_id"] = self.eos_token_ids

        # The reference model scores, too, and needs the prompt's end for that; only rollouts of the model are counted.
        for model in filter(None, (self.model, self.ref_model)):
            if isinstance(model, HRMController):
                end_of_prompt(model, self.segments if model is self.model else None)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Our schedule over the stage (`learning_rate`): a rate that falls takes the last steps' noise out again."""
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        warmup = min(WARMUP_STEPS, num_training_steps // 2)

        warmed = warmup / num_training_steps

        def share(step: int) -> float:
            return learning_rate(self.schedule, step, step / num_training_steps, warmup, warmed) / self.schedule.lr

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, share)
        return self.lr_scheduler

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict]:
        return self.format.prompts([prompt[-1]["content"] for prompt in prompts]), None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        was_training = self.model.training
        self.model.eval()
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:
            self.model.train(was_training)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        """(B, rewards) values as TRL's; on the way, notes the metrics that TRL does not have."""
        metrics = self._metrics["train" if self.model.training else "eval"]

        # As at evaluation: an end of turn that the tokenizer does not call special is no part of the answer.
        completions = self._cut(completions, completion_ids_list)
        texts = [text_of(completion) for completion in completions]
        own = sum(map(repetition, texts)) / max(len(texts), 1)

        # Segments of the rollouts since the last call; a model that does not count runs all its cycles.
        counted = torch.cat(self.segments).float().mean().item() if self.segments else 0.0
        used = counted or float(self.cycles)
        self.segments.clear()

        # Of all processes, which have equally many completions; the rewards that TRL returns are of all as well.
        if self.accelerator.num_processes > 1:  # one alone keeps all its digits
            means = self.accelerator.reduce(torch.tensor([own, used], device=self.accelerator.device), "mean")
            own, used = means.tolist()
        metrics["completions/repetition"].append(own)
        metrics["cycles_used"].append(used)

        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

        # A group teaches nothing where all its completions are worth the same.
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1).view(-1, self.num_generations)
        alike = total.amax(dim=1) - total.amin(dim=1) < ALIKE
        metrics["groups_alike"].append(alike.float().mean().item())
        return rewards

    def _cut(self, completions: Sequence[Any], ids: Sequence[Sequence[int]]) -> list[Any]:
        """The completions, as strings or message lists, read from their ids by the prompt format."""
        read = []
        for completion, row in zip(completions, ids, strict=True):
            text, _ = self.format.answer_text(torch.tensor(row), self.eos_token_ids)
            if isinstance(completion, str):
                read.append(text)
            else:
                read.append([*completion[:-1], {**completion[-1], "content": text}])
        return read

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """TRL's files of a state, which get their name together, with their hashes. Raises WriteError."""
        place = Path(self.args.output_dir) / f"{STATE}{self.state.global_step}"
        is_main = self.accelerator.is_main_process
        with contextlib.ExitStack() as stack:
            if is_main:
                stack.enter_context(written_aside(place, 3 * bytes_of(model, learns=True)))
            self.accelerator.wait_for_everyone()

            # Each process adds its random state.
            with _set(self, "_aside", aside_of(place)):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if is_main:
                own = aside_of(place) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
                for path in own.iterdir():
                    path.rename(aside_of(place) / path.name)
                own.rmdir()

        if is_main:
            forget_older(place.parent)
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the folder holds states to resume from, the checkpoint proper has its own card."""


def end_of_prompt(model: HRMController, segments: list[torch.Tensor] | None = None) -> None:
    """Wraps `model.forward`, so that TRL's joined sequences come with the mask of their prompts.

    TRL marks what it scores by labels and left-pads prompts: what is attended before a row's first label is its prompt.
    The segments (B,) of each call that thinks while generating are appended to `segments`.
    """
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("fused_lm_head"):
            kwargs["prompt_mask"] = prompt_before(kwargs["labels"], kwargs.get("attention_mask"))
        out = inner(*args, **kwargs)
        if segments is not None and getattr(out, "segments_used", None) is not None:
            segments.append(out.segments_used)
        return out

    model.forward = forward


@contextlib.contextmanager
def rollout_mode(model: Any) -> Iterator[None]:
    """Inside, training and evaluation mode compute the same function: every cycle, fixed initial states, one scale."""
    with contextlib.ExitStack() as stack:
        if hasattr(model, "all_cycles"):
            stack.enter_context(model.all_cycles())
        if isinstance(model, HRMController):
            config = model.config
            stack.enter_context(_set(model.model.addon.core, "init_state", "fixed"))
            stack.enter_context(_set(config, "train_injector_scale", config.eval_injector_scale))
        yield


@contextlib.contextmanager
def _set(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, the attribute has this value."""
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


class Reporter(TrainerCallback):
    """Hands TRL's metrics on, ends the stage in order when asked, and says when nothing is learnt."""

    def __init__(self, run: StageRun):
        self.run = run
        self.steps_alike = 0  # logged steps in a row in which no group had a difference
        self.overflows = 0  # steps in a row with a gradient that is no number

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> Any:
        """Saves and stops after this step where the run is to end. Raises NonFiniteError, as `check`, before a save."""
        self.check(model, state)
        if self.run.stopped() and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Looks at the gradients, alike on all ranks: a step with one that is no number is left out.

        Raises:
            NonFiniteError: the run is to end before such a step.
        """
        left_out = self.run.left_out
        name = spoilt((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
        if name is None:
            left_out.good()
            self.overflows = 0
            return

        # The scaling of fp16 overflows now and then by design, and skips that step itself.
        self.overflows += 1
        if args.fp16 and self.overflows < MAX_SCALER_SKIPS:
            return

        found = f"stage {self.run.stage.name}, step {state.global_step}: the gradient of {name} is no number"
        if not left_out.another():
            raise NonFiniteError(f"{found}{left_out.reason()}")

        # An optimizer moves nothing that has no gradient.
        for parameter in model.parameters():
            parameter.grad = None
        state.log_history.append({"step": state.global_step, LEFT_OUT: left_out.document()})
        if state.is_world_process_zero:
            print(f"WARNING: {found}: the step is left out ({left_out.count} so far)", file=sys.stderr, flush=True)

    def check(self, model: Any, state: Any) -> None:
        """Raises NonFiniteError where weights that train are not all numbers: nothing could be sampled from them."""
        name = spoilt((name, p) for name, p in model.named_parameters() if p.requires_grad)
        if name is not None:
            stage = self.run.stage.name
            raise NonFiniteError(f"stage {stage}, step {state.global_step}: the weights {name} are not all numbers")

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Goes on counting where an interrupted stage had come to. Raises NonFiniteError, as `check`."""
        self.check(model, state)
        entries = [entry for entry in state.log_history if LEFT_OUT in entry]
        if entries:
            self.run.left_out.restore(entries[-1][LEFT_OUT])
        if not entries or entries[-1]["step"] + 1 != state.global_step:
            self.run.left_out.good()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Logs a step's metrics, and warns after every PATIENCE of them without a difference inside any group."""
        if not logs or "reward" not in logs:
            return
        numbers = metrics_of(logs, args.beta) | self.run.left_out.metrics
        self.run.log(state.global_step, numbers)

        if numbers.get("frac_reward_zero_std", 0.0) < 1.0:
            self.steps_alike = 0
            return
        self.steps_alike += 1
        if self.steps_alike % PATIENCE == 0 and state.is_world_process_zero:
            warning = NOTHING_LEARNT.format(
                stage=self.run.stage.name, step=state.global_step, count=self.steps_alike, group=args.num_generations
            )
            print(warning, file=sys.stderr, flush=True)


def metrics_of(logs: dict[str, Any], beta: float) -> dict[str, float]:
    """TRL's logged numbers under our names: `reward_<name>` for each part, `policy_loss` without the KL term."""
    numbers: dict[str, float] = {}
    for name, value in logs.items():
        if name in DROPPED or not isinstance(value, int | float):
            continue
        if name.startswith("rewards/"):
            _, reward, kind = name.split("/")
            name = f"reward_{reward}"
            if kind != "mean":
                name += f"_{kind}"
        numbers[RENAMED.get(name, name.replace("/", "_"))] = value

    # Two of TRL's numbers say less than they seem to.
    if "groups_alike" in numbers:  # TRL takes a rounding error (of 0.2, say) for a difference
        numbers["frac_reward_zero_std"] = numbers.pop("groups_alike")
    if "loss" in numbers and "policy_loss" not in numbers:
        numbers["policy_loss"] = numbers["loss"] - beta * numbers.get("kl", 0.0)
    return numbers


def train_stage(
    model: Any, prompt_format: PromptFormat, problems: Sequence[Problem], run: StageRun
) -> tuple[bool, int]:
    """Trains `model` in place on `problems`, going on where an interrupted call stopped.

    Returns (whether the stage is finished, its optimizer steps so far). Parameters that do not require gradient stay
    as they are.

    Raises:
        NonFiniteError: before an optimizer step that would have spoilt the weights.
    """
    transformers.logging.set_verbosity_error()
    config = run.stage.config
    with rollout_mode(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL still says gradient_checkpointing where transformers has renamed it

        if config.beta > 0:  # TRL reads the reference model from the folder this names
            model.config._name_or_path = str(save_reference(model, run.folder))

        trainer = StageTrainer(
            model=model,
            reward_funcs=list(run.functions),
            args=trl_config(run),
            train_dataset=Dataset.from_list([problem.row() for problem in problems]),
            processing_class=padding_tokenizer(prompt_format),
            callbacks=[Reporter(run)],
            prompt_format=prompt_format,
            schedule=config,
            cycles=getattr(model.config, "max_cycles", None) or getattr(model.config, "segments", 1),
        )
        # They print what `Reporter` hands to the run's own log.
        for callback in (transformers.trainer_callback.PrinterCallback, transformers.trainer_callback.ProgressCallback):
            trainer.remove_callback(callback)

        # States of the stage are TRL's own checkpoints: weights, optimizer, random state, position in the questions.
        state = newest_state(run.folder)
        try:
            trainer.train(resume_from_checkpoint=str(state) if state else None)
        finally:
            for name in ("forward", "_original_forward"):
                model.__dict__.pop(name, None)  # TRL's and accelerate's wrappings, which no later stage may find

    done = trainer.state.global_step
    return done >= trainer.state.max_steps, done


def padding_tokenizer(prompt_format: PromptFormat) -> Any:
    """The format's tokenizer; a copy of it with the format's pad where its own pad is another or none."""
    tokenizer = prompt_format.tokenizer
    if tokenizer.pad_token_id == prompt_format.pad_id:
        return tokenizer

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(prompt_format.pad_id)
    return tokenizer
