"""The model card of runs with own data, own tasks and other text to retain: names, entries, what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import export_model
import train
from tiny_rows import PLUGIN, sums, write
from tiny_runs import arguments

TASKS = ("--task", "none", "--tasks", "toy_add,chain_sum,doubles", "--task_config", "small", "--overlong", "drop")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder of the training machine, with data, texts, a template and a plugin."""
    place = tmp_path_factory.mktemp("machine")
    write(place / "ok.jsonl", sums(24))
    write(place / "held.jsonl", sums(40)[30:])
    texts = [{"text": f"The sea was calm on day {day}, and the boats stayed out."} for day in range(6)]
    write(place / "texts.jsonl", texts)
    (place / "turns.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %} =", encoding="utf-8")
    (place / "doubles.py").write_text(f"{PLUGIN}\nTASKS = {{'doubles': (Doubles, Config)}}\n", encoding="utf-8")
    return place


def own_flags(place: Path) -> list[str]:
    """Flags that name files by their absolute paths."""
    files = {"data": "ok.jsonl", "eval_data": "held.jsonl", "retain": "texts.jsonl", "chat_template": "turns.jinja",
             "plugin": "doubles.py", "log_csv": "all.csv", "cache_dir": "cache"}
    words = [word for flag, name in files.items() for word in (f"--{flag}", str(place / name))]
    return [*words, *TASKS, "--prompt_gate", "--cache_hidden", "disk", "--train_n", "8", "--verifier", "number"]


@pytest.fixture(scope="module")
def export(tiny_host, place):
    """Trains with the flags and returns the exported folder."""

    def exported(name: str, *flags: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("engine.loop.draw_curve", lambda *anything: None)
            assert train.main(arguments(tiny_host, place / "runs", *flags, "--run_name", name)) == 0
        to = place / "exported" / name
        argv = [str(place / "runs" / name), "--to", str(to), "--merge_host", "--device", "cpu"]
        assert export_model.main(argv) == 0
        return to

    return exported


@pytest.fixture(scope="module")
def own(export, place) -> Path:
    return export("own", *own_flags(place))


def test_no_file_of_a_run_on_own_data_holds_a_path_of_the_training_machine(own, place, tiny_host):
    for path in own.iterdir():
        if path.suffix != ".safetensors":
            text = path.read_text(encoding="utf-8")
            assert str(place) not in text and str(tiny_host.parent) not in text, path.name

    # Files are named, those that are a matter of the machine are not.
    card = (own / "README.md").read_text(encoding="utf-8")
    for words in ("--data ok.jsonl", "--eval_data held.jsonl", "--retain texts.jsonl", "--chat_template turns.jinja",
                  "--plugin doubles.py", "--cache_dir cache"):
        assert words in card
    assert "all.csv" not in card


def test_each_task_has_an_entry_of_its_own_and_own_data_are_named_as_such(own):
    (model,) = ModelCard.load(own / "README.md").data.to_dict()["model-index"]
    entries = {entry["dataset"]["config"]: entry for entry in model["results"]}
    named = {task: (entry["dataset"]["type"], entry["dataset"]["name"]) for task, entry in entries.items()}
    assert named == {
        "toy_add": ("built-in-task", "built-in task toy_add"),
        "chain_sum": ("reasoning-gym", "Reasoning Gym chain_sum"),
        "doubles": ("own-task", "own task doubles"),
        "ok": ("own-data", "own data ok"),
        "overall": ("mixture", "all tasks together"),
    }
    assert len(model["results"]) == len(entries)
    for entry in entries.values():
        assert [metric["type"] for metric in entry["metrics"]] == ["solved", "solved_strict", "solved_extracted"]


def test_the_card_says_what_is_true_of_other_prompts(own, export, place):
    alone = "was trained on the tasks above alone"
    gate = (own / "README.md").read_text(encoding="utf-8")
    assert "A gate decides for each prompt whether the add-on is on" in gate and "on for every prompt" not in gate
    assert "shut for text like that of `--retain texts.jsonl`" in gate and alone not in gate

    retained = (export("retained", "--retain", str(place / "texts.jsonl")) / "README.md").read_text(encoding="utf-8")
    assert "on for every prompt" in retained and alone not in retained
    assert "to leave text like that of `--retain texts.jsonl` as the LLM has it" in retained

    plain = (export("plain") / "README.md").read_text(encoding="utf-8")
    assert f"The add-on is on for every prompt, and {alone}" in plain and "retain" not in plain


def test_rates_of_another_protocol_do_not_pass_for_the_runs_own(export, place, tiny_host):
    def results(folder) -> list[dict]:
        return ModelCard.load(folder / "README.md").data.to_dict()["model-index"][0]["results"]

    def rows(folder) -> list[str]:
        text = (folder / "README.md").read_text(encoding="utf-8")
        return [line for line in text.splitlines() if line.startswith("| toy_add")]

    def exported(name: str) -> Path:
        run, to = place / "runs" / "measured", place / "exported" / name
        assert export_model.main([str(run), "--to", str(to), "--device", "cpu"]) == 0
        return to

    own = export("measured")
    again = ("--resume", str(place / "runs" / "measured"), "--eval_only", "--report", "0")
    other = ("--answer_from", "boxed", "--system_header", "Hello", "--few_shot", "1", "--eval_n", "3")
    assert train.main([*again, *other]) == 0
    both = exported("both")
    card = (both / "README.md").read_text(encoding="utf-8")
    assert results(both) == results(own) and rows(both)[:3] == rows(own)
    assert [row.split("|")[3].strip() for row in rows(both)] == ["4"] * 3 + ["3"] * 3
    named, _, behind = card.partition("Measured by another protocol than the run's own, ")
    assert "reads an answer as `--answer_from text` does" in named and "--few_shot 1" in behind
    assert "reads an answer as `--answer_from boxed` does" in behind
    assert "Answers were cut at so many tokens: 4 of the model, 4 of the bare LLM" in named

    # More items of the same protocol take the place of fewer.
    assert train.main([*again, "--eval_n", "5"]) == 0
    assert "(n = 5)" in results(exported("more"))[0]["metrics"][0]["name"]

    # Where the run's own measurement is gone, its name is not lent to another.
    table = place / "runs" / "measured" / "eval.csv"
    lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines[1:] if line.split(",")[4] == "3"]
    table.write_text("".join([lines[0], *kept]), encoding="utf-8")
    alone = exported("alone")
    assert "(n = 3; --system_header" in results(alone)[0]["metrics"][0]["name"]
    assert "The run's own protocol did not measure this checkpoint" in (alone / "README.md").read_text(encoding="utf-8")


def test_an_exported_llm_computes_attention_as_in_training(export, place):
    from transformers import AutoModelForCausalLM

    whole = export("eager", "--attn_implementation", "eager")
    named = place / "exported" / "eager-named"
    assert export_model.main([str(place / "runs" / "eager"), "--to", str(named), "--device", "cpu"]) == 0
    for folder in (whole, named):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert model.host.config._attn_implementation == "eager"
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="sdpa")
        assert model.host.config._attn_implementation == "sdpa"
        assert ", attention eager" in (folder / "README.md").read_text(encoding="utf-8")
