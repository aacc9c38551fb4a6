"""text_data.synthetic: a tokenizer of characters, sums, and a split that neither order of a pair crosses."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from text_data.synthetic import SimpleTokenizer, build_synthetic_dataset, is_held_out, synthetic_questions


@example(text="12<|pad|> \u00e9")
@given(text=st.text() | st.text("What is 0123456789+?\n<|pad|>"))
def test_a_saved_simple_tokenizer_gives_the_same_ids_in_transformers(simple_pair, text):
    simple, fast = simple_pair
    assert simple.encode(text) == fast(text, split_special_tokens=True)["input_ids"]


@pytest.fixture(scope="module")
def simple_pair(tmp_path_factory):
    from transformers import PreTrainedTokenizerFast

    simple, path = SimpleTokenizer(), tmp_path_factory.mktemp("simple") / "tokenizer.json"
    simple.save(path)
    return simple, PreTrainedTokenizerFast(tokenizer_file=str(path))


@given(text=st.text("abcXYZ 0123456789+-?!.,\n\t"))
def test_the_simple_tokenizer_is_of_characters_and_round_trips(text):
    simple = SimpleTokenizer()
    ids = simple.encode(text)
    assert len(ids) == len(text) and simple.decode(ids) == text
    assert all(simple.unk_id < number < simple.vocab_size for number in ids)
    assert simple.decode([simple.bos_id, *ids, simple.eos_id, simple.pad_id]) == text
    assert simple.tokenizer.get_vocab_size() == simple.vocab_size


def test_synthetic_triples_say_the_sum():
    simple = SimpleTokenizer()
    for triple, (prompt, answer) in zip(build_synthetic_dataset(200, 3), synthetic_questions(200, 3), strict=True):
        a, b = map(int, prompt.removeprefix("What is ").removesuffix("?").split(" + "))
        assert 0 <= a <= 99 and 0 <= b <= 99 and answer == str(a + b)
        assert simple.decode(triple.encoder_ids) == prompt
        assert triple.decoder_input_ids == [simple.bos_id, *simple.encode(answer)]
        assert triple.labels == [*simple.encode(answer), simple.eos_id]


def pairs_of(split: str, seed: int) -> set[frozenset[str]]:
    questions = synthetic_questions(12_000, seed, split)  # more than there are, so all of them
    return {frozenset(prompt.removeprefix("What is ").removesuffix("?").split(" + ")) for prompt, _ in questions}


def test_no_pair_stands_in_both_splits_in_either_order():
    train, val = pairs_of("train", 0), pairs_of("val", 1)
    assert not train & val
    assert len(train | val) == 100 * 101 // 2
    assert 0.08 < len(val) / len(train | val) < 0.12
    assert all(is_held_out(a, b) == is_held_out(b, a) for a in range(100) for b in range(100))


def test_the_synthetic_set_is_a_function_of_seed_and_split():
    assert build_synthetic_dataset(50, 1) == build_synthetic_dataset(50, 1) != build_synthetic_dataset(50, 2)
    assert len(set(synthetic_questions(500, 0, "val"))) == 500  # none twice while there are others
    with pytest.raises(ValueError, match="expected train or val"):
        build_synthetic_dataset(5, 0, "tests")
