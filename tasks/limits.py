"""How strictly a task's answers are judged, and how long its own code may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class JudgeConfig:
    """What holds for making items and scoring answers; each field is a flag.

    The limits are seconds of wall-clock time that one call of a task's own code may take, 0 = no limit.

    draw_timeout_s: making an item; one that takes longer is passed over.
    score_timeout_s: scoring an answer; one that takes longer is wrong.
    verifier_strict: answers must pass the strict rule of the task too, and items whose gold answer fails are left out.
    """

    draw_timeout_s: float = 60.0
    score_timeout_s: float = 10.0
    verifier_strict: bool = True


USUAL = JudgeConfig()  # where nobody set others
