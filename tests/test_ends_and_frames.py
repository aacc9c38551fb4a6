"""Where an answer ends, and what stands around a question: all end ids of a family, a frame that checkpoints keep."""

from __future__ import annotations

import dataclasses
import json
import shutil
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import generate
import train
from addon.adapters import saved_format
from addon.baselines import BaselineConfig, BaselineController
from batching import PromptConfig, PromptFormat
from evaluation import Decoding, answer, generate_answers, stop_ids
from grpo.measure import completions
from host import ROOT, end_ids, load_host, load_tokenizer
from reasoning_gym_wrapper import Reserve, make_tasks
from text_data.frames import Frame
from text_model import CausalTextModel
from tiny_runs import arguments, newest, only_run, tiny_model

SUMS = make_tasks(["chain_sum"], "small")
DATED = "{{ strftime_now('%f') }}{% for m in messages %}|{{ m['role'] }}|{{ m['content'] }}{% endfor %}|assistant|"


def edit(path: Path, **changes) -> None:
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**document, **changes}), encoding="utf-8")


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """The embedded LLM in float32, which answers sums and stops by itself."""
    folder = tmp_path_factory.mktemp("original") / "host"
    shutil.copytree(ROOT / "assets/tiny_host", folder)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def turned(original, tmp_path_factory) -> Path:
    """The same LLM, whose tokenizer calls another token the end: what ends its answers stands in generation_config."""
    folder = tmp_path_factory.mktemp("turned") / "host"
    shutil.copytree(original, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]

    # Its old end becomes an ordinary token by a new name.
    vocabulary["<end_of_turn>"] = vocabulary.pop("<|eos|>", 2)
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<|eos|>"]
    tokenizer["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    edit(folder / "tokenizer_config.json", eos_token="<|system|>")
    edit(folder / "config.json", eos_token_id=3)
    edit(folder / "generation_config.json", eos_token_id=[3, 2])
    return folder


def held_out(n: int = 8):
    return Reserve(SUMS, n).examples


def opened(folder: Path):
    host = load_host(str(folder))
    return host, PromptFormat(load_tokenizer(str(folder)), rows=host.config.vocab_size)


@pytest.fixture(scope="module")
def both(original, turned):
    return opened(original), opened(turned)


# --- every end --------------------------------------------------------------------------------------------------------


def test_an_end_that_only_generation_config_names_ends_the_bare_llms_answers(both):
    decoding = Decoding(max_new_tokens=24)
    as_made, as_turned = (answer(*pair, held_out(), decoding, thinks=False) for pair in both)
    assert [given.text for given in as_turned] == [given.text for given in as_made]
    assert all(given.finished for given in as_made) and all(given.finished for given in as_turned)


def test_the_suite_and_grpo_stop_at_it_too(both):
    questions = [example.question for example in held_out(4)]
    host, prompt_format = both[1]
    model = BaselineController(BaselineConfig(base_config=host.config), host).eval()
    texts, lengths, finished, _ = completions(model, prompt_format, questions, 24)
    assert all(finished) and max(lengths) < 24
    assert CausalTextModel(host, prompt_format).generate(questions, 24) == texts
    assert not any("end_of_turn" in text for text in texts)


def test_ends_are_gathered_from_all_that_name_them():
    def owner(eos, **more):
        return types.SimpleNamespace(eos_token_id=eos, **more)

    text = owner([5, 6], vocab_size=10)
    config = owner(7, get_text_config=lambda: text)
    model = types.SimpleNamespace(config=config, generation_config=owner([8, 12, -1]))
    assert end_ids(model, owner(1)) == {1, 5, 6, 7, 8}, "12 and -1 are no rows of the table"
    model = types.SimpleNamespace(config=owner(None, get_text_config=lambda: text))
    text.eos_token_id = None
    assert end_ids(model, owner(3)) == {3}


def test_an_adapter_stops_where_its_llm_does(turned):
    model = tiny_model(turned)
    _, prompt_format = opened(turned)
    assert stop_ids(model, prompt_format) == stop_ids(model.host, prompt_format) == [2, 3]
    with model.bare() as bare:
        assert stop_ids(bare, prompt_format) == [2, 3]
    untrained = generate_answers(model.eval(), prompt_format, ["1 + 1 ="], 24, Decoding(), torch.device("cpu"))
    assert 0 < untrained[0].tokens <= 24


def test_grpo_reads_completions_without_their_end(turned):
    from grpo.stage_trainer import StageTrainer

    _, prompt_format = opened(turned)
    trainer = StageTrainer.__new__(StageTrainer)
    trainer.format = prompt_format
    trainer.eos_token_ids = [2, 3]
    ids = prompt_format.tokenizer("12", add_special_tokens=False)["input_ids"]
    shown = "12<end_of_turn>"
    messages = [{"role": "assistant", "content": shown}]
    cut = trainer._cut([shown, messages], [[*ids, 2], [*ids, 2]])
    assert cut == ["12", [{"role": "assistant", "content": "12"}]]


def test_grpo_samples_to_every_end_and_pads_within_the_table(turned, tmp_path, monkeypatch):
    """TRL is given the ends that config alone names, and a pad that has an embedding."""
    from grpo import stage_trainer
    from grpo.problems import task_source, training_problems
    from grpo.stages import GrpoConfig, Stage

    class Built(Exception):
        pass

    built = []

    def train_nothing(trainer, **_):
        built.append(trainer)
        raise Built

    monkeypatch.setattr(stage_trainer.StageTrainer, "train", train_nothing)
    model = tiny_model(turned)
    model.generation_config.eos_token_id = None
    model.config.base_config.eos_token_id = [2, 3]
    tokenizer = load_tokenizer(str(turned))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    prompt_format = PromptFormat(tokenizer, rows=model.config.get_text_config().vocab_size)

    config = GrpoConfig(grpo_batch_size=4, num_generations=2, max_completion_length=4)
    stage = Stage(name="math", levels=(task_source({"chain_sum": {}}),), size=2, epochs=1, rewards={"math": 1.0},
                  eval_n=2, warm=1.0, config=config)
    run = stage_trainer.StageRun(stage, tmp_path, [lambda completions, **_: [0.0] * len(completions)], [1.0],
                                 log=lambda *_: None, stopped=lambda: False)
    with pytest.raises(Built):
        stage_trainer.train_stage(model, prompt_format, training_problems(stage.levels, 2, 0, set()), run)
    (trainer,) = built
    assert trainer.eos_token_ids == trainer.generation_config.eos_token_id == [2, 3]
    pads = {trainer.processing_class.pad_token_id, trainer.generation_config.pad_token_id}
    assert pads == {prompt_format.pad_id} and prompt_format.pad_id < 1536
    assert tokenizer.pad_token == "[PAD]", "the run's own tokenizer stays as it was"


# --- the end of a target ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("template", "end"), [
    ("{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<|user|>\n{% endif %}{% endfor %}A:",
     "<|user|>"),
    ("{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}\n<|user|>{% endif %}{% endfor %}A:",
     "<|user|>"),
    ("{% for m in messages %}{{ m['content'] }}{% endfor %}A:", "<|eos|>"),
    ("{% for m in messages %}{{ m['content'] }} and more{% endfor %}A:", "<|eos|>"),
    ("{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0]['content'] }}A:",
     "<|eos|>"),
])
def test_a_target_ends_as_the_chat_template_ends_a_turn(plain_tokenizer, template, end):
    plain_tokenizer.chat_template = template
    prompt_format = PromptFormat(plain_tokenizer)
    [target] = prompt_format.targets(["12"])
    assert plain_tokenizer.convert_ids_to_tokens(target[-1]) == end
    assert prompt_format.answer_text(torch.tensor(target)) == ("12", True)
    assert PromptFormat(plain_tokenizer, PromptConfig("plain")).frame.end == plain_tokenizer.eos_token_id


