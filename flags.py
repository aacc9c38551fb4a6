"""The table of every flag of `train.py`: default, legal values, help, systems.

The tables stand in flag_table/, one module for each heading of --help; a new flag is one line there. The parser, the
checks of YAML files and of checkpoints, `configs/default.yaml` and docs/flags.md derive from `FLAGS`. What contradicts
what among several flags stands in rules.py. This module needs the standard library only.
"""

from __future__ import annotations

from dataclasses import replace

from flag_table import data, enhanced, evaluation, grpo, hybrid, model, run, training
from flag_table.flag import ADAPTERS, ARCHS, HYBRID, METAVARS, UNWRITABLE, Flag, names

__all__ = ["ADAPTERS", "ARCHS", "HYBRID", "METAVARS", "UNWRITABLE", "Flag", "names"]  # handed on

# In the order of --help and of YAML files.
_TABLES: dict[str, tuple[Flag, ...]] = {
    "model": model.TABLE,
    "hybrid": hybrid.TABLE,
    "enhanced": enhanced.TABLE,
    "grpo": grpo.TABLE,
    "items": data.TABLE,
    "training": training.TABLE,
    "evaluation": evaluation.TABLE,
    "run": run.TABLE,
}
GROUPS = tuple(_TABLES)
FLAGS: tuple[Flag, ...] = tuple(replace(flag, group=group) for group, flags in _TABLES.items() for flag in flags)
FIND = {name: flag for flag in FLAGS for name in (flag.name, *flag.aliases)}
INVOCATION = tuple(flag.name for flag in FLAGS if flag.one_call)
