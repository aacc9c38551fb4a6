"""Writes docs/flags.md from the table of flags: `python scripts/make_flags_doc.py`. A test keeps the page true."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.files import write_text_aside  # noqa: E402
from flags import ADAPTERS, ARCHS, FLAGS, GROUPS, Flag  # noqa: E402
from script_tools import ScriptParser, run_script  # noqa: E402

PAGE = ROOT / "docs" / "flags.md"
INTRODUCTION = """# Flags of train.py

Every flag of `train.py`, with its default, its legal values and what it does. `scripts/make_flags_doc.py` writes this
page from the table in `flag_table/`.

- **Where values come from.** A value on the command line wins over one in the YAML file of `--config`, which wins over
  the options of the checkpoint that a run goes on from (`--resume`, or an existing `--run_name`), which win over the
  defaults.
- **How they are typed.** A switch takes 0, 1, true or false, or stands alone. Where none is a legal value, `none` takes
  back what a file gave. A value that begins with `--` is written `--flag=value`.
- **In YAML.** A file holds `flag: value` lines under any headings. Each run writes all of its own to
  `config.resolved.yaml`, and `--config` on that file runs it again.
- **What a checkpoint fixes.** The shape of its weights cannot be changed, so the flags marked *shape* come from the
  checkpoint, and another value is refused.
- **In the terminal.** `python train.py --help` shows the common flags, `python train.py --help --arch hybrid` those of
  one system, and `python train.py --help all` every one. [Completion](runs.md#flags-and-configuration-files) is for
  bash and zsh.
"""
SECTIONS = {
    ARCHS: ("Every system", "Where systems differ, the default is followed by their own."),
    ("addon",): ("The add-on on a frozen LLM", "Of `--arch addon`, the default. What only some adapters know says so."),
    ("hybrid",): ("The hybrid", "Of `--arch hybrid`, the encoder-decoder with an HRM between its halves."),
    ("enhanced",): ("The planner/worker LM", "Of `--arch enhanced`."),
}


def cell(text: str) -> str:
    """Text as a cell of a Markdown table."""
    return text.replace("|", "\\|")


def shown(value: object) -> str:
    """A default as it is typed."""
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        value = int(value)
    return f"`{value}`"


def default_of(flag: Flag, systems: Sequence[str]) -> str:
    """The default in the first of some systems, and those of the others where they differ."""
    usual = flag.default_in(systems[0])
    parts = [shown(usual)]
    for arch in systems[1:]:
        if flag.default_in(arch) != usual:
            parts.append(f"{arch} {shown(flag.default_in(arch))}")
    return "; ".join(parts)


def meaning_of(flag: Flag) -> str:
    """What a flag does, and the notes that belong to it."""
    parts = [flag.help]
    if flag.aliases:
        parts.append(f"also `--{'`, `--'.join(flag.aliases)}`")

    # Adapters are the add-on's: other systems know no such limit.
    if flag.adapters != ADAPTERS:
        where = "in the add-on only"
        if flag.archs == ("addon",):
            where = "only"
        parts.append(f"{where} with `--adapter` {' or '.join(flag.adapters)}")
    if flag.shape:
        parts.append("*shape*")
    return "; ".join(parts)


def table(flags: Sequence[Flag], systems: Sequence[str]) -> list[str]:
    """The lines of a table of flags."""
    lines = ["| flag | default | legal values | what it does |", "|---|---|---|---|"]
    for flag in flags:
        cells = (f"`--{flag.name}`", default_of(flag, systems), flag.legal, meaning_of(flag))
        lines.append(f"| {' | '.join(map(cell, cells))} |")
    return lines


def page() -> str:
    """The text of docs/flags.md."""
    lines = [INTRODUCTION]
    for systems, (title, introduction) in SECTIONS.items():
        lines += [f"## {title}", "", introduction, ""]

        # What every system knows stands once; what two of them know stands with each.
        shared = systems == ARCHS
        known = [flag for flag in FLAGS if systems[0] in flag.archs and (flag.archs == ARCHS) == shared]
        for group in GROUPS:
            flags = [flag for flag in known if flag.group == group]
            if flags:
                lines += [f"### {title}: {group}", "", *table(flags, systems), ""]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page and says where it lies."""
    ScriptParser(__doc__).parse_args(argv)
    write_text_aside(PAGE, page())
    print(PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