# --- a frame that changes from day to day -----------------------------------------------------------------------------


@pytest.fixture
def dated(tiny_host, tmp_path) -> Path:
    """A host whose template writes another frame at every call, as one with a date does every day."""
    folder = shutil.copytree(tiny_host, tmp_path / "dated")
    (folder / "chat_template.jinja").write_text(DATED, encoding="utf-8")
    return folder


NOTE = "writes another frame around a question today than in training"


def test_a_checkpoint_keeps_the_frame_of_its_prompts(dated, tmp_path, capsys, no_curve):
    runs = tmp_path / "runs"
    assert train.main(arguments(dated, runs, "--max_steps", "2")) == 0
    assert NOTE not in "".join(capsys.readouterr())
    checkpoint = newest(only_run(runs))
    kept = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))["frame"]
    assert kept["chat"] and kept["prefix"].endswith("|user|")

    # Going on, evaluating and answering ask in the words of training.
    assert train.main(["--resume", str(only_run(runs)), "--max_steps", "3"]) == 0
    assert NOTE in capsys.readouterr().err
    later = newest(only_run(runs))
    assert later != checkpoint
    assert json.loads((later / "adapter_config.json").read_text(encoding="utf-8"))["frame"] == kept

    assert train.main(["--resume", str(later), "--eval_only"]) == 0
    assert NOTE in capsys.readouterr().err
    assert generate.main(["--checkpoint", str(later), "--prompt", "1 + 1", "--device", "cpu"]) == 0
    assert NOTE in capsys.readouterr().err


