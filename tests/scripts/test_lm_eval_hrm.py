"""lm_eval_hrm: the harness sees what we see. Without the optional package only its own command line is tested."""

from __future__ import annotations

import fnmatch
import json
from types import SimpleNamespace

import pytest

import lm_eval_hrm
import train
from engine.files import json_lines
from script_tools import run_script
from tiny_runs import arguments, records

HARNESS = lm_eval_hrm.register_model is not None
needs_harness = pytest.mark.skipif(not HARNESS, reason="lm-eval is not installed")
RUN = ("--task_config", '{"max_value": 4}', "--eval_n", "8", "--max_steps", "40", "--lr", "0.02", "--warmup_steps", "0",
       "--ema", "0", "--batch_size", "8", "--run_name", "mine", "--log_steps", "40")


@pytest.mark.skipif(HARNESS, reason="lm-eval is installed")
def test_a_missing_package_is_one_line(capsys):
    with pytest.raises(SystemExit) as left:
        lm_eval_hrm.main(["runs/NAME", "--tasks", "gsm8k"])
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("not installed; run: pip install lm-eval")


class Tasks:
    """As much of the harness's `TaskManager` as names are looked up in."""

    all_tasks = ["gsm8k", "hellaswag", "mmlu_law", "mmlu_virology"]

    def match_tasks(self, names):
        return [task for task in self.all_tasks if any(fnmatch.fnmatch(task, name) for name in names)]


def test_names_of_tasks_are_looked_up_before_anything_loads():
    assert lm_eval_hrm.chosen_tasks("gsm8k, mmlu_*", Tasks()) == ["gsm8k", "mmlu_law", "mmlu_virology"]
    told = {"nosuchtask": "list them by: lm_eval ls", "gsm8k,gsm8": "nearest names are gsm8k", ",": "names no task"}
    for text, words in told.items():
        with pytest.raises(ValueError, match=f"^--tasks .* .*{words}"):
            lm_eval_hrm.chosen_tasks(text, Tasks())


@needs_harness
def test_an_unknown_task_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lm_eval_hrm.py", "runs/NAME", "--tasks", "nosuchtask"])
    assert run_script(lm_eval_hrm.main) == 2
    assert capsys.readouterr().err.startswith("lm_eval_hrm.py: error: --tasks nosuchtask is no task of the harness: ")


def test_an_answer_is_cut_at_the_first_stop():
    assert lm_eval_hrm.cut_at("12\n\nQ: 3", ("Q:", "\n")) == "12" and lm_eval_hrm.cut_at("12", ()) == "12"


@pytest.fixture(scope="module")
def run(tiny_host, tmp_path_factory):
    """A tiny run that has learnt some sums, in a chat frame; its folder."""
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.loop.draw_curve", lambda *arguments: None)
        assert train.main(arguments(tiny_host, place, *RUN)) == 0
    return place / "mine"


def task_file(folder, items) -> None:
    """A task of the harness over the run's own items, judged by exact match."""
    (folder / "items.json").write_text(json.dumps(items), encoding="utf-8")
    (folder / "ours.yaml").write_text(json.dumps({
        "task": "ours", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "items.json")}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{question}}",
        "doc_to_target": "{{gold}}",
        "generation_kwargs": {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }), encoding="utf-8")


@needs_harness
def test_the_same_items_give_the_same_solved_rate(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    items = [line for _, line in json_lines(run / "predictions.jsonl")]
    task_file(tmp_path, [{"question": item["question"], "gold": item["gold"]} for item in items])
    (solved,) = [row for row in records(run)["eval"] if row["metric"] == "solved"]
    assert 0 < float(solved["value"]) < 1, "the comparison says something"

    told = ["--tasks", "ours", "--include_path", str(tmp_path), "--compare", "--device", "cpu", "--batch_size", "3"]
    assert lm_eval_hrm.main([str(run), *told, "--to", str(tmp_path / "results.json")]) == 0
    table = capsys.readouterr().out.splitlines()
    (heading,) = [line for line in table if line.startswith("task")]
    assert heading.split()[2:] == ["bare", "LLM", "with", "the", "add-on"]
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    rates = {who: tasks["ours"]["exact_match,none"] for who, tasks in results.items()}
    assert rates["with the add-on"] == pytest.approx(float(solved["value"]))
    assert rates["bare LLM"] == pytest.approx(float(solved["bare"]))


def requests(*arguments) -> list:
    return [SimpleNamespace(args=given) for given in arguments]


@needs_harness
@pytest.mark.parametrize("bare", [0, 1])
def test_texts_are_those_of_the_run_in_any_batch(run, bare):
    lines = [line for _, line in json_lines(run / "predictions.jsonl")]
    asked = requests(*((line["question"], {"until": [], "max_gen_toks": 4}) for line in lines))
    expected = [line["bare_prediction" if bare else "prediction"] for line in lines]
    for size in (1, 5):
        model = lm_eval_hrm.HRMEvalModel.create_from_arg_string(
            f"checkpoint={run},bare={bare},batch_size={size},device=cpu")
        assert model.generate_until(asked) == expected


@needs_harness
def test_likelihoods_add_up_and_tell_what_greedy_decoding_says(run):
    model = lm_eval_hrm.HRMEvalModel(str(run), device="cpu", frame=0)
    context = "Calculate 5 * 8."
    pairs = [(context, text) for text in (" answer", " 7", "state", "?")]
    whole = model.loglikelihood(requests(*pairs))
    alone = [model.loglikelihood(requests(pair))[0] for pair in pairs]
    assert [value for value, _ in whole] == pytest.approx([value for value, _ in alone], abs=1e-4)
    assert all(value < 0 for value, _ in whole)
    for (_, text), (value, is_greedy) in zip(pairs, whole, strict=True):
        scores = model.framed.token_scores([(context, text)])[0]
        assert is_greedy == bool(scores[1].all()) and value == pytest.approx(float(scores[0].sum()))
    bare = lm_eval_hrm.HRMEvalModel(str(run), bare=1, device="cpu")
    assert bare.loglikelihood(requests(*pairs)) != whole
    (rolling,) = bare.loglikelihood_rolling(requests((context,)))
    assert rolling == pytest.approx(bare.loglikelihood(requests(("", context)))[0][0])


@needs_harness
def test_what_is_not_offered_is_said(run):
    model = lm_eval_hrm.HRMEvalModel(str(run), device="cpu")
    with pytest.raises(ValueError, match="answers are greedy here, and a task asks for .*0.7"):
        model.generate_until(requests(("a", {"do_sample": True, "temperature": 0.7})))
    text = model.apply_chat_template([{"role": "user", "content": "What is 1 + 2?"}])
    assert text.endswith("<|assistant|>") and model.chat_template()
    asked = requests((text, {"max_gen_toks": 4}))
    plain = lm_eval_hrm.HRMEvalModel(str(run), device="cpu")
    assert model.generate_until(asked) == plain.generate_until(requests(("What is 1 + 2?", {"max_gen_toks": 4})))
    with pytest.raises(ValueError, match="leave the chat template out"):
        model.loglikelihood(requests(("a", "b")))
