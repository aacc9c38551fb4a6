"""The command that trained a run, for readers elsewhere: no path of the machine that trained it stands in it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import options

# Flags of one machine or one call, which say nothing of how a model came to be.
OF_THE_CALL = ("resume", "run_name", "save_dir", "log_csv", "num_threads", "device", "device_map", "max_memory",
               "dry_run", "eval_only", "config", "trackers")
FILE_OR_HUB = ("data", "eval_data")  # a data set of the hub is named as it is, and a file by its absolute path


def command_text(opts: options.Options, base: str, plugin: str | None) -> str:
    """Every flag that differs from its default.

    Args:
        opts: the flags of the run.
        base: the LLM's name for people.
        plugin: the file of --plugin, which no record of flags holds; None = there was none.
    """
    words = ["python", "train.py"]
    for flag in options.FLAGS:
        value = getattr(opts, flag.name)
        if flag.name in OF_THE_CALL or flag.one_call or value is None:
            continue
        if value == flag.default_in(opts.arch):
            continue
        text = base if flag.name == "model_name" else shown_value(flag.name, value)
        words += [f"--{flag.name}", shlex.quote(text)]

    if plugin:
        words += ["--plugin", shlex.quote(Path(plugin).name)]
    return " ".join(words)


def shown_value(name: str, value: Any) -> str:
    """The value of a flag as it is typed, files by their name alone: where they lay is nobody's concern.

    The LLM's name, which may be one of the hub, is no matter of this function.
    """
    if isinstance(value, bool):
        return str(int(value))
    text = str(value)
    if name in FILE_OR_HUB:
        return Path(text).name if os.path.isabs(text) else text
    if name == "eval_suite":
        entries = [entry.partition("=") for entry in text.split(",")]
        return ",".join(key + sign + Path(file).name for key, sign, file in entries)

    # A JSON flag holds the object itself, a word, or the name of a file.
    kind = options.FIND[name].type
    if kind == "path" or (kind == "json" and not text.lstrip().startswith("{")):
        return Path(text).name
    return text
