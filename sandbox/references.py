"""Checks that the programs which data sets give as right pass the tests they come with."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from sandbox.runner import CodeJob, CodeResult, confinement, run_many

LISTED = 5  # rows that a message names
SURE = ("failed", "error", "syntax")  # a slow or small machine may bring about the other endings


def failing_references(jobs: Mapping[str, CodeJob]) -> str | None:
    """None where all programs pass, else what is wrong, in one line that names the rows.

    Nothing is run on a machine that cannot confine code, and no time or memory limit counts as a failure.

    Args:
        jobs: where a row stands -> its program with its tests; a row without a program is left out.
    """
    distinct = tuple(dict.fromkeys(job for job in jobs.values() if job.code.strip()))
    if not distinct or confinement() is not None:
        return None
    results = dict(zip(distinct, _results(distinct), strict=True))

    wrong = []
    for place, job in jobs.items():
        result = results.get(job)
        if result is not None and result.status in SURE:
            wrong.append(f"{place} ({_reason(result)})")
    if not wrong:
        return None

    more = f" and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
    return f"the reference code fails its own tests at {', '.join(wrong[:LISTED])}{more}: correct it or take it out"


@functools.lru_cache
def _results(jobs: tuple[CodeJob, ...]) -> list[CodeResult]:
    """A file is read more than once in a run, and its programs stay the same."""
    return run_many(jobs)


def _reason(result: CodeResult) -> str:
    """The last line that tells why a run has not passed."""
    lines = result.output.splitlines()
    return lines[-1][:100] if lines else result.status
