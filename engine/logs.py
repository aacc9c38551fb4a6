"""What a run leaves behind (eval.csv, metrics.jsonl, predictions.jsonl, curve.png) and what the terminal shows."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from engine.figures import new_figure, save_figure
from engine.files import json_lines, staged

EVAL_HEADER = ("step", "task", "metric", "value", "n", "ci_low", "ci_high", "bare", "segments_used", "elapsed_s")
TRACKERS = ("tensorboard", "wandb", "trackio")
Tracker = tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]  # log(step, numbers), close()


def _plain(value: Any) -> Any:
    """Values JSON can hold: 0-dim tensors and numpy scalars become numbers, NaN and infinity become None."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if not isinstance(value, str | int | float | bool | None):
        value = value.item() if hasattr(value, "item") else str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> str:
    value = _plain(value)
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(str(value).split())  # a line break inside a cell would make half a row look whole


def _csv_line(values: Iterable[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([_cell(value) for value in values])
    return text.getvalue()


def _json_line(record: dict[str, Any]) -> str:
    return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n"


def _append(path: Path, text: str, sync: bool) -> None:
    """Appends `text` in one write; if the disk refuses, the file is cut back to what it was. Raises ValueError."""
    content = text.encode("utf-8", "backslashreplace")  # a model may emit half a surrogate pair
    try:
        with open(path, "ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            try:
                if file.write(content) != len(content):
                    raise OSError(None, "only a part could be written, the disk is full")
                if sync:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(start)
                raise
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}; free space or move the run") from error


def _cut_torn_line(path: Path) -> None:
    """Removes a last line without its line break: a crash wrote only its beginning."""
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _rewind(path: Path, step: int, header: int = 0) -> None:
    """Rewrites `path` atomically without the lines of later steps; the first `header` lines stay."""
    lines = _lines(path)
    kept = lines[:header] + [line for line in lines[header:] if _step(line) <= step]
    if kept == lines:
        return
    try:
        with staged(path.parent, [path.name]) as (file,):
            file.writelines(line.encode() for line in kept)
    except OSError as error:
        raise ValueError(f"cannot rewrite {path}: {error.strerror}; free some space and resume again") from error


def _lines(path: Path) -> list[str]:
    """The file's lines with their line breaks. Only newline ends a line: answers may hold U+2028 and its like."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        return list(file)


def _step(line: str) -> float:
    """The step of a CSV or JSON line; infinity if it is damaged, so that rewinding drops it."""
    try:
        return float(json.loads(line)["step"] if line.startswith("{") else line.split(",", 1)[0])
    except (ValueError, KeyError, TypeError):
        return math.inf


def check_csv(path: Path) -> None:
    """Raises ValueError if `path` is a CSV with another header, or cannot be one. Writes nothing."""
    ours = ",".join(EVAL_HEADER)
    if path.is_dir():
        raise ValueError(f"--log_csv {path} is a folder; give the path of a file, such as {path / 'eval.csv'}")
    if not path.exists():
        return
    with open(path, "rb") as file:
        first = file.readline(4096)
    found = first.decode("utf-8-sig", "replace").rstrip("\r\n")
    torn = not first.endswith(b"\n") and ours.startswith(found)  # a crash in the middle of our own header
    if found != ours and not torn:
        shown = found if len(found) <= 120 else found[:117] + "..."
        raise ValueError(f"{path} has the header {shown!r}, expected {ours!r}; give another --log_csv")


def check_trackers(trackers: Sequence[str]) -> None:
    """Raises ValueError naming the first unknown tracker, or one whose package is not installed."""
    for name in trackers:
        if name not in TRACKERS:
            raise ValueError(f"unknown tracker {name!r}, expected {', '.join(TRACKERS)}; correct --trackers")
        if name in sys.modules and sys.modules[name] is None or importlib.util.find_spec(name) is None:
            raise ValueError(f"--trackers {name} needs a package that is not installed; run: pip install {name}")


def _start_tracker(name: str, folder: Path, config: dict[str, Any], after: int | None) -> Tracker:
    """Opens one tracker; its package is imported here, so only when asked. `after` is the step resumed from."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "tensorboard", purge_step=None if after is None else after + 1)
        writer.add_text("config", f"```json\n{json.dumps(_plain(config), indent=2)}\n```")

        def log_scalars(step: int, numbers: dict[str, float]) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return log_scalars, writer.close
    project = folder.parent.name or "runs"
    if name == "wandb":
        import wandb

        # never stop a run for a login: online only where the user has arranged for it
        mode = os.environ.get("WANDB_MODE") or ("online" if "WANDB_API_KEY" in os.environ else "offline")
        run = wandb.init(project=project, name=folder.name, dir=folder, config=_plain(config), mode=mode)
        return (lambda step, numbers: run.log(numbers, step=step)), run.finish
    import trackio

    trackio.init(project=project, name=folder.name, config=_plain(config))
    return (lambda step, numbers: trackio.log(numbers, step=step)), trackio.finish


class RunLog:
    """The records of one run. With `main=False` (other ranks) every method does nothing.

    `csv_path` None means `<folder>/eval.csv`. Everything that can be wrong is checked before anything is written.
    Raises ValueError: a CSV with another header, an unknown or missing tracker, a folder that cannot be written.
    """

    def __init__(self, folder: Path, csv_path: Path | None, trackers: Sequence[str], config: dict[str, Any],
                 main: bool = True, elapsed_offset: float = 0.0) -> None:
        self.folder, self.main, self.elapsed_offset = Path(folder), main, elapsed_offset
        self.csv_path = Path(csv_path) if csv_path else self.folder / "eval.csv"
        self.metrics_path, self.predictions_path = self.folder / "metrics.jsonl", self.folder / "predictions.jsonl"
        self._start, self._config = time.monotonic(), config
        self._waiting, self._open, self._after = list(trackers), [], None  # trackers start at the first log
        if not main:
            return
        try:
            check_csv(self.csv_path)
            check_trackers(trackers)
            self.folder.mkdir(parents=True, exist_ok=True)
            self.csv_path.parent.mkdir(parents=True, exist_ok=True)
            for path in (self.csv_path, self.metrics_path, self.predictions_path):
                _cut_torn_line(path)
        except OSError as error:
            raise ValueError(f"cannot open the logs in {self.folder}: {error.filename}: {error.strerror}; choose a "
                             "--save_dir and --log_csv that can be written") from error
        if not self.csv_path.exists() or self.csv_path.stat().st_size == 0:
            _append(self.csv_path, _csv_line(EVAL_HEADER), sync=True)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def elapsed_s(self) -> float:
        """Seconds of this run, those before a resume (`elapsed_offset`) included."""
        return self.elapsed_offset + time.monotonic() - self._start

    def log(self, step: int, **metrics: Any) -> None:
        """One line in metrics.jsonl, the numbers to the trackers as well. NaN and infinity are written as null."""
        if not self.main:
            return
        record = {"step": int(step), "elapsed_s": round(self.elapsed_s, 3), **_plain(metrics)}
        _append(self.metrics_path, _json_line(record), sync=False)
        while self._waiting:
            self._open.append(_start_tracker(self._waiting.pop(0), self.folder, self._config, self._after))
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
        for log, _ in self._open:
            log(int(step), numbers)

    def eval_rows(self, rows: list[dict[str, Any]]) -> None:
        """Appends whole rows to the CSV in one write; missing values are empty, `elapsed_s` is added."""
        if not self.main or not rows:
            return
        lines = []
        for row in rows:
            row = {"elapsed_s": self.elapsed_s, **row}
            assert set(row) <= set(EVAL_HEADER), f"no such column: {sorted(set(row) - set(EVAL_HEADER))}"
            assert "step" in row, "truncate_after needs the step of every row"
            lines.append(_csv_line(row.get(column) for column in EVAL_HEADER))
        _append(self.csv_path, "".join(lines), sync=True)

    def predictions(self, lines: list[dict[str, Any]]) -> None:
        """Appends to predictions.jsonl; every line needs its `step`, so that a resumed run can drop it."""
        if not self.main or not lines:
            return
        assert all("step" in line for line in lines), "truncate_after needs the step of every prediction"
        _append(self.predictions_path, "".join(map(_json_line, lines)), sync=True)

    def truncate_after(self, step: int, evaluate: bool = False) -> None:
        """Drops what was recorded after `step`, the step a run resumes from, so that nothing is recorded twice; the
        evaluation of `step` as well when the run goes on with it (`evaluate`)."""
        if not self.main:
            return
        self._after = step
        _rewind(self.csv_path, step - evaluate, header=1)
        _rewind(self.metrics_path, step)
        _rewind(self.predictions_path, step - evaluate)

    def close(self) -> None:
        while self._open:
            self._open.pop()[1]()


def _number(value: Any) -> str:
    """For people: 0.412, 9.1e-4, 1234."""
    value = _plain(value) if not isinstance(value, float) else value
    if value is None:
        return "-"
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    if 1000 <= abs(value) < 1e6:
        return f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Progress:
    """Progress of a loop on stderr: a bar on a terminal, a line every `interval` seconds elsewhere.

    `total` None: unknown. `start` is the step a resumed run begins at. The field `rate` (units per second) of `update`
    replaces the steps per second counted here.
    """

    def __init__(self, total: int | None, label: str = "step", unit: str = "step", *, start: int = 0,
                 interval: float = 15.0, stream: TextIO | None = None, enabled: bool = True,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.label, self.unit, self.start = total, label, unit, start
        self.interval, self.enabled, self.clock = interval, enabled, clock
        self.stream = stream or sys.stderr
        self._step, self._fields, self._bar, self._printed = start, {}, None, None
        self._begun = self._shown = clock()

    def __enter__(self) -> Progress:
        self._begun = self._shown = self.clock()
        if self.enabled and self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(BarColumn(bar_width=24), TextColumn("{task.description}", markup=False),
                                     console=Console(file=self.stream), transient=False)
            self._task = self._bar.add_task(self.line(), total=self.total, completed=self.start)
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._step, description=self.line())
            self._bar.stop()
        elif self.enabled and self._step != self._printed and self._step != self.start:
            self._print()

    def line(self) -> str:
        """`step 400/2000  loss 0.412  lr 9.1e-4  620 ex/s  1:12 elapsed, 4:40 left`"""
        elapsed, done = self.clock() - self._begun, self._step - self.start
        fields = dict(self._fields)
        rate = fields.pop("rate", done / elapsed if elapsed > 0 and done else None)
        parts = [f"{self.label} {self._step}" + (f"/{self.total}" if self.total is not None else "")]
        parts += [f"{name} {_number(value)}" for name, value in fields.items()]
        parts += [f"{_number(float(rate))} {self.unit}/s"] if rate is not None else []
        left = None if self.total is None or not done else max(0.0, (self.total - self._step) * elapsed / done)
        parts.append(f"{_clock(elapsed)} elapsed" + (f", {_clock(left)} left" if left is not None else ""))
        return "  ".join(parts)

    def update(self, step: int, **fields: Any) -> None:
        """`step` steps are done in all; `fields` are shown beside it, strings as they are. Call it each step."""
        self._step, self._fields = step, fields
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
        self._shown, self._printed = self.clock(), self._step


def _losses(folder: Path) -> list[tuple[int, float]]:
    points = []
    for _, record in json_lines(folder / "metrics.jsonl", skip_damaged=True):
        try:
            points.append((int(record["step"]), float(record["loss"])))
        except (ValueError, KeyError, TypeError):  # a line without a loss, or a loss that was not finite
            continue
    return points


def _solved(path: Path) -> dict[str, list[dict[str, float]]]:
    """Task -> its 'solved' rows, in file order; columns that are not numbers are left out."""
    tasks: dict[str, list[dict[str, float]]] = {}
    for row in csv.DictReader(_lines(path)):
        if row.get("metric") != "solved" or not row.get("value"):
            continue
        numbers = {key: float(row[key]) for key in ("step", "value", "ci_low", "ci_high", "bare") if row.get(key)}
        tasks.setdefault(row["task"], []).append(numbers)
    return tasks


def _draw_tasks(axes: Any, tasks: dict[str, list[dict[str, float]]]) -> None:
    styles, markers = ("-", "-.", ":", (0, (5, 1, 1, 1, 1, 1))), "osD^vPX*"
    for index, (task, rows) in enumerate(tasks.items()):
        tone, marker = str(0.75 * index / max(1, len(tasks))), markers[index % len(markers)]
        steps = [row["step"] for row in rows]
        axes.plot(steps, [100 * row["value"] for row in rows], color=tone, marker=marker, markersize=5,
                  linestyle=styles[index % len(styles)], label=task)
        band = [row for row in rows if {"ci_low", "ci_high"} <= set(row)]
        axes.fill_between([row["step"] for row in band], [100 * row["ci_low"] for row in band],
                          [100 * row["ci_high"] for row in band], color=tone, alpha=0.15, linewidth=0)
        bare = next((row["bare"] for row in reversed(rows) if "bare" in row), None)
        if bare is not None:
            ends = [0, max(steps) or 1]
            axes.plot(ends, [100 * bare] * 2, color=tone, linestyle="--", linewidth=1, marker=marker, markersize=5,
                      markerfacecolor="white", label=f"{task}, bare LLM")
    axes.set(title="solved, generated answers (95 % interval)", xlabel="step", ylabel="solved, %", ylim=(-2, 102))
    axes.legend(fontsize=8, framealpha=0.6)


def draw_curve(folder: Path, csv_path: Path | None = None) -> Path | None:
    """Draws loss and solved rate of a run into `<folder>/curve.png`; None when there is nothing to draw."""
    folder = Path(folder)
    losses, tasks = _losses(folder), _solved(Path(csv_path) if csv_path else folder / "eval.csv")
    if not losses and not tasks:
        return None
    figure, (left, right) = new_figure(2)
    if losses:
        steps, values = zip(*losses, strict=True)
        window = max(1, len(values) // 25)
        recent = [values[max(0, end - window): end] for end in range(1, len(values) + 1)]
        smooth = [sum(part) / len(part) for part in recent]
        left.plot(steps, values, color="0.75", linewidth=0.8, label="each logged step")
        left.plot(steps, smooth, color="0.1", linewidth=1.8, label=f"mean of {window}")
        left.set(title="training loss", xlabel="step", ylabel="loss")
        left.legend(fontsize=8)
    if tasks:
        _draw_tasks(right, tasks)
    for axes, drawn in ((left, losses), (right, tasks)):
        axes.grid(alpha=0.3)
        axes.set_visible(bool(drawn))
    save_figure(figure, [folder / "curve.png"])
    return folder / "curve.png"
