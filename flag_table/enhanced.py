"""Flags under the heading `enhanced`: the planner/worker LM's shape. A new flag is one line here."""

from __future__ import annotations

from flag_table.flag import enhanced

TABLE = (
    # The planner/worker LM.
    enhanced("tokenizer", "path", None, "tokenizer, to which the reasoning tags are added: a folder or a hub "
             "name; none = the embedded one", nullable=True, shape=True),
    enhanced("n_planner_layers", "int", 4, "layers of the planner", low=1, high=64, shape=True),
    enhanced("n_worker_layers", "int", 6, "layers of the worker", low=1, high=64, shape=True),
    enhanced("max_cycles", "int", 4, "planner-then-worker cycles", low=1, high=64, shape=True),
    enhanced("thought_dim", "int", 256, "width of the thought head", low=1, shape=True),
    enhanced("adamw_lr_ratio", "float", 0.2, "learning rate of what AdamW trains beside muon, as a share of lr",
             low=0, exclusive_low=True),
)
