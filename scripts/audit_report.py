"""docs/tasks.md from the rows of `audit_verifiers.py`, and what has changed since they were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from audit_probes import RIGHT
from audit_task import wrongly_accepted
from reasoning_gym_wrapper import EXECUTES_CODE, GLOBAL_RANDOM, HASH_DEPENDENT
from verify.judge import rule_name

Row = Mapping[str, Any]
MOST_SHOWN = 4  # probes in a cell
LEAST_SHARE = 0.02  # of its items that a wrong probe must be accepted on to be shown
FEW = 20  # items too few to tell a level of chance
CHANCE = 0.5  # a constant that solves more than this says that accuracy means little

HEAD = """# Tasks: what their verifiers accept

Most scorers of Reasoning Gym accept text that answers nothing on some of their items. This page says which, task by
task, measured with reasoning_gym {version} at each task's default difficulty. `python scripts/audit_verifiers.py`
(`make audit`) writes it; the raw rows are in [results/tasks](results/tasks/tasks.jsonl). With `--check` the command
compares {first} items of each task with them and exits with 1 where something changed, another version of
reasoning_gym among it.

An answer is solved where the task's own scorer gives 1.0 **and** the strict rule of the task accepts it. `mean_score`
stays the scorer's own.

## What is accepted though it is wrong

The probes: constants, the gold answer spoilt (cut, reversed, rounded, its sign flipped, `not` before it), a wrong
answer beside it, parts of the input, the commonest gold answer of the draw. A share is of the items on which the probe
does not say the gold answer (of all items, where the input is copied: it may be the right answer); tasks with several
right answers accept some probes rightly. `chance`: the share of items
that the best constant answer solves under the strict verdict, found on the same items. Where it is above 50 %, accuracy
says little.

"""

PROBES = """
## Depth probes

Built-in tasks that need a known number of steps. `min_steps` and `max_steps` (1 and 4) are their knob: each item draws
its number between them, and keeps it in its metadata as `steps`. `--curriculum` raises `max_steps` by one a level, up
to the configured one. Letters stand for themselves in the embedded LLM's tokenizer, each its own token, and its prompts
stay under 80 tokens. Other tokenizers may read several letters as one token. The first
levels of toy_chain and toy_chase have few nodes of few letters, at one step: a model learns to find a letter among 6
within some hundred batches, and among 26 it does not begin to.

    python train.py --task toy_chain --task_config '{"max_steps": 4}' --curriculum
    python scripts/depth_curve.py RUN --steps 1-12 --segments 1,2,4,8,16

The second command draws solved against steps, one line for each number of segments, steps beyond training among them.

| task | question | answer | other fields of `--task_config` |
|---|---|---|---|
| toy_chain | `B>D,A>Q,...:S>` | the letter where the chain of pointers from S ends | `nodes` 18, `letters` 26, \
`chains` 6, `ends` self |
| toy_chase | `A>C,B>F,...:S7>` | the letter 7 hops from S | `nodes` 18, `letters` 26, `map` cycle |
| toy_automaton | `KABFE:20134>` | the letters after these moves | `objects` 5 |
| toy_rewrite | `ABBDDFA...>` | what is left when no two neighbours are equal | `pairs` 16, `kept` 3 |

Chance, measured on 2,000 items each, in % of them:

| task | best constant, 4 steps at most | best constant, most steps | better guess |
|---|---|---|---|
| toy_chain | 4.8 | 4.4 (12 steps) | the end of any chain: 16.7, one in `chains` |
| toy_chase | 4.6 | 4.8 (17 steps) | any letter but the start: 5.9, one in `nodes` - 1 |
| toy_automaton | 0.1 | 0.1 (16 steps) | the order it began with: 0.5; most steps: 0.9 |
| toy_rewrite | 1.9 | 1.8 (16 steps) | the letters that occur an odd number of times, in a likely order: 18.8 |

