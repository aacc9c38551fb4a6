"""The table of every flag of `train.py`: default, legal values, help, systems. A new flag is one line here.

The parser, the checks of YAML files and of checkpoints, `configs/default.yaml` and docs/flags.md derive from `FLAGS`.
What contradicts what among several flags stands in rules.py. This module needs the standard library only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

# The systems, and the sets of them that share flags.
ARCHS = ("addon", "hybrid", "enhanced")
ADDON = ("addon",)
HYBRID = ("hybrid",)
ENHANCED = ("enhanced",)
HRM = ("addon", "hybrid")  # built of H and L blocks
OWN_WEIGHTS = ("hybrid", "enhanced")  # train all their weights, no LLM is loaded
REASONERS = ("addon", "enhanced")  # can be trained with rewards

# What can train beside the add-on's frozen LLM, and the sets of adapters that share flags.
ADAPTERS = ("hrm", "lora", "prompt", "mlp", "none")
RECURRENT = ("hrm",)
BLOCKS = ("hrm", "mlp")  # read hidden states and inject: the HRM, and its blocks in a single pass

METAVARS = {"int": "N", "float": "X", "bool": "0|1", "str": "TEXT", "path": "PATH", "list": "A,B", "json": "TEXT"}
UNWRITABLE = re.compile("[\0\ud800-\udfff]")  # no text file holds these; bytes that are not UTF-8 come as halves


def names(text: str | None) -> list[str]:
    """The names in a comma list as `tasks` and `trackers` hold it: "a,b" -> ["a", "b"], "" and None -> []."""
    return text.split(",") if text else []


def json_ok(text: str) -> bool:
    """False only for text that begins as a JSON object and is not one: `small`, `default` and paths pass."""
    if not text.lstrip().startswith("{"):
        return True

    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


@dataclass(frozen=True)
class Flag:
    """One flag of the command line: what it may hold, what it does, who knows it. Each field is a column of the table.

    Values have the flag's type; a list is kept as text with commas between, JSON as text.
    """

    name: str  # typed as --name
    type: str  # a key of METAVARS
    default: Any
    help: str  # what it does; units, and what 0 means where it matters
    group: str = ""  # heading of --help and of YAML files; the table fills it in
    choices: tuple[str, ...] | None = None  # the legal texts; of a list, the legal names
    low: float | None = None  # ends of a number's range, legal themselves unless excluded
    high: float | None = None
    exclusive_low: bool = False
    exclusive_high: bool = False
    aliases: tuple[str, ...] = ()  # further names
    nullable: bool = False  # None is legal, typed as `none`
    pattern: str = ".+"  # text only: what the whole value must match
    form: str = "text, not empty"  # text only: `pattern` in words
    in_file: bool = True  # False: on the command line only, and never dumped
    archs: tuple[str, ...] = ARCHS  # the systems that know it
    by_arch: Mapping[str, Any] = field(default_factory=dict, hash=False)  # system -> its default, where it differs
    adapters: tuple[str, ...] = ADAPTERS  # the add-on's adapters that know it
    shape: bool = False  # fixes the shape of the weights: a checkpoint brings it, and another value is refused
    depth: bool = False  # how often blocks run: a checkpoint's weights bring it, and another value may be typed
    before: Any = None  # what checkpoints mean that are older than the flag; None: the default
    one_call: bool = False  # said of one call: no record of a run keeps it
    common: bool = False  # shown by the short --help

    def default_in(self, arch: str) -> Any:
        """The default in one system."""
        return self.by_arch.get(arch, self.default)

    @property
    def legal(self) -> str:
        """The legal values in words, as help and error messages give them."""
        if self.type == "bool":
            return "0, 1, true or false"

        if self.type == "list":
            among = f", among {', '.join(self.choices)}" if self.choices else ""
            return "distinct names with commas between" + among
        if self.choices:
            return f"one of {', '.join(self.choices)}"

        if self.type in ("int", "float"):
            return self._range
        return self.form

    @property
    def _range(self) -> str:
        ends = []
        if self.low is not None:
            ends.append(f"{'>' if self.exclusive_low else '>='} {self.low}")
        if self.high is not None:
            ends.append(f"{'<' if self.exclusive_high else '<='} {self.high}")

        kind = "an integer" if self.type == "int" else "a finite number"
        return f"{kind} {' and '.join(ends)}".rstrip()

    def allows(self, value: Any) -> bool:
        """True when `value`, already of the right type, is legal for this flag alone."""
        if value is None:
            return self.nullable
        if isinstance(value, str) and UNWRITABLE.search(value):
            return False
        if self.type == "bool":
            return True
        if self.type in ("int", "float"):
            return self._in_range(value)

        if self.choices:
            picked = names(value) if self.type == "list" else [value]
            return set(picked) <= set(self.choices)

        matches = re.fullmatch(self.pattern, value, re.DOTALL) is not None
        return matches and (self.type != "json" or json_ok(value))

    def _in_range(self, value: float) -> bool:
        if self.type == "float" and not math.isfinite(value):
            return False
        if self.low is not None and (value < self.low or (value == self.low and self.exclusive_low)):
            return False
        return self.high is None or value < self.high or (value == self.high and not self.exclusive_high)


# Flags that not every system knows.
addon = partial(Flag, archs=ADDON)
hybrid = partial(Flag, archs=HYBRID)
enhanced = partial(Flag, archs=ENHANCED)
with_hrm = partial(Flag, archs=HRM)
own_weights = partial(Flag, archs=OWN_WEIGHTS)
reasoner = partial(Flag, archs=REASONERS)

_TABLE: dict[str, tuple[Flag, ...]] = {
    "model": (
        # Which system, and what trains.
        Flag("arch", "str", "addon", "system to train: frozen LLM + HRM, encoder-decoder, or planner/worker LM",
             choices=ARCHS, shape=True, common=True),
        reasoner("objective", "str", "ce", "ce = cross-entropy on the answers; grpo = afterwards also rewards on the "
                 "model's own answers, in stages", choices=("ce", "grpo"), common=True),
        # The frozen LLM.
        addon("model_name", "path", "assets/tiny_host", "frozen LLM: a local folder or a Hugging Face hub name",
              common=True),
        addon("load_in", "str", "none", "quantisation of the frozen LLM", choices=("none", "8bit", "4bit")),
        addon("host_dtype", "str", "auto", "what the frozen LLM's weights are held in: as saved (stored), or auto = as "
              "saved where the device multiplies that natively, else fp32 if it fits the memory",
              choices=("auto", "stored", "bf16", "fp32", "fp16"), before="stored"),
        reasoner("min_roundtrip", "float", 0.95, "least share of texts that the tokenizer gives back", low=0, high=1,
              before=0.0),
        addon("trust_remote_code", "bool", False, "run Python code that comes with the hub model"),
        # What is trained beside it, and of which size.
        addon("adapter", "str", "hrm", "what trains beside the frozen LLM: the HRM, LoRA, virtual tokens, HRM's "
              "blocks in a single pass, or nothing", choices=ADAPTERS, shape=True, common=True),
        addon("match_params", "int", 0, "size the adapter (d_h, lora_rank or virtual_tokens) to this many trainable "
              "parameters, within 5 %; 0 = off", low=0, one_call=True),
        # The H and L blocks, whose states are z_H and z_L.
        with_hrm("d_h", "int", 128, "width of the HRM; a multiple of 2 x n_heads", low=8, by_arch={"hybrid": 256},
                 adapters=BLOCKS, shape=True, common=True),
        with_hrm("h_layers", "int", 1, "layers of the slow block H", low=1, high=64, adapters=BLOCKS, shape=True),
        with_hrm("l_layers", "int", 1, "layers of the fast block L", low=1, high=64, adapters=BLOCKS, shape=True),
        addon("share_hl", "bool", False, "one block serves as both H and L, as in TRM; needs h_layers = l_layers",
              shape=True),
        Flag("n_heads", "int", 4, "attention heads", low=1, by_arch={"hybrid": 8}, adapters=BLOCKS, shape=True),
        # How often the blocks run.
        addon("segments", "int", 1, "recurrence segments in training", low=1, high=256, adapters=RECURRENT,
              depth=True, common=True),
        with_hrm("inner_T", "int", 2, "L steps before each H step", low=1, high=64, aliases=("l_steps",),
                 adapters=RECURRENT, depth=True),
        addon("reset_l", "bool", False, "start z_L anew at each segment", adapters=RECURRENT),
        with_hrm("grad_horizon", "str", "full", "block calls that carry gradient: the last of L and of H, all, or "
                 "the last N of L", pattern=r"one_step|full|k:[1-9][0-9]*", form="one_step, full or k:N with N >= 1",
                 adapters=RECURRENT, depth=True),
        # What HRM reads and begins with.
        addon("hrm_input", "str", "tokens", "what HRM reads of the prompt: every token, or mean and last token",
              choices=("tokens", "pooled"), adapters=BLOCKS, shape=True),
        addon("hrm_read", "str", "embed+last", "which of the LLM's states HRM reads",
              choices=("embed+last", "last", "all"), adapters=BLOCKS, shape=True),
        addon("init_state", "str", "zero", "first z_H and z_L: random vectors in training and fixed buffers at "
              "evaluation, the published fixed buffers in both, or zeros", choices=("random", "fixed", "zero"),
              adapters=RECURRENT),
        addon("state_mix", "str", "gated", "how earlier states enter a block: by the published sum, or by learned "
              "gates that begin at zero", choices=("sum", "gated"), before="sum", adapters=RECURRENT, shape=True),
        # How z_H enters the LLM.
        addon("injector", "str", "cab", "how z_H enters the LLM: by cross-attention or by a gated bias",
              choices=("cab", "grb"), adapters=BLOCKS, shape=True),
        addon("cab_mem", "int", 0, "learned memory tokens that cab reads; 0 = all of z_H", low=0, adapters=BLOCKS,
              shape=True),
        addon("cab_gate_init", "float", 1.0, "initial gate of cab, a factor", adapters=BLOCKS),
        addon("grb_gate_init", "float", 0.0, "initial gate of grb, a logit", adapters=BLOCKS),
        addon("logit_bias_head", "bool", False, "add a gated bias over the vocabulary, computed from z_H",
              adapters=BLOCKS, shape=True),
        # Adapters beside HRM, or in its place.
        addon("lora_layers", "int", 0, "besides HRM, LoRA on this many top layers of the LLM", low=0, adapters=BLOCKS,
              shape=True),
        addon("lora_rank", "int", 8, "rank of that LoRA, or of adapter lora", low=1, adapters=("hrm", "mlp", "lora"),
              shape=True),
        addon("virtual_tokens", "int", 20, "learned embeddings of adapter prompt", low=1, adapters=("prompt",),
              shape=True),
        # Halting (adaptive computation time).
        addon("use_act", "bool", False, "learn when to halt, and halt examples at evaluation", adapters=RECURRENT,
              shape=True, common=True),
        addon("halt_detach", "bool", False, "the halting head only reads z_H: its loss does not change z_H; needs "
              "use_act"),
        addon("act_penalty", "float", 0.0, "weight of the sum of 1 - p_halt; needs use_act", low=0,
              adapters=RECURRENT),
        addon("halt_max_segments", "int", 0, "most segments at evaluation with use_act; 0 = segments", low=0,
              adapters=RECURRENT),
    ),
    "hybrid": (
        # Encoder and decoder; the planner/worker LM has a width, too.
        own_weights("d_model", "int", 256, "width of encoder and decoder, or of planner and worker; a multiple of 2 "
                    "x n_heads", low=8, shape=True),
        hybrid("encoder", "str", "mamba2", "the network that reads the prompt", choices=("mamba2", "transformer"),
               shape=True),
        hybrid("encoder_layers", "int", 4, "layers of the encoder", low=1, high=128, shape=True),
        hybrid("decoder_layers", "int", 4, "layers of the decoder", low=1, high=128, shape=True),
        hybrid("state_size", "int", 64, "state of Mamba2 per channel", low=1, shape=True),
        hybrid("tie_embeddings", "bool", True, "one table of embeddings for tokens in and out", shape=True),
        # The HRM between them.
        hybrid("h_len", "int", 8, "tokens of the slow state", low=1, shape=True),
        hybrid("l_len", "int", 16, "tokens of the fast state", low=1, shape=True),
        hybrid("h_cycles", "int", 2, "cycles of HRM: l_steps L steps and one H step each", low=1, high=64, depth=True),
        hybrid("bridge", "str", "prefix", "z_H becomes prefix_len memory tokens, or one vector",
               choices=("prefix", "cross_attn"), shape=True),
        hybrid("prefix_len", "int", 8, "memory tokens of the prefix bridge", low=1, shape=True),
        # The gate through which HRM acts.
        hybrid("hrm_gate_warmup_steps", "int", 0, "batches with the gate shut, that is without HRM", low=0),
        hybrid("hrm_gate_ramp_steps", "int", 0, "batches after the gate's warmup in which its scale rises from 0",
               low=0),
        hybrid("hrm_gate_scale", "float", 1.0, "the scale that the gate reaches; 0 = encoder-decoder without HRM",
               low=0, high=1),
        # Further losses.
        hybrid("deep_supervision", "bool", False, "the z_H of earlier cycles have a decoder loss too"),
        hybrid("ds_weight", "float", 0.1, "weight of each earlier cycle's loss", low=0),
        hybrid("use_halting", "bool", False, "learn when to stop cycling, and stop there at evaluation"),
        hybrid("halting_weight", "float", 0.01, "weight of the halting losses, times the mean gate", low=0),
        hybrid("halting_target", "float", 1.0, "aim of the sum of halting probabilities", low=0),
        hybrid("halt_threshold", "float", 0.99, "summed halting probability at which an example stops", low=0,
               exclusive_low=True),
    ),
    "enhanced": (
        # The planner/worker LM.
        enhanced("tokenizer", "path", None, "tokenizer, to which the reasoning tags are added: a folder or a hub "
                 "name; none = the embedded one", nullable=True, shape=True),
        enhanced("n_planner_layers", "int", 4, "layers of the planner", low=1, high=64, shape=True),
        enhanced("n_worker_layers", "int", 6, "layers of the worker", low=1, high=64, shape=True),
        enhanced("max_cycles", "int", 4, "planner-then-worker cycles", low=1, high=64, shape=True),
        enhanced("thought_dim", "int", 256, "width of the thought head", low=1, shape=True),
        enhanced("adamw_lr_ratio", "float", 0.2, "learning rate of what AdamW trains beside muon, as a share of lr",
                 low=0, exclusive_low=True),
    ),
    "grpo": (
        # Rewards on own answers; a stage's settings may override the numbers.
        reasoner("stages", "json", None, "what each stage of GRPO trains on and is rewarded for; none = the "
                 "published five (addon: one, on the checkpoint's tasks)", nullable=True, pattern=r"\s*\{.*",
                 form="a JSON object"),
        reasoner("grpo_lr", "float", 5e-5, "learning rate of GRPO", low=0, exclusive_low=True),
        reasoner("grpo_batch_size", "int", 4, "completions per micro-batch", low=1),
        reasoner("grpo_accum_steps", "int", 2, "micro-batches per step", low=1),
        reasoner("num_generations", "int", 8, "completions of each question, which are compared", low=2),
        reasoner("max_completion_length", "int", 256, "longest completion in tokens", low=1),
        reasoner("temperature", "float", 1.0, "sampling temperature of completions", low=0, exclusive_low=True),
        reasoner("loss_type", "str", "dapo", "how token losses are averaged",
                 choices=("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo")),
        reasoner("beta", "float", 0.0, "weight of the KL divergence from the stage's start", low=0),
        reasoner("grpo_save_every", "int", 50, "steps of a stage between the states an interrupted one goes on from",
                 low=1),
    ),
    "data": (
        # Prepared triples.
        hybrid("dataset", "path", None, "training data: synthetic (two-digit addition) or a folder of prepared "
               "triples", nullable=True, common=True),
        hybrid("dev_sets", "str", None, "further prepared folders scored at each validation", nullable=True,
               pattern=r"[\w.-]+=[^,].*(?<!,)", form="NAME=DIR,NAME=DIR"),
        hybrid("dataset_workers", "int", 0, "threads that read ahead; capped to the machine's cores", low=0),
        hybrid("max_val_samples", "int", 0, "most validation samples; 0 = the whole split", low=0),
        hybrid("on_bad_line", "str", "error", "what to do at a broken line of a prepared file",
               choices=("error", "skip")),
        # Reasoning Gym tasks.
        addon("task", "str", None, "one Reasoning Gym task by name, or toy_add", nullable=True, common=True),
        addon("tasks", "list", None, "several tasks, mixed in equal parts", nullable=True, common=True),
        addon("task_config", "json", None, "settings of the tasks; none = small when no task is named, else default",
              nullable=True, form="small, default, a file or a JSON object", common=True),
        addon("train_n", "int", 0, "training items; 0 = fresh items without end", low=0, common=True),
        Flag("eval_n", "int", 256, "evaluation items of each task", low=1, common=True),
        addon("group_split", "bool", True, "evaluate a task of few solutions (mini_sudoku) on solutions that are "
              "never trained on, beside questions"),
        reasoner("verifier_strict", "bool", True, "judge answers by a strict rule of the task beside its scorer, "
                 "and leave out items whose gold answer fails", before=False),
        # Saving forward passes of the frozen LLM.
        addon("cache_hidden", "str", "off", "where to keep the frozen LLM's hidden states of the train_n items",
              choices=("off", "ram")),
        addon("cache_max_gb", "float", 4.0, "largest such cache in GB; a larger one is refused", low=0,
              exclusive_low=True),
        addon("allow_code_tasks", "bool", False, "allow tasks whose verifier executes code"),
        reasoner("draw_timeout_s", "float", 60.0, "most seconds to make one item; a slower one is passed over; 0 = no "
                 "limit", low=0),
        reasoner("score_timeout_s", "float", 10.0, "most seconds to score one answer; a slower one is wrong; 0 = no "
                 "limit", low=0),
        # Difficulty that rises with what is solved.
        addon("curriculum", "bool", False, "raise each task through Reasoning Gym's levels of difficulty"),
        addon("curriculum_threshold", "float", 0.8, "held-out solved rate at which a task goes up a level", low=0,
              high=1, exclusive_low=True),
        addon("curriculum_levels", "int", 0, "highest level; 0 = the task's last", low=0),
        addon("curriculum_draw_s", "float", 60.0, "most seconds to draw the questions of one level; 0 = no limit",
              low=0),
        # How text becomes tokens.
        addon("sentinel", "str", None, "text appended to every target, at which generation stops", nullable=True),
        addon("system_header", "str", None, "text put before every prompt", nullable=True, pattern=r".*", form="text"),
        addon("prompt_style", "str", "auto", "how a question is put to the LLM; auto = chat if it has a template",
              choices=("auto", "chat", "plain")),
        Flag("max_seq_len", "int", 512, "most tokens of a prompt; the hybrid cuts longer ones", low=8,
             by_arch={"enhanced": 1024}),
        addon("overlong", "str", "error", "what to do with longer prompts", choices=("error", "drop")),
        # Training seeds and evaluation seeds never meet.
        Flag("seed", "int", 0, "seed of weights, training items and order", low=0, high=2**31, exclusive_high=True,
             common=True),
        Flag("eval_seed", "int", 10**9, "evaluation items are drawn from it; every training seed lies far below",
             low=10**9, high=2**32, exclusive_high=True),
    ),
    "training": (
        # The optimizer's steps.
        Flag("batch_size", "int", 64, "examples per batch", low=1, high=2**20, by_arch={"hybrid": 32}, common=True),
        Flag("bucket_batches", "int", 1, "batches drawn together and grouped by length; 1 = off", low=1),
        Flag("lr", "float", 3e-3, "peak learning rate", low=0, exclusive_low=True, aliases=("learning_rate",),
             by_arch={"hybrid": 3e-4, "enhanced": 5e-3}, common=True),
        # When training ends.
        Flag("max_steps", "int", 1900, "batches to train; 0 = until epochs or max_minutes", low=0, aliases=("steps",),
             by_arch={"hybrid": 10_000, "enhanced": 2000}, common=True),
        Flag("epochs", "int", 0, "passes over train_n items; 0 = off", low=0),
        Flag("max_minutes", "float", 0.0, "stop training after this time; 0 = off", low=0, common=True),
        # The optimizer.
        Flag("grad_accum_steps", "int", 1, "micro-batches per batch", low=1),
        Flag("grad_clip", "float", 1.0, "largest gradient norm; 0 = off", low=0),
        Flag("weight_decay", "float", 0.1, "weight decay", low=0),
        Flag("beta1", "float", 0.9, "first beta of AdamW", low=0, high=1, exclusive_high=True),
        Flag("beta2", "float", 0.95, "second beta of AdamW", low=0, high=1, exclusive_high=True),
        Flag("optimizer", "str", "muon", "muon = Muon on hidden matrices, AdamW on the rest",
             choices=("muon", "adamw", "adamw_8bit"), by_arch={"hybrid": "adamw"}),
        # The course of the learning rate.
        Flag("lr_scheduler", "str", "cosine", "course of the learning rate after the warmup",
             choices=("cosine", "linear", "constant")),
        Flag("warmup_steps", "int", 50, "batches of linear warmup", low=0, by_arch={"hybrid": 500}),
        Flag("lr_min_ratio", "float", 0.0, "final learning rate as a share of lr", low=0, high=1,
             by_arch={"hybrid": 0.05}),
        Flag("lr_fall", "str", "after_warmup", "what cosine and linear are stretched over: what the warmup leaves, or "
             "the whole run, so that the rate drops at once where the warmup ends", before="whole_run",
             choices=("after_warmup", "whole_run")),
        # Precision and averages.
        Flag("mixed_precision", "str", "auto", "precision of autocast; auto = bf16 where the hardware has it, fp16 "
             "needs CUDA", choices=("auto", "none", "bf16", "fp16")),
        Flag("ema", "float", 0.998, "decay of the averaged weights, which are evaluated; 0 = off", low=0, high=1,
             exclusive_high=True, by_arch={"hybrid": 0.0, "enhanced": 0.0}),
        # Deep supervision over segments.
        addon("segments_sampling", "str", "fixed", "how many segments a batch has: all (with use_act 1 to all); 1 to "
              "all, drawn per batch; or 1 to a number that grows to all over the run",
              choices=("fixed", "uniform", "growing"), adapters=RECURRENT),
        addon("supervised_segments", "int", 0, "0 = every segment has a loss and an optimizer step (deep "
              "supervision); N = only the last N have, and the earlier ones run without gradient", low=0,
              adapters=RECURRENT),
        addon("carry_state", "bool", True, "each supervised segment goes on from the states of the one before; off: "
              "from the initial ones, a control for what recurrence adds to repeated steps", adapters=RECURRENT),
        # Further heads and controls.
        addon("verifier_weight", "float", 0.0, "loss weight of the head that learns the verifier's verdict; 0 = off",
              low=0, adapters=BLOCKS),
        addon("verifier_every", "int", 50, "batches between the answers that are generated for that head", low=1,
              adapters=BLOCKS),
        addon("train_injector_scale", "float", 1.0, "factor on the injection in training; 0 = bare LLM", low=0,
              adapters=BLOCKS),
        # Stopping when the validation loss rises.
        hybrid("eval_loss_patience", "int", 3, "consecutive rises of the validation loss that end training; 0 = off",
               low=0),
        hybrid("patience_grace_steps", "int", 0, "batches before rises of the validation loss count", low=0),
        # Trying out.
        Flag("dry_run", "bool", False, "run one real batch and stop: loss, parameter counts, estimated time and "
             "memory", one_call=True, common=True),
    ),
    "evaluation": (
        # When to evaluate.
        Flag("eval_only", "bool", False, "evaluate a checkpoint, named by resume or run_name, and stop",
             one_call=True, common=True),
        Flag("eval_every", "int", 380, "batches between evaluations; 0 = only at the end", low=0,
             aliases=("val_every",), by_arch={"hybrid": 1000, "enhanced": 0}, common=True),
        Flag("eval_batch_size", "int", 128, "examples per evaluation batch", low=1, by_arch={"hybrid": 64}),
        # How many segments answer.
        addon("eval_segments", "int", 0, "segments at evaluation; 0 = as trained", low=0, adapters=RECURRENT),
        addon("eval_readout", "str", "last", "the segment that answers: the last, or of all segments the one with "
              "the highest halting score; needs use_act", choices=("last", "best_halt")),
        addon("halt_settled", "float", 0.0, "at evaluation an example also stops when a segment changes z_H by less "
              "than this share of its norm; 0 = off", low=0, high=1, adapters=RECURRENT),
        addon("eval_injector_scale", "float", 1.0, "factor on the injection at evaluation; 0 = bare LLM", low=0,
              adapters=BLOCKS),
        # How answers are generated.
        addon("decode_temperature", "float", 0.0, "sampling temperature; 0 = greedy", low=0),
        addon("decode_top_p", "float", 1.0, "nucleus sampling; 1 = off", low=0, high=1, exclusive_low=True),
        addon("decode_top_k", "int", 0, "sample among the k likeliest tokens; 0 = off", low=0),
        Flag("max_new_tokens", "int", 0, "longest answer; 0 = longest evaluation target and a margin", low=0),
        # Benchmarks.
        Flag("eval_suite", "str", None, "benchmarks measured after training and with eval_only: perplexity=FILE, "
             "gsm8k=FILE, mbpp=FILE, science_qa=FILE, synthetic", nullable=True),
        Flag("eval_suite_n", "int", 0, "most items of each entry of the suite; 0 = all", low=0),
        Flag("eval_suite_split", "str", None, "split of the suite's files whose rows name one, such as test; all mixes "
             "them; none = the only one there is", nullable=True),
        Flag("allow_unconfined_code", "bool", False, "run generated code even where nothing can confine it"),
        # Records.
        Flag("log_csv", "path", None, "file of the evaluation table; none = eval.csv in the run folder",
             nullable=True),
        Flag("log_samples_every", "int", 0, "batches between printed samples; 0 = off", low=0),
    ),
    "run": (
        # Files and folders.
        Flag("config", "path", None, "YAML file of flags, which the command line overrides", nullable=True,
             in_file=False, common=True),
        Flag("run_name", "str", None, "folder in save_dir; none = named by task and time", nullable=True,
             pattern=r"\w[^/\\\x00-\x1f]{0,99}", form="a plain folder name (no slash, not ..)", one_call=True,
             common=True),
        Flag("save_dir", "path", "runs", "folder of all runs", common=True),
        Flag("save_every", "int", 0, "batches between checkpoints; 0 = only at the end", low=0),
        Flag("resume", "path", None, "checkpoint to go on from, or auto = the newest of the run", nullable=True,
             one_call=True, common=True),
        Flag("reset_progress", "bool", False, "take only the weights of resume and begin anew: step, optimizer, data",
             one_call=True),
        Flag("checkpoint_limit", "int", 3, "checkpoints kept; 0 = all", low=0),
        Flag("save_best_model", "bool", False, "also keep the best checkpoint: solved rate, or validation loss"),
        Flag("log_steps", "int", 20, "batches between logged lines", low=1),
        Flag("trackers", "list", "", "where else to log", choices=("tensorboard", "wandb", "trackio")),
        # The machine.
        Flag("device", "str", "auto", "where to compute; auto = CUDA, else MPS, else CPU",
             choices=("auto", "cpu", "cuda", "mps"), common=True),
        Flag("num_threads", "int", 0, "CPU threads; 0 = OMP_NUM_THREADS, else one or all cores, whichever "
             "multiplies faster at the start", low=0),
    ),
}
GROUPS = tuple(_TABLE)
FLAGS: tuple[Flag, ...] = tuple(replace(flag, group=group) for group, flags in _TABLE.items() for flag in flags)
FIND = {name: flag for flag in FLAGS for name in (flag.name, *flag.aliases)}
INVOCATION = tuple(flag.name for flag in FLAGS if flag.one_call)
