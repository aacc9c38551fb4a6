"""A cache of words gives the tokenizer's own ids, whatever the text."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from text_data import word_cache
from text_data.tokenizer import parse_tokenizer, train_tokenizer
from text_data.word_cache import WordEncoder

TEXTS = ["the cat sat on 1234 mats , it 's 12 @.@ 5 kg ", "été 12 don't  stop\n\n the\tend "] * 5
SPACES = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\x85", "\x1c"]
WORDS = ["the", "cat", "'s", "don't", "12", ",", "@.@", "é", "日本", "😀", "<|eos|>", "x" * 50, "\u0301", "_"]
PIECES = st.sampled_from(SPACES + WORDS)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return parse_tokenizer(train_tokenizer(TEXTS, 320).to_str(), "here")


@pytest.fixture(scope="module")
def encoder(trained) -> WordEncoder:
    encoder = WordEncoder(trained)
    assert encoder.has_cache
    return encoder


@example(texts=["it 's a 1 2 b 3c", " lead", "trail ", "two  spaces", "line \n end", "a <|eos|> b", ""])
@given(texts=st.lists(st.lists(PIECES).map("".join) | st.text(), max_size=4))
def test_ids_are_the_tokenizers_own(trained, encoder, texts):
    plain = [encoding.ids for encoding in trained.encode_batch(texts, add_special_tokens=False)]
    assert encoder.encode(texts) == plain
    assert encoder.encode(texts) == plain  # from the cache


def test_the_cache_keeps_its_size_and_what_comes_again(trained, monkeypatch):
    monkeypatch.setattr(word_cache, "MOST_WORDS", 50)
    encoder = WordEncoder(trained)
    for number in range(40):
        text = f"the cat {' '.join(str(1000 * number + i) for i in range(20))} " + "y" * 100
        assert encoder.encode([text])[0] == trained.encode(text, add_special_tokens=False).ids
        assert len(encoder._young) <= 50 and len(encoder._old) <= 75
        assert "cat" in encoder._young or "cat" in encoder._old
        assert "y" * 100 not in encoder._young


def changed(trained: Tokenizer, change) -> Tokenizer:
    tokenizer = Tokenizer.from_str(trained.to_str())
    tokenizer.encode_special_tokens = True
    change(tokenizer)
    return tokenizer


def lower(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Lowercase()


def add_phrase(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens([AddedToken("the cat", normalized=False)])


def prefix(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def pieces(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()


def drop(tokenizer: Tokenizer) -> None:
    tokenizer.model.dropout = 0.5


def specials(tokenizer: Tokenizer) -> None:
    tokenizer.encode_special_tokens = False


@pytest.mark.parametrize("change", [lower, add_phrase, prefix, pieces, drop, specials])
def test_a_tokenizer_that_may_see_beyond_a_word_is_asked_for_whole_texts(trained, change):
    tokenizer = changed(trained, change)
    encoder = WordEncoder(tokenizer)
    assert not encoder.has_cache
    if change is not drop:
        text = "The cat sat , the cat <|eos|> the cat"
        assert encoder.encode([text])[0] == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_plain_byte_level_tokenizer_has_a_cache(trained):
    def plain(tokenizer: Tokenizer) -> None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)

    assert WordEncoder(changed(trained, plain)).has_cache
    assert not WordEncoder(Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))).has_cache
