"""page: a run as one HTML file, whatever its texts hold and whatever its version has recorded."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from engine import page
from engine.logs import RunLog
from engine.page import page_of_run, write_page
from engine.report import metric_row, prediction_line, stamped
from engine.run_records import read_run

HOSTILE = "<script>alert('1')</script> & \"a\" </td> {{ 7 * 7 }} $x$"
TASK = "a<b>_$c$"


class Seen(HTMLParser):
    """What a browser would find: tags, attributes, texts, and the cells of each table by its id."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.tables: dict[str, list[list[str]]] = {}
        self._rows: list[list[str]] | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        named = dict(attributes)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag == "table":
            self._rows = self.tables.setdefault(named.get("id") or named["class"], [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag):
        if tag == "table":
            self._rows = None

    def handle_data(self, data):
        self.text += data
        if self._rows and self._rows[-1] and data.strip():
            self._rows[-1][-1] += data


def seen(path: Path) -> Seen:
    return Seen(path.read_text(encoding="utf-8"))


def answered(index: int, score: float, bare_score: float | None, **more) -> dict:
    return prediction_line(TASK, index, f"{HOSTILE} {index}", f"said {index}", score, f"gold {index}",
                           bare_score=bare_score, bare_prediction=f"bare {index}", segments_used=index % 2 + 1,
                           finished=True, answer=f"said {index}", **more)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of two evaluations, of which the second solves 2 of 4 items and the bare LLM 1."""
    folder = tmp_path / "a <run>"
    with RunLog(folder, None, [], {}) as log:
        for step in range(1, 5):
            log.log(step, loss=1 / step, segments=step, gate_mean=0.5, gate_min=0.1, gate_max=0.9)
        old = [answered(index, 0.0, 1.0) for index in range(4)]
        log.predictions(stamped(old, 2))
        scores = ((1.0, 1.0), (1.0, 0.0), (0.01, 0.0), (1.0, None))
        new = [answered(index, *pair) for index, pair in enumerate(scores)]
        new[3] |= {"refused": True, "bare_score": 1.0}
        log.predictions(stamped(new, 4))
        for step, solved in ((2, 0.0), (4, 0.5)):
            log.eval_rows(stamped([
                metric_row(TASK, "solved", solved, 4, interval=(0.15, 0.85), bare=0.25, segments_used=1.5),
                metric_row(TASK, "solved_strict", solved, 4, interval=(0.15, 0.85), bare=0.25),
                metric_row(TASK, "solved_extracted", 0.75, 4, interval=(0.3, 0.95), bare=0.5),
                metric_row(TASK, "truncated", 0.25, 4, bare=0.5),
                metric_row(TASK, "gain", solved - 0.5, 4, bare=0.5),
            ], step, 60.0))
    return folder


def test_a_page_shows_the_newest_evaluation_beside_the_bare_llm(run):
    tables = seen(write_page(run)).tables
    (bare, ours) = tables["tasks"][1:]
    assert bare[:4] == [TASK, "4", "bare LLM", "25.0 % [4.6, 69.9]"]
    assert bare[5:7] == ["50.0 % [15.0, 85.0]", "2"]
    assert ours[:4] == ["", "4", "LLM + HRM", "50.0 % [15.0, 85.0]"] and ours[5] == "75.0 % [30.0, 95.0]"
    assert ours[7] == "+0.0 over the best of them"
    assert tables["paired"][1] == [TASK, "1", "1", "1", "1"], "a refused answer of full score is wrong"
    assert tables["segments"][1:] == [["1", "2", "50.0 %", ""], ["2", "2", "50.0 %", ""]]


def test_samples_are_right_wrong_and_changed(run):
    page = seen(write_page(run))
    headings = ("Right, where the bare LLM was wrong (1)", "Wrong, where the bare LLM was right (1)", "Right (1)",
                "Wrong (1)")
    assert [page.text.count(heading) for heading in headings] == [1] * 4
    rows = [row for row in page.tables["samples"] if row[0] != "item"]
    shown = [[f"{HOSTILE} {i}", f"gold {i}", f"said {i}", f"bare {i}"] for i in (1, 3, 0, 2)]
    assert [row[1:] for row in rows] == shown
    few = seen(write_page(run, most=0))
    assert "Right (1, 0 shown)" in few.text


def test_no_text_of_a_run_is_markup_and_nothing_is_loaded(run):
    path = write_page(run)
    page = seen(path)
    assert not {"script", "link", "img", "iframe", "b"} & set(page.tags) and "svg" in page.tags
    assert all(link.startswith("#") for link in page.links), "marks inside the curves alone"
    assert HOSTILE in page.text and TASK in page.text and "a <run>" in page.text
    assert page.text.count("gate_mean") == 1, "the curve of the gate has its legend"
    assert path == run / "report.html" and not list(run.glob(".tmp*"))


def test_records_of_an_earlier_version_have_a_page(run):
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        for name in ("question", "gold", "answer", "bare_prediction"):
            del line[name]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"torn": '
    (run / "predictions.jsonl").write_text(text, encoding="utf-8")
    page = seen(write_page(run))
    assert page.tables["samples"][1][1] == "not recorded" and page.tables["paired"][1][1:] == ["1", "1", "1", "1"]


@pytest.mark.parametrize("kept", ["metrics.jsonl", "eval.csv"])
def test_a_run_that_stopped_early_has_a_page_of_what_there_is(run, kept):
    for path in run.iterdir():
        if path.name != kept:
            path.unlink()
    page = seen(write_page(run))
    assert "svg" in page.tags and ("tasks" in page.tables) == (kept == "eval.csv") and "samples" not in page.tables


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no run: it holds no config.resolved.yaml"):
        read_run(tmp_path)


def test_rows_of_other_runs_in_a_shared_table_are_left_out(run):
    table = run / "eval.csv"
    other = table.read_text(encoding="utf-8").splitlines()[-5].rsplit(",", 1)[0] + ",another"
    with open(table, "a", encoding="utf-8") as file:
        file.write(other.replace("4,", "9,", 1) + "\n")
    assert read_run(run).step == 4


def test_what_goes_wrong_with_a_page_is_a_warning(run, monkeypatch, capsys):
    monkeypatch.setattr(page, "page", lambda *anything: 1 / 0)
    assert page_of_run(run) is None
    assert capsys.readouterr().err == "WARNING: the page of the run could not be written: division by zero\n"


@pytest.mark.slow
def test_a_browser_shows_the_page(run, tmp_path):
    """Chromium builds the page without an error and lays the curves out."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    path = write_page(run, to=tmp_path / "page.html")
    look = path.read_text(encoding="utf-8").replace("</body>", """<script>
        const box = document.querySelector("#curves svg").getBoundingClientRect();
        const rows = document.querySelectorAll("#tasks tr").length;
        const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
        document.title = [box.width > 300, box.height > 150, rows, wide <= 0, document.scripts.length].join(" ");
    </script></body>""")
    path.write_text(look, encoding="utf-8")
    shot = tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,2000",
             f"--user-data-dir={tmp_path / 'profile'}"]
    for more in (["--dump-dom"], [f"--screenshot={shot}"]):
        done = subprocess.run([browser, *flags, *more, path.as_uri()], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        if more == ["--dump-dom"]:
            assert "<title>true true 3 true 1</title>" in done.stdout
    assert shot.read_bytes()[:4] == b"\x89PNG" and shot.stat().st_size > 20_000