def test_a_frame_is_rendered_anew_where_another_is_wanted_or_none_was_kept(tokenizer):
    frame = Frame("<", ">", chat=True, end=7)
    document = {"prompt": dataclasses.asdict(PromptConfig("chat")), "frame": dataclasses.asdict(frame)}
    rows = len(tokenizer)
    kept, note = saved_format(document, tokenizer, rows)
    assert kept.frame == frame and NOTE in note and kept.targets(["1"])[0][-1] == 7
    assert saved_format(document, tokenizer, rows, PromptConfig("chat"))[0].frame == frame
    other, note = saved_format(document, tokenizer, rows, PromptConfig("chat", "Be brief."))
    assert "Be brief." in other.prefix and note is None

    # A checkpoint of before: today's frame, and the end that its targets had.
    del document["frame"]
    old, note = saved_format(document, tokenizer, rows)
    assert note is None and old.frame == dataclasses.replace(PromptFormat(tokenizer).frame, end=tokenizer.eos_token_id)


# --- ids beyond the table ---------------------------------------------------------------------------------------------


def test_a_pad_beyond_the_table_is_replaced(plain_tokenizer):
    rows = len(plain_tokenizer)
    plain_tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    prompt_format = PromptFormat(plain_tokenizer, rows=rows)
    assert plain_tokenizer.pad_token_id == rows and prompt_format.pad_id < rows
    batch = prompt_format.batch(held_out(3))
    assert batch.input_ids.max() < rows


def test_a_token_beyond_the_table_is_named_before_anything_trains(tiny_host, tmp_path, call):
    folder = shutil.copytree(tiny_host, tmp_path / "more")
    tokenizer = load_tokenizer(str(folder))
    rows = len(tokenizer)
    tokenizer.add_tokens(["problem"])
    tokenizer.save_pretrained(folder)
    status, _, err = call("--model_name", str(folder), "--task", "chain_sum", "--task_config", "small")
    assert status == 2 and len(err.strip().splitlines()) == 1
    assert f"'problem' (id {rows})" in err and f"{rows} embeddings" in err

    with pytest.raises(ValueError, match="problem"):
        PromptFormat(tokenizer, rows=rows).prompts(["a problem"])
    with pytest.raises(ValueError, match="problem"):
        PromptFormat(tokenizer, rows=rows).targets(["no problem"])
    model = load_host(str(folder))
    with pytest.raises(ValueError, match="problem"):
        CausalTextModel(model, PromptFormat(tokenizer)).log_likelihoods([("a", " problem")])


def test_an_end_beyond_the_table_is_refused(plain_tokenizer):
    rows = len(plain_tokenizer)
    plain_tokenizer.add_special_tokens({"eos_token": "<|stop|>"})
    with pytest.raises(ValueError, match=r"<\|stop\|>.*no answer could end"):
        PromptFormat(plain_tokenizer, rows=rows)


def test_a_run_on_a_host_whose_pad_has_no_embedding(tiny_host, tmp_path, call, no_curve):
    folder = shutil.copytree(tiny_host, tmp_path / "padded")
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    status, _, err = call("--model_name", str(folder))
    assert status == 0, err


# --- a space in front of every text -----------------------------------------------------------------------------------


