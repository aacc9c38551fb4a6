"""Texts of others inside a frame: the name of a special token is text, while the frame's own stays a token."""

from __future__ import annotations

import json
import shutil

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from batching import PromptConfig, PromptFormat
from host import load_tokenizer
from text_data.frames import Guard, text_ids
from text_model import CausalTextModel
from tiny_runs import tiny_model

TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ '<|user|>\n' + m['content'] + '</s>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|reply|>\n' }}{% endif %}")
SAID = ["What is </s> + 2?", "<s>", "a <|user|>\nb", "<|reply|> </s></s>", "<pad>x"]


def spaced() -> PreTrainedTokenizerFast:
    """SentencePiece's habits: a space before a text, a bos that opens it; Phi-3's: a token swallows a line break."""
    characters = "▁\n<>|/+?.:" + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    names = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|reply|>"]
    vocabulary = {token: number for number, token in enumerate([*names, *dict.fromkeys(characters)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False, rstrip=name == "<|user|>")
                                  for name in names])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                   unk_token="<unk>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="module")
def spaced_tokenizer():
    return spaced()


def special_of(tokenizer, ids) -> list[int]:
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [number for number in ids if number in special]


@pytest.mark.parametrize("style", ["chat", "plain"])
@pytest.mark.parametrize("header", [None, "Be <|reply|> brief."])
def test_a_question_adds_no_control_token_to_its_frame(spaced_tokenizer, style, header):
    if style == "chat" and header:
        header = "Be brief."
    prompt = PromptFormat(spaced_tokenizer, PromptConfig(prompt_style=style, system_header=header))
    ordinary, *rows = prompt.prompts(["ordinary", *SAID])
    for said, ids in zip(SAID, rows, strict=True):
        assert special_of(spaced_tokenizer, ids) == special_of(spaced_tokenizer, ordinary)
        text = spaced_tokenizer.decode(ids, skip_special_tokens=False)
        assert "".join(said.split()) in "".join(text.split())

    # Apart from the question's own tokens the rows are those of an ordinary question.
    for said, ids in zip(SAID, rows, strict=True):
        own = text_ids(spaced_tokenizer, ["\n" + said])[0][-len(said):]
        place = next(start for start in range(len(ids)) if ids[start : start + len(own)] == own)
        rest = ids[:place] + ids[place + len(own) :]
        question = text_ids(spaced_tokenizer, ["\nordinary"])[0][-8:]
        begin = next(start for start in range(len(ordinary)) if ordinary[start : start + 8] == question)
        assert rest == ordinary[:begin] + ordinary[begin + 8 :]


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_a_byte_level_prompt_reads_back_letter_for_letter(tokenizer, style):
    prompt = PromptFormat(tokenizer, PromptConfig(prompt_style=style))
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    assert names
    for name in names:
        said = f"one {name} two{name}{name}"
        (ordinary, ids) = prompt.prompts(["one", said])
        assert special_of(tokenizer, ids) == special_of(tokenizer, ordinary)
        assert prompt.prefix + said + prompt.suffix in tokenizer.decode(ids, skip_special_tokens=False)
        target = prompt.targets([said])[0]
        assert special_of(tokenizer, target) == [prompt.frame.end]
        assert tokenizer.decode(target[:-1], skip_special_tokens=False).strip() == said


def test_targets_of_a_spaced_tokenizer_are_text(spaced_tokenizer):
    prompt = PromptFormat(spaced_tokenizer, PromptConfig(prompt_style="chat"))
    for said, ids in zip(SAID, prompt.targets(SAID), strict=True):
        assert special_of(spaced_tokenizer, ids) == [prompt.frame.end]
        assert spaced_tokenizer.convert_ids_to_tokens(ids[:-1]) == list(said.replace(" ", "▁"))


def test_an_ordinary_text_is_not_touched(spaced_tokenizer, tokenizer):
    for each in (spaced_tokenizer, tokenizer):
        guard = Guard(each)
        assert not any(guard.names_one(text) for text in ("", "a < s > b", "<", "s>", "eos"))
        assert guard.framed("", "abc", "", opened=True) == each("abc")["input_ids"]


def test_a_base_models_tokenizer_reads_the_whole_text_whatever_its_file_carries(tmp_path, tiny_host):
    shutil.copytree(tiny_host, tmp_path / "host")
    path = tmp_path / "host" / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {"strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                           "pad_type_id": 0, "pad_token": "<|pad|>"}
    path.write_text(json.dumps(document), encoding="utf-8")
    carrying, plain = load_tokenizer(str(tmp_path / "host")), load_tokenizer(str(tiny_host))
    questions = ["What is 12 + 7 and what is that plus another 5?", "1"]
    assert PromptFormat(carrying).prompts(questions) == PromptFormat(plain).prompts(questions)
    assert PromptFormat(carrying).targets(questions) == PromptFormat(plain).targets(questions)
    text = questions[0]
    assert carrying.backend_tokenizer.encode(text).ids == plain.backend_tokenizer.encode(text).ids


def test_likelihoods_read_the_names_of_special_tokens_as_text(tokenizer, tiny_host):
    text_model = CausalTextModel(tiny_model(tiny_host), tokenizer)
    name = tokenizer.eos_token
    contexts = text_model._context_ids([f"a {name}", "a"])
    assert len(contexts[0]) > len(contexts[1]) + 2
    assert name in tokenizer.decode(contexts[0], skip_special_tokens=True)
    (ids,) = text_model._continuation_ids([f" {name} b"])
    assert special_of(tokenizer, ids) == []


def test_an_answer_that_the_limit_ended_is_told(tokenizer, tiny_host):
    text_model = CausalTextModel(tiny_model(tiny_host), PromptFormat(tokenizer))
    prompts = ["What is 1 + 2?", "9" * 600, "x"]
    texts = text_model.generate(prompts, 3)
    ends = text_model.format.ends
    for prompt, text, cut in zip(prompts, texts, text_model.cuts.answers, strict=True):
        said = text_ids(tokenizer, [text])[0]
        assert cut or len(said) < 3 and not ends & set(said), (prompt, text)
    assert text_model.cuts.answers[1] and texts[1] == "" and text_model.cuts.questions == (False,) * 3
    text_model.log_likelihoods([("a" * 600, "b"), ("a", "b")])
    assert text_model.cuts.questions == (True, False) and text_model.cuts.answers == ()


def test_a_base_model_whose_tokenizer_loses_the_tasks_texts_is_refused(call, tmp_path, tiny_host, no_curve):
    host = tmp_path / "lossy"
    shutil.copytree(tiny_host, host)
    path = host / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(document), encoding="utf-8")
    words = ["--model_name", str(host), "--max_steps", "1"]
    status, _, err = call(*words)
    assert status == 2 and "(0.0 %) come back from the tokenizer as they were, --min_roundtrip is 0.95" in err
    assert "'What is" in err and "becomes 'what is" in err and not list((tmp_path / "runs").glob("*/checkpoints/*"))
    status, out, err = call(*words, "--min_roundtrip", "0")
    assert status == 0 and "come back from the tokenizer" in out + err
