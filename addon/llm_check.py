"""What is wrong with the LLM that a run of the add-on names, before its weights are loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import options
from addon.cache_use import CacheUseConfig, without_llm
from host import load_config, resolve_name


def llm_config(opts: argparse.Namespace) -> Any:
    """The LLM's config, without its weights where the run never loads them. Raises ValueError (HostError)."""
    needs_weights = not without_llm(options.part(CacheUseConfig, opts))
    return load_config(opts.model_name, opts.trust_remote_code, opts.revision, needs_weights)


def idle_template(opts: argparse.Namespace) -> list[str]:
    """One line for each typed flag of a chat template beside --prompt_style plain, which writes without one."""
    idle = {"chat_template", "chat_template_kwargs"} & set(getattr(opts, "typed", ()))
    if opts.prompt_style != "plain":
        return []

    return [f"--{name} {getattr(opts, name)} does nothing with --prompt_style plain: keep one"
            for name in sorted(idle) if getattr(opts, name)]


def check_llm(opts: argparse.Namespace) -> None:
    """Raises ValueError for an LLM that cannot be read, or has too few layers or positions for the flags."""
    if "revision" in getattr(opts, "typed", ()) and Path(resolve_name(opts.model_name)).is_dir():
        raise ValueError(
            f"--revision {opts.revision} does nothing with --model_name {opts.model_name}, which lies on this machine: "
            "leave it out, or name a model of the hub"
        )

    config = llm_config(opts).get_text_config()
    if opts.lora_layers > config.num_hidden_layers:  # a lower number may still be too high, see `host.lora_layers`
        raise ValueError(
            f"--lora_layers {opts.lora_layers}: {opts.model_name} has only {config.num_hidden_layers} layers"
        )

    # Families without a table of positions take any length. Prompt tuning's virtual tokens stand before the prompt.
    positions = getattr(config, "max_position_embeddings", None)
    if not positions or positions < 0:
        positions = opts.max_seq_len
    virtual = 0
    if opts.adapter == "prompt":
        virtual = opts.virtual_tokens
    if opts.max_seq_len + virtual > positions and virtual:
        raise ValueError(
            f"--max_seq_len {opts.max_seq_len} and --virtual_tokens {virtual} are more than the {positions} positions "
            f"of {opts.model_name}: lower one"
        )

    if opts.max_seq_len > positions:
        raise ValueError(
            f"--max_seq_len {opts.max_seq_len} is more than the {positions} positions of {opts.model_name}: lower it"
        )
