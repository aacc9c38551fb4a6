"""scripts/pretrain_host.py: an honest, balanced corpus, a regular tokenizer, a run that resumes; the shipped folder."""

from __future__ import annotations

import collections
import importlib.util
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import reasoning_gym_wrapper as rg
from batching import PromptConfig, PromptFormat
from conftest import SPECIAL
from tasks.built_in import BUILT_IN

ROOT = Path(__file__).resolve().parent.parent.parent
SHIPPED = ROOT / "assets" / "tiny_host"
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
TASKS = ["chain_sum", "basic_arithmetic", "gcd"]
OPENINGS = {"chain_sum": "State the final answer", "gcd": "Find the Greatest Common Divisor"}
SIZES = "--documents 30 --steps 7 --batch_tokens 512 --hidden_size 64 --layers 2 --vocab_size 384 --threads 1".split()

spec = importlib.util.spec_from_file_location("pretrain_host", ROOT / "scripts" / "pretrain_host.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.fixture(scope="module", autouse=True)
def threads():
    """`--threads 1` is a setting of the process; the tests that follow get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(output: Path, save_every: int = 100, more: tuple[str, ...] = ()) -> Path:
    command = ["--output", str(output), "--tasks", ",".join(TASKS), "--save_every", str(save_every), *SIZES, *more]
    script.main(command)
    return output


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("made") / "host")


@pytest.fixture(scope="module")
def corpus() -> list[tuple[str, str]]:
    return script.draw_documents(TASKS, 300, 0)


# --- corpus -----------------------------------------------------------------------------------------------------------


def task_of(question: str) -> str:
    return next((name for name, opening in OPENINGS.items() if question.startswith(opening)), "basic_arithmetic")


def test_the_corpus_is_balanced_by_task(corpus):
    assert collections.Counter(task_of(question) for question, _ in corpus) == dict.fromkeys(TASKS, 300)
    # Shuffled: no long run of one task.
    assert len({task_of(question) for question, _ in corpus[:30]}) == 3


def test_half_of_it_is_small_and_half_default(corpus):
    terms = [len(re.findall(r"\d+", question)) for question, _ in corpus if task_of(question) == "chain_sum"]
    assert 100 < sum(count > 3 for count in terms) < 200  # default is 2 to 6 terms, so three of five are longer
    seen = {"small": set(), "default": set()}
    for level in seen:
        [task] = rg.make_tasks(["chain_sum"], level)
        stream = task.items(rg.train_seed(0))
        seen[level] = {next(stream)[1].question for _ in range(600)}
    asked = [question for question, _ in corpus if task_of(question) == "chain_sum"]
    assert all(question in seen["small"] | seen["default"] for question in asked)
    assert abs(sum(question in seen["small"] for question in asked) - 150) < 75


def reserved(names: list[str], n: int) -> dict[str, rg.Reserve]:
    """What evaluation reserves at either difficulty, told without the script's help."""
    tasks = [task for level in ("small", "default") for task in rg.make_tasks(names, level)]
    return {f"{task.name} {task.config}": rg.Reserve([task], n, must_fill=False) for task in tasks}


def test_no_evaluation_question_is_in_the_corpus(corpus, monkeypatch):
    evaluation = reserved(TASKS, 1024)
    for level, reserve in evaluation.items():
        assert not [question for question, _ in corpus if question in reserve], level

    # The rule bites: without it the same draws hold evaluation questions.
    monkeypatch.setattr(script, "RESERVED_PER_TASK", 1)
    careless = script.draw_documents(["chain_sum"], 300, 0)
    assert any(question in reserve for question, _ in careless for reserve in evaluation.values())


def test_answers_are_gold(corpus):
    for question, answer in corpus:
        if task_of(question) == "chain_sum":
            assert eval(question.split(":")[1].strip(" =")) == int(answer)  # noqa: S307 - digits and signs alone
            assert re.fullmatch(r"[\d +-]+", question.split(":")[1].strip(" ="))


def test_the_corpus_is_a_function_of_its_seed():
    random.seed(1)
    first = script.draw_documents(["gcd", "list_functions"], 20, 0)
    random.seed(2)
    assert first == script.draw_documents(["gcd", "list_functions"], 20, 0) != script.draw_documents(["gcd"], 20, 1)


def test_a_task_with_too_few_questions_is_named(monkeypatch):
    few = rg.Task("toy_add", {"max_value": 3})
    monkeypatch.setattr(script, "make_tasks", lambda names, level: [few])
    with pytest.raises(SystemExit, match="task toy_add has too few questions beside its evaluation set"):
        script.draw_documents(["toy_add"], 5, 0)


def test_the_default_tasks_are_many_reproducible_and_safe():
    assert len(script.TASKS) == len(set(script.TASKS)) >= 50
    assert set(script.TASKS) <= set(rg.registry()) - set(BUILT_IN)
    for kind in (rg.HASH_DEPENDENT, rg.EXECUTES_CODE, rg.NO_GOLD, rg.SCORES_ANYTHING):
        assert not set(script.TASKS) & set(kind)
    assert {"basic_arithmetic", "gsm_symbolic", "chain_sum", "simple_equations"} <= set(script.TASKS)
    assert script.parse([]).tasks.split(",") == script.TASKS
    assert script.RESERVED_PER_TASK >= 1024  # the largest evaluation set of the published commands


# --- tokenizer --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["trained here", "shipped"])
def any_tokenizer(request, corpus):
    from transformers import AutoTokenizer

    if request.param == "trained here":
        tempting = [("_ 1 _ 4\n_ _ 2 2\n" * 4, "x  12 __ 34   \n\n_ _")] * 100  # pairs that BPE would love to merge
        return script.train_tokenizer(corpus + tempting, 384)
    if not (SHIPPED / "tokenizer.json").is_file():
        pytest.skip("assets/tiny_host is not here")
    return AutoTokenizer.from_pretrained(SHIPPED)


def grids(side: int):
    cell = st.sampled_from(["_", *map(str, range(1, side + 1))])
    return st.lists(st.lists(cell, min_size=side, max_size=side), min_size=side, max_size=side)


@SHARED
@given(st.sampled_from([4, 9]).flatmap(grids), st.sampled_from(["", "Solve this puzzle:\n", "is:"]))
def test_every_row_of_a_sudoku_has_the_same_length(any_tokenizer, grid, before):
    """One token for each cell, each space and each end of line, wherever the grid stands."""
    text = before + "\n".join(" ".join(row) for row in grid) + "\n"
    tokens = any_tokenizer.tokenize(text)
    lead = len(any_tokenizer.tokenize(before))
    stride = 2 * len(grid)
    assert len(tokens) == lead + len(grid) * stride
    for place, row in enumerate(grid):
        of_row = tokens[lead + place * stride : lead + (place + 1) * stride]
        assert of_row[::2] == row and set(of_row[1:-1:2]) == {"Ġ"} and of_row[-1] == "Ċ"


@SHARED
@given(st.text("0123456789_ ", min_size=1, max_size=20), st.sampled_from(["", "x", "The", "\n", "="]))
def test_digits_underscores_and_the_spaces_before_them_are_tokens_of_their_own(any_tokenizer, text, before):
    tokens = any_tokenizer.tokenize(before + text)
    assert tokens[len(any_tokenizer.tokenize(before)) :] == [character.replace(" ", "Ġ") for character in text]


@SHARED
@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_text_survives_the_tokenizer(any_tokenizer, text):
    if not any(token in text for token in SPECIAL):
        assert any_tokenizer.decode(any_tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_special_tokens_template_and_sides(any_tokenizer):
    ids = [any_tokenizer.pad_token_id, any_tokenizer.bos_token_id, any_tokenizer.eos_token_id]
    assert None not in ids and len(set(ids)) == 3
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    prompt = any_tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|bos|><|system|>Be brief.<|user|>1 + 1?<|assistant|>"
    whole = any_tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "2"}], tokenize=False)
    assert whole == f"{prompt}2<|eos|>"
    assert any_tokenizer.padding_side == "left"


