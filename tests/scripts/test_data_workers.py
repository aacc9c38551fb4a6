"""`--workers` of the data scripts: the same files for any number, and what becomes of processes that end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_scripts import call, merge, prepare, validate
from engine.worker_pool import WorkerError
from patience import HANG_S
from script_tools import file_sha256
from text_data import checking, documents, encoding, mixing
from text_data.roundtrip import ENOUGH
from text_data.trained import KeyRecord, TrainedOn

ROOT = Path(__file__).resolve().parents[2]
FILES = ["meta.json", "tokenizer.json", "train.jsonl", "val.jsonl"]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def drawn_text(documents_: int, separator: str, seed: int = 0) -> str:
    """Documents of one to four lines, with characters of one to four bytes."""
    draw = random.Random(seed)
    words = ["lobster", "crab", "été", "日本", "😀", "the", "12", "3.5", ",", "don't"]
    texts = []
    for number in range(documents_):
        lines = [" ".join(draw.choices(words, k=draw.randint(1, 30))) for _ in range(draw.randint(1, 4))]
        texts.append(f"{number} " + "\n".join(lines))
    return separator.join(texts)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """One file of every kind."""
    folder = tmp_path_factory.mktemp("source")
    contents = {
        "blank_lines.txt": "\n\n \n" + drawn_text(40, "\n\n\n \t\n") + "\n\n",
        "no_newline_at_the_end.txt": drawn_text(30, "\n\n", seed=1),
        "carriage_returns.txt": drawn_text(30, "\n\n", seed=2).replace("\n", "\r\n"),
        "mark.txt": "\ufeff" + drawn_text(10, "\n\n", seed=3),
        "articles.txt": "\n".join(f" = Title {n} = \n \n{drawn_text(1, '', seed=n)}\n \n" for n in range(20)),
        "one_long_document.txt": drawn_text(60, "\n", seed=4),
        "one_line.txt": "日本 and " * 300,
        "empty.txt": "",
        "texts.jsonl": "".join(json.dumps({"text": text}) + "\n\n" for text in drawn_text(30, "|", 5).split("|")),
        "answers.jsonl": "".join(json.dumps({"prompt": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(1000)),
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8", newline="")
    return folder


@pytest.fixture(scope="module")
def tokenizer(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    call(prepare, "--source", source, "--dest", folder, "--vocab_size", 400, "--val_ratio", 0.2)
    return folder / "tokenizer.json"


# --- prepare ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("chars", [1, 700])
def test_prepared_files_are_the_same_for_any_number_of_workers_and_any_cut(
    tmp_path, monkeypatch, source, tokenizer, workers, chars
):
    monkeypatch.setattr(documents, "MAX_CHARS", 900)  # so that long documents are read in pieces
    words = ["--source", source, "--val_ratio", 0.2, "--tokenizer", tokenizer, "--max_seq_len", 24]
    call(prepare, *words, "--dest", tmp_path / "whole")
    meta = json.loads((tmp_path / "whole" / "meta.json").read_text(encoding="utf-8"))
    assert meta["splits"]["val"]["samples"] > 10 and ENOUGH < meta["roundtrip"]["rows"] < 1100

    monkeypatch.setattr(encoding, "BATCH_CHARS", chars)
    call(prepare, *words, "--dest", tmp_path / "one")
    call(prepare, *words, "--dest", tmp_path / "several", "--workers", workers)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "several") == hashes(tmp_path / "whole")
    assert list(hashes(tmp_path / "one")) == FILES


@pytest.mark.parametrize("text", ["one document", "one document\n\nand another"])
def test_a_source_of_fewer_documents_than_workers_is_prepared(tmp_path, text):
    (tmp_path / "few.txt").write_text(text, encoding="utf-8")
    words = ["--source", tmp_path / "few.txt", "--val_ratio", 0, "--vocab_size", 300]
    call(prepare, *words, "--dest", tmp_path / "one")
    call(prepare, *words, "--dest", tmp_path / "three", "--workers", 3)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "three")


def test_a_tokenizer_is_trained_on_an_even_part_of_a_large_source(tmp_path, monkeypatch):
    texts = [f"document {number} " + "w " * number for number in range(100)]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts), encoding="utf-8")
    words = ["--source", str(tmp_path / "texts.txt"), "--dest", str(tmp_path / "dest"), "--val_ratio", "0"]
    monkeypatch.setattr(prepare, "source_megabytes", lambda files: 200)

    def read(megabytes: int) -> list[str]:
        options = prepare.parse([*words, "--tokenizer_megabytes", str(megabytes)])
        return [text.strip() for text in prepare.training_texts(options, [tmp_path / "texts.txt"], 0)]

    stripped = [text.strip() for text in texts]
    assert read(60) == stripped[::4]  # 200 MB in four parts are at most 60 MB each
    assert read(0) == read(200) == stripped


@pytest.mark.parametrize("value", ["-1", "two", "1.5"])
def test_a_bad_number_of_workers_exits_2_in_one_line(tmp_path, source, value):
    done = subprocess.run(
        [sys.executable, "scripts/prepare_language_dataset.py", "--source", str(source), "--dest",
         str(tmp_path / "dest"), "--workers", value], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 2 and "--workers" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "dest").exists() and "Traceback" not in done.stderr


def test_a_bad_source_is_told_by_any_number_of_workers(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n' * 50 + '{"text": 5}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 51: text must be text"):
        call(prepare, "--source", tmp_path / "bad.jsonl", "--dest", tmp_path / "dest", "--workers", 2,
             "--val_ratio", 0, "--vocab_size", 300)
    assert not list(tmp_path.glob("dest/*"))


# --- merge ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory, source, tokenizer) -> list[Path]:
    """Two prepared folders of one tokenizer."""
    place = tmp_path_factory.mktemp("prepared")
    words = ["--val_ratio", 0.2, "--tokenizer", tokenizer, "--max_seq_len", 24]
    call(prepare, "--source", source, "--dest", place / "all", *words)
    call(prepare, "--source", source / "answers.jsonl", "--dest", place / "answers", *words)
    return [place / "all", place / "answers"]


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("size", [1, 5000])
def test_merged_files_are_the_same_for_any_number_of_workers_and_any_cut(
    tmp_path, monkeypatch, folders, workers, size
):
    # More of each source than it has: the last epoch is cut.
    words = ["--sources", *folders, "--weights", ".7", ".3", "--train_samples", 500, "--val_samples", 130]
    call(merge, *words, "--output", tmp_path / "one")
    monkeypatch.setattr(merge, "WORTH_WORKERS", 0)
    monkeypatch.setattr(mixing, "STRETCH", size)
    call(merge, *words, "--output", tmp_path / "several", "--workers", workers)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "several")
    assert list(hashes(tmp_path / "one")) == FILES
    assert len((tmp_path / "one" / "train.jsonl").read_bytes().splitlines()) == 500


def test_a_bad_line_of_val_is_told_by_workers_as_by_one_process(tmp_path, monkeypatch, folders):
    place = tmp_path / "bad"
    place.mkdir()
    for path in folders[0].iterdir():
        (place / path.name).write_bytes(path.read_bytes().replace(b'"labels"', b'"label_"') if path.name == "val.jsonl"
                                        else path.read_bytes())
    monkeypatch.setattr(merge, "WORTH_WORKERS", 0)
    told = []
    for workers in (1, 2):
        with pytest.raises(ValueError, match="a val line of a source is bad .has no labels.: find it with") as error:
            call(merge, "--sources", place, "--weights", 1, "--train_samples", 50, "--val_samples", 20, "--output",
                 tmp_path / "out", "--workers", workers)
        told.append(str(error.value))
        assert not list((tmp_path / "out").iterdir())
    assert told[0] == told[1] and "\n" not in told[0]


def test_workers_meet_a_full_disk_in_one_line(tmp_path, monkeypatch, folders):
    import resource

    monkeypatch.setattr(merge, "WORTH_WORKERS", 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            call(merge, "--sources", *folders, "--weights", 1, 1, "--train_samples", 5000, "--val_samples", 20,
                 "--output", tmp_path / "out", "--workers", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ".tmp-train.jsonl" in error.value.filename and not list((tmp_path / "out").iterdir())


def test_merge_refuses_a_bad_number_of_workers(tmp_path, folders):
    with pytest.raises(ValueError, match="^--workers -2 must be at least 0"):
        call(merge, "--sources", folders[0], "--weights", 1, "--train_samples", 5, "--val_samples", 0, "--output",
             tmp_path / "out", "--workers", -2)


# --- validate ---------------------------------------------------------------------------------------------------------


@given(lines=st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b"")), max_size=8),
       ends=st.booleans(), size=st.integers(1, 12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranges_of_any_size_hold_each_line_once(tmp_path, lines, ends, size):
    content = b"\n".join(lines) + b"\n" * ends
    path = tmp_path / "lines"
    path.write_bytes(content)
    before, checking.RANGE = checking.RANGE, size
    try:
        parts = list(checking.ranges(path, len(content)))
    finally:
        checking.RANGE = before
    found = [line for part in parts for line in checking.lines_of(part)]
    assert found == (content.removesuffix(b"\n").split(b"\n") if content else [])


@pytest.mark.parametrize("workers", [2, 3])
def test_the_same_is_said_by_any_number_of_workers_and_ranges(tmp_path, monkeypatch, folders, capsys, workers):
    def said(folder: Path, count: int) -> str:
        try:
            call(validate, folder, "--workers", count)
        except ValueError as error:
            return str(error)
        return capsys.readouterr().out

    place = tmp_path / "bad"
    place.mkdir()
    for path in folders[0].iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    rows = (place / "train.jsonl").read_bytes().splitlines(keepends=True)
    for number in range(3, 60, 4):
        rows[number] = b"{}\n"
    (place / "train.jsonl").write_bytes(b"".join(rows) + (folders[0] / "val.jsonl").read_bytes()[:-1])

    whole = [said(folder, 1) for folder in (folders[0], place)]
    assert "every line is good" in whole[0] and "15 bad lines in all, the first 10 are named" in whole[1]
    assert "train.jsonl line 4: has no encoder_ids" in whole[1]
    monkeypatch.setattr(checking, "RANGE", 700)
    assert [said(folder, workers) for folder in (folders[0], place)] == whole
    with pytest.raises(ValueError, match="--workers -1 must be at least 0"):
        call(validate, folders[0], "--workers", -1)


# --- processes that end -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A text that takes a while."""
    path = tmp_path_factory.mktemp("large") / "large.txt"
    path.write_text("\n\n".join(f"document {i} " + drawn_text(3, " ", i) for i in range(30_000)), encoding="utf-8")
    return path


