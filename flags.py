"""The table of every flag of `train.py`: default, legal range, help. A new flag is one line here.

The argparse parser, the checking of YAML files, the range checks and `configs/default.yaml` all derive from `FLAGS`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from typing import Any

ARCHS = ("addon", "hybrid", "enhanced")
ADDON, HYBRID, ENHANCED = (("addon",), ("hybrid",), ("enhanced",))
HRM, OWN, REASONERS = ("addon", "hybrid"), ("hybrid", "enhanced"), ("addon", "enhanced")
ADAPTERS = ("hrm", "lora", "prompt", "mlp", "none")
METAVARS = {"int": "N", "float": "X", "bool": "0|1", "str": "TEXT", "path": "PATH", "list": "A,B", "json": "TEXT"}


def names(text: str | None) -> list[str]:
    """The names in a comma list as `tasks` and `trackers` hold it: "a,b" -> ["a", "b"], "" and None -> []."""
    return text.split(",") if text else []


def json_ok(text: str) -> bool:
    """False only for text that means to be a JSON object and is not: small, default and paths pass."""
    try:
        return not text.lstrip().startswith("{") or isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


@dataclass(frozen=True)
class Flag:
    """One flag: what it may hold (`legal`) and how it is explained. Everything else in this module reads this."""

    name: str
    type: str  # a key of METAVARS; "list" is kept as comma-separated text, "json" as text
    default: Any
    help: str
    group: str = ""
    choices: tuple[str, ...] | None = None
    low: float | None = None
    high: float | None = None
    exclusive_low: bool = False
    exclusive_high: bool = False
    aliases: tuple[str, ...] = ()
    nullable: bool = False
    pattern: str = ".+"  # text only: what the whole value must match
    form: str = "text, not empty"  # text only: `pattern` in words
    in_file: bool = True  # False: command line only, and never dumped
    archs: tuple[str, ...] = ARCHS  # the systems that know it

    @property
    def legal(self) -> str:
        """The legal values in words, as help and error messages give them."""
        if self.type == "bool":
            return "0, 1, true or false"
        if self.type == "list":
            return "distinct names with commas between" + (f", among {', '.join(self.choices)}" if self.choices else "")
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.type not in ("int", "float"):
            return self.form
        ends = ((">", self.low, self.exclusive_low), ("<", self.high, self.exclusive_high))
        told = [f"{sign}{'' if exclusive else '='} {end}" for sign, end, exclusive in ends if end is not None]
        return f"{'an integer' if self.type == 'int' else 'a finite number'} {' and '.join(told)}".rstrip()

    def allows(self, value: Any) -> bool:
        """True when `value`, already of the right type, is legal for this flag alone."""
        if value is None:
            return self.nullable
        if self.type == "bool":
            return True
        if self.type in ("int", "float"):
            above = self.low is None or value > self.low or (value == self.low and not self.exclusive_low)
            below = self.high is None or value < self.high or (value == self.high and not self.exclusive_high)
            return above and below and (self.type == "int" or math.isfinite(value))
        if self.choices:
            return all(name in self.choices for name in (names(value) if self.type == "list" else [value]))
        return re.fullmatch(self.pattern, value, re.DOTALL) is not None and (self.type != "json" or json_ok(value))


_TABLE: dict[str, tuple[Flag, ...]] = {
    "model": (
        Flag("arch", "str", "addon", "system to train: frozen LLM + HRM, encoder-decoder, or planner/worker LM",
             choices=ARCHS),
        Flag("objective", "str", "ce", "ce = cross-entropy on answers; grpo = then rewards on own answers, in stages",
             choices=("ce", "grpo"), archs=REASONERS),
        Flag("model_name", "path", "assets/tiny_host", "frozen LLM: a local folder or a Hugging Face hub name",
             archs=ADDON),
        Flag("load_in", "str", "none", "quantisation of the frozen LLM", choices=("none", "8bit", "4bit"), archs=ADDON),
        Flag("trust_remote_code", "bool", False, "run Python code that comes with the hub model", archs=ADDON),
        Flag("adapter", "str", "hrm", "what trains beside the frozen LLM: HRM, LoRA, virtual tokens, HRM's blocks in a "
             "single pass, or nothing", choices=ADAPTERS, archs=ADDON),
        Flag("match_params", "int", 0, "size the adapter (d_h, lora_rank or virtual_tokens) to this many trainable "
             "parameters, within 5 %; 0 = off", low=0, archs=ADDON),
        Flag("d_h", "int", 128, "width of the HRM; a multiple of 2 x n_heads", low=8, archs=HRM),
        Flag("h_layers", "int", 1, "layers of the slow block H", low=1, high=64, archs=HRM),
        Flag("l_layers", "int", 1, "layers of the fast block L", low=1, high=64, archs=HRM),
        Flag("share_hl", "bool", False, "one block is both H and L, as in TRM; needs h_layers = l_layers", archs=ADDON),
        Flag("n_heads", "int", 4, "attention heads", low=1),
        Flag("segments", "int", 1, "recurrence segments in training", low=1, high=256, archs=ADDON),
        Flag("inner_T", "int", 2, "L steps before each H step", low=1, high=64, aliases=("l_steps",),
             archs=HRM),
        Flag("reset_l", "bool", False, "start z_L anew at each segment", archs=ADDON),
        Flag("grad_horizon", "str", "full", "calls with gradient: the last of L and H, all, or the last N inner",
             pattern="one_step|full|k:[1-9][0-9]*", form="one_step, full or k:N with N >= 1", archs=HRM),
        Flag("hrm_input", "str", "tokens", "all prompt tokens, or mean and last", choices=("tokens", "pooled"),
             archs=ADDON),
        Flag("hrm_read", "str", "embed+last", "LLM states that HRM reads", choices=("embed+last", "last", "all"),
             archs=ADDON),
        Flag("init_state", "str", "zero", "first z_H and z_L: random vectors in training and fixed buffers at "
             "evaluation, the published fixed buffers in both, or zeros", choices=("random", "fixed", "zero"),
             archs=ADDON),
        Flag("state_mix", "str", "gated", "earlier states enter a block by the published sum, or by learned gates "
             "that begin at zero", choices=("sum", "gated"), archs=ADDON),
        Flag("injector", "str", "cab", "z_H enters the LLM by cross-attention or gated bias", choices=("cab", "grb"),
             archs=ADDON),
        Flag("cab_mem", "int", 0, "learned memory tokens that cab reads; 0 = all of z_H", low=0, archs=ADDON),
        Flag("cab_gate_init", "float", 1.0, "initial gate of cab, a factor", archs=ADDON),
        Flag("grb_gate_init", "float", 0.0, "initial gate of grb, a logit", archs=ADDON),
        Flag("logit_bias_head", "bool", False, "add a gated bias over the vocabulary, computed from z_H", archs=ADDON),
        Flag("lora_layers", "int", 0, "besides HRM, LoRA on this many top layers of the LLM", low=0, archs=ADDON),
        Flag("lora_rank", "int", 8, "rank of that LoRA, or of adapter lora", low=1, archs=ADDON),
        Flag("virtual_tokens", "int", 20, "learned embeddings of adapter prompt", low=1, archs=ADDON),
        Flag("use_act", "bool", False, "learn to halt, and halt examples at evaluation", archs=ADDON),
        Flag("halt_detach", "bool", False, "the halting head only reads z_H, its loss leaves z_H alone; needs use_act",
             archs=ADDON),
        Flag("act_penalty", "float", 0.0, "weight of the sum of 1 - p_halt; needs use_act", low=0, archs=ADDON),
        Flag("halt_max_segments", "int", 0, "most segments at evaluation with use_act; 0 = segments", low=0,
             archs=ADDON),
    ),
    "hybrid": (
        Flag("d_model", "int", 256, "width of encoder and decoder, or of planner and worker; a multiple of "
             "2 x n_heads", low=8, archs=OWN),
        Flag("encoder", "str", "mamba2", "reads the prompt", choices=("mamba2", "transformer"), archs=HYBRID),
        Flag("encoder_layers", "int", 4, "layers of the encoder", low=1, high=128, archs=HYBRID),
        Flag("decoder_layers", "int", 4, "layers of the decoder", low=1, high=128, archs=HYBRID),
        Flag("state_size", "int", 64, "state of Mamba2 per channel", low=1, archs=HYBRID),
        Flag("tie_embeddings", "bool", True, "one table for tokens in and out", archs=HYBRID),
        Flag("h_len", "int", 8, "tokens of the slow bank", low=1, archs=HYBRID),
        Flag("l_len", "int", 16, "tokens of the fast bank", low=1, archs=HYBRID),
        Flag("h_cycles", "int", 2, "cycles of HRM: l_steps L steps and one H step each", low=1, high=64, archs=HYBRID),
        Flag("bridge", "str", "prefix", "z_H becomes prefix_len memory tokens, or one vector",
             choices=("prefix", "cross_attn"), archs=HYBRID),
        Flag("prefix_len", "int", 8, "memory tokens of the prefix bridge", low=1, archs=HYBRID),
        Flag("hrm_gate_warmup_steps", "int", 0, "batches with the gate shut: no HRM", low=0, archs=HYBRID),
        Flag("hrm_gate_ramp_steps", "int", 0, "batches after them in which the gate's scale rises from 0", low=0,
             archs=HYBRID),
        Flag("hrm_gate_scale", "float", 1.0, "the scale it reaches; 0 = encoder-decoder without HRM", low=0, high=1,
             archs=HYBRID),
        Flag("deep_supervision", "bool", False, "earlier cycles' z_H have a decoder loss too", archs=HYBRID),
        Flag("ds_weight", "float", 0.1, "weight of each earlier cycle's loss", low=0, archs=HYBRID),
        Flag("use_halting", "bool", False, "learn when to stop cycling, and stop there at evaluation", archs=HYBRID),
        Flag("halting_weight", "float", 0.01, "weight of the halting losses, times the mean gate", low=0, archs=HYBRID),
        Flag("halting_target", "float", 1.0, "aim of the sum of halting probabilities", low=0, archs=HYBRID),
        Flag("halt_threshold", "float", 0.99, "summed halting probability at which an example stops", low=0,
             exclusive_low=True, archs=HYBRID),
    ),
    "enhanced": (
        Flag("tokenizer", "path", None, "tokenizer, given the reasoning tags: a folder or a hub name; none = the "
             "embedded one", nullable=True, archs=ENHANCED),
        Flag("n_planner_layers", "int", 4, "layers of the planner", low=1, high=64, archs=ENHANCED),
        Flag("n_worker_layers", "int", 6, "layers of the worker", low=1, high=64, archs=ENHANCED),
        Flag("max_cycles", "int", 4, "planner-then-worker cycles", low=1, high=64, archs=ENHANCED),
        Flag("thought_dim", "int", 256, "width of the thought head", low=1, archs=ENHANCED),
        Flag("adamw_lr_ratio", "float", 0.2, "learning rate of what AdamW trains beside muon, as a share of lr", low=0,
             exclusive_low=True, archs=ENHANCED),
    ),
    "grpo": (
        Flag("stages", "json", None, "what each stage of GRPO trains on and is rewarded for; none = the published five "
             "(addon: one, on the checkpoint's tasks)", nullable=True, pattern=r"\s*\{.*", form="a JSON object",
             archs=REASONERS),
        Flag("grpo_lr", "float", 5e-5, "learning rate of GRPO", low=0, exclusive_low=True, archs=REASONERS),
        Flag("grpo_batch_size", "int", 4, "completions per micro-batch", low=1, archs=REASONERS),
        Flag("grpo_accum_steps", "int", 2, "micro-batches per step", low=1, archs=REASONERS),
        Flag("num_generations", "int", 8, "completions of each question, which are compared", low=2, archs=REASONERS),
        Flag("max_completion_length", "int", 256, "longest completion in tokens", low=1, archs=REASONERS),
        Flag("temperature", "float", 1.0, "sampling temperature of completions", low=0, exclusive_low=True,
             archs=REASONERS),
        Flag("loss_type", "str", "dapo", "how token losses are averaged",
             choices=("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo"), archs=REASONERS),
        Flag("beta", "float", 0.0, "weight of the KL divergence from the stage's start", low=0, archs=REASONERS),
        Flag("grpo_save_every", "int", 50, "steps of a stage between the states an interrupted one goes on from",
             low=1, archs=REASONERS),
    ),
    "data": (
        Flag("dataset", "path", None, "synthetic (two-digit addition) or a folder of prepared triples", nullable=True,
             archs=HYBRID),
        Flag("dev_sets", "str", None, "further prepared folders scored at each validation", nullable=True,
             pattern=r"[\w.-]+=[^,=]+(,[\w.-]+=[^,=]+)*", form="NAME=DIR,NAME=DIR", archs=HYBRID),
        Flag("dataset_workers", "int", 0, "threads that read ahead; capped to the machine's cores", low=0,
             archs=HYBRID),
        Flag("max_val_samples", "int", 0, "most validation samples; 0 = the whole split", low=0, archs=HYBRID),
        Flag("on_bad_line", "str", "error", "a broken line of a prepared file", choices=("error", "skip"),
             archs=HYBRID),
        Flag("task", "str", None, "one Reasoning Gym task by name, or toy_add", nullable=True, archs=ADDON),
        Flag("tasks", "list", None, "several tasks, mixed in equal parts", nullable=True, archs=ADDON),
        Flag("task_config", "json", None, "settings of the tasks; none = small when no task is named, else default",
             nullable=True, form="small, default, a file or a JSON object", archs=ADDON),
        Flag("train_n", "int", 0, "training items; 0 = fresh items without end", low=0, archs=ADDON),
        Flag("eval_n", "int", 256, "evaluation items of each task", low=1),
        Flag("group_split", "bool", True, "evaluate a task of few solutions (mini_sudoku) on solutions that are never "
             "trained on, beside questions", archs=ADDON),
        Flag("cache_hidden", "str", "off", "keep what the frozen LLM says of each of the train_n items",
             choices=("off", "ram"), archs=ADDON),
        Flag("cache_max_gb", "float", 4.0, "largest such cache in GB; a larger one is refused", low=0,
             exclusive_low=True, archs=ADDON),
        Flag("allow_code_tasks", "bool", False, "allow tasks whose verifier executes code", archs=ADDON),
        Flag("curriculum", "bool", False, "raise each task through Reasoning Gym's levels of difficulty", archs=ADDON),
        Flag("curriculum_threshold", "float", 0.8, "held-out solved rate at which a task goes up a level", low=0,
             high=1, exclusive_low=True, archs=ADDON),
        Flag("curriculum_levels", "int", 0, "highest level; 0 = the task's last", low=0, archs=ADDON),
        Flag("sentinel", "str", None, "text appended to every target, at which generation stops", nullable=True,
             archs=ADDON),
        Flag("system_header", "str", None, "text put before every prompt", nullable=True, pattern=".*", form="text",
             archs=ADDON),
        Flag("prompt_style", "str", "auto", "auto = chat if the LLM has a template",
             choices=("auto", "chat", "plain"), archs=ADDON),
        Flag("max_seq_len", "int", 512, "most tokens of a prompt; the hybrid cuts longer ones", low=8),
        Flag("overlong", "str", "error", "what to do with longer prompts", choices=("error", "drop"), archs=ADDON),
        Flag("seed", "int", 0, "seed of weights, training items and order", low=0, high=2**31, exclusive_high=True),
        Flag("eval_seed", "int", 10**9, "evaluation items are drawn from it; every training seed lies far below",
             low=10**9, high=2**32, exclusive_high=True),
    ),
    "training": (
        Flag("batch_size", "int", 64, "examples per batch", low=1),
        Flag("bucket_batches", "int", 1, "batches drawn together and grouped by length; 1 = off", low=1),
        Flag("lr", "float", 3e-3, "peak learning rate", low=0, exclusive_low=True, aliases=("learning_rate",)),
        Flag("max_steps", "int", 1900, "batches to train; 0 = until epochs or max_minutes", low=0, aliases=("steps",)),
        Flag("epochs", "int", 0, "passes over train_n items; 0 = off", low=0),
        Flag("max_minutes", "float", 0.0, "stop training after this time; 0 = off", low=0),
        Flag("grad_accum_steps", "int", 1, "micro-batches per batch", low=1),
        Flag("grad_clip", "float", 1.0, "largest gradient norm; 0 = off", low=0),
        Flag("weight_decay", "float", 0.1, "weight decay", low=0),
        Flag("beta1", "float", 0.9, "first beta of AdamW", low=0, high=1, exclusive_high=True),
        Flag("beta2", "float", 0.95, "second beta of AdamW", low=0, high=1, exclusive_high=True),
        Flag("optimizer", "str", "muon", "muon = Muon on hidden matrices, AdamW on the rest",
             choices=("muon", "adamw", "adamw_8bit")),
        Flag("lr_scheduler", "str", "cosine", "after the warmup", choices=("cosine", "linear", "constant")),
        Flag("warmup_steps", "int", 50, "batches of linear warmup", low=0),
        Flag("lr_min_ratio", "float", 0.0, "final learning rate as a share of lr", low=0, high=1),
        Flag("mixed_precision", "str", "auto", "autocast; auto = bf16 where the hardware has it, fp16 needs CUDA",
             choices=("auto", "none", "bf16", "fp16")),
        Flag("ema", "float", 0.998, "decay of the weights evaluated; 0 = off", low=0, high=1, exclusive_high=True),
        Flag("segments_sampling", "str", "fixed", "all (with use_act 1 to all); 1 to all, drawn per batch; or 1 to a "
             "number that grows to all over the run", choices=("fixed", "uniform", "growing"), archs=ADDON),
        Flag("supervised_segments", "int", 0, "0 = every segment has a loss and an optimizer step (deep supervision); "
             "N = only the last N, the earlier ones run without gradient", low=0, archs=ADDON),
        Flag("carry_state", "bool", True, "each supervised segment goes on from the states of the one before; off: "
             "from the initial ones, a control for what recurrence adds to repeated steps", archs=ADDON),
        Flag("verifier_weight", "float", 0.0, "weight of the head that learns the verifier's verdict; 0 = off", low=0,
             archs=ADDON),
        Flag("verifier_every", "int", 50, "batches between the answers generated for that head", low=1, archs=ADDON),
        Flag("train_injector_scale", "float", 1.0, "factor on the injection in training; 0 = bare LLM", low=0,
             archs=ADDON),
        Flag("eval_loss_patience", "int", 3, "consecutive rises of the validation loss that end training; 0 = off",
             low=0,
             archs=HYBRID),
        Flag("patience_grace_steps", "int", 0, "batches before rises count", low=0, archs=HYBRID),
        Flag("dry_run", "bool", False, "one real batch: loss, parameter counts, estimated time and memory; then stop"),
    ),
    "evaluation": (
        Flag("eval_only", "bool", False, "evaluate a checkpoint, named by resume or run_name, and stop"),
        Flag("eval_every", "int", 380, "batches between evaluations; 0 = only at the end", low=0,
             aliases=("val_every",)),
        Flag("eval_batch_size", "int", 128, "examples per evaluation batch", low=1),
        Flag("eval_segments", "int", 0, "segments at evaluation; 0 = as trained", low=0, archs=ADDON),
        Flag("eval_readout", "str", "last", "the segment that answers: the last, or of all segments the one with the "
             "highest halting score; needs use_act", choices=("last", "best_halt"), archs=ADDON),
        Flag("halt_settled", "float", 0.0, "at evaluation an example stops too when a segment changes z_H by less than "
             "this share of its norm; 0 = off", low=0, high=1, archs=ADDON),
        Flag("eval_injector_scale", "float", 1.0, "factor on the injection at evaluation; 0 = bare LLM", low=0,
             archs=ADDON),
        Flag("decode_temperature", "float", 0.0, "sampling temperature; 0 = greedy", low=0, archs=ADDON),
        Flag("decode_top_p", "float", 1.0, "nucleus sampling; 1 = off", low=0, high=1, exclusive_low=True, archs=ADDON),
        Flag("decode_top_k", "int", 0, "sample among the k likeliest tokens; 0 = off", low=0, archs=ADDON),
        Flag("max_new_tokens", "int", 0, "longest answer; 0 = longest evaluation target and a margin", low=0),
        Flag("eval_suite", "str", None, "measured after training and with eval_only: perplexity=FILE, gsm8k=FILE, "
             "mbpp=FILE, science_qa=FILE, synthetic", nullable=True),
        Flag("eval_suite_n", "int", 0, "most items of each entry of the suite; 0 = all", low=0),
        Flag("allow_unconfined_code", "bool", False, "run generated code even where nothing can confine it"),
        Flag("log_csv", "path", None, "evaluation table; none = eval.csv in the run folder", nullable=True),
        Flag("log_samples_every", "int", 0, "batches between printed samples; 0 = off", low=0),
    ),
    "run": (
        Flag("config", "path", None, "YAML of flags, overridden by the command line", nullable=True, in_file=False),
        Flag("run_name", "str", None, "folder in save_dir; none = named by task and time", nullable=True,
             pattern=r"\w[^/\\\x00-\x1f]{0,99}", form="a plain folder name (no slash, not ..)"),
        Flag("save_dir", "path", "runs", "folder of all runs"),
        Flag("save_every", "int", 0, "batches between checkpoints; 0 = only at the end", low=0),
        Flag("resume", "path", None, "checkpoint to go on from, or auto = the newest of the run", nullable=True),
        Flag("reset_progress", "bool", False, "take the weights of resume, and begin anew: step, optimizer, data"),
        Flag("checkpoint_limit", "int", 3, "checkpoints kept; 0 = all", low=0),
        Flag("save_best_model", "bool", False, "also keep the best checkpoint: solved rate, or validation loss"),
        Flag("log_steps", "int", 20, "batches between logged lines", low=1),
        Flag("trackers", "list", "", "where else to log", choices=("tensorboard", "wandb", "trackio")),
        Flag("device", "str", "auto", "device", choices=("auto", "cpu", "cuda", "mps")),
        Flag("num_threads", "int", 0, "CPU threads; 0 = torch's choice", low=0),
    ),
}
GROUPS = tuple(_TABLE)
# Said of one call: no record of a run keeps them.
INVOCATION = ("run_name", "resume", "eval_only", "dry_run", "reset_progress", "match_params")
FLAGS: tuple[Flag, ...] = tuple(replace(flag, group=group) for group, flags in _TABLE.items() for flag in flags)
FIND = {name: flag for flag in FLAGS for name in (flag.name, *flag.aliases)}

# Where a system's defaults differ from the table's.
ARCH_DEFAULTS: dict[str, dict[str, Any]] = {
    "addon": {},
    "enhanced": {
        **{"batch_size": 64, "lr": 5e-3, "max_steps": 2000, "warmup_steps": 50, "ema": 0.0, "eval_every": 0},
        **{"max_seq_len": 1024},
    },
    "hybrid": {
        **{"d_h": 256, "n_heads": 8, "batch_size": 32, "lr": 3e-4, "max_steps": 10_000, "optimizer": "adamw"},
        **{"warmup_steps": 500, "lr_min_ratio": 0.05, "eval_every": 1000, "ema": 0.0, "eval_batch_size": 64},
    },
}


def default_of(flag: Flag, arch: str) -> Any:
    """The flag's default for one system."""
    return ARCH_DEFAULTS[arch].get(flag.name, flag.default)


# Which adapters know a flag of the add-on; those not named here serve all.
ADAPTER_FLAGS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("segments", "inner_T", "reset_l", "grad_horizon", "init_state", "state_mix", "use_act", "act_penalty",
         "halt_max_segments", "segments_sampling", "supervised_segments", "carry_state", "eval_segments",
         "halt_settled"), ("hrm",)),
    **dict.fromkeys(
        ("d_h", "h_layers", "l_layers", "n_heads", "hrm_input", "hrm_read", "injector", "cab_mem", "cab_gate_init",
         "grb_gate_init", "logit_bias_head", "lora_layers", "verifier_weight", "verifier_every", "train_injector_scale",
         "eval_injector_scale"), ("hrm", "mlp")),
    "lora_rank": ("hrm", "mlp", "lora"),
    "virtual_tokens": ("prompt",),
}
