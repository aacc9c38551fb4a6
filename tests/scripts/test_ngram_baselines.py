"""ngram_baselines: probabilities, the fitted weight and perplexities against an obvious slow count."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batches import IGNORE
from ngram_baselines import (
    InterpolatedBigram,
    baseline_perplexities,
    fit_weight,
    label_rows,
    main,
    text_perplexities,
    unigram_bigram_baselines,
)
from text_data import documents
from text_data.synthetic import SimpleTokenizer
from tiny_hybrid import write_prepared

V = 6
rows = st.lists(st.lists(st.integers(0, V - 1), min_size=2, max_size=9), min_size=1, max_size=25)


def slow_probability(before: int, word: int, pairs: list[tuple[int, int]], weight: float, bigram: bool = True) -> float:
    """Counted by going through all pairs each time."""
    unigram = (1 + sum(label == word for _, label in pairs)) / (V + len(pairs))
    seen = [label for other, label in pairs if other == before]
    return weight * seen.count(word) / len(seen) + (1 - weight) * unigram if seen and bigram else unigram


def slow_weight(train_rows: list[list[int]]) -> float:
    """The best weight on a fine grid, on every tenth row with counts from the others."""
    per_row = [list(zip(row, row[1:], strict=False)) for row in train_rows]
    if len(per_row) < 10:
        per_row = [[pair] for row in per_row for pair in row]
    held = [pair for place, row in enumerate(per_row) if place % 10 == 9 for pair in row]
    part = [pair for place, row in enumerate(per_row) if place % 10 != 9 for pair in row]
    known = [pair for pair in held if any(before == pair[0] for before, _ in part)]
    both = [[slow_probability(*pair, part, weight) for weight in (1.0, 0.0)] for pair in known]  # of either model alone

    def likelihood(weight: float) -> float:
        return sum(math.log(max(weight * bigram + (1 - weight) * unigram, 1e-300)) for bigram, unigram in both)

    return max(np.linspace(0, 0.999, 112), key=likelihood) if known else 0.5


def slow_perplexity(val_rows, pairs, weight, bigram) -> float:
    logs = [math.log(slow_probability(before, word, pairs, weight, bigram))
            for row in val_rows for before, word in zip(row, row[1:], strict=False)]
    return math.exp(-sum(logs) / len(logs))


@given(rows, rows)
def test_perplexities_equal_the_slow_count(train, val):
    found = unigram_bigram_baselines(iter(train), iter(val), V)
    pairs = [pair for row in train for pair in zip(row, row[1:], strict=False)]
    for name, bigram in (("unigram_perplexity", False), ("bigram_perplexity", True)):
        assert found[name] == pytest.approx(slow_perplexity(val, pairs, found["bigram_weight"], bigram), rel=1e-9)
    assert found["train_tokens"] == len(pairs) and found["val_tokens"] == sum(len(row) - 1 for row in val)


@given(rows, st.floats(0, 0.999))
def test_probabilities_after_any_token_sum_to_one(train, weight):
    pairs = np.array([pair for row in train for pair in zip(row, row[1:], strict=False)])
    model = InterpolatedBigram(pairs, V, weight)
    assert model.unigram.sum() == pytest.approx(1)
    for before in range(V):
        after = np.array([[before, word] for word in range(V)])
        chances = model.probabilities(after)
        assert chances.sum() == pytest.approx(1) and (chances > 0).all()


def test_the_weight_is_the_best_on_held_out_training_rows():
    random = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.9):  # of tokens that their predecessor determines
        train = []
        for _ in range(60):
            row = [int(random.integers(V))]
            for _ in range(30):
                row.append((row[-1] + 1) % V if random.random() < share else int(random.integers(V)))
            train.append(row)
        found = unigram_bigram_baselines(train, train[:1], V)["bigram_weight"]
        assert found == pytest.approx(slow_weight(train), abs=0.01)


@given(rows, rows, rows)
def test_validation_tokens_fit_nothing(train, val, other):
    first, second = (unigram_bigram_baselines(train, rows, V) for rows in (val, other))
    assert first["bigram_weight"] == second["bigram_weight"]


def test_the_weight_without_a_known_bigram_is_one_half_and_never_reaches_one():
    assert fit_weight(np.array([np.nan]), np.array([0.1])) == 0.5
    assert fit_weight(np.ones(9), np.full(9, 0.1)) == 0.999


def test_a_determined_sequence_is_cheap_for_the_bigram_alone():
    cycle = [place % V for place in range(601)]
    found = unigram_bigram_baselines([cycle], [cycle], V)
    assert found["unigram_perplexity"] == pytest.approx(V, rel=1e-3) and found["bigram_perplexity"] < 1.01


@pytest.mark.parametrize(("train", "val", "told"), [
    ([[1]], [[1, 2]], "training data hold no token"), ([[1, 2]], [], "validation data hold no token"),
    ([[1, V]], [[1, 2]], f"training data hold token {V}"), ([[1, 2]], [[-100, 2]], "validation data hold token -100")])
def test_unusable_ids_are_told(train, val, told):
    with pytest.raises(ValueError, match=told):
        unigram_bigram_baselines(train, val, V)


# --- prepared data


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5) | st.just(IGNORE)), max_size=12), st.booleans())
def test_label_rows_hold_every_label_once_after_its_own_predecessor(pairs, shifted):
    before, labels = [b for b, _ in pairs], [label for _, label in pairs]
    if shifted and labels:  # teacher forcing: the decoder reads the labels one place later
        before = [0] + [max(label, 0) for label in labels[:-1]]
    found = [pair for row in label_rows(before, labels) for pair in zip(row, row[1:], strict=False)]
    assert found == [(b, label) for b, label in zip(before, labels, strict=True) if label != IGNORE]


def test_an_ordinary_example_is_one_row():
    assert list(label_rows([1, 7, 8, 9], [7, 8, 9, 2])) == [[1, 7, 8, 9, 2]]
    assert list(label_rows([1, 7, 8, 9, 0], [IGNORE, 8, 9, IGNORE, IGNORE])) == [[7, 8, 9]]


def test_a_folder_of_prepared_data_is_read(tmp_path):
    def write(name, examples):
        lines = [json.dumps({"encoder_ids": [3], "decoder_input_ids": d, "labels": labels}) for d, labels in examples]
        (tmp_path / name).write_text("\n".join(lines) + "\n\n", encoding="utf-8")

    write("train.jsonl", [([1, 2, 3], [2, 3, 4]), ([1, 2], [2, IGNORE])] * 10)
    with pytest.raises(ValueError, match=r"no file .*val\.jsonl"):
        baseline_perplexities(tmp_path, V)
    write("val.jsonl", [([1, 2], [2, 4])])
    train = [[1, 2, 3, 4], [1, 2]] * 10
    assert baseline_perplexities(tmp_path, V) == unigram_bigram_baselines(train, [[1, 2, 4]], V)
    (tmp_path / "meta.json").write_text('{"vocab_size": 6}', encoding="utf-8")
    assert baseline_perplexities(tmp_path) == baseline_perplexities(str(tmp_path), 6)
    (tmp_path / "meta.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="tells no vocab_size"):
        baseline_perplexities(tmp_path)
    assert Counter(token for row in train for token in row[1:])[2] == 20
    for broken in ('{"labels": [1]}', '{"decoder_input_ids": [1, 2], "labels": [1]}', "{", "[1]"):
        good = '{"decoder_input_ids": [1], "labels": [2]}\n'
        (tmp_path / "val.jsonl").write_text(good + broken + "\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"val\.jsonl, line 2: expected decoder_input_ids and labels"):
            baseline_perplexities(tmp_path, V)


# --- text files and the command


@pytest.fixture
def texts(tmp_path):
    """(training file, validation file, tokenizer.json) of characters."""
    files = [tmp_path / name for name in ("train.txt", "val.jsonl", "tokenizer.json")]
    files[0].write_text("abcabc\n\nab\n\nbcabcacb\n\n" * 5, encoding="utf-8")
    files[1].write_text('{"text": "abcab"}\n{"prompt": "xyz", "answer": "bca"}\n{"text": ""}\n', encoding="utf-8")
    SimpleTokenizer("abc").save(files[2])
    return files


def test_text_files_are_measured_by_the_tokens_of_their_texts_and_answers(texts):
    tokenizer = SimpleTokenizer("abc")
    train, val = (list(map(tokenizer.encode, rows)) for rows in (["abcabc", "ab", "bcabcacb"] * 5, ["abcab", "bca"]))
    assert text_perplexities(*texts) == unigram_bigram_baselines(train, val, tokenizer.vocab_size)


def test_a_long_text_in_pieces_is_measured_as_a_whole(texts, monkeypatch):
    whole = text_perplexities(*texts)
    monkeypatch.setattr(documents, "MAX_CHARS", 2)
    assert text_perplexities(texts[0], texts[1], texts[2])["val_tokens"] == whole["val_tokens"]


def test_the_command_prints_both_perplexities(tmp_path, texts, capsys):
    folder = write_prepared(tmp_path / "prepared", train=30)
    for words, values in (([folder], baseline_perplexities(folder)),
                          (["--train", texts[0], "--val", texts[1], "--tokenizer", texts[2]],
                           text_perplexities(*texts))):
        assert main(list(map(str, words))) == 0
        first, unigram, bigram = capsys.readouterr().out.splitlines()
        assert f"{values['train_tokens']} tokens" in first and first.endswith(str(values["val_tokens"]))
        assert float(unigram.split()[-1]) == pytest.approx(values["unigram_perplexity"], abs=0.01)
        assert float(bigram.split()[3]) == pytest.approx(values["bigram_perplexity"], abs=0.01)


@pytest.mark.parametrize(("words", "told"), [
    ([], "give a prepared folder, or"), (["--train", "a", "--val", "b"], "give a prepared folder, or"),
    (["folder", "--val", "b"], "give the folder or the three"), (["nowhere"], "no file nowhere/train.jsonl"),
    (["--train", "a", "--val", "b", "--tokenizer", __file__], "is no tokenizer.json")])
def test_what_the_command_cannot_measure_is_told(words, told):
    with pytest.raises(ValueError, match=told):
        main(words)
