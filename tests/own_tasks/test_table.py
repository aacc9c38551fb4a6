"""Rows of own data: every format, what is named as unusable, duplicates, chats."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from own_tasks.source import Source, fingerprint, source_of
from own_tasks.table import SHOWN, OwnDataConfig, table_of
from text_data.row_fields import chat_texts

ROWS = [{"question": "What is 7 + 1?", "answer": "08"}, {"question": "Say, \"NA\"", "answer": "NA"},
        {"question": "two\nlines", "answer": "x, y"}]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def table(path, flag="--data", **config):
    return table_of(source_of(str(path), flag), OwnDataConfig(data=str(path), **config))


def pairs(path, **config):
    return [(item.question, item.answer) for item in table(path, **config).items]


def write(path, rows):
    """The rows in the format that the name ends in."""
    if path.suffix in (".csv", ".tsv"):
        frame = pa.Table.from_pylist(rows).to_pandas()
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        write_jsonl(path, rows)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    assert pairs(path) == [(row["question"], row["answer"]) for row in ROWS]
    assert fingerprint(source_of(str(path), "--data")) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert source_of(str(path), "--data").name == "a"


def test_a_folder_is_read_by_its_splits(tmp_path):
    write(tmp_path / "train.parquet", ROWS)
    write(tmp_path / "test.parquet", ROWS[:1])
    assert len(table(tmp_path).items) == 3
    assert len(table(f"{tmp_path}:test").items) == 1
    with pytest.raises(ValueError, match="there is no split dev: choose from train, test"):
        table(f"{tmp_path}:dev")


def test_what_save_to_disk_wrote_is_read(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS[:2])}).save_to_disk(tmp_path / "two")
    assert len(table(tmp_path / "one").items) == 3
    assert len(table(tmp_path / "two").items) == 2


def test_rows_that_name_splits_are_not_mixed_unasked(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{**row, "split": "train"} for row in ROWS[:2]]
                       + [{**ROWS[2], "split": "test"}])
    with pytest.raises(ValueError, match=r"rows of the splits test \(1\), train \(2\) are mixed"):
        table(path)
    assert len(table(f"{path}:test").items) == 1
    with pytest.raises(ValueError, match="the rows name no split: leave :test out"):
        table(f"{write_jsonl(tmp_path / 'b.jsonl', ROWS)}:test")


def test_rows_that_cannot_be_used_are_named_and_then_counted(tmp_path):
    bad = ['{"question": "q"', "[1]", '{"question": "", "answer": 1}', '{"question": "q"}',
           '{"question": "q", "answer": null}', '{"question": "q", "answer": {"a": 1}}',
           '{"question": "q", "answer": " "}']
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps(ROWS[0]), *bad, json.dumps(ROWS[1])]) + "\n", encoding="utf-8")
    read = table(path)
    assert len(read.items) == 2 and read.read == 9
    notes = read.notes()
    assert notes[0].startswith("WARNING: a.jsonl line 2 is not JSON")
    assert notes[1] == "WARNING: a.jsonl line 3 is no object with fields, but list: left out"
    assert notes[2] == "WARNING: a.jsonl line 4 has no question: left out"
    assert notes[3] == "WARNING: a.jsonl line 5 has no field answer: left out"
    assert len(notes) == SHOWN + 1
    assert notes[-1] == f"WARNING: a.jsonl: {len(bad) - SHOWN} further rows cannot be used and are left out"


def test_rows_of_a_csv_file_are_counted_behind_its_header(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('question,answer\n"a\nb",1\nc,\n', encoding="utf-8")
    assert table(path).notes() == ["WARNING: a.csv row 2 has no answer: left out"]


def test_a_csv_row_of_too_many_cells_is_no_shifted_row(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question,answer\nHow, much?,1\nWhat, else?,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="a row has more cells than the header has names"):
        table(path)


def test_repeated_questions_count_once_and_are_told(tmp_path):
    rows = [ROWS[0], {"question": " what is 7 +  1? ", "answer": "08"}, {"question": "WHAT is 7 + 1?", "answer": "9"}]
    read = table(write_jsonl(tmp_path / "a.jsonl", rows))
    assert [item.answer for item in read.items] == ["08"]
    assert read.notes() == ["WARNING: a.jsonl: 2 of 3 rows repeat a question and are left out; 1 of them have another "
                            "answer than the first, which counts"]


@pytest.mark.parametrize(("text", "told"), [
    ("", "holds no rows: give a file with one question a row"),
    ("\n\n", "holds no rows"),
    ('{"prompt": "a", "response": "b"}\n', "no row has the field question: name one of prompt, response with --ques"),
    ('{"question": "a", "reply": "b"}\n', "has the field answer: name one of question, reply with --answer_field"),
    ('{"question": "a", "answer": "b"}\n{"question": "c", "answer": ""}\n', "none of its 2 rows can be used; the "
     "first: line 1 has an answer that holds no number that is the answer: 'b'"),
    ("[\n{\n", "is not JSON"),
])
def test_a_file_of_no_use_is_one_line(tmp_path, text, told):
    path = tmp_path / "a.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        table(path, verifier="number")
    assert told in str(error.value) and str(error.value).startswith("--data a.jsonl") and "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "content", "told"), [
    ("a.csv", b"", "holds no rows"),
    ("a.csv", b"question,answer\n", "holds no rows"),
    ("a.csv", "question,answer\ncaf\xe9,1\n".encode("latin-1"), "): save it as UTF-8"),
    ("a.csv", "question,answer\ncaf\xe9,1\n".encode("utf-16"), "is no UTF-8 text ("),
    ("a.csv", "question,answer\ncaf\xe9,1\n".encode("utf-16-le"), "is no UTF-8 text ("),
    ("a.tsv", "question\tanswer\ncaf\xe9\t1\n".encode("latin-1"), "is no UTF-8 text ("),
    ("a.jsonl", '{"question": "caf\xe9", "answer": "1"}\n'.encode("latin-1"), "save it as UTF-8"),
    ("a.parquet", b"nonsense", "cannot be read"),
    ("a.txt", b"x", "a .txt file cannot be read: expected a .jsonl"),
])
def test_a_broken_file_is_one_line(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        table(tmp_path / name)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "told"), [
    ("nowhere.jsonl", "--data nowhere.jsonl: there is no such file"),
    ("a/b/c/d", "there is no such file"),
    ("no/such_data", "is no file here, and as a data set of the hub it cannot be read"),
])
def test_data_that_are_not_there_are_one_line(text, told):
    with pytest.raises(ValueError, match=told):
        table(text)


def test_a_data_set_of_the_hub_is_read(tmp_path, monkeypatch):
    """A folder stands in for the hub: the library is called alike for both, and keeps what it reads."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "sums").mkdir()
    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
        write_jsonl(tmp_path / "sums" / f"{split}.jsonl", rows)
    hub = Source("--data", str(tmp_path / "sums"), "hub")
    read = table_of(hub, OwnDataConfig())
    assert [item.question for item in read.items] == [row["question"] for row in ROWS] and len(read.digest) == 64
    assert len(table_of(dataclasses.replace(hub, split="test"), OwnDataConfig()).items) == 1
    assert any((tmp_path / "cache").rglob("*.arrow")), "kept for the next run"
    with pytest.raises(ValueError, match=r"there is no split dev: choose from train, test \(--data NAME:SPLIT\)"):
        table_of(dataclasses.replace(hub, split="dev"), OwnDataConfig())