- **toy_chain.** An end points at itself, so that every hop is alike. The chain that holds the start has as many nodes
  as the others, `nodes // chains`, while the steps allow it: up to 2 steps by default nothing tells it from the
  others. From there on it is the longest, as the others share the nodes that are left. With `ends` none an end points
  nowhere, and a model must learn to stay there: none that was tried learnt the second hop. 24 nodes are then the most.
- **toy_chase.** The hops must be counted as well. `map` cycle is one cycle through all letters: no hop returns before
  `nodes` of them, which are therefore too many; near that number the way back is shorter. `map` permutation and
  function take up to 99 steps, and have short cycles, around which hops may be counted modulo their length.
- **toy_automaton.** Move 0 takes the first letter to the end, move i swaps the letters at places i and i + 1; no swap
  stands twice in a row. `objects` 3 has 6 orders, 5 has 120, and their group is not solvable.
- **toy_rewrite.** A step is a round: from left to right each letter cancels with its right neighbour where the two are
  equal. Whatever the order, the same letters are left. Pairs inside pairs go first, so the rounds are the depth of the
  deepest pair. All words have `2 * pairs + kept` letters. Near `pairs` steps most of a word is one palindrome.
"""


def page(rows: Mapping[str, Row], existing: Sequence[str]) -> str:
    """The whole page."""
    ordered = [rows[name] for name in sorted(rows)]
    versions = sorted({row["reasoning_gym"] for row in ordered})
    text = HEAD.format(version=" and ".join(versions), first=10)
    text += _table(("task", "its own scorer", "with the strict rule", "chance", "strict rule"), map(_accepts, ordered))
    text += _summary(ordered)
    text += _facts_head(ordered)
    text += _table(
        ("task", "items scored", "distinct", "s an item", "s a score", "no gold", "gold refused", "more"),
        map(_facts, ordered),
    )

    missing = sorted(set(existing) - set(rows))
    if missing:
        text += f"\nNot measured: {', '.join(missing)} (codeio runs generated programs: name it with `--tasks`).\n"
    return text + PROBES


def _table(head: Sequence[str], rows: Any) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(lines) + "\n"


def _accepts(row: Row) -> tuple[str, ...]:
    if not row.get("scored"):
        reason = _plain(row["failure"] or "out of time")
        return (row["task"], f"not measured: {reason}", "-", "-", rule_name(row["task"]))
    chance = f"{100 * row['chance']:.0f} %"
    if row["scored"] < FEW:
        chance = f"({row['scored']} items)"
    elif row["chance"] >= CHANCE:
        chance = f"**{chance}** ({_code(row['chance_answer'])})"
    return (row["task"], _shares(row, 1), _shares(row, 2), chance, rule_name(row["task"]))


def _shares(row: Row, column: int) -> str:
    """The wrong probes that are accepted most, with their shares."""
    shares = {probe: share for probe, share in wrongly_accepted(dict(row), column).items() if share >= LEAST_SHARE}
    shown = [f"{_plain(probe)} {100 * share:.0f} %" for probe, share in list(shares.items())[:MOST_SHOWN]]
    if len(shares) > MOST_SHOWN:
        shown.append(f"{len(shares) - MOST_SHOWN} more")
    return "; ".join(shown) or "nothing"


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def _code(text: str) -> str:
    short = text if len(text) <= 24 else text[:21] + "..."
    return f"`{_plain(short)}`"


def _summary(rows: Sequence[Row]) -> str:
    """Two sentences of figures."""
    measured = [row for row in rows if row.get("scored")]
    loose = [row for row in measured if any(share >= 0.5 for share in wrongly_accepted(dict(row), 1).values())]
    strict = [row for row in measured if any(share >= 0.5 for share in wrongly_accepted(dict(row), 2).values())]
    guessed = [row["task"] for row in measured if row["chance"] >= CHANCE and row["scored"] >= FEW]
    return (
        f"\nOf {len(measured)} tasks, {len(loose)} scorers accept some wrong probe on half of their items or more; "
        f"with the strict rules {len(strict)} do.\nOne constant solves half of the items or more of "
        f"{', '.join(guessed) or 'no task'}.\n\n"
    )


def _facts_head(rows: Sequence[Row]) -> str:
    late = [row["task"] for row in rows if row["out_of_time"]]
    return (
        "## What the items are like\n\n"
        "`distinct`: distinct questions among the items drawn. Seconds are of one core of an AMD EPYC, mean and most.\n"
        "`gold refused`: items whose own gold answer is not solved by the scorer alone / with the strict rule.\n"
        "`no row`: items that one row of an Arrow data set cannot hold as they are. `prints`: making or scoring items\n"
        f"writes to stdout.\n\nOut of time before all was measured: {', '.join(late) or 'none'}.\n\n"
    )


def _facts(row: Row) -> tuple[str, ...]:
    if not row.get("items"):
        return (row["task"], "0", *["-"] * 5, _plain(row["failure"] or "out of time"))
    gold = row.get("probes", {}).get("gold", [0, 0, 0, 0])
    more = []
    if row["prints"]:
        more.append("prints")
    if row["not_arrow"]:
        more.append(f"no row {row['not_arrow']} of {row['items']}")
    if row.get("late"):
        more.append(f"{row['late']} scores ran out of time")
    if row["failure"]:
        more.append(_plain(row["failure"]))
    if row["task"] in EXECUTES_CODE:
        more.append("executes code")
    if row["task"] in HASH_DEPENDENT:
        more.append("varies with PYTHONHASHSEED")
    if row["task"] in GLOBAL_RANDOM:
        more.append("draws from the global generator")
    return (
        row["task"],
        str(row.get("scored", 0)),
        f"{row['distinct']:,} of {row['draws']:,}" if row["draws"] else "-",
        f"{_seconds(row['s_item'])}, {_seconds(row['s_item_most'])}",
        f"{_seconds(row['s_score'])}, {_seconds(row['s_score_most'])}" if row.get("scored") else "-",
        str(row["gold_none"]),
        f"{gold[0] - gold[1]} / {gold[0] - gold[2]}" if gold[0] else "-",
        "; ".join(more),
    )


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def changes(rows: Mapping[str, Row], fresh: Mapping[str, Row], names: Sequence[str], version: str) -> list[str]:
    """What differs from the rows, one line each.

    Args:
        rows: task -> its row in the table.
        fresh: task -> its row of now, of the first items alone; tasks without one are compared by version only.
        names: the tasks that should be in the table.
        version: of reasoning_gym, as installed.
    """
    lines = [f"{name}: not in the table" for name in names if name not in rows]
    older = sorted({row["reasoning_gym"] for row in rows.values()} - {version})
    if older:
        lines.append(f"reasoning_gym {version} is installed, the table is of {', '.join(older)}: run make audit")
    for name, row in fresh.items():
        lines += _row_changes(rows[name], row)
    return lines


def _row_changes(old: Row, new: Row) -> list[str]:
    """What the first items of a task say otherwise than the table."""
    if not new.get("scored") or not old.get("scored"):
        if bool(new.get("scored")) == bool(old.get("scored")):
            return []
        return [f"{new['task']}: {new.get('scored', 0)} items could be scored, the table has {old.get('scored', 0)}"]

    # Time that ran out here or there is no change of the task.
    if min(row["judged"] for row in (new, old)) < new["asked_items"]:
        return []
    lines = []
    probes = {*old["first"], *new["first"]} - {"commonest gold"}  # which depends on how many items there are
    for probe in sorted(probes):
        before = old["first"].get(probe, [0, 0, 0, 0])
        now = new["first"].get(probe, [0, 0, 0, 0])
        if before[3] or now[3] or before[1:3] == now[1:3]:
            continue
        right = "right: " if probe in RIGHT else ""
        lines.append(
            f"{new['task']}: {right}{probe}: accepted by the scorer {now[1]} times (table: {before[1]}), solved "
            f"{now[2]} times (table: {before[2]}), of {max(now[0], before[0])}"
        )
    return lines
