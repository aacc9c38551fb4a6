"""trackers: told when missing, fed with numbers, opened late and closed."""

from __future__ import annotations

import sys

import pytest

from engine import trackers
from engine.logs import RunLog


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name, hint", [("wandb", "pip install wandb"), ("trackio", "pip install trackio"),
                                        ("tensorboard", "pip install tensorboard"), ("mlflow", "unknown tracker")])
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