def test_a_changed_file_is_read_again(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    assert len(table(path).items) == 1
    write_jsonl(path, ROWS)
    assert len(table(path).items) == 3


@pytest.mark.parametrize(("turns", "question", "answer"), [
    ([("user", "Hi?"), ("assistant", "Ho")], "Hi?", "Ho"),
    ([("system", "Be brief."), ("user", "Hi?"), ("assistant", "Ho")], "Be brief.\n\nHi?", "Ho"),
    ([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")], "user: a\n\nassistant: b\n\nuser: c", "d"),
    ([("human", "Hi?"), ("gpt", "Ho"), ("human", "Bye")], "Hi?", "Ho"),
])
def test_the_last_assistant_turn_is_the_answer(tmp_path, turns, question, answer):
    chat = [{"role": role, "content": text} for role, text in turns]
    assert chat_texts(chat, "messages") == chat_texts(json.dumps(chat), "messages") == (question, answer)
    other = [{"from": role, "value": text} for role, text in turns]
    path = write(tmp_path / "a.parquet", [{"conversations": other}])
    assert pairs(path, messages_field="conversations") == [(question, answer)]


ANSWER = {"role": "assistant", "content": "x"}


@pytest.mark.parametrize("chat", ["Hi", 3, [], [ANSWER], [{"role": "user", "content": "x"}], ["x"],
                                  [{"role": "user", "content": {"image": 1}}, ANSWER]])
def test_a_chat_without_an_answer_is_refused(chat):
    with pytest.raises(ValueError, match="^has (no chat|a chat .*|a part) in its field messages"):
        chat_texts(chat, "messages")
