"""The data scripts, prepared folders: documents, windows, splits, exact mixing, validation, and what a crash leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_scripts import call, merge, prepare, validate
from patience import HANG_S
from text_data import documents, encoding, mixing
from text_data.batches import PreparedBatches
from text_data.documents import Document, key_of, read_documents, source_files
from text_data.roundtrip import RoundTrip
from text_data.tokenizer import byte_counter, parse_tokenizer, special_ids, train_tokenizer
from text_data.trained import TrainedOn, trained_on
from text_data.triples import PreparedData, read_meta

ROOT = Path(__file__).resolve().parent.parent.parent
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
ARTICLES = (
    "\n = Lobsters = \n \n Text of <unk> , 12 @.@ 5 kg . \n \n = = Habitat = = \n \n More text . \n\n"
    " = Crabs = \n \n Here . \n"
)


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Sixty different documents of different lengths in a text file."""
    path, words = tmp_path_factory.mktemp("texts") / "texts.txt", ["lobster", "crab", "shore", "claws", "été", "the"]
    path.write_text("\n\n".join(" ".join(f"{words[(i + j * j) % 6]} {i}" for j in range(3 + i * 7 % 90))
                                for i in range(60)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, texts) -> Path:
    dest = tmp_path_factory.mktemp("prepared") / "texts"
    call(prepare, "--source", texts, "--dest", dest, "--max-seq-len", 48, "--val-ratio", 0.2, "--vocab-size", 400,
         "--tokenizer-batch-size", 7)
    return dest


@pytest.fixture(scope="module")
def qa(tmp_path_factory, prepared) -> Path:
    rows = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(40)]
    folder = tmp_path_factory.mktemp("qa")
    source = write_lines(folder / "source" / "qa.jsonl", rows)
    call(prepare, "--source", source, "--dest", folder / "qa", "--tokenizer", prepared / "tokenizer.json",
         "--val_ratio", 0.2)
    return folder / "qa"


def tokenizer_of(folder: Path):
    return parse_tokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"), str(folder))


# --- documents --------------------------------------------------------------------------------------------------------


def read_text(folder: Path, text: str) -> list[str]:
    (folder / "file.txt").write_text(text, encoding="utf-8")
    return [document.text for document in read_documents([folder / "file.txt"])]


def test_blank_lines_part_plain_documents(tmp_path):
    assert read_text(tmp_path, "\n\none\nmore of one\n \n\t\ntwo\n\n\n") == ["one\nmore of one", "two"]


def test_wikitext_documents_are_articles(tmp_path):
    lobsters, crabs = read_text(tmp_path, ARTICLES)
    assert lobsters.startswith(" = Lobsters = \n") and lobsters.endswith("More text .")
    assert " = = Habitat = = " in lobsters
    assert crabs == " = Crabs = \n \n Here ."


def test_a_line_that_looks_like_a_title_amid_text_starts_no_article(tmp_path):
    assert len(read_text(tmp_path, " = One = \n\n text \n = 5 = \n more \n\n = 7 = \n more \n")) == 1


@SHARED
@given(parts=st.lists(st.text("ab \n", min_size=1), max_size=6), limit=st.integers(1, 9))
def test_pieces_of_long_documents_join_to_the_whole_and_share_its_key(tmp_path, parts, limit):
    text = "".join(parts)
    whole = read_text(tmp_path, text)
    before, documents.MAX_CHARS = documents.MAX_CHARS, limit
    try:
        pieces = list(read_documents([tmp_path / "file.txt"]))
    finally:
        documents.MAX_CHARS = before
    joined, keys = [""], [set()]
    for piece in pieces:
        joined[-1] += piece.text
        keys[-1].add(piece.key)
        if piece.ends:
            joined.append("")
            keys.append(set())
    squeeze = ["".join(text.split()) for text in whole]
    assert "".join("".join(text.split()) for text in joined) == "".join(squeeze)
    assert all(len(found) == 1 for found in keys[:-1])
    if limit == 9 and all(len(line) < 9 for line in text.split("\n")):
        assert ["".join(text.split()) for text in joined[:-1]] == squeeze


