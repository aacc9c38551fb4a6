"""The tokenizer of prepared data: opened one way, whatever its file carries from its use elsewhere."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from hybrid.text import HybridText
from text_data.synthetic import SimpleTokenizer
from text_data.tokenizer import parse_tokenizer, read_tokenizer, train_tokenizer
from tiny_hybrid import tiny

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("prepare_data", ROOT / "scripts" / "prepare_language_dataset.py")
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)

MARKED = "one <|eos|> two <|bos|><|pad|> three"  # a text that names special tokens is text


def carrying(tokenizer) -> str:
    """Its tokenizer.json with what training code leaves in one: truncation and padding."""
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9, pad_id=0, pad_token="<|pad|>")
    text = tokenizer.to_str()
    tokenizer.no_truncation()
    tokenizer.no_padding()
    assert json.loads(text)["truncation"] and json.loads(text)["padding"]
    return text


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(["one two three four five"] * 4, 300)


def test_text_is_read_as_it_was_prepared_whatever_the_tokenizers_file_carries(tmp_path, trained):
    rows = [{"prompt": f"{MARKED} {n} and then some more", "answer": f"{n} <|eos|> of it all"} for n in range(12)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "carrying.json").write_text(carrying(trained), encoding="utf-8")
    prepare.main(["--source", str(tmp_path / "qa.jsonl"), "--dest", str(tmp_path / "prepared"), "--val_ratio", "0",
                  "--tokenizer", str(tmp_path / "carrying.json")])

    text = HybridText(tiny(vocab_size=300), (tmp_path / "prepared" / "tokenizer.json").read_text(encoding="utf-8"))
    lines = (tmp_path / "prepared" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    for row, line in zip(rows, lines, strict=True):
        triple = json.loads(line)
        assert text.encode(row["prompt"]) == triple["encoder_ids"] and min(triple["encoder_ids"]) > 2
        assert [*text.encode(row["answer"]), 2] == triple["labels"]
        assert text.decode(triple["encoder_ids"]) == row["prompt"]


def test_likelihoods_and_answers_do_not_depend_on_what_the_file_carries(trained):
    model = tiny(vocab_size=300)
    pairs = [(f"{MARKED} {MARKED}", " and four <|eos|> five, six, seven, eight"), ("a", "b")]
    plain, other = HybridText(model, trained.to_str()), HybridText(model, carrying(trained))
    assert other.log_likelihoods(pairs) == plain.log_likelihoods(pairs)
    assert other.generate([MARKED, "a"], 5) == plain.generate([MARKED, "a"], 5)


def test_the_synthetic_tokenizer_reads_the_names_of_special_tokens_as_text():
    simple = SimpleTokenizer()
    assert simple.decode(simple.encode(MARKED)) == MARKED
    assert HybridText(tiny(), simple.tokenizer.to_str()).encode(MARKED) == simple.encode(MARKED)


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "is no tokenizer.json"), (b"{}", "is no tokenizer.json"), (b"\n\xff", "is not UTF-8 text (line 2"),
    (b"[" * 100_000, "is no tokenizer.json")])
def test_a_broken_tokenizer_is_told_in_one_line(tmp_path, content, reason):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_tokenizer(tmp_path / "t.json", "--tokenizer")
    assert str(error.value).startswith("--tokenizer ") and reason in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_tokenizer(tmp_path)


def test_a_tokenizer_with_a_byte_order_mark_is_one(tmp_path, trained):
    (tmp_path / "t.json").write_text("\ufeff" + trained.to_str(), encoding="utf-8")
    plain = parse_tokenizer(trained.to_str(), "here")
    assert read_tokenizer(tmp_path / "t.json").encode("one two").ids == plain.encode("one two").ids
