"""progress: a bar on a terminal, a line now and then elsewhere, nothing from other processes."""

from __future__ import annotations

import io

from engine.progress import Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_progress_is_a_line_every_15_seconds():
    clock, stream = Clock(), io.StringIO()
    with Progress(2000, "step", "ex", stream=stream, clock=clock) as progress:
        for step in range(1, 401):
            clock.now = step * 0.18
            progress.update(step, loss=0.41199, lr=9.1e-4, rate=620.4)
        progress.say("[not markup]")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 1/2000  loss 0.412") and lines[-2] == "[not markup]"
    assert lines[-1] == "step 400/2000  loss 0.412  lr 9.1e-4  620 ex/s  1:12 elapsed, 4:48 left"
    assert len(lines) == 1 + 4 + 1 + 1  # first, at 15, 30, 45 and 60 s, what was said, the last state


def test_unknown_total_shows_no_time_left_and_a_resumed_run_counts_its_own_steps():
    clock, stream = Clock(), io.StringIO()
    with Progress(None, "step", "step", start=100, stream=stream, clock=clock) as progress:
        clock.now = 3700.0
        progress.update(470, loss=None)
    assert stream.getvalue() == "step 470  loss -  0.1 step/s  1:01:40 elapsed\n"


def test_on_a_terminal_progress_is_one_bar_with_the_same_fields():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(10, "step", "ex", stream=stream) as progress:
        progress.update(5, loss=0.5)
        progress.say("a [sample]")
        progress.update(10, loss=0.25)
    assert "step 10/10" in stream.getvalue() and "loss 0.25" in stream.getvalue()
    assert "a [sample]" in stream.getvalue()


def test_progress_of_other_ranks_is_silent():
    stream = io.StringIO()
    with Progress(10, stream=stream, enabled=False) as progress:
        progress.update(10)
        progress.say("x")
    assert stream.getvalue() == ""
