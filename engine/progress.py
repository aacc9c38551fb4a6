"""How far a loop has come, on stderr."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from engine.records import plain


def number_text(value: Any) -> str:
    """A number for people: 0.412, 9.1e-4, 1234; `-` for none. Text stays as it is."""
    if not isinstance(value, float):
        value = plain(value)
    if value is None:
        return "-"
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)

    # Three digits; beyond four places in front or two behind the point, as a power of ten.
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    if 1000 <= abs(value) < 1e6:
        return f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def clock_text(seconds: float) -> str:
    """Minutes and seconds, `4:40`, and hours where there are any, `1:01:40`."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minute:02}:{second:02}"
    return f"{minute}:{second:02}"


class Progress:
    """Progress of a loop on stderr: a bar on a terminal, a line every `interval` seconds elsewhere.

    Args:
        total: steps in all; None = unknown.
        label: what a step is called.
        unit: what is counted per second.
        start: the step that a resumed run begins at.
        interval: seconds between two lines.
        stream: where to write; None = stderr.
        enabled: False writes nothing, for all processes but one.
        clock: seconds, rising.
    """

    def __init__(
        self,
        total: int | None,
        label: str = "step",
        unit: str = "step",
        *,
        start: int = 0,
        interval: float = 15.0,
        stream: TextIO | None = None,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.label = label
        self.unit = unit
        self.start = start
        self.interval = interval
        self.stream = stream or sys.stderr
        self.enabled = enabled
        self.clock = clock

        # What the last `update` said, and when and with what the last line was printed.
        self._step = start
        self._fields: dict[str, Any] = {}
        self._bar: Any = None
        self._printed: int | None = None  # a step
        self._begun = clock()
        self._shown = self._begun

    def __enter__(self) -> Progress:
        self._begun = self.clock()
        self._shown = self._begun
        if self.enabled and self.stream.isatty():
            self._start_bar()
        return self

    def _start_bar(self) -> None:
        # Imported here: a loop without a terminal needs no bar.
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        text = TextColumn("{task.description}", markup=False)
        # Our own line is the only text, so that a bar and a line read alike; brackets in it are no markup.
        self._bar = RichProgress(BarColumn(bar_width=24), text, console=Console(file=self.stream), transient=False)
        self._task = self._bar.add_task(self.line(), total=self.total, completed=self.start)
        self._bar.start()

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._step, description=self.line())
            self._bar.stop()
        elif self.enabled and self._step != self._printed and self._step != self.start:
            self._print()

    def line(self) -> str:
        """`step 400/2000  loss 0.412  lr 9.1e-4  620 ex/s  1:12 elapsed, 4:40 left`"""
        elapsed = self.clock() - self._begun
        done = self._step - self.start
        total = "" if self.total is None else f"/{self.total}"
        parts = [f"{self.label} {self._step}{total}"]

        # The fields of the last update; one that is called `rate` stands for the steps per second counted here.
        fields = dict(self._fields)
        counted = done / elapsed if elapsed > 0 and done else None
        rate = fields.pop("rate", counted)
        parts += [f"{name} {number_text(value)}" for name, value in fields.items()]
        if rate is not None:
            parts.append(f"{number_text(float(rate))} {self.unit}/s")

        # At the speed so far.
        time_text = f"{clock_text(elapsed)} elapsed"
        if self.total is not None and done:
            left = max(0.0, (self.total - self._step) * elapsed / done)
            time_text += f", {clock_text(left)} left"

        return "  ".join([*parts, time_text])

    def update(self, step: int, **fields: Any) -> None:
        """`step` steps are done in all; call it each step.

        `fields` are shown beside it, strings as they are. The field `rate` (units per second) replaces the steps per
        second counted here.
        """
        self._step = step
        self._fields = fields
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=self.line())
        elif self.enabled and (self._printed is None or self.clock() - self._shown >= self.interval):
            self._print()

    def say(self, text: str) -> None:
        """Prints `text` above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self.enabled:
            print(text, file=self.stream, flush=True)

    def _print(self) -> None:
        print(self.line(), file=self.stream, flush=True)
        self._shown = self.clock()
        self._printed = self._step


class Speed:
    """Items and tokens a second since training began in this process."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._examples = 0.0
        self._tokens = 0.0

    def update(self, examples: float, tokens: float) -> dict[str, float]:
        """The rates after a batch of so many examples and tokens; no rate of tokens where none were counted."""
        self._examples += examples
        self._tokens += tokens
        seconds = time.monotonic() - self._began
        rates = {"examples_per_second": self._examples / seconds}
        if self._tokens:
            rates["tokens_per_second"] = self._tokens / seconds
        return rates
