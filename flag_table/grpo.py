"""Flags under the heading `grpo`: rewards on own answers. A new flag is one line here."""

from __future__ import annotations

from flag_table.flag import reasoner

TABLE = (
    # Rewards on own answers; a stage's settings may override the numbers.
    reasoner("stages", "json", None, "what each stage of GRPO trains on and is rewarded for; none = the "
             "published five (addon: one, on the checkpoint's tasks)", nullable=True, pattern=r"\s*\{.*",
             form="a JSON object"),
    reasoner("grpo_lr", "float", 5e-5, "learning rate of GRPO", low=0, exclusive_low=True),
    reasoner("grpo_batch_size", "int", 4, "completions per micro-batch", low=1),
    reasoner("grpo_accum_steps", "int", 2, "micro-batches per step", low=1),
    reasoner("num_generations", "int", 8, "completions of each question, which are compared", low=2),
    reasoner("max_completion_length", "int", 256, "longest completion in tokens", low=1, protocol=True),
    reasoner("temperature", "float", 1.0, "sampling temperature of completions", low=0, exclusive_low=True),
    reasoner("loss_type", "str", "dapo", "how token losses are averaged",
             choices=("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo")),
    reasoner("beta", "float", 0.0, "weight of the KL divergence from the stage's start", low=0),
    reasoner("grpo_save_every", "int", 50, "steps of a stage between the states an interrupted one goes on from",
             low=1),
)