def test_json_lines_and_parquet_give_prompts_and_texts(tmp_path):
    import pyarrow
    import pyarrow.parquet

    write_lines(tmp_path / "a.jsonl", [{"prompt": "p", "answer": "a", "source": "s"}, {"text": "t"}])
    pyarrow.parquet.write_table(pyarrow.table({"answer": ["A", None], "prompt": ["P", "Q"], "n": [1, 2]}),
                                tmp_path / "b.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["T"]}), tmp_path / "c.parquet")
    (tmp_path / "notes.md").write_text("not read", encoding="utf-8")
    found = list(read_documents(source_files(tmp_path)))
    assert [document[:2] for document in found] == [("p", "a"), (None, "t"), ("P", "A"), ("Q", ""), (None, "T")]
    assert found[0].key == key_of(" P ")


@pytest.mark.parametrize(("name", "content", "told"), [
    ("a.jsonl", b'{"text": "t"}\n{"text"', "a.jsonl line 2:"),
    ("a.jsonl", b'{"question": "t"}\n', "a.jsonl line 1: expected prompt and answer, or text; found question"),
    ("a.jsonl", b'{"prompt": 5, "answer": "t"}\n', "a.jsonl line 1: prompt and answer must be text"),
    ("a.txt", b"caf\xe9", "a.txt is not UTF-8"),
    ("a.txt", b"x\n" * 9000 + b"caf\xe9\n" + b"y\n" * 9000, "a.txt is not UTF-8 text (line 9001: "),
    ("a.txt", b"one\n\ntwo\0\n", "a.txt is no plain text (line 3 holds a NUL"),
    ("a.jsonl", b'{"text": "t"}\n{"prompt": "Say hi \\ud83d", "answer": "hi"}\n', "a.jsonl line 2: it holds \\ud83d"),
    ("a.jsonl", b'{"text": "t"}\n{"text": "a\\u0000"}\n', "a.jsonl line 2: it holds \\u0000, a NUL character"),
    ("a.jsonl", b'{"text": null}\n', "a.jsonl line 1: text must be text, it is NoneType"),
    ("a.jsonl", b"\xef\xbb\xbf", "gives no training triple"),
    ("a.jsonl", b'{"text": "abc", "split": 1}\n{"text": "abd", "split": 2}\n', "row 2: rows of the splits 1 (1), 2"),
    ("a.jsonl", b'{"text": "t", "text": "u"}\n', "a.jsonl line 1: it holds 'text' twice"),
    ("a.jsonl", b'{"text": "t"}\n{"text": ' + b"[" * 100_000 + b"\n", "a.jsonl line 2: it is nested too deeply"),
    ("a.jsonl", b'{"text": "t"}\n{"text": "t", "n": 1' + b"0" * 5000 + b"}\n", "a.jsonl line 2: it holds a number"),
    ("a.parquet", b"PAR0", "a.parquet"),
    ("a.md", b"text", "has no file that ends in"),
])
def test_a_broken_source_is_told_in_one_line_and_leaves_nothing(tmp_path, name, content, told):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        call(prepare, "--source", tmp_path / "source", "--dest", tmp_path / "dest")
    assert told in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.glob("dest/*"))


@pytest.mark.parametrize(("columns", "told"), [
    ({"prompt": ["p", "q"], "answer": ["a", "b\0"]}, "a.parquet row 2: answer holds a NUL"),
    ({"prompt": ["p", "q"], "answer": [1, 2]}, "a.parquet row 1: prompt and answer must be text"),
    ({"text": [["a"], ["b"]]}, "a.parquet row 1: text must be text, it is list"),
    ({"texts": ["a"]}, "a.parquet: has the columns texts; expected"),
])
def test_a_broken_row_of_a_parquet_file_is_named(tmp_path, columns, told):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError) as error:
        list(read_documents([tmp_path / "a.parquet"]))
    assert told in str(error.value) and "\n" not in str(error.value) and str(error.value).count("a.parquet") == 1


# --- tokenizer --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    return parse_tokenizer(train_tokenizer(["the cat sat on 1234 mats ", "été 12"] * 5, 300).to_str(), "here")


@example(text="a text may say <|eos|> or <|pad|>")
@given(text=st.text() | st.text("the cat 0123<|eos|>\r\n"))
def test_the_trained_tokenizer_round_trips_any_text_and_counts_its_bytes(trained, text):
    ids = trained.encode(text, add_special_tokens=False).ids
    assert trained.decode(ids, skip_special_tokens=False) == text
    assert min(ids, default=3) > 2  # no special token, whatever the text says
    assert byte_counter(trained)(ids) == len(text.encode())
    parts = [byte_counter(trained)([number]) for number in ids]
    assert sum(parts) == len(text.encode())