def test_prompts_look_like_the_documents_the_host_was_trained_on(any_tokenizer):
    """Chat and plain alike: what PromptFormat builds at evaluation, bos included, starts a document of the corpus."""
    rows = script.encode_documents(any_tokenizer, [("What is 1 + 2?", "3")] * 200, 0)
    documents = {tuple(row.tolist()) for row in rows}
    assert len(documents) == 2 and len(rows) == 200
    built = set()
    for style in ("chat", "plain"):
        prompt_format = PromptFormat(any_tokenizer, PromptConfig(style))
        [prompt], [target] = prompt_format.prompts(["What is 1 + 2?"]), prompt_format.targets(["3"])
        built.add((*prompt, *target))
        share = sum(row.tolist() == [*prompt, *target] for row in rows) / len(rows)
        assert share == pytest.approx(0.9 if style == "chat" else 0.1, abs=0.07)
    assert built == documents


def test_documents_that_are_too_long_are_left_out(any_tokenizer):
    rows = script.encode_documents(any_tokenizer, [("1" * 300, "2"), ("1" * 500, "2")], 0)
    assert len(rows) == 1 and len(rows[0]) <= script.MAX_TOKENS


# --- batches ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(40, 120), st.integers(0, 3))
def test_every_epoch_shows_each_document_once(lengths, budget, seed):
    rows = [np.full(length, place + 1) for place, length in enumerate(lengths)]
    batches = script.Batches(rows, budget, seed, pad=0)
    number = 0
    for _ in range(2):
        seen: list[int] = []
        while len(seen) < len(rows):
            batch = batches[number]
            number += 1
            # Rows of like length: lengths are sorted with a jitter below 8.
            assert batch.numel() <= budget + 8 * len(batch)
            for row in batch.tolist():
                place = row[0] - 1
                assert row == [place + 1] * lengths[place] + [0] * (len(row) - lengths[place])
                seen.append(place)
        assert sorted(seen) == list(range(len(rows)))
    # A batch is a function of its number alone: a resumed run, which starts in the middle, reads the same.
    resumed = script.Batches(rows, budget, seed, pad=0)
    for later in (number - 1, 0):
        assert torch.equal(resumed[later], batches[later])