def sentence_piece(kind: str):
    """A tokenizer as SentencePiece makes them, with a space in front of every text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    corpus = ["What is 12 + 7? Answer: 19", "Sort the words: b a c Answer: a b c", "The answer: 345\nAnswer: x"] * 4
    alphabet = sorted(set("".join(corpus)) | {"▁", "\n", "\t"})
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(
            vocab_size=90, special_tokens=special, unk_token="<unk>", initial_alphabet=alphabet, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(
            vocab_size=120, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(corpus, trainer)
    if kind == "llama":  # Llama 2: one text without cuts, whose spaces are signs
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>",
        additional_special_tokens=special[3:], clean_up_tokenization_spaces=False, padding_side="left",
    )


@pytest.mark.parametrize("kind", ["metaspace", "llama", "unigram"])
@pytest.mark.parametrize("style", ["plain", "chat"])
@pytest.mark.parametrize("sentinel", [None, " x"])
def test_an_answer_is_taught_as_it_follows_the_prompt(kind, style, sentinel):
    tokenizer = sentence_piece(kind)
    tokenizer.chat_template = "[INST] {{ messages[0]['content'] }} [/INST] Answer:"
    prompt_format = PromptFormat(tokenizer, PromptConfig(style, sentinel=sentinel))
    lead = "" if style == "chat" else " "
    for question, target in (("What is 12 + 7?", "19"), ("Sort: b a", "a b"), ("What", "345 4\n5"), ("is", "7 is 12")):
        [prompt], [ids] = prompt_format.prompts([question]), prompt_format.targets([target])
        text = prompt_format.prefix + question + prompt_format.suffix + lead + target + (sentinel or "")
        joint = tokenizer(text, add_special_tokens=style == "plain")["input_ids"]
        assert prompt + ids[:-1] == joint, tokenizer.convert_ids_to_tokens(ids)
        if kind != "unigram" or style == "plain":
            assert tokenizer.decode(prompt + ids[:-1]) == tokenizer.decode(joint)
        assert prompt_format.answer_text(torch.tensor(ids)) == (target, True)


def test_a_text_of_plain_style_comes_back_whole():
    for kind in ("metaspace", "llama"):
        tokenizer = sentence_piece(kind)
        prompt_format = PromptFormat(tokenizer, PromptConfig("plain"))
        [prompt], [ids] = prompt_format.prompts(["What is 12 + 7?"]), prompt_format.targets(["19"])
        assert tokenizer.decode(prompt + ids[:-1]) == "What is 12 + 7?\nAnswer: 19"


def test_a_prompt_that_ends_in_a_space_is_not_given_another():
    tokenizer = sentence_piece("llama")
    tokenizer.chat_template = "[INST] {{ messages[0]['content'] }} [/INST] "
    prompt_format = PromptFormat(tokenizer, PromptConfig("chat"))
    [prompt], [ids] = prompt_format.prompts(["What"]), prompt_format.targets(["19"])
    text = prompt_format.prefix + "What" + prompt_format.suffix + "19"
    joint = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(prompt + ids[:-1]) == tokenizer.decode(joint)


# --- another chat template --------------------------------------------------------------------------------------------

THINKING = (
    "{% for turn in messages %}<|user|>{{ turn.content }}{% endfor %}<|assistant|>"
    "{% if enable_thinking is not defined or enable_thinking %}think{% else %}answer{% endif %}"
)


def test_a_template_file_and_its_variables_write_the_frame(tokenizer, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text(THINKING)
    own = tokenizer.chat_template
    try:
        assert PromptFormat(tokenizer, PromptConfig(chat_template=str(file))).suffix == "<|assistant|>think"
        config = PromptConfig(chat_template=str(file), chat_template_kwargs='{"enable_thinking": false, "date": null}')
        trained = PromptFormat(tokenizer, config)
        assert (trained.prefix, trained.suffix) == ("<|user|>", "<|assistant|>answer")

        assert trained.frame.template.endswith(THINKING)

        # A checkpoint asks as it was trained to, with the file and without it.
        document = {"prompt": dataclasses.asdict(config), "frame": dataclasses.asdict(trained.frame)}
        rows = len(tokenizer)
        for _ in range(2):
            tokenizer.chat_template = own
            asked, note = saved_format(document, tokenizer, rows)
            assert asked.frame == trained.frame and note is None
            assert tokenizer.chat_template == trained.frame.template, "an export hands on what was trained with"
            file.unlink(missing_ok=True)
    finally:
        tokenizer.chat_template = own


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ("{thinking}", "is no JSON"),
        ("[1]", "expected a JSON object"),
        ('{"messages": []}', "'messages' is no variable"),
        ('{"a-b": 1}', "'a-b' is no variable"),
        ('{"none": 1}', "'none' is no variable"),
        ('{"a": NaN}', "NaN is no number"),
    ],
)
def test_variables_that_no_template_can_be_given_are_refused(tokenizer, values, told):
    with pytest.raises(ValueError, match=f"--chat_template_kwargs.*{told}"):
        PromptFormat(tokenizer, PromptConfig(chat_template_kwargs=values))


def test_a_template_that_is_not_there_is_refused(tokenizer, plain_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="--chat_template .* cannot be read: No such file or directory"):
        PromptFormat(tokenizer, PromptConfig(chat_template=str(tmp_path / "none.jinja")))
    with pytest.raises(ValueError, match="needs a chat template, this tokenizer has none"):
        PromptFormat(plain_tokenizer, PromptConfig(chat_template_kwargs='{"a": 1}'))


def test_nested_values_reach_the_template_as_they_are(tokenizer):
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ messages[0].content }}|{{ a[0] is none }}|{{ a[1].b }}|{{ c }}"
        values = json.dumps({"a": [None, {"b": True}], "c": "\U0001d11e %}"}, ensure_ascii=False)
        assert PromptFormat(tokenizer, PromptConfig(chat_template_kwargs=values)).suffix == "|True|True|\U0001d11e %}"
    finally:
        tokenizer.chat_template = own