def begun(dest: Path, large: Path, tokenizer: Path) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """A command with two workers that has written its first lines, and these workers."""
    running = subprocess.Popen(
        [sys.executable, "scripts/prepare_language_dataset.py", "--source", str(large), "--dest", str(dest),
         "--tokenizer", str(tokenizer), "--workers", "2", "--tokenizer_batch_size", "50"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a test in the background would ignore it
    deadline = time.monotonic() + HANG_S
    while not any(path.stat().st_size for path in dest.glob(".tmp-train.jsonl-*")):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = psutil.Process(running.pid).children()
    assert len(workers) == 2
    return running, workers


def have_ended(workers: list[psutil.Process]) -> bool:
    gone, alive = psutil.wait_procs(workers, timeout=60)
    return not alive


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("whole_group", [False, True])
def test_a_signal_leaves_no_worker_and_no_file(tmp_path, large, tokenizer, sent, status, whole_group):
    running, workers = begun(tmp_path / "dest", large, tokenizer)
    if whole_group:  # as a terminal does with Ctrl-C
        os.killpg(running.pid, sent)
    else:
        running.send_signal(sent)
    _, said = running.communicate(timeout=HANG_S)
    assert running.returncode == status and said.splitlines()[-1].endswith("run it again") and "Traceback" not in said
    assert have_ended(workers) and not list((tmp_path / "dest").iterdir())


def test_workers_of_a_killed_command_end_and_leave_no_final_file(tmp_path, large, tokenizer):
    running, workers = begun(tmp_path / "dest", large, tokenizer)
    running.kill()
    running.communicate()
    assert have_ended(workers) and all(path.name.startswith(".tmp-") for path in (tmp_path / "dest").iterdir())


def test_a_killed_worker_ends_the_command_in_one_line(tmp_path, large, tokenizer):
    running, workers = begun(tmp_path / "dest", large, tokenizer)
    workers[0].kill()
    _, said = running.communicate(timeout=HANG_S)
    last = said.splitlines()[-1]
    assert running.returncode == 2 and "Traceback" not in said
    assert f"(process {workers[0].pid}) was ended by SIGKILL" in last and "fewer --workers" in last
    assert have_ended(workers) and not list((tmp_path / "dest").iterdir())
    assert issubclass(WorkerError, ValueError)


# --- memory -----------------------------------------------------------------------------------------------------------


MEASURED = """
import resource, sys
sys.path[:0] = sys.argv[1:3]
import {script}
{script}.main(sys.argv[3:])
peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print("PEAKS", *peaks)
"""


def peak_megabytes(name: str, *words) -> float:
    """The largest resident size of the command, or of one of its workers."""
    done = subprocess.run([sys.executable, "-c", MEASURED.format(script=name), str(ROOT), str(ROOT / "scripts"),
                           *map(str, words)], capture_output=True, text=True, timeout=HANG_S, check=True)
    return max(map(int, done.stdout.split("PEAKS")[1].split())) / 1024


def grown(path: Path, megabytes: float) -> Path:
    """A text of about that size whose documents, and numbers in them, differ."""
    draw = random.Random(0)

    def lines() -> Iterator[str]:
        text = drawn_text(200, "\n\n")
        for number in range(int(megabytes * 1e6 / len(text.encode()))):
            yield text.replace("12", str(draw.randrange(10**6))) + f" {number}\n\n"

    with open(path, "w", encoding="utf-8") as file:
        file.writelines(lines())
    return path


@pytest.mark.slow
def test_memory_stays_flat_as_the_text_grows(tmp_path, tokenizer):
    peaks = []
    for megabytes in (10, 30):
        text = grown(tmp_path / f"{megabytes}.txt", megabytes)
        peaks.append(peak_megabytes("prepare_language_dataset", "--source", text, "--dest", tmp_path / str(megabytes),
                                    "--tokenizer", tokenizer, "--workers", 2))
    assert peaks[1] <= peaks[0] + 12


@pytest.mark.parametrize("most", [3, 100])
def test_keys_that_come_in_parts_are_recorded_as_a_set_would_be(monkeypatch, most):
    import numpy as np

    from text_data import trained

    monkeypatch.setattr(trained, "MOST", most)
    draw = random.Random(0)
    keys = [draw.randrange(1 << 64) for _ in range(40)]
    record = KeyRecord()
    for start in range(0, 40, 7):
        record.add(np.array(keys[start : start + 7] + keys[:2], np.uint64))
    assert record.record() == TrainedOn(keys).record()
    assert (record.record() is None) == (most == 3)
    assert KeyRecord().record() == TrainedOn().record() == ""
