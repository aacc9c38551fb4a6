"""trackers: told when missing, fed with numbers, opened late and closed."""

from __future__ import annotations

import sys

import pytest
from accelerate import PartialState

from engine import trackers
from engine.logs import RunLog
from engine.report import metric_row, prediction_line, stamped

TASK = "mine+x"
HOSTILE = "a | b <script> *c*\nd"


@pytest.fixture(autouse=True)
def started_process():
    """accelerate's state of the process, which every run has from `start_machine` before its trackers open."""
    PartialState(cpu=True)


def evaluate(log: RunLog, step: int, count: int = 30) -> None:
    """Records an evaluation of two tasks with `count` answers each."""
    rows = [metric_row(task, "solved", 0.5, count, interval=(0.4, 0.6), bare=0.1) for task in (TASK, "other")]
    lines = []
    for task in (TASK, "other"):
        for index in range(count):
            lines.append(prediction_line(task, index, f"{HOSTILE} {index}", f"said {index}", float(index % 2),
                                         f"gold {index}", bare_score=0.0, bare_prediction="bare"))
    log.evaluation(step, stamped(rows, step, 1.0), stamped(lines, step))


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name, hint", [("wandb", "pip install wandb"), ("trackio", "pip install trackio"),
                                        ("tensorboard", "pip install tensorboard"), ("mlflow", "pip install mlflow"),
                                        ("comet_ml", "pip install comet-ml"), ("swanlab", "pip install swanlab"),
                                        ("aim", "pip install aim"), ("clearml", "unknown tracker")])
def test_a_missing_tracker_is_told_before_anything_is_written(tmp_path, monkeypatch, name, hint):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=hint) as error:
        RunLog(tmp_path / "run", None, [name], {})
    one_line(error)
    assert not (tmp_path / "run").exists()


def test_tensorboard_receives_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, None, ["tensorboard"], {"lr": 1e-3}) as log:
        log.log(5, loss=0.5, text="not a number", bad=float("nan"))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(5, 0.5)]
    assert set(events.Tags()["scalars"]) == {"loss", "elapsed_s"}


class FakeTracker:
    """Stands in for wandb and trackio: the same calls as both packages document."""

    def __init__(self) -> None:
        self.calls: list = []

    def init(self, **options) -> FakeTracker:
        self.calls.append(("init", options))
        return self

    def log(self, numbers: dict, step: int | None = None) -> None:
        self.calls.append(("log", step, numbers))

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_are_opened_fed_and_closed(tmp_path, monkeypatch, name):
    fake = FakeTracker()
    monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with RunLog(tmp_path / "mine", None, [name], {"lr": 1}) as log:
        log.log(2, loss=0.5)
    (_, options), (_, step, numbers), last = fake.calls
    assert options["name"] == "mine" and options["config"] == {"lr": 1}
    assert options.get("mode", "offline") == "offline" and step == 2 and numbers["loss"] == 0.5
    assert last == ("finish",)


def test_an_evaluation_gives_rates_intervals_and_the_bare_rate_by_name(tmp_path):
    rows = [metric_row(TASK, "solved", 0.5, 8, interval=(0.2, 0.8), bare=0.1), metric_row("b", "loss", float("nan"), 8)]
    assert trackers.evaluation_numbers(rows) == {
        "eval/mine_x/solved": 0.5, "eval/mine_x/solved_ci_low": 0.2, "eval/mine_x/solved_ci_high": 0.8,
        "eval/mine_x/solved_bare": 0.1}, "what is no number is left out, and so is a sign that a tracker refuses"


def test_the_table_has_20_answers_of_all_tasks_and_no_text_is_markup():
    lines = [prediction_line(task, index, HOSTILE, "said", 0.01, "gold", bare_score=None)
             for task in ("a", "b", "c") for index in range(30)]
    rows = trackers.answer_rows(lines)
    assert len(rows) == 20 and [row[0] for row in rows[:4]] == ["a", "b", "c", "a"]
    assert rows[0] == ["a", HOSTILE, "gold", "said", 0.01, ""]
    table = trackers.markdown(rows).split("\n")
    assert len(table) == 22 and table[2] == "| a | a \\| b \\<script\\> \\*c\\* d | gold | said | 0.01 |  |"


def test_tensorboard_receives_an_evaluation(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, None, ["tensorboard"], {"lr": 1e-3}) as log:
        log.log(5, loss=0.5)
        evaluate(log, 5)
    evaluate(log, 6)  # after the end, as the suite does: written down, and no tracker starts anew
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("eval/mine_x/solved")] == [(5, 0.5)]
    assert [e.value for e in events.Scalars("eval/other/solved_bare")] == [pytest.approx(0.1)]
    (table,) = events.Tensors("predictions/text_summary")
    assert table.step == 5 and b"said 0" in table.tensor_proto.string_val[0]


def test_an_evaluation_before_the_first_step_starts_a_tracker(tmp_path):
    pytest.importorskip("tensorboard")
    with RunLog(tmp_path, None, ["tensorboard"], {}, alone=False) as log:
        evaluate(log, 0)
    assert list((tmp_path / "tensorboard").iterdir())


def test_mlflow_receives_numbers_and_tables(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with RunLog(tmp_path / "runs" / "mine", None, ["mlflow"], {"lr": 1e-3}) as log:
        log.log(5, loss=0.5)
        evaluate(log, 5)
    (run,) = mlflow.search_runs(experiment_names=["runs"], output_format="list")
    assert run.data.metrics["eval/mine_x/solved"] == 0.5 and run.data.params["lr"] == "0.001"
    assert run.info.run_name == "mine" and run.info.status == "FINISHED"
    table = mlflow.artifacts.load_dict(run.info.artifact_uri + "/predictions/step-00000005.json")
    assert table["columns"] == list(trackers.COLUMNS) and len(table["data"]) == 20


def test_wandb_receives_numbers_and_tables_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with RunLog(tmp_path / "runs" / "mine", None, ["wandb"], {"lr": 1e-3}) as log:
        log.log(5, loss=0.5)
        evaluate(log, 5)
    written = list((tmp_path / "runs" / "mine" / "wandb").rglob("*.table.json"))
    assert len(written) == 1 and "said 0" in written[0].read_text(encoding="utf-8")


class Recorder:
    """Anything a package may offer: remembers what it is called with."""

    def __init__(self, calls: list, path: str = ""):
        self._calls = calls
        self._path = path

    def __getattr__(self, name):
        if name == "__version__":
            return "9.9"
        return Recorder(self._calls, f"{self._path}.{name}")

    def __call__(self, *values, **named):
        self._calls.append((self._path, values, named))
        return self

    def __setitem__(self, name, value):
        self._calls.append((self._path, (name, value), {}))


@pytest.mark.parametrize("name,table", [
    ("comet_ml", "log_table"), ("swanlab", "Text"), ("aim", "Text"), ("trackio", "Table")])
def test_the_others_are_called_as_their_packages_document(tmp_path, monkeypatch, name, table):
    """They are not installed here: this holds the calls, not what comes of them."""
    calls: list = []
    monkeypatch.setitem(sys.modules, name, Recorder(calls))
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: object())
    with RunLog(tmp_path / "mine", None, [name], {"lr": 1}) as log:
        log.log(2, loss=0.5)
        evaluate(log, 2)
    paths = [path.rsplit(".", 1)[-1] for path, *_ in calls]
    assert paths.count(table) == 1, "one table an evaluation"
    assert "eval/other/solved" in repr(calls) and "said 0" in repr(calls)