# --- the run ----------------------------------------------------------------------------------------------------------


def weights(folder: Path) -> list[torch.Tensor]:
    [file] = folder.glob("*.safetensors")
    return list(load_file(file).values())


def generated(folder: Path) -> list[str]:
    from host import load_host, load_tokenizer

    host, prompt_format = load_host(str(folder)), PromptFormat(load_tokenizer(str(folder)))
    ids = torch.tensor(prompt_format.prompts(["State the final answer to the following arithmetic problem: 1 + 2 ="]))
    out = host.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    return [prompt_format.tokenizer.decode(row) for row in out[:, ids.shape[1] :]]


def test_the_result_is_a_host_that_loads_and_generates(made):
    assert len(generated(made)) == 1
    assert not made.with_name("host.work").exists()  # work files go once they are not needed
    assert {tensor.dtype for tensor in weights(made)} == {torch.bfloat16}
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["hidden_size"], config["num_hidden_layers"]) == ("llama", 64, 2)
    card = (made / "README.md").read_text(encoding="utf-8")
    assert "90 question-and-answer texts drawn from 3 Reasoning Gym tasks" in card and "less the 0 that are" in card
    assert re.search(r"\*\*Steps\*\*: 7 of about 512 tokens", card)


class Killed(Exception):
    pass


@pytest.mark.parametrize("last", [4, 5], ids=["at a save", "after a save"])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(made, tmp_path, monkeypatch, last):
    """The run dies before step `last`, its newest save is that of step 4; the files of both runs are the same bytes."""
    rate = script.learning_rate

    def dies(step, options):
        if step == last:
            raise Killed
        return rate(step, options)

    monkeypatch.setattr(script, "learning_rate", dies)
    with pytest.raises(Killed):
        run(tmp_path / "host", save_every=2)
    assert not (tmp_path / "host").exists()
    assert json.loads((tmp_path / "host.work" / "state" / "state.json").read_text(encoding="utf-8"))["step"] == 4

    steps = []
    monkeypatch.setattr(script, "learning_rate", lambda step, options: steps.append(step) or rate(step, options))
    monkeypatch.setattr(script, "draw_documents", None)  # the corpus is kept, not drawn again
    torch.manual_seed(99)
    random.seed(99)
    run(tmp_path / "host", save_every=3)
    assert sorted(set(steps)) == [4, 5, 6]
    assert sorted(path.name for path in made.iterdir()) == sorted(path.name for path in (tmp_path / "host").iterdir())
    for path in made.iterdir():
        assert path.read_bytes() == (tmp_path / "host" / path.name).read_bytes(), path.name


def test_another_seed_is_another_model(made, tmp_path):
    other = run(tmp_path / "host", more=("--seed", "1"))
    assert (made / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_a_work_folder_of_other_settings_is_refused(tmp_path, capsys):
    work = tmp_path / "host.work"
    work.mkdir()
    (work / "settings.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit, match="holds a run with other settings: delete it or repeat those"):
        run(tmp_path / "host")
    with pytest.raises(SystemExit):
        run(tmp_path / "other", more=("--steps", "0"))
    assert "--steps 0 must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "other.work").exists()


def test_training_lowers_the_loss(made, tmp_path):
    def final_loss(card: Path) -> float:
        return float(re.search(r"\(smoothed\): (\d+\.\d+) nats", card.read_text(encoding="utf-8")).group(1))

    longer = run(tmp_path / "host", more=("--steps", "40"))
    assert final_loss(longer / "README.md") < final_loss(made / "README.md") - 0.3


# --- the folder as shipped --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHIPPED / "README.md").is_file(), reason="assets/tiny_host is not here")
def test_the_shipped_host_keeps_its_promises():
    [file] = SHIPPED.glob("*.safetensors")
    assert file.stat().st_size < 9e6
    tensors = weights(SHIPPED)
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert 3e6 < sum(tensor.numel() for tensor in tensors) < 5e6
    config = json.loads((SHIPPED / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] in ("llama", "qwen2")
    [text] = generated(SHIPPED)
    assert re.match(r"-?\d+<\|eos\|>", text), text  # an answer in the form it was taught, right or wrong

    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    for said in (r"\*Data\*\*: \d+ ", r"\*Steps\*\*: \d+ ", r"loss\*\* \(smoothed\): \d\.\d+", r"license: apache-2\.0"):
        assert re.search(said, card), said
    named = re.search(r"^Tasks: (.*)\.$", card, re.MULTILINE).group(1).split(", ")
    assert len(named) >= 50 and f"{len(named)} Reasoning Gym tasks" in card