def test_digits_are_tokens_of_their_own(trained):
    assert trained.encode("1234 12", add_special_tokens=False).tokens == ["1", "2", "3", "4", "Ġ", "1", "2"]


def test_special_tokens_of_a_foreign_tokenizer_are_found_or_asked_for(tmp_path):
    from tokenizers import Tokenizer, models

    foreign = Tokenizer(models.WordLevel({"<s>": 0, "<|end|>": 1, "a": 2}, unk_token="a"))
    with pytest.raises(ValueError) as error:
        special_ids(foreign, "here", {})
    assert len(str(error.value).splitlines()) == 2 and "--pad_token" in str(error.value)
    assert special_ids(foreign, "here", {"pad": "a", "eos": "<|end|>"}) == {"pad": 2, "bos": 0, "eos": 1}


# --- windows ----------------------------------------------------------------------------------------------------------


@given(length=st.integers(0, 700), limit=st.integers(2, 90), ends=st.booleans())
def test_windows_predict_every_token_after_the_head_once_and_never_one_the_encoder_read(length, limit, ends):
    cuts = list(encoding.windows(length, limit, ends))
    assert bool(cuts) == (length > 1)
    predicted = [place for _, start, end in cuts for place in range(start, end)]
    if cuts:
        head = cuts[0][1]
        assert 1 <= head <= min(encoding.HEAD, limit) and head <= max(length // 4, 1)
        assert predicted == list(range(head, length))
    for context, start, end in cuts:
        assert 0 <= context < start < end  # the encoder's tokens end where the decoder's begin
        assert start - context == min(start, limit)
        assert end - start + (ends and end == length) <= limit


def test_text_triples_on_disk_rebuild_each_document_once(prepared, texts):
    tokenizer, meta = tokenizer_of(prepared), read_meta(prepared)
    rows = rows_of(prepared, "train") + rows_of(prepared, "val")
    rebuilt, current = [], []
    for row in rows:
        encoder, read, said = row["encoder_ids"], row["decoder_input_ids"], row["labels"]
        assert read[0] == meta["bos_id"] and read[1:] == said[:-1]
        assert max(len(encoder), len(said)) <= meta["max_seq_len"]
        current = current or list(encoder)
        assert current[-len(encoder):] == encoder  # what the encoder reads is what came just before
        current += said
        if said[-1] == meta["eos_id"]:
            rebuilt.append(tokenizer.decode(current[:-1]))
            current = []
    assert not current
    assert sorted(rebuilt) == sorted(texts.read_text(encoding="utf-8").split("\n\n"))
    assert any(len(row["encoder_ids"]) == meta["max_seq_len"] for row in rows)


def test_meta_counts_what_was_written(prepared, qa):
    for folder in (prepared, qa):
        meta, tokenizer = read_meta(folder), tokenizer_of(folder)
        for split in ("train", "val"):
            rows, counts = rows_of(folder, split), meta["splits"][split]
            said = [row["labels"] for row in rows]
            texts = [tokenizer.decode([i for i in ids if i != meta["eos_id"]]) for ids in said]
            assert counts["samples"] == len(rows) > 0
            assert counts["documents"] == sum(ids[-1] == meta["eos_id"] for ids in said)
            assert counts["encoder_tokens"] == sum(len(row["encoder_ids"]) for row in rows)
            assert counts["decoder_tokens"] == sum(map(len, said))
            assert counts["decoder_bytes"] == sum(len(text.encode()) for text in texts)


def word_pieces(tmp_path: Path) -> Path:
    """A tokenizer as BERT has it: lower case, words and pieces of words, every other text unknown."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz0123456789?().:+=_",
              *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789")]
    tokenizer = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "pieces.json"))
    return tmp_path / "pieces.json"


def test_a_tokenizer_that_loses_text_is_refused(tmp_path, capsys):
    code = [{"prompt": f"Write f{i}.", "answer": f"def f{i}(x):\n    return x + {i}"} for i in range(20)]
    words = ["--source", write_lines(tmp_path / "code.jsonl", code), "--dest", tmp_path / "out", "--val_ratio", 0,
             "--tokenizer", word_pieces(tmp_path)]
    with pytest.raises(ValueError) as error:
        call(prepare, *words)
    assert "0 of 20 rows (0.0 %) come back" in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("--tokenizer ") and "'Write f0.' becomes 'write f0.'" in str(error.value)
    assert not list(tmp_path.glob("out/*"))
    call(prepare, *words, "--min_roundtrip", 0)
    assert "round trip: 0 of 20 rows (0.0 %) come back" in capsys.readouterr().out
    assert read_meta(tmp_path / "out")["roundtrip"] == {"rows": 20, "back": 0}
    with pytest.raises(ValueError, match="--min_roundtrip 1.5 must be"):
        call(prepare, *words, "--min_roundtrip", 1.5)


def test_a_hopeless_tokenizer_is_refused_before_the_pass_over_the_data(tmp_path, monkeypatch):
    code = [{"prompt": f"Write F{i}.", "answer": f"F{i}"} for i in range(300)]
    prose = [{"prompt": "ab", "answer": "cd"} for _ in range(300)]
    (tmp_path / "source").mkdir()
    write_lines(tmp_path / "source" / "a.jsonl", code)
    words = ["--source", tmp_path / "source", "--dest", tmp_path / "out", "--val_ratio", 0,
             "--tokenizer", word_pieces(tmp_path)]

    def passed(*arguments):
        raise AssertionError("the pass has begun")

    monkeypatch.setattr(prepare, "write_splits", passed)
    with pytest.raises(ValueError, match="of a sample 0 of 300 rows .* --min_roundtrip is 0.95: "):
        call(prepare, *words)
    assert not list(tmp_path.glob("out/*"))
    with pytest.raises(AssertionError, match="has begun"):
        call(prepare, *words, "--min_roundtrip", 0)

    # Only a whole pass tells where a sample of every file gives back more than half of what is asked.
    write_lines(tmp_path / "source" / "b.jsonl", prose)
    with pytest.raises(AssertionError, match="has begun"):
        call(prepare, *words)


def test_byte_level_and_sentencepiece_tokenizers_lose_nothing(prepared, qa):
    from tokenizers import Tokenizer, decoders, models, normalizers

    for folder in (prepared, qa):
        meta = read_meta(folder)
        assert meta["roundtrip"]["rows"] == meta["roundtrip"]["back"] > 0

    # As Llama's: a space in front, bytes for what is unknown.
    characters = "▁abcdefghijklmnopqrstuvwxyz(): "
    vocabulary = {token: n for n, token in enumerate(["<unk>", *(f"<0x{n:02X}>" for n in range(256)),
                                                      *dict.fromkeys(characters)])}
    llama = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    llama.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    llama.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    trip = RoundTrip()
    for text in ("def f(x):\n    return  é + '√'", " a", "A b\t\n\n c ", "\U0001f600"):
        trip.add([text], lambda text: llama.decode(llama.encode(text).ids))
    assert (trip.rows, trip.back) == (4, 4) and trip.problem(1.0) is None


def test_a_large_source_is_sampled():
    trip = RoundTrip()
    assert [trip.wants(number) for number in (0, 999, 1000, 1024, 6400)] == [True, True, False, True, True]
    for text in ("a", "A", "ｂ"):
        trip.add([text], str.lower)
    trip.add(["ok", " x"], lambda text: f" {text.strip()}")
    assert (trip.rows, trip.back, trip.first) == (4, 3, ("A", "a"))
    assert trip.problem(0.75) is None and "3 of 4 rows (75.0 %)" in trip.problem(0.8)


def test_a_row_whose_split_is_blank_names_none(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": "a", "split": ""}, {"text": "b", "split": None}, {"text": "c"},
                                       {"text": "d", "split": "train"}])
    assert [document.text for document in read_documents([tmp_path / "a.jsonl"])] == ["a", "b", "c", "d"]


def split_rows(count: int = 12) -> list[dict]:
    return [{"prompt": f"What is {i} + 1?", "answer": str(i + 1), "split": ("train", "test")[i % 2]}
            for i in range(count)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_of_several_splits_are_not_mixed_unasked(tmp_path, kind, capsys):
    import pyarrow
    import pyarrow.parquet

    source = tmp_path / f"qa.{kind}"
    if kind == "jsonl":
        write_lines(source, split_rows())
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(split_rows()), source)
    words = ["--source", source, "--dest", tmp_path / "out", "--vocab-size", 300, "--val_ratio", 0.1]
    with pytest.raises(ValueError, match="row 2: .*are mixed: name one with --split") as error:
        call(prepare, *words)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("out/*"))
    with pytest.raises(ValueError, match=r"no row is of --split dev, there are test \(6\), train \(6\)"):
        call(prepare, *words, "--split", "dev")
    call(prepare, *words, "--split", "train")
    meta = read_meta(tmp_path / "out")
    assert sum(meta["splits"][split]["documents"] for split in ("train", "val")) == 6
    assert meta["source_splits"] == {"test": 6, "train": 6}
    capsys.readouterr()
    call(prepare, *words, "--split", "all")
    assert "mixed: rows of the splits test (6), train (6)" in capsys.readouterr().out


def test_a_prepared_and_a_merged_folder_know_what_they_train_on(tmp_path, prepared, qa, texts):
    record = trained_on(read_meta(qa))
    tokenizer = tokenizer_of(qa)
    for split in ("train", "val"):
        for row in rows_of(qa, split):
            prompt = tokenizer.decode(row["encoder_ids"])
            assert (prompt in record) == (split == "train")
            assert (f"  {prompt.upper()}\n" in record) == (split == "train")
    assert "What is 41 + 1?" not in record and len(record) == read_meta(qa)["splits"]["train"]["documents"]
    corpus = trained_on(read_meta(prepared))
    documents = texts.read_text(encoding="utf-8").split("\n\n")
    assert sum(document in corpus for document in documents) == read_meta(prepared)["splits"]["train"]["documents"]

    call(merge, "--sources", prepared, qa, "--weights", 1, 1, "--output", tmp_path / "mix", "--train-samples", 20,
         "--val-samples", 2)
    both = trained_on(read_meta(tmp_path / "mix"))
    assert both is not None and len(both) == len(corpus | record) and documents[0] in (corpus | record)
    assert all((document in both) == (document in corpus) for document in documents)


def test_a_folder_of_an_earlier_version_records_nothing_and_a_damaged_record_is_told():
    assert trained_on({}) is None and trained_on({"train_keys": None}) is None
    assert trained_on({"train_keys": TrainedOn([key_of("a"), 0, 2**64 - 1]).record()}).__contains__("A ")
    for damaged in ("?", "QUJD", 5):
        with pytest.raises(ValueError, match="train_keys of meta.json is damaged"):
            trained_on({"train_keys": damaged})


def test_prompts_go_to_the_encoder_and_answers_to_the_decoder(qa):
    tokenizer = tokenizer_of(qa)
    for row in rows_of(qa, "train") + rows_of(qa, "val"):
        prompt, answer = tokenizer.decode(row["encoder_ids"]), tokenizer.decode(row["labels"])
        assert eval(prompt.removeprefix("What is ").removesuffix("?")) == int(answer)


def test_truncation_keeps_the_prompts_end_and_the_answers_beginning_and_is_counted(tmp_path, prepared):
    rows = [{"prompt": "1234567", "answer": "7654321"}, {"prompt": "89", "answer": "98"},
            {"prompt": " ", "answer": "1"}, {"prompt": "5", "answer": " "}, {"prompt": "", "answer": "1"}]
    source = write_lines(tmp_path / "rows.jsonl", rows)
    dest = tmp_path / "dest"
    call(prepare, "--source", source, "--dest", dest, "--tokenizer", prepared / "tokenizer.json", "--max-seq-len", 4,
         "--val_ratio", 0)
    meta, tokenizer = read_meta(dest), tokenizer_of(dest)
    first, second = rows_of(dest, "train")[:2]
    assert tokenizer.decode(first["encoder_ids"]) == "4567" and tokenizer.decode(first["labels"]) == "7654"
    assert meta["eos_id"] not in first["labels"] and second["labels"][-1] == meta["eos_id"]
    assert meta["truncated"] == {"prompts": 1, "answers": 1}
    assert meta["left_out"]["blank"] == 2 and meta["splits"]["train"]["samples"] == 3


# --- splits -----------------------------------------------------------------------------------------------------------


@SHARED
@given(numbers=st.lists(st.integers(0, 12), min_size=4, max_size=30), seed=st.integers(0, 3))
def test_no_document_stands_in_both_splits_however_often_it_comes(tmp_path, prepared, numbers, seed):
    spellings = ["Document {} of set {}", "document  {} of SET {}", " Document {}\nof set {} "]
    rows = [{"text": spellings[place % 3].format(number, seed)} for place, number in enumerate(numbers)]
    source = write_lines(tmp_path / "source" / "rows.jsonl", rows + [{"text": "one more"}, {"text": "and another"}])
    dest = tmp_path / "dest"
    call(prepare, "--source", source, "--dest", dest, "--tokenizer", prepared / "tokenizer.json", "--val_ratio", 0.3,
         "--tokenizer_batch_size", 3)
    tokenizer, found = tokenizer_of(dest), {}
    for split in ("train", "val"):
        texts = [tokenizer.decode(row["encoder_ids"] + row["labels"]) for row in rows_of(dest, split)]
        found[split] = {" ".join(text.removesuffix("<|eos|>").lower().split()) for text in texts}
    assert not found["train"] & found["val"]
    assert found["val"] and found["train"]
    assert len(found["train"] | found["val"]) == len(set(numbers)) + 2


def test_a_prompt_with_two_answers_stays_in_one_split(tmp_path, prepared):
    rows = [{"prompt": f"ask {i % 20}", "answer": f"say {i}"} for i in range(60)]
    dest = tmp_path / "dest"
    call(prepare, "--source", write_lines(tmp_path / "rows.jsonl", rows), "--dest", dest, "--val_ratio", 0.3,
         "--tokenizer", prepared / "tokenizer.json")
    asked = {split: {tuple(row["encoder_ids"]) for row in rows_of(dest, split)} for split in ("train", "val")}
    assert not asked["train"] & asked["val"] and len(asked["train"] | asked["val"]) == 20


def test_preparing_again_gives_the_same_bytes_whatever_the_batch_size(tmp_path, prepared, texts):
    call(prepare, "--source", texts, "--dest", tmp_path, "--max_seq_len", 48, "--val_ratio", 0.2, "--vocab_size", 400,
         "--tokenizer_batch_size", 100)
    for name in ("train.jsonl", "val.jsonl", "tokenizer.json", "meta.json"):
        assert (tmp_path / name).read_bytes() == (prepared / name).read_bytes()


def test_every_wrong_option_of_prepare_is_told_at_once(tmp_path):
    with pytest.raises(ValueError) as error:
        call(prepare, "--source", tmp_path, "--dest", tmp_path / "in", "--val_ratio", 1, "--vocab_size", 10,
             "--max-seq-len", 1, "--tokenizer", tmp_path / "none", "--tokenizer_batch_size", 0)
    assert len(str(error.value).splitlines()) == 6


# --- merge ------------------------------------------------------------------------------------------------------------


@given(weights=st.lists(st.fractions(0, 10, max_denominator=1000), min_size=1, max_size=8).filter(sum),
       total=st.integers(0, 100_000))
def test_quotas_add_up_and_are_each_share_rounded(weights, total):
    counts = merge.quotas(weights, total)
    assert sum(counts) == total
    for share, count in zip(weights, counts, strict=True):
        exact = total * share / sum(weights)
        assert exact - 1 < count < exact + 1
        assert count == exact or exact.denominator > 1


def test_quotas_round_up_the_largest_remainders():
    assert merge.quotas([Fraction(".9"), Fraction(".05"), Fraction(".05")], 101) == [91, 5, 5]
    assert merge.quotas([Fraction(1)] * 3, 5) == [2, 2, 1]
    assert merge.quotas([Fraction(".9"), Fraction(".1")], 8) == [7, 1]


def merged(folder: Path, sources: list[Path], weights: str, train: int, val: int, seed: int = 0) -> Path:
    call(merge, "--sources", *sources, "--weights", *weights.split(), "--output", folder, "--train-samples", train,
         "--val-samples", val, "--seed", seed)
    return folder


def test_merging_takes_exact_shares_and_repeats_in_whole_epochs(tmp_path, prepared, qa):
    few = len(rows_of(qa, "train"))
    total = 5 * few  # of which half are the questions', each two or three times
    folder = merged(tmp_path / "mix", [prepared, qa], ".5 .5", total, 6)
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ours = (qa / "train.jsonl").read_text(encoding="utf-8").splitlines()
    counts = [lines.count(line) for line in ours]
    assert len(lines) == total and sum(counts) == total // 2 and set(counts) == {2, 3}
    meta = read_meta(folder)
    assert meta["sources"][1]["train"] == {"samples": total // 2, "available": few, "epochs": 2.5}
    assert meta["sources"][1]["weight"] == 0.5
    assert meta["splits"]["train"]["samples"] == total and meta["splits"]["val"]["samples"] == 6
    known = set(ours) | set((prepared / "train.jsonl").read_text(encoding="utf-8").splitlines())
    assert set(lines) <= known
    assert not set(lines) & set((folder / "val.jsonl").read_text(encoding="utf-8").splitlines())
    # Shuffled together: neither source fills a third of the file by itself.
    third = total // 3
    assert all(set(ours) & set(lines[k * third: (k + 1) * third]) < set(lines[k * third: (k + 1) * third])
               for k in range(3))
    assert call(validate, folder) == 0


def test_a_short_source_comes_again_in_another_order(tmp_path, qa):
    ours = (qa / "train.jsonl").read_text(encoding="utf-8").splitlines()
    mixed = merged(tmp_path / "mix", [qa], "1", 3 * len(ours), 0)
    lines = (mixed / "train.jsonl").read_text(encoding="utf-8").splitlines()
    epochs = [lines[start: start + len(ours)] for start in range(0, len(lines), len(ours))]
    assert all(sorted(epoch) == sorted(ours) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] != ours


def test_merging_is_a_function_of_the_seed(tmp_path, prepared, qa):
    one, two, other = (merged(tmp_path / name, [prepared, qa], "2 1", 50, 5, seed)
                       for name, seed in (("one", 0), ("two", 0), ("other", 1)))
    assert (one / "train.jsonl").read_bytes() == (two / "train.jsonl").read_bytes()
    assert (one / "train.jsonl").read_bytes() != (other / "train.jsonl").read_bytes()


def test_many_blocks_are_copied_whole(tmp_path, prepared, qa, monkeypatch):
    expected = (merged(tmp_path / "one", [prepared, qa], "1 1", 300, 9) / "train.jsonl").read_bytes()
    monkeypatch.setattr(mixing, "MOST_LINES", 7)
    assert (merged(tmp_path / "two", [prepared, qa], "1 1", 300, 9) / "train.jsonl").read_bytes() == expected


def test_merged_val_counts_are_those_of_its_lines(tmp_path, prepared, qa):
    everything = {split: len(rows_of(prepared, split)) for split in ("train", "val")}
    folder = merged(tmp_path / "mix", [prepared, qa], "1 0", everything["train"], everything["val"])
    counts = read_meta(prepared)["splits"]["val"]
    counts.pop("documents")
    assert read_meta(folder)["splits"]["val"] == counts


def test_a_merged_folder_streams_as_its_list_does(tmp_path, prepared, qa):
    data = PreparedData(merged(tmp_path / "mix", [prepared, qa], "1 1", 80, 5), "train")
    streamed, listed = (PreparedBatches(source, 8, 0, data.meta["pad_id"], bucket=2) for source in (data, list(data)))
    for _ in range(25):
        one, two = next(streamed), next(listed)
        assert all(one[key].equal(two[key]) for key in one)


def test_sources_of_different_tokenizers_are_refused_in_one_line(tmp_path, texts, prepared):
    call(prepare, "--source", texts, "--dest", tmp_path / "other", "--vocab_size", 270, "--val_ratio", 0.2)
    with pytest.raises(ValueError, match="different tokenizers") as error:
        merged(tmp_path / "mix", [prepared, tmp_path / "other"], "1 1", 10, 2)
    assert "\n" not in str(error.value) and not (tmp_path / "mix").exists()


def test_a_torn_or_exchanged_source_is_refused(tmp_path, prepared):
    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for path in prepared.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    torn, exchanged = copy("torn"), copy("exchanged")
    os.truncate(torn / "train.jsonl", (torn / "train.jsonl").stat().st_size - 5)
    with pytest.raises(ValueError, match="train.jsonl is torn"):
        merged(tmp_path / "mix", [torn], "1", 10, 2)
    (exchanged / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is not the one its meta.json names"):
        merged(tmp_path / "mix", [exchanged], "1", 10, 2)
    assert not list(tmp_path.glob("mix/*"))


def test_every_wrong_option_of_merge_is_told_at_once(prepared):
    with pytest.raises(ValueError) as error:
        merged(prepared, [prepared, prepared], "1 -1 2", 0, -1)
    assert len(str(error.value).splitlines()) == 6


def test_a_source_without_val_is_told(tmp_path, prepared, texts):
    call(prepare, "--source", texts, "--dest", tmp_path / "all", "--tokenizer", prepared / "tokenizer.json",
         "--val_ratio", 0)
    with pytest.raises(ValueError, match="has no val triple, 2 are asked of it"):
        merged(tmp_path / "mix", [prepared, tmp_path / "all"], "1 1", 10, 4)


# --- validate ---------------------------------------------------------------------------------------------------------


def test_validate_sums_up_a_good_folder(prepared, capsys):
    assert call(validate, prepared) == 0
    told = capsys.readouterr().out
    assert "every line is good" in told and f"train: {len(rows_of(prepared, 'train'))} triples" in told


@pytest.mark.parametrize(("change", "told"), [
    (lambda row: row | {"encoder_ids": [5000]}, "encoder_ids holds 5000"),
    (lambda row: row | {"encoder_ids": [5] * 49}, "49 tokens on one side, meta.json says at most 48"),
    (lambda row: row | {"labels": row["labels"][1:]}, "labels, expected equally many"),
    (lambda row: row | {"decoder_input_ids": [5, *row["decoder_input_ids"][1:]]}, "expected bos"),
    (lambda row: {key: row[key] for key in ("labels", "encoder_ids")}, "has no decoder_input_ids"),
])
def test_validate_names_the_bad_lines_and_exits_2(tmp_path, prepared, change, told):
    folder = tmp_path / "spoilt"
    folder.mkdir()
    for path in prepared.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    rows = rows_of(folder, "train")
    rows[1], rows[6] = change(rows[1]), change(rows[6])
    write_lines(folder / "train.jsonl", rows)
    with pytest.raises(ValueError) as error:
        call(validate, folder)
    first, second = str(error.value).splitlines()
    assert "train.jsonl line 2:" in first and "train.jsonl line 7:" in second and told in first


def test_validate_exits_2_without_a_traceback(tmp_path):
    done = subprocess.run([sys.executable, "scripts/validate_dataset.py", str(tmp_path)], cwd=ROOT, capture_output=True,
                          text=True, timeout=HANG_S)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "meta.json" in done.stderr


# --- crashes ----------------------------------------------------------------------------------------------------------


def test_a_killed_prepare_leaves_no_final_file_and_runs_again(tmp_path, prepared):
    source, dest = tmp_path / "texts.txt", tmp_path / "dest"
    source.write_text("\n\n".join(f"document {i} " + "w " * 200 for i in range(30_000)), encoding="utf-8")
    command = [sys.executable, "scripts/prepare_language_dataset.py", "--source", str(source), "--dest", str(dest),
               "--tokenizer", str(prepared / "tokenizer.json"), "--tokenizer-batch-size", "50"]
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + HANG_S
        while not any(path.stat().st_size for path in dest.glob(".tmp-train.jsonl-*")):
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    left = sorted(path.name for path in dest.iterdir())
    assert left and all(name.startswith(".tmp-") for name in left)
    source.write_text("one document\n\nanother document\n\na third one", encoding="utf-8")
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=HANG_S).returncode == 0
    assert {path.name for path in dest.iterdir()} == {"train.jsonl", "val.jsonl", "tokenizer.json", "meta.json"}
    assert call(validate, dest) == 0


def test_documents_are_a_stream(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"text": str(i)} for i in range(9)])
    long = Document(None, "x" * encoding.BATCH_CHARS)
    batches = list(encoding.batched(iter([*read_documents([path]), long]), 4))
    assert [(batch.first, len(batch.documents)) for batch in batches] == [(0, 4), (4, 4), (8, 2)]
