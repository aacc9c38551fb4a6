"""text_model: likelihoods against a slow truth without padding, no leak, and answers of any causal LM."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batching import PromptFormat
from evaluation import Decoding, generate_texts
from host import load_host
from text_model import CausalTextModel, adds_space
from tiny_families import randomise, tiny_controller
from tiny_families import tiny_host as random_host
from tiny_runs import tiny_model

PAIRS = [
    ("Calculate 12 + 7", ". What is the answer?"),
    ("State the final answer", " to the following arithmetic problem: 12 + 7 - 30 ="),
    ("x", "1"),
    ("Solve this 4x4 Mini Sudoku puzzle:\n_ 1 _ 4\n2 _ 3 _\n", "\u00fcber"),
    ("", "Calculate"),
    ("Calculate 5 * 8. What is the ans", "wer? Ensure"),  # the joined text has other tokens at the joint
]


@pytest.fixture(scope="module")
def host(tiny_host):
    return load_host(str(tiny_host))


@pytest.fixture(scope="module")
def addon(tiny_host):
    return randomise(tiny_model(tiny_host, segments=2)).eval()


@torch.no_grad()
def slow_terms(model, tokenizer, context: str, continuation: str, keep: int = 10**9) -> list[float]:
    """One pair, no padding, one forward per token; the context is at most `keep` tokens."""
    ids = tokenizer(context, add_special_tokens=False)["input_ids"] or [tokenizer.bos_token_id]
    start, terms = len(ids), []
    for token in tokenizer(continuation, add_special_tokens=False)["input_ids"]:
        given = torch.tensor([ids[-keep:]])
        mask = (torch.arange(len(given[0])) < start)[None].long()
        extra = {"prompt_mask": mask} if hasattr(model, "addon_state") else {}
        logits = model(input_ids=given, **extra).logits[0, -1].double()
        terms.append(float(logits.log_softmax(-1)[token]))
        ids = ids + [token]
    return terms


# --- likelihood


@pytest.mark.parametrize("kind", ["host", "addon"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_terms_equal_the_slow_truth(kind, batch_size, host, addon, tokenizer):
    model = {"host": host, "addon": addon}[kind]
    seen = CausalTextModel(model, tokenizer, batch_size=batch_size)
    found = seen.token_log_probs(PAIRS)
    for terms, pair in zip(found, PAIRS, strict=True):
        assert terms.tolist() == pytest.approx(slow_terms(model, tokenizer, *pair), abs=1e-4)
    sums = seen.log_likelihoods(PAIRS)
    assert sums == [(pytest.approx(float(terms.sum())), len(terms)) for terms in found]
    assert seen.segments_used == (2 if kind == "addon" else None)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_padding_changes_nothing_in_any_family(family, wrapped, tokenizer):
    host = random_host(family, vocab_size=len(tokenizer), max_position_embeddings=128)
    model = tiny_controller(host=host) if wrapped else host
    for terms, pair in zip(CausalTextModel(model, tokenizer).token_log_probs(PAIRS), PAIRS, strict=True):
        assert terms.tolist() == pytest.approx(slow_terms(model, tokenizer, *pair), abs=1e-4)


def test_the_addon_at_scale_zero_and_its_bare_llm_are_the_bare_llm(host, addon, tokenizer, monkeypatch):
    plain = CausalTextModel(host, tokenizer)
    expected, texts = plain.log_likelihoods(PAIRS), plain.generate([p for p, _ in PAIRS[:4]], 6)
    ours = CausalTextModel(addon, tokenizer)
    assert ours.log_likelihoods(PAIRS)[0][0] != pytest.approx(expected[0][0], abs=1e-2)  # the add-on does something
    off = CausalTextModel(addon, tokenizer, bare=True)
    approx = [(pytest.approx(value, abs=1e-4), count) for value, count in expected]
    assert off.log_likelihoods(PAIRS) == approx and off.generate([p for p, _ in PAIRS[:4]], 6) == texts
    assert off.segments_used is None
    monkeypatch.setattr(addon.config, "eval_injector_scale", 0.0)
    assert ours.log_likelihoods(PAIRS) == approx and ours.generate([p for p, _ in PAIRS[:4]], 6) == texts


@pytest.mark.parametrize("kind", ["host", "addon"])
def test_later_tokens_change_no_earlier_term(kind, host, addon, tokenizer):
    seen = CausalTextModel({"host": host, "addon": addon}[kind], tokenizer)
    first, second = seen.token_log_probs([("Calculate 5", " 1 2 3 4 5 6"), ("Calculate 5", " 1 2 3 9 9 9 8 7")])
    same = [a == b for a, b in zip(*(tokenizer(text, add_special_tokens=False)["input_ids"]
                                     for text in (" 1 2 3 4 5 6", " 1 2 3 9 9 9 8 7")), strict=False)].index(False)
    assert same >= 5
    assert first[:same].tolist() == pytest.approx(second[:same].tolist(), abs=1e-5)
    assert abs(float(first[same] - second[same])) > 1e-3
    other = seen.token_log_probs([("Calculate 6", " 1 2 3 4 5 6")])[0]
    assert (other - first).abs().max() > 1e-3  # the context is read


def test_a_uniform_model_gives_the_vocabulary(tiny_host, tokenizer):
    flat = load_host(str(tiny_host))
    torch.nn.init.zeros_(flat.get_output_embeddings().weight)
    pairs = CausalTextModel(flat, tokenizer).log_likelihoods(PAIRS)
    nats, tokens = (sum(column) for column in zip(*pairs, strict=True))
    assert math.exp(-nats / tokens) == pytest.approx(flat.config.vocab_size, rel=1e-5)


def test_positions_that_are_too_few_cut_the_context_and_split_the_continuation(host, tokenizer, monkeypatch):
    monkeypatch.setattr(host.config, "max_position_embeddings", 12)
    context, continuation = "1234567890" * 3, "0987654321" * 2
    seen = CausalTextModel(host, tokenizer)
    found = seen.token_log_probs([(context, continuation), ("12", "345")])
    truth: list[float] = []
    for start in range(0, 20, 6):
        piece = continuation[start : start + 6]
        before = (context + continuation[:start])[-(12 - len(piece)) :]
        truth += slow_terms(host, tokenizer, before, piece)
    assert found[0].tolist() == pytest.approx(truth, abs=1e-4)
    assert found[1].tolist() == pytest.approx(slow_terms(host, tokenizer, "12", "345"), abs=1e-4)


def test_the_opening_token_survives_a_cut_context(host, tokenizer, monkeypatch):
    monkeypatch.setattr(host.config, "max_position_embeddings", 10)
    seen = CausalTextModel(host, tokenizer)
    bos = tokenizer.bos_token_id
    pieces = list(seen._pieces(3, [bos, *range(10, 40)], list(range(50, 62))))
    assert [piece.ids for piece in pieces] == [[50, 51, 52, 53, 54], [55, 56, 57, 58, 59], [60, 61]]
    assert [piece.context_ids for piece in pieces] == [
        [bos, 36, 37, 38, 39], [bos, 51, 52, 53, 54], [bos, 53, 54, 55, 56, 57, 58, 59]]


@given(st.integers(1, 30), st.integers(1, 40), st.integers(4, 50), st.booleans())
def test_pieces_cover_the_continuation_once_and_fit(host, tokenizer, context, ids, positions, opened):
    seen = CausalTextModel(host, tokenizer)
    seen.positions = positions
    first = [tokenizer.bos_token_id] if opened else []
    before, after = first + list(range(1000, 1000 + context)), list(range(2000, 2000 + ids))
    joined = before + after
    covered = []
    for piece in seen._pieces(0, before, after):
        given_ids = piece.context_ids
        assert piece.pair == 0 and piece.start == len(covered) and given_ids
        assert len(given_ids) + len(piece.ids) <= positions
        tail = given_ids[1:] if opened else given_ids
        end = len(before) + piece.start
        assert tail == joined[end - len(tail) : end]
        covered += piece.ids
    assert covered == after


def test_a_closed_context_is_opened_again(host, tokenizer):
    class Closing:
        """The same tokenizer with a beginning and an end of sequence around every text."""

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, texts, add_special_tokens=True, **settings):
            out = tokenizer(texts, add_special_tokens=False, **settings)
            if add_special_tokens:
                bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
                out["input_ids"] = [[bos, *row, eos] for row in out["input_ids"]]
            return out

    seen = CausalTextModel(host, PromptFormat(tokenizer))
    seen.format.tokenizer = Closing()
    ids = tokenizer("12", add_special_tokens=False)["input_ids"]
    assert seen._context_ids(["12", ""]) == [[tokenizer.bos_token_id, *ids], [tokenizer.bos_token_id]]


def test_no_space_is_put_in_front_of_a_continuation(host, tokenizer):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", "\u2581", *"abcd\n", "\u2581ab", "ab", "cd", "abcd", "\u2581cd"]
    metaspace = Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)},
                                     [("a", "b"), ("c", "d"), ("\u2581", "ab"), ("\u2581", "cd"), ("ab", "cd")],
                                     unk_token="<unk>"))
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    metaspace.decoder = decoders.Metaspace(prepend_scheme="first")
    spaced = PreTrainedTokenizerFast(tokenizer_object=metaspace, eos_token="</s>", unk_token="<unk>")
    assert adds_space(spaced) and not adds_space(tokenizer)
    seen = CausalTextModel(host, spaced)
    told = [spaced.convert_ids_to_tokens(row) for row in seen._continuation_ids(["ab", " ab", "abcd", ""])]
    assert told == [["ab"], ["\u2581ab"], ["abcd"], []]


def test_nothing_asked_is_nothing_answered(host, tokenizer):
    seen = CausalTextModel(host, tokenizer)
    assert seen.log_likelihoods([]) == [] == seen.generate([], 5)
    assert seen.log_likelihoods([("12", "")]) == [(0.0, 0)]


def test_large_vocabularies_make_batches_smaller(host, tokenizer, monkeypatch):
    monkeypatch.setattr("text_model.MOST_LOGITS", 5 * host.config.vocab_size)
    sizes = []
    original = CausalTextModel._score
    monkeypatch.setattr(CausalTextModel, "_score", lambda self, model, device, batch, *rest: (
        sizes.append(len(batch) * max(len(piece.ids) for piece in batch)),
        original(self, model, device, batch, *rest))[1])
    seen = CausalTextModel(host, tokenizer, batch_size=64)
    found = seen.log_likelihoods([("12", "34")] * 5 + [("12", "3456789")])
    assert sizes == [4, 4, 7] or sizes == [4, 4, 2, 7] and len(found) == 6


# --- answers


@pytest.mark.parametrize("kind", ["host", "addon"])
def test_answers_are_the_greedy_ones_in_order(kind, host, addon, tokenizer):
    model = {"host": host, "addon": addon}[kind]
    prompts = ["Calculate 12 + 7", "x", "State the final answer to the following: 5 * 8", "2 _ 3 _"]
    prompt_format, done = PromptFormat(tokenizer), []
    model.train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    seen = CausalTextModel(model, prompt_format, batch_size=3)
    found = seen.generate(prompts, 5, done.append)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    model.eval()
    alone = [generate_texts(model, prompt_format, [prompt], Decoding(max_new_tokens=5))[0] for prompt in prompts]
    assert found == alone and len(set(found)) > 2 and done == [3, 4]
    assert seen.segments_used == (2 if kind == "addon" else None)


def test_autocast_covers_the_addon_and_not_its_bare_llm(addon, tokenizer):
    def seen(part: torch.nn.Module, **settings) -> bool:
        found: list[bool] = []
        hook = part.register_forward_pre_hook(lambda *_: found.append(torch.is_autocast_enabled("cpu")))
        asked = CausalTextModel(addon, tokenizer, autocast=lambda: torch.autocast("cpu", torch.bfloat16), **settings)
        asked.log_likelihoods(PAIRS[:1])
        asked.generate(["12"], 1)
        hook.remove()
        (value,) = set(found)
        return value

    assert seen(addon.model.addon.read) and not seen(addon.host, bare=True)


def test_a_prompt_that_leaves_less_room_gets_a_shorter_answer(host, tokenizer, monkeypatch):
    prompts = ["12", "1234567890", "1" * 50]
    whole = CausalTextModel(host, tokenizer).generate(prompts, 8)
    lengths = [len(ids) for ids in PromptFormat(tokenizer).prompts(prompts)]
    monkeypatch.setattr(host.config, "max_position_embeddings", lengths[1] + 3)
    done: list[int] = []
    found = CausalTextModel(host, tokenizer).generate(prompts, 8, done.append)
    short = CausalTextModel(host, tokenizer).generate([prompts[1]], 3)[0]
    assert found == [whole[0], short, ""] and done[-1] == 3 and short != whole[1]
