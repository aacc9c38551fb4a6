"""Kills and signals of scripts/soak.py: chains of one run that is struck, goes on, is struck again, and ends."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from typing import Any

from soak_runs import Ended, Place

MOST_IN_CHAIN = 6  # strikes of one run
SHARE = 0.6  # of the moments that the uninterrupted run has in a phase: a run that goes on has fewer left
LATEST = 0.8  # of a stay: the next one may be shorter
DELAY_S = 0.004  # most that passes after an operation on a file
# What a command that a signal has ended may return. Before training begins, SIGTERM ends it as it ends any program.
ORDERLY = {signal.SIGTERM: (143, -signal.SIGTERM), signal.SIGINT: (130,)}


def deck(phases: tuple[str, ...], draw: random.Random) -> list[str]:
    """The phases in which the run of a chain is struck, in their order: the cache is filled at the beginning alone."""
    others = [phase for phase in phases if phase not in ("fill", "start")]
    cards = [*others, *others]
    draw.shuffle(cards)
    first = [phase for phase in ("start", "fill", "fill") if phase in phases]

    return [*first, *cards][:MOST_IN_CHAIN]


def moment(phase: str, counted: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A moment of a phase, drawn from those that the uninterrupted run has."""
    operations = counted["operations"].get(phase, 0)
    stays = counted["entries"].get(phase, [])
    if phase in ("checkpoint", "records", "fill"):
        index = draw.randint(1, max(1, round(operations * (1.0 if phase == "fill" else SHARE))))
        return {"phase": phase, "index": index, "delay_s": draw.choice((0.0, draw.uniform(0, DELAY_S)))}
    if not stays:
        return {"phase": phase, "index": 1, "delay_s": 0.0}
    index = draw.randint(1, max(1, round(len(stays) * SHARE)))

    return {"phase": phase, "index": index, "delay_s": draw.uniform(0, LATEST * stays[index - 1])}


def words_of(where: dict[str, Any]) -> str:
    """A moment for people."""
    return f"{where['phase']} {where['index']} + {1000 * where['delay_s']:.1f} ms"


def trouble_of(done: Ended, number: int) -> str:
    """What is wrong with how a struck command ended; "" = nothing."""
    if "Traceback" in done.text:
        return f"a traceback: {done.last_line}"
    if number == signal.SIGKILL:
        return "" if done.status == -number else f"exit status {done.status}: {done.last_line}"
    if done.status == 0 or done.status in ORDERLY[signal.Signals(number)]:
        return ""

    return f"exit status {done.status}: {done.last_line}"


def chain(place: Place, number: int, seed: int, part: str, most: int, whole: bool = False) -> Iterator[dict[str, Any]]:
    """One run that is struck at most `most` times, and then left to end: a row for each strike that landed.

    Args:
        place: where the system runs.
        number: of the chain, from 0; with `seed` it fixes all that is drawn.
        part: kills or signals.
        whole: each command is a process of its own, which imports everything itself.
    """
    counted = place.reference()
    draw = random.Random(f"{seed}/{part}/{place.system.name}/{number}")
    place.clear()

    rows: list[dict[str, Any]] = []
    ends = False  # whether nothing is left to do
    for phase in deck(place.system.phases, draw)[:most]:
        sent = signal.SIGKILL if part == "kills" else draw.choice((signal.SIGTERM, signal.SIGINT))
        where = moment(phase, counted, draw)
        done = place.bench.run(place.argv, place.strike(kind="signal", signal=sent, **where), whole)
        if not done.facts.get("phase"):  # the run has ended before
            if done.status != 0:
                rows.append({"moment": "none", "why": f"exit status {done.status}: {done.last_line}"})
            elif not rows:  # nothing was struck yet
                place.clear()
                continue
            ends = True
            break
        rows.append({"moment": f"{sent.name} in {words_of(where)}", "why": trouble_of(done, sent),
                     "status": done.status, "cpu_s": done.cpu_s})
        if rows[-1]["why"]:
            break

    # Left alone, the run ends as if nothing had happened; where it does not, any of the strikes may be the cause.
    if not ends:
        done = place.bench.run(place.argv, place.strike(), whole)
        if done.status != 0:
            blame(rows, f"exit status {done.status} when it goes on: {done.last_line}")
    blame(rows, "; ".join(place.differences(newest_only=part == "signals")))
    for index, row in enumerate(rows):
        yield {"case": f"chain {number} strike {index + 1}", **row}


def blame(rows: list[dict[str, Any]], why: str) -> None:
    """Enters a fault into each row that has none of its own."""
    if why and not rows:
        rows.append({"moment": "none"})
    for row in rows:
        row["why"] = row.get("why") or why
