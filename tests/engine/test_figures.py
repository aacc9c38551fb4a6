"""figures: the curve of a run."""

from __future__ import annotations

from engine.figures import draw_curve
from engine.logs import RunLog


def row(step: int, task: str = "chain_sum", metric: str = "solved", value: float | None = 0.5) -> dict:
    return {"step": step, "task": task, "metric": metric, "value": value, "n": 256, "ci_low": 0.4, "ci_high": 0.6,
            "bare": 0.02, "segments_used": 3.0, "elapsed_s": 1.5}


def test_the_curve_needs_something_to_draw(tmp_path):
    assert draw_curve(tmp_path) is None
    with RunLog(tmp_path, None, [], {}) as log:
        log.log(1, lr=0.1)
    assert draw_curve(tmp_path) is None and not (tmp_path / "curve.png").exists()


def test_the_curve_is_drawn_from_what_is_there(tmp_path):
    with RunLog(tmp_path, tmp_path / "elsewhere.csv", [], {}) as log:
        for step in range(1, 40):
            log.log(step, loss=float("nan") if step == 5 else 1 / step)
        only_loss = draw_curve(tmp_path)
        assert only_loss is not None
        before = only_loss.read_bytes()
        log.eval_rows([row(0, value=0.1), row(20, value=0.7), row(20, task="b", value=0.2), row(20, metric="mean")])
    after = draw_curve(tmp_path, tmp_path / "elsewhere.csv")
    assert after == tmp_path / "curve.png" and after.read_bytes()[:4] == b"\x89PNG" and after.read_bytes() != before
    assert not list(tmp_path.glob(".tmp*"))
