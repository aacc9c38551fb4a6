"""What contradicts what among the flags of `train.py`, where each flag alone is legal.

Each rule is a function of the options: it returns what to tell the user, or None where all is well. Its decorator
names the flags that it reads, so that a flag already told as wrong starts no second complaint. The rules need no
import, so that a command line is answered at once.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Tell = Callable[[Namespace], "str | None"]
LENGTH = {"max_steps", "epochs", "max_minutes"}  # flags that set how long a run is
INJECTING = ("hrm", "mlp")  # adapters that read the LLM's hidden states and inject into it


@dataclass(frozen=True)
class Rule:
    """A rule and the flags that it reads."""

    reads: frozenset[str]
    tell: Tell


RULES: list[Rule] = []  # in the order in which problems are told


def rule(*reads: str) -> Callable[[Tell], Tell]:
    """Enters a function in `RULES`; `reads` names every flag that it reads."""

    def enter(tell: Tell) -> Tell:
        RULES.append(Rule(frozenset(reads), tell))
        return tell

    return enter


def shown(value: Any) -> str:
    """A value on one line, quoted where blanks or control characters would mislead, cut at 80 characters."""
    text = repr(value)
    if isinstance(value, str) and re.fullmatch(r"[\w./:,+=@<>-]+", value):
        text = value
    return text if len(text) <= 80 else text[:77] + "..."


def own_data_alone(o: Namespace) -> bool:
    """Whether own data are all that is trained on: a fixed set without --train_n."""
    return o.data is not None and not (o.task or o.tasks)


def is_default_run(o: Namespace) -> bool:
    """Whether nobody has said what to train on, or how long: such a run ends within minutes on any machine."""
    trains = o.arch == "addon" and o.objective == "ce" and o.adapter != "none"
    return trains and not (o.task or o.tasks or o.data) and not LENGTH & o.explicit


# --- sizes ---


@rule("d_h", "n_heads", "arch")
def heads_divide_d_h(o: Namespace) -> str | None:
    # One condition for two needs: heads of whole width (d_h / n_heads), and of even width (RoPE turns pairs).
    step = 2 * o.n_heads
    if o.arch == "enhanced" or o.d_h % step == 0:
        return None
    twice = "" if o.d_h % o.n_heads else "twice "
    return (f"--d_h {o.d_h} is not divisible by {twice}--n_heads {o.n_heads}: choose a multiple of {step}, such as "
            f"{-(-o.d_h // step) * step}")


@rule("d_model", "n_heads", "arch")
def heads_divide_d_model(o: Namespace) -> str | None:
    if o.arch != "addon" and o.d_model % (2 * o.n_heads):
        return f"--d_model {o.d_model} is not a multiple of {2 * o.n_heads}, twice --n_heads"


@rule("share_hl", "h_layers", "l_layers")
def shared_blocks_are_equally_deep(o: Namespace) -> str | None:
    if o.share_hl and o.h_layers != o.l_layers:
        return (f"--share_hl makes one block of H and L: --h_layers {o.h_layers} and --l_layers {o.l_layers} must be "
                "equal")


# --- data ---


@rule("task", "tasks")
def tasks_are_named_once(o: Namespace) -> str | None:
    if o.task is not None and o.tasks is not None:
        return (f"--task {shown(o.task)} and --tasks {shown(o.tasks)} are both set: keep one (`none` takes back the "
                "other)")


@rule("arch", "dataset", "dry_run")
def the_hybrid_has_data(o: Namespace) -> str | None:
    if o.arch == "hybrid" and o.dataset is None and not o.dry_run:
        return ("--arch hybrid needs --dataset: synthetic, or a folder of prepared triples (only --dry_run works on "
                "random data)")


@rule("data", "eval_data", "messages_field", "question_field", "answer_field", "verifier")
def own_data_are_named(o: Namespace) -> str | None:
    # Evaluation data alone would say nothing of what is trained on.
    defaults = {"eval_data": None, "messages_field": None, "question_field": "question", "answer_field": "answer",
                "verifier": "exact"}
    for name, default in defaults.items():
        if o.data is None and getattr(o, name) != default:
            return f"--{name} {shown(getattr(o, name))} does nothing without --data: name your data, or leave it out"


@rule("messages_field", "question_field", "answer_field")
def rows_are_read_one_way(o: Namespace) -> str | None:
    if o.messages_field is not None and (o.question_field, o.answer_field) != ("question", "answer"):
        return (f"--messages_field {shown(o.messages_field)} stands in place of --question_field and --answer_field: "
                "keep one way")


@rule("curriculum", "data")
def own_data_have_no_levels(o: Namespace) -> str | None:
    if o.curriculum and o.data is not None:
        return f"--curriculum: --data {shown(o.data)} has no levels of difficulty: leave one out"


@rule("curriculum", "train_n")
def a_curriculum_has_fresh_items(o: Namespace) -> str | None:
    if o.curriculum and o.train_n:
        return f"--curriculum needs fresh items: --train_n {o.train_n} is a fixed set, choose 0"


@rule("curriculum", "eval_every", "eval_only", "dry_run")
def a_curriculum_is_evaluated(o: Namespace) -> str | None:
    if o.curriculum and not (o.eval_every or o.eval_only or o.dry_run):
        return "--curriculum raises levels by evaluations: set --eval_every above 0"


@rule("retain", "retain_weight", "retain_batch_size", "prompt_gate", "objective", "eval_only")
def retaining_has_text(o: Namespace) -> str | None:
    if o.prompt_gate and o.retain is None and o.objective == "ce" and not o.eval_only:
        return "--prompt_gate needs --retain: without other text the gate would learn to be open for everything"
    if o.retain is None and (o.retain_weight, o.retain_batch_size) != (1.0, 16):
        name = "retain_weight" if o.retain_weight != 1.0 else "retain_batch_size"
        return f"--{name} {getattr(o, name)} does nothing without --retain: name a file of text, or leave it out"


# --- how long a run takes ---


@rule("max_steps", "epochs", "max_minutes", "eval_only", "dry_run")
def training_ends(o: Namespace) -> str | None:
    if not (o.max_steps or o.epochs or o.max_minutes or o.eval_only or o.dry_run):
        return "training would never end: set --max_steps, --epochs or --max_minutes"


@rule("fit_minutes", "epochs", "max_minutes", "max_steps", "objective")
def a_run_is_sized_one_way(o: Namespace) -> str | None:
    if not o.fit_minutes:
        return None
    if o.objective == "grpo":
        return f"--fit_minutes {o.fit_minutes:g} does nothing with --objective grpo: leave it out"
    if o.epochs or o.max_minutes or not o.max_steps:
        return (f"--fit_minutes {o.fit_minutes:g} chooses the steps of a run, at most --max_steps: leave out --epochs, "
                "--max_minutes and --max_steps 0, or it")


@rule("batch_tokens", "epochs", "max_seq_len", "objective")
def a_token_batch_holds_an_item(o: Namespace) -> str | None:
    if not o.batch_tokens:
        return None
    if o.objective == "grpo":
        return f"--batch_tokens {o.batch_tokens} does nothing with --objective grpo: leave it out"
    if o.epochs:
        return (f"--batch_tokens {o.batch_tokens}: nobody knows how many batches --epochs {o.epochs} would be; set "
                "--max_steps or --max_minutes in place of --epochs")
    if o.batch_tokens < o.max_seq_len:
        return (f"--batch_tokens {o.batch_tokens} is less than --max_seq_len {o.max_seq_len}: one item might not fit; "
                "raise it, or lower --max_seq_len")


@rule("epochs", "train_n", "arch", "data", "task", "tasks")
def epochs_have_a_fixed_set(o: Namespace) -> str | None:
    if o.arch == "addon" and o.epochs > 0 and o.train_n == 0 and not own_data_alone(o):
        return f"--epochs {o.epochs} needs --train_n above 0: fresh items without end have no epochs"


@rule("arch", "warmup_steps", "max_steps")
def the_warmup_fits_the_run(o: Namespace) -> str | None:
    # The default warmup gives way to a short run by itself; only a typed one is a contradiction. The hybrid's published
    # commands are tried with fewer steps: there half of the run warms up.
    typed = "warmup_steps" in getattr(o, "explicit", ())
    if o.arch == "addon" and typed and 0 < o.max_steps < o.warmup_steps:
        return f"--warmup_steps {o.warmup_steps} is more than --max_steps {o.max_steps}"


@rule("patience", "eval_every", "eval_only", "dry_run")
def patience_has_evaluations(o: Namespace) -> str | None:
    # The hybrid's default gives way by itself.
    typed = "patience" in getattr(o, "explicit", ())
    if typed and o.patience and not (o.eval_every or o.eval_only or o.dry_run):
        return f"--patience {o.patience} counts evaluations amid training: set --eval_every above 0"


@rule("patience", "patience_on", "arch", "dataset")
def what_is_waited_for_is_measured(o: Namespace) -> str | None:
    if o.patience and o.arch == "enhanced" and o.patience_on != "solved":
        return f"--patience_on {o.patience_on}: --arch enhanced measures no held-out loss, choose solved"
    if o.patience and o.arch == "hybrid" and o.patience_on == "solved" and o.dataset not in (None, "synthetic"):
        return "--patience_on solved: --arch hybrid solves questions of --dataset synthetic alone, choose loss or rise"


# --- segments ---


@rule("supervised_segments", "segments")
def supervised_segments_exist(o: Namespace) -> str | None:
    if o.supervised_segments > o.segments:
        return (f"--supervised_segments {o.supervised_segments} is more than --segments {o.segments}: choose at most "
                f"{o.segments}")


@rule("carry_state", "segments", "supervised_segments", "eval_only")
def a_state_can_be_carried(o: Namespace) -> str | None:
    if not o.carry_state and not o.eval_only and (o.supervised_segments or o.segments) < 2:
        return ("--carry_state 0 does nothing with one supervised segment: choose more by --segments or "
                "--supervised_segments")


@rule("carry_state", "grad_horizon")
def a_gradient_through_segments_needs_their_states(o: Namespace) -> str | None:
    if not o.carry_state and o.grad_horizon.startswith("segments:"):
        return f"--grad_horizon {o.grad_horizon} runs through carried states and --carry_state 0 drops them: keep one"


@rule("grad_horizon", "arch", "recompute_segments")
def a_gradient_through_segments_has_several(o: Namespace) -> str | None:
    several = o.grad_horizon.startswith("segments:") and o.grad_horizon != "segments:1"
    if several and o.arch == "hybrid":
        return f"--grad_horizon {o.grad_horizon} needs segments, which --arch hybrid has not: choose full"
    if o.recompute_segments and not several:
        return "--recompute_segments needs a gradient through several segments: add --grad_horizon segments:N"


@rule("h_layers", "arch", "reset_l")
def what_recurs_without_a_slow_block(o: Namespace) -> str | None:
    if o.h_layers == 0 and o.arch == "hybrid":
        return "--h_layers 0 leaves out the slow block, which --arch hybrid needs: choose 1 or more"
    if o.h_layers == 0 and o.reset_l:
        return "--reset_l drops z_L, and with --h_layers 0 there is no other state: keep one"


@rule("segments_sampling", "segments")
def segments_can_be_sampled(o: Namespace) -> str | None:
    if o.segments_sampling != "fixed" and o.segments < 2:
        return (f"--segments_sampling {o.segments_sampling} has nothing to draw from with --segments {o.segments}: "
                "choose at least 2")


@rule("segments_stretch", "segments_sampling")
def a_stretch_needs_steps(o: Namespace) -> str | None:
    if o.segments_stretch != 2 and o.segments_sampling != "steps":
        return f"--segments_stretch {o.segments_stretch} does nothing without --segments_sampling steps"


@rule("attn_implementation", "trust_remote_code")
def kernels_of_the_hub_are_code(o: Namespace) -> str | None:
    is_kernel = "/" in (o.attn_implementation or "")
    if not o.trust_remote_code and is_kernel:
        return f"--attn_implementation {o.attn_implementation} would run code of the hub: add --trust_remote_code"


# --- halting ---


@rule("act_penalty", "use_act")
def a_penalty_needs_halting(o: Namespace) -> str | None:
    if o.act_penalty > 0 and not o.use_act:
        return f"--act_penalty {o.act_penalty} does nothing without --use_act"


@rule("halt_detach", "use_act")
def detaching_needs_halting(o: Namespace) -> str | None:
    if o.halt_detach and not o.use_act:
        return "--halt_detach does nothing without --use_act"


@rule("halt_max_segments", "use_act")
def more_segments_need_halting(o: Namespace) -> str | None:
    if o.halt_max_segments > 0 and not o.use_act:
        return f"--halt_max_segments {o.halt_max_segments} does nothing without --use_act"


@rule("eval_readout", "use_act")
def the_readout_needs_halting(o: Namespace) -> str | None:
    if o.eval_readout != "last" and not o.use_act:
        return f"--eval_readout {o.eval_readout} needs a halting head: add --use_act"


@rule("halt_settled", "eval_readout")
def settling_and_readout_agree(o: Namespace) -> str | None:
    if o.halt_settled > 0 and o.eval_readout == "best_halt":
        return "--halt_settled stops examples and --eval_readout best_halt runs every segment: keep one"


@rule("halt_settled", "halt_settled_at", "logit_bias_head")
def what_settles_is_all_that_is_written(o: Namespace) -> str | None:
    if o.halt_settled > 0 and o.halt_settled_at == "answer" and o.logit_bias_head:
        return ("--halt_settled does not look at the bias of --logit_bias_head: add --halt_settled_at prompt")


@rule("halt_settled", "segments", "eval_segments", "halt_max_segments")
def settling_can_save_segments(o: Namespace) -> str | None:
    # The first change of a state is known after the second segment: with fewer than 3 none is left to save.
    if o.halt_settled > 0 and (o.halt_max_segments or o.eval_segments or o.segments) < 3:
        return (f"--halt_settled {o.halt_settled} saves nothing with fewer than 3 segments at evaluation: choose more "
                "by --segments, --eval_segments or, with --use_act, --halt_max_segments")


# --- what a call does ---


@rule("eval_only", "dry_run")
def a_call_does_one_thing(o: Namespace) -> str | None:
    if o.eval_only and o.dry_run:
        return "--eval_only and --dry_run are both set: keep one"


@rule("eval_only", "resume", "run_name")
def evaluation_has_a_checkpoint(o: Namespace) -> str | None:
    if o.eval_only and o.resume is None and o.run_name is None:
        return "--eval_only needs a checkpoint: add --resume PATH or --run_name NAME"


@rule("reset_progress", "resume", "eval_only")
def beginning_anew_has_weights(o: Namespace) -> str | None:
    if o.reset_progress and o.resume is None:
        return "--reset_progress needs --resume CHECKPOINT, whose weights it takes"
    if o.reset_progress and o.eval_only:
        return "--reset_progress and --eval_only are both set: keep one"


# --- adapters of the frozen LLM ---


@rule("train_injector_scale", "lora_layers", "eval_only")
def something_trains(o: Namespace) -> str | None:
    if o.train_injector_scale == 0 and not o.lora_layers and not o.eval_only:
        return "--train_injector_scale 0 leaves nothing to train"


@rule("adapter", "dry_run", "match_params")
def the_bare_llm_is_not_sized(o: Namespace) -> str | None:
    if o.adapter == "none" and (o.dry_run or o.match_params):
        flag = "--dry_run" if o.dry_run else "--match_params"
        return f"{flag} makes no sense with --adapter none: nothing trains"


@rule("adapter", "cache_hidden")
def the_cache_serves_the_adapter(o: Namespace) -> str | None:
    if o.cache_hidden != "off" and o.adapter not in INJECTING:
        return (f"--cache_hidden {o.cache_hidden} cannot serve --adapter {o.adapter}, which takes part in the LLM's "
                "forward pass: leave it out")


@rule("cache_hidden", "lora_layers", "prompt_gate")
def lora_changes_the_llm(o: Namespace) -> str | None:
    if o.prompt_gate and o.lora_layers:
        return f"--prompt_gate cannot shut --lora_layers {o.lora_layers}, which lie inside the LLM: leave one out"
    if o.cache_hidden != "off" and o.lora_layers:
        return (f"--cache_hidden {o.cache_hidden} and --lora_layers {o.lora_layers}: LoRA changes what the LLM says at "
                "every step; leave one out")


@rule("cache_hidden", "train_n", "data", "task", "tasks")
def the_cache_is_read_again(o: Namespace) -> str | None:
    if o.cache_hidden != "off" and o.train_n == 0 and not own_data_alone(o):
        return (f"--cache_hidden {o.cache_hidden} needs --train_n above 0: fresh items without end are never seen "
                "twice")


@rule("cache_hidden", "cache_dir")
def a_cache_on_disk_has_a_folder(o: Namespace) -> str | None:
    if o.cache_hidden == "disk" and o.cache_dir is None:
        return "--cache_hidden disk needs --cache_dir: a folder, which runs that read the same may share"
    if o.cache_hidden != "disk" and o.cache_dir is not None:
        return f"--cache_dir {shown(o.cache_dir)} does nothing with --cache_hidden {o.cache_hidden}: choose disk"


@rule("cache_hidden", "cache_dtype", "cache_mode")
def a_cache_is_there_to_be_packed(o: Namespace) -> str | None:
    if o.cache_hidden == "off" and o.cache_dtype != "bf16":
        return f"--cache_dtype {o.cache_dtype} does nothing with --cache_hidden off: choose ram or disk"
    if o.cache_hidden != "disk" and o.cache_mode != "both":
        return f"--cache_mode {o.cache_mode} does nothing with --cache_hidden {o.cache_hidden}: choose disk"


@rule("host_dtype", "load_in")
def a_quantised_llm_has_its_own_dtype(o: Namespace) -> str | None:
    if o.load_in != "none" and o.host_dtype not in ("auto", "stored"):
        return (f"--host_dtype {o.host_dtype} and --load_in {o.load_in} are both set: a quantised LLM is held as it is "
                "quantised; keep one")


@rule("device_map", "load_in", "objective", "lora_layers", "adapter")
def a_spread_llm_is_only_read(o: Namespace) -> str | None:
    unfit = {"load_in": o.load_in != "none", "objective": o.objective == "grpo", "lora_layers": o.lora_layers > 0,
             "adapter": o.adapter in ("lora", "prompt")}
    flag = next((f"--{name} {getattr(o, name)}" for name, is_unfit in unfit.items() if is_unfit), None)
    if flag and o.device_map != "none":
        return f"--device_map {o.device_map} and {flag}: an LLM that is spread can only be read; keep one"


# --- the hybrid's losses ---


@rule("deep_supervision", "ds_weight")
def deep_supervision_weighs_something(o: Namespace) -> str | None:
    if o.deep_supervision and o.ds_weight == 0:
        return "--deep_supervision with --ds_weight 0 does nothing: raise the weight"


# --- GRPO ---


@rule("objective", "grpo_batch_size", "grpo_accum_steps", "num_generations")
def a_step_holds_whole_groups(o: Namespace) -> str | None:
    completions = o.grpo_batch_size * o.grpo_accum_steps
    if o.objective == "grpo" and completions % o.num_generations:
        return (f"--grpo_batch_size {o.grpo_batch_size} x --grpo_accum_steps {o.grpo_accum_steps} = {completions} "
                f"completions a step are not divisible by --num_generations {o.num_generations}: change one")


@rule("objective", "logit_bias_head")
def grpo_sees_the_whole_model(o: Namespace) -> str | None:
    if o.objective == "grpo" and o.logit_bias_head:
        return ("--objective grpo does not see the bias of --logit_bias_head: start from a checkpoint without it")


@rule("objective", "adapter")
def grpo_can_train_the_adapter(o: Namespace) -> str | None:
    if o.objective == "grpo" and o.adapter not in INJECTING:
        return f"--objective grpo cannot train --adapter {o.adapter}: start from a checkpoint of --adapter hrm or mlp"


@rule("objective", "sentinel")
def grpo_stops_by_itself(o: Namespace) -> str | None:
    if o.objective == "grpo" and o.sentinel:
        return "--objective grpo cannot stop at --sentinel: start from a checkpoint without it"
