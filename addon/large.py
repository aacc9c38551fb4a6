"""An LLM that the defaults were not chosen on: told at the start."""

from __future__ import annotations

from dataclasses import dataclass

from flags import FIND

LARGE = 100_000_000  # parameters


@dataclass(frozen=True)
class SizeConfig:
    """What fits an LLM's size or not; each field is the flag of its name."""

    arch: str
    model_name: str
    batch_size: int
    lr: float


def size_warnings(config: SizeConfig, parameters: int) -> list[str]:
    """One line where an LLM of so many parameters meets the batch size and learning rate of the embedded one."""
    usual = (FIND["batch_size"].default_in(config.arch), FIND["lr"].default_in(config.arch))
    if parameters < LARGE or (config.batch_size, config.lr) != usual:
        return []
    return [
        f"--batch_size {usual[0]} and --lr {usual[1]:g} were chosen on an LLM of 3.6 M parameters, and "
        f"{config.model_name} has {parameters / 1e6:,.0f} M: begin with a file of configs/recipes/, or with "
        "--batch_size 16 --lr 1e-3 --cache_hidden disk"
    ]
