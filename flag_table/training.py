"""Flags under the heading `training`: steps, optimizer, deep supervision. A new flag is one line here."""

from __future__ import annotations

from flag_table.flag import BLOCKS, LEARNING, RECURRENT, Flag, addon

TABLE = (
    # The optimizer's steps.
    Flag("batch_size", "int", 64, "examples per batch", low=1, high=2**20, by_arch={"hybrid": 32}, common=True),
    addon("batch_tokens", "int", 0, "most tokens of a micro-batch, pads included, in place of batch_size examples; "
          "at most 10 % of it are pads; 0 = off", low=0),
    Flag("bucket_batches", "int", 1, "batches drawn together and grouped by length; 1 = off", low=1),
    Flag("lr", "float", 3e-3, "peak learning rate", low=0, exclusive_low=True, aliases=("learning_rate",),
         by_arch={"hybrid": 3e-4, "enhanced": 5e-3}, common=True),
    # When training ends.
    Flag("max_steps", "int", 1900, "batches to train; 0 = until epochs or max_minutes", low=0, aliases=("steps",),
         by_arch={"hybrid": 10_000, "enhanced": 2000}, common=True),
    Flag("epochs", "int", 0, "passes over train_n items; 0 = off", low=0),
    addon("fit_minutes", "float", None, "minutes of training for which a new run chooses its steps, max_steps at most; "
          "none = 7 where no task is named and nothing sets the length, else 0 = off", low=0, nullable=True, before=0.0,
          adapters=LEARNING),
    Flag("max_minutes", "float", 0.0, "stop training after this time; 0 = off", low=0, common=True),
    # The optimizer.
    Flag("grad_accum_steps", "int", 1, "micro-batches per batch", low=1),
    Flag("grad_clip", "float", 1.0, "largest gradient norm; 0 = off", low=0),
    Flag("weight_decay", "float", 0.1, "weight decay", low=0),
    Flag("beta1", "float", 0.9, "first beta of AdamW", low=0, high=1, exclusive_high=True),
    Flag("beta2", "float", 0.95, "second beta of AdamW", low=0, high=1, exclusive_high=True),
    Flag("optimizer", "str", "muon", "muon = Muon on hidden matrices, AdamW on the rest",
         choices=("muon", "adamw", "adamw_8bit"), by_arch={"hybrid": "adamw"}),
    Flag("on_nonfinite", "str", "stop", "a batch whose loss or gradient is no number: stop = end the run before its "
         "step; skip = leave its step out, count it, and end after 10 in a row", choices=("stop", "skip")),
    # The course of the learning rate.
    Flag("lr_scheduler", "str", "cosine", "course of the learning rate after the warmup; wsd = constant, then "
         "linear over the last 30 %", choices=("cosine", "linear", "constant", "wsd")),
    Flag("warmup_steps", "int", 50, "batches of linear warmup", low=0, by_arch={"hybrid": 500}),
    Flag("lr_min_ratio", "float", 0.0, "final learning rate as a share of lr", low=0, high=1,
         by_arch={"hybrid": 0.05}),
    Flag("lr_fall", "str", "after_warmup", "what cosine and linear are stretched over: what the warmup leaves, or "
         "the whole run, so that the rate drops at once where the warmup ends", before="whole_run",
         choices=("after_warmup", "whole_run")),
    # Precision and averages.
    Flag("mixed_precision", "str", "auto", "precision of autocast; auto = bf16 where the hardware has it, fp16 "
         "needs CUDA", choices=("auto", "none", "bf16", "fp16"), protocol=True),
    Flag("ema", "float", 0.998, "decay of the averaged weights, which are evaluated; 0 = off", low=0, high=1,
         exclusive_high=True, by_arch={"hybrid": 0.0, "enhanced": 0.0}),
    # Deep supervision over segments.
    addon("segments_sampling", "str", "fixed", "how many segments a batch has: all (with use_act 1 to all); 1 to "
          "all, drawn per batch; 1 to a number that grows to all over the run; from the steps its items need to "
          "twice as many; or for each item as many as it needs steps, at evaluation too",
          choices=("fixed", "uniform", "growing", "steps", "item"), adapters=RECURRENT),
    addon("segments_stretch", "int", 2, "with segments_sampling steps: draw up to so many times the steps needed",
          low=1, adapters=RECURRENT),
    addon("carry_noise", "float", 0.0, "Gaussian noise on the states that a segment hands to the next, in training, as "
          "a share of their root mean square; 0 = none", low=0, adapters=RECURRENT),
    addon("supervised_segments", "int", 0, "0 = every segment has a loss and an optimizer step (deep "
          "supervision); N = only the last N have, and the earlier ones run without gradient", low=0,
          adapters=RECURRENT),
    addon("recompute_segments", "bool", False, "compute again, in the backward pass, what the gradient reads of "
          "earlier segments: less memory, more time; needs grad_horizon segments:N", adapters=RECURRENT),
    addon("carry_state", "bool", True, "each supervised segment goes on from the states of the one before; off: "
          "from the initial ones, a control for what recurrence adds to repeated steps", adapters=RECURRENT),
    # Other text, which is left alone.
    addon("retain_weight", "float", 1.0, "weight of the divergence from the bare LLM on the text of retain", low=0,
          exclusive_low=True),
    addon("retain_batch_size", "int", 16, "texts of retain in each batch", low=1),
    # Further heads and controls.
    addon("verifier_weight", "float", 0.0, "loss weight of the head that learns the verifier's verdict; 0 = off",
          low=0, adapters=BLOCKS),
    addon("verifier_every", "int", 50, "batches between the answers that are generated for that head", low=1,
          adapters=BLOCKS),
    addon("train_injector_scale", "float", 1.0, "factor on the injection in training; 0 = bare LLM", low=0,
          adapters=BLOCKS),
    # Stopping early.
    Flag("patience", "int", 0, "evaluations in a row without anything better that end training; 0 = off", low=0,
         aliases=("eval_loss_patience",), by_arch={"hybrid": 3}),
    Flag("patience_on", "str", "solved", "what must get better: the solved rate or the held-out loss; rise = the loss "
         "must not be higher than the time before", choices=("solved", "loss", "rise"), by_arch={"hybrid": "rise"}),
    Flag("patience_grace_steps", "int", 0, "batches before evaluations count for patience", low=0),
    # Trying out.
    Flag("dry_run", "bool", False, "run one real batch and stop: loss, parameter counts, estimated time and "
         "memory", one_call=True, common=True),
)
