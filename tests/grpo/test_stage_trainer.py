"""GRPO's stages: data, held-out questions, TRL on both systems, resuming, what is refused."""

from __future__ import annotations

import ast
import functools
import json
import math
import operator
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

import options
from batching import PromptConfig, PromptFormat, pad
from engine.files import json_lines
from engine.machine import Machine
from engine.records import normalise, question_hash
from engine.report import stamped
from engine.time_limit import TimeLimitError
from enhanced.config import EnhancedHRMConfig
from enhanced.model import create_hrm_model_and_tokenizer
from enhanced.reasoning_format import REASONING_TOKENS, format_score, split_completion
from enhanced.tokenizer import reasoning_tokenizer
from enhanced.training import token_batch
from grpo.measure import Change, Measured, change_table, completions, judge, measure
from grpo.problem_files import file_source
from grpo.problems import (
    FUNCTIONS,
    CodeSource,
    Problem,
    _tests,
    evaluation_problems,
    problem_of,
    sum_steps,
    task_source,
    training_problems,
)
from grpo.rewards import build_rewards
from grpo.stages import PUBLISHED, GrpoConfig, Stage, StagesConfig, hold_out, rewards_of, stages_of
from model import HRMController
from patience import HANG_S
from reasoning_gym_wrapper import Reserve, Task, for_evaluation
from sandbox.runner import confinement
from text_data.trained import TrainedQuestions, trained_by
from tiny_runs import error_lines, tiny_model

ROOT = Path(options.__file__).parent
SUMS = {"chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}}
ENHANCED = "--arch enhanced --objective grpo"


def parsed(words: str = ENHANCED, **changes) -> options.Options:
    return options.replace(options.parse(words.split()), **changes)


def given_stages(opts: options.Options) -> tuple[list[Stage], list[str]]:
    return stages_of(options.part(StagesConfig, opts))


def stage(levels=(SUMS,), **changes) -> Stage:
    settings = {"name": "math", "epochs": 1, "size": 2, "rewards": {"math": 1.0}, "eval_n": 2, "warm": 1.0}
    return Stage(**(settings | {"levels": tuple(map(task_source, levels))} | changes))


# --- data -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-99, 99), min_size=2, max_size=6), st.data())
def test_the_steps_of_a_sum_are_right_and_end_in_its_value(numbers, data):
    signs = data.draw(st.lists(st.sampled_from("+-"), min_size=len(numbers) - 1, max_size=len(numbers) - 1))
    text = str(numbers[0]) + "".join(f" {s} {n}" for s, n in zip(signs, numbers[1:], strict=True))
    steps = sum_steps(text)
    value = functools.reduce(
        lambda total, part: {"+": operator.add, "-": operator.sub}[part[0]](total, part[1]),
        zip(signs, numbers[1:], strict=True), numbers[0],
    )
    assert len(steps) == len(signs) and steps[-1].endswith(f" = {value}")
    for line in steps:
        left, right = line.split(" = ")
        a, sign, b = re.fullmatch(r"(-?\d+) ([+-]) (-?\d+)", left).groups()
        assert {"+": int(a) + int(b), "-": int(a) - int(b)}[sign] == int(right)


@given(st.text(max_size=60))
def test_the_steps_of_any_text_are_none_or_lines(text):
    steps = sum_steps(text)
    assert steps is None or all(isinstance(line, str) for line in steps)


@pytest.mark.parametrize("source", [task_source(SUMS), task_source({"syllogism": {}, "maze": {}}), CodeSource()])
def test_a_worked_example_is_well_formed_and_gets_every_reward(source):
    drawn = [problem for _, problem in zip(range(6), source.problems(5), strict=False)]
    texts = [problem.worked() for problem in drawn]
    assert all(format_score(text) == 1.0 for text in texts)
    wanted = {"format": 1.0} | ({} if isinstance(source, CodeSource) else {"verifier": 1.0})
    if source == task_source(SUMS) or "chain_sum" in drawn[0].task:
        wanted |= {"math": 1.0, "chain_of_thought": 1.0}
    functions, _ = build_rewards(wanted, tasks=getattr(source, "tasks", ()))
    assert judge(drawn, texts, functions) == {name: [1.0] * len(drawn) for name in wanted}


def test_a_share_of_the_warm_start_s_examples_guesses():
    from grpo.worked_examples import WorkedExamples

    made = {}
    for share in (0.0, 0.5, 1.0):
        examples = WorkedExamples([stage(guess=share)], set(), 0)
        made[share] = [text for _ in range(4) for _, text in examples.take(50)]
        guessed = sum("So it is" in text for text in made[share]) / 200
        assert abs(guessed - share) < 0.12 and (share == 0.5 or guessed == share)
        assert all(format_score(text) == 1.0 for text in made[share])
        again = WorkedExamples([stage(guess=share)], set(), 0)
        again.skip_to([[50, 3]])
        assert [text for _, text in again.take(50)] == made[share][150:]


def test_the_tests_of_every_tiny_function_hold_for_its_reference_and_not_for_another():
    drawn = [problem for _, problem in zip(range(60), CodeSource().problems(0), strict=False)]
    for problem in drawn:
        scope: dict = {}
        exec(problem.answer, scope)
        for test in problem.tests:
            exec(test, scope)
        broken = re.sub(r"return .*", "return None", problem.answer)
        with pytest.raises((AssertionError, NameError)):
            exec("\n".join([broken, *problem.tests]), {})
    assert len({problem.question for problem in drawn}) > 50


def test_the_tests_of_a_tiny_function_tell_it_from_every_other_one():
    """`return False` would else pass for most of `x > k`, and count as solved."""
    kinds = {told: kind for told, _, kind in FUNCTIONS}
    expressions = {kind: [e for _, e, k in FUNCTIONS if k == kind] for kind in kinds.values()}
    for told, expression, kind in FUNCTIONS:
        for k in (2, 5) if kind in ("text", "list") else (3, 12, 13, 99):
            names = {"a": "a", "b": "b", "k": k}
            heads = "a, b" if kind == "two" else "a"
            tests = _tests("f", f"def f({heads}): return {expression.format(**names)}", kind, k)
            for other in [*expressions[kind], "False", "True", "0", "''", "a"]:
                scope: dict = {}
                exec(f"def f({heads}): return {other.format(**names)}", scope)
                passed = all(_passes(test, scope) for test in tests)
                assert passed == (other == expression), (told, k, other)


def _passes(test: str, scope: dict) -> bool:
    try:
        exec(test, dict(scope))
    except (AssertionError, TypeError):
        return False
    return True


def test_the_solutions_of_a_task_with_few_are_split_between_evaluation_and_training():
    grids = stage(name="reasoning", levels=({"mini_sudoku": {}},), eval_n=20)
    held = hold_out([grids], 10**9)
    evaluated = {problem.example.group for problem in held.problems["reasoning"]}
    assert len(held.problems["reasoning"]) == 20
    assert all(for_evaluation("mini_sudoku", group) for group in evaluated)
    trained = {problem.example.group for problem in training_problems(grids.levels, 60, 0, held.reserved)}
    assert not any(for_evaluation("mini_sudoku", group) for group in trained)


def test_an_answer_of_0_in_a_file_is_an_answer(tmp_path):
    lines = '{"prompt": "1 - 1", "answer": 0}\n{"prompt": "1 + 1", "answer": 2}\n'
    (tmp_path / "p.jsonl").write_text(lines, encoding="utf-8")
    assert [problem.answer for problem in file_source(tmp_path / "p.jsonl").rows] == ["0", "2"]


def test_a_warm_start_without_an_answer_left_is_refused(tmp_path):
    """Else it would look for one for ever."""
    from grpo.worked_examples import WorkedExamples

    rows = [{"prompt": "Write f", "tests": ["assert f()"], "answer": "def f(): return 1"},
            {"prompt": "Write g", "tests": ["assert g()"]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    code = Stage("code", 1, 2, (file_source(tmp_path / "p.jsonl"),), {"code": 1.0}, 1, 1.0)
    assert "return 1" in WorkedExamples([code], {"write g"}, 0).take(1)[0][1]
    with pytest.raises(ValueError, match="no stage gives the warm start an example"):
        WorkedExamples([code], {"write f"}, 0)


def test_no_question_held_out_for_any_stage_is_trained_on_in_any(tmp_path):
    lines = [json.dumps({"prompt": f"Write f{i}", "tests": [f"assert f{i}() == {i}"]}) for i in range(20)]
    (tmp_path / "code.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    stages = [stage(name="format", eval_n=30), stage(name="math", eval_n=30, levels=(SUMS, SUMS)),
              stage(name="code", eval_n=30, levels=()).__class__("code", 1, 5, (file_source(tmp_path / "code.jsonl"),),
                                                                {"code": 1.0}, 30, 1.0)]
    held = hold_out(stages, 10**9)
    assert [len(held.problems[s.name]) for s in stages] == [30, 30, 4]
    for each in stages:
        drawn = training_problems(each.levels, 200, 0, held.reserved)
        assert len(drawn) == 200
        assert not {normalise(problem.question) for problem in drawn} & held.reserved


def test_questions_that_the_weights_were_trained_on_are_not_held_out():
    chosen = stage(eval_n=10)
    usual = [problem.question for problem in hold_out([chosen], 10**9).problems[chosen.name]]
    known = TrainedQuestions()
    for question in (usual[2].upper(), usual[5]):
        known.add(question)
    held = hold_out([chosen], 10**9, known)
    clean = [problem.question for problem in held.problems[chosen.name]]
    assert len(clean) == 10 and clean[:8] == [q for q in usual if q not in (usual[2], usual[5])]
    assert not any(question in known for question in clean) and held.note().startswith("2 evaluation questions are")
    few = stage(levels=({"toy_add": {"max_value": 3}},), eval_n=16)
    known.add(hold_out([few], 10**9).problems[few.name][0].question)
    with pytest.raises(ValueError, match="only 15 distinct questions of toy_add beside 1 that the checkpoint was"):
        hold_out([few], 10**9, known)


def test_levels_come_in_the_order_given():
    levels = [task_source({"chain_sum": {"min_terms": n, "max_terms": n}}) for n in (2, 3, 4)]
    drawn = training_problems(levels, 10, 0, set())
    terms = [problem.example.entry["metadata"]["num_terms"] for problem in drawn]
    assert terms == sorted(terms) and set(terms) == {2, 3, 4}
    assert len(evaluation_problems(levels, 10, 1)) == 10


@pytest.mark.parametrize(("text", "told"), [
    ('{"prompt": "p"}\n', "line 1 needs a prompt, and tests or an answer"),
    ('{"prompt": "p", "answer": "1"}\nnot json\n', "line 2 is no JSON record"),
    ('{"prompt": "p", "answer": "1"}\n{"prompt": "\\ud83d", "answer": "1"}\n', "line 2 is no JSON record (it holds"),
    ('{"prompt": "p", "answer": "1"}\n', "holds 1 problems"),
    ("[1]\n", "line 1 is no JSON record"),
])
def test_a_broken_file_of_problems_is_refused_in_one_line(tmp_path, text, told):
    path = tmp_path / "p.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        file_source(path)
    assert "\n" not in str(caught.value)


# --- stages -----------------------------------------------------------------------------------------------------------


def test_the_published_stages_have_the_published_epochs_sizes_and_settings():
    opts = options.parse(["--config", str(ROOT / "configs" / "enhanced_grpo.yaml")])
    for asked in (opts, parsed()):
        stages, problems = given_stages(asked)
        assert problems == []
        assert [s.name for s in stages] == ["format", "math", "reasoning", "code", "chain_of_thought"]
        assert [(s.epochs, s.size) for s in stages] == [(2, 200), (5, 500), (4, 500), (3, 300), (3, 400)]
        for each in stages:
            values = ("grpo_batch_size", "grpo_accum_steps", "num_generations", "max_completion_length", "grpo_lr")
            assert [getattr(each.config, name) for name in values] == [4, 2, 8, 256, 5e-5]
            config = each.config
            assert [getattr(config, name) for name in ("temperature", "loss_type", "beta")] == [1.0, "dapo", 0.0]
            assert each.rewards == PUBLISHED[each.name]["rewards"]
        shape = ("d_model", "n_heads", "n_planner_layers", "n_worker_layers", "max_cycles", "thought_dim")
        assert [getattr(asked, name) for name in shape] == [getattr(EnhancedHRMConfig(), name) for name in shape]
    assert options.parse(["--config", str(ROOT / "configs" / "enhanced_grpo_small.yaml")]).stages


@pytest.mark.parametrize(("stages", "told"), [
    ({"formt": {}}, ["there is no stage 'formt'"]),
    ({"math": {"rewards": {"math": -1}}}, ["stage math: the weight of math must be a finite number of 0 or more"]),
    ({"math": {"num_generations": 5}}, ["stage math: grpo_batch_size 4 x grpo_accum_steps 2 = 8 completions a step"]),
    ({"math": {"epochs": 0}, "code": {"lr": 1}}, ["stage math: epochs must be above 0", "stage code: unknown setting"]),
    ({"math": {"levels": [{"chain_sum": {"terms": 2}}]}}, ["stage math: task chain_sum has no config field terms"]),
    ({"math": {"levels": "absent.yaml"}}, ["stage math: levels "]),
    ({"math": {"levels": [{"countdown": {}}]}}, ["stage math: countdown executes code"]),
    ({"math": 3}, ["stage math: expected settings"]),
    ({"math": {"rewards": {"maths": 1}}}, ["stage math: unknown reward 'maths'"]),
    ({"math": {"rewards": {"math": 0}}}, ["stage math: no reward has a weight above 0"]),
    ({"math": {"rewards": "math"}}, ["stage math: rewards must be a mapping of names to weights"]),
    ({"math": {"loss_type": "grop"}}, ["stage math: loss_type must be one of dapo, grpo, bnpo"]),
    ({"math": {"size": 1, "grpo_batch_size": 16}}, ["stage math: size 1 is less than the 4 questions of one step"]),
])
def test_every_bad_stage_is_told_in_one_line_and_nothing_is_loaded_or_written(stages, told, capsys, monkeypatch,
                                                                              tmp_path):
    import train

    monkeypatch.setattr("grpo.run.GrpoRun.__init__", lambda *given: pytest.fail("a run was built"))
    words = [*ENHANCED.split(), "--stages", json.dumps(stages), "--save_dir", str(tmp_path / "runs")]
    assert train.main(words) == 2 and not (tmp_path / "runs").exists()
    lines = error_lines(capsys.readouterr().err)
    assert len(lines) == len(told)
    for line, part in zip(lines, told, strict=True):
        assert part in line


def test_whole_numbers_written_as_decimals_are_whole_numbers():
    given = {"size": 20.0, "eval_n": 4.0, "num_generations": 8.0, "max_completion_length": 6.0, "grpo_batch_size": 8.0}
    (chosen,), problems = given_stages(parsed(stages=json.dumps({"math": given})))
    assert problems == []
    for value in (chosen.size, chosen.eval_n, *(getattr(chosen.config, name) for name in list(given)[2:])):
        assert isinstance(value, int)


def test_a_stage_takes_its_problems_from_a_prepared_file(tmp_path):
    """As `scripts/build_reasoning_dataset.py --dataset mbpp` writes it."""
    row = {"answer": "def f(): return 1", "source": "mbpp", "tests": ["assert f() == 1"], "setup": "", "task_id": 1}
    path = tmp_path / "mbpp.jsonl"
    lines = [json.dumps({"prompt": f"Write f, number {n}.", **row}) + "\n" for n in range(9)]
    path.write_text("".join(lines), encoding="utf-8")
    opts = parsed(stages=json.dumps({"code": {"levels": str(path)}}), allow_unconfined_code=confinement() is not None)
    (code,), problems = given_stages(opts)
    assert problems == [] and code.levels == (file_source(path),)
    problem = next(code.levels[0].problems(0))
    functions, _ = rewards_of(code)
    assert judge([problem], [problem.worked()], functions) == {"code": [1.0], "format": [1.0]}


def tricks(problem: Problem) -> dict[str, str]:
    """What a model could find out instead of answering."""
    right, every = problem.worked(), " ".join(map(str, range(-50, 200)))
    solution = right.partition("</think>")[2]
    return {
        "nothing": "", "an empty think": f"<think></think>{solution}", "tags twice": right * 2,
        "two solutions": right + "<SOLUTION>0</SOLUTION>", "tags fifty times": "<think></think><SOLUTION>" * 50,
        "nested": f"<think><think>{right}</think></think>",
        "every number": f"<think>a</think><SOLUTION>{every}</SOLUTION>",
        "a solution per number": "<think>a</think>" + "".join(f"<SOLUTION>{n}</SOLUTION>" for n in range(99)),
        "the question": f"<think>a</think><SOLUTION>{problem.question}</SOLUTION>", "bare": problem.answer,
        "no thought": solution, "the answer in the thought": f"<think>{problem.answer}</think><SOLUTION>?</SOLUTION>",
        "early exit": "<think>a</think><SOLUTION>raise SystemExit(0)</SOLUTION>", "unicode": "\ud800\x00ü" * 99,
        "a megabyte": right + right[:40] * 25_000,
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_trick_earns_as_much_as_a_right_answer(name):
    opts = parsed(allow_unconfined_code=confinement() is not None)
    (chosen,) = [each for each in given_stages(opts)[0] if each.name == name]
    functions, weights = rewards_of(chosen)
    problem = next(chosen.levels[0].problems(3))
    texts = {"right": problem.worked(), **tricks(problem)}
    parts = judge([problem] * len(texts), list(texts.values()), functions)
    totals = dict(zip(texts, (sum(w * v for w, v in zip(weights, row, strict=True))
                              for row in zip(*parts.values(), strict=True)), strict=True))
    assert totals["right"] == pytest.approx(sum(weights))
    well_formed = {"every number", "the question", "the answer in the thought", "early exit"}
    for trick in tricks(problem):
        if name == "format" and trick in well_formed:  # that stage asks for nothing else
            assert totals[trick] <= totals["right"]
        else:
            assert totals[trick] < totals["right"], trick


@pytest.mark.parametrize(("words", "told"), [
    (f"{ENHANCED} --num_generations 3", "--grpo_batch_size 4 x --grpo_accum_steps 2 = 8 completions a step are not"),
    (f"{ENHANCED} --tokenizer nowhere", "--tokenizer nowhere"),
    ("--arch addon --objective grpo", "--arch addon --objective grpo needs --resume CHECKPOINT"),
    ("--arch addon --objective grpo --resume x --logit_bias_head", "does not see the bias of --logit_bias_head"),
    ("--arch addon --objective grpo --resume x --sentinel END", "cannot stop at --sentinel"),
    ("--arch addon --objective grpo --resume x --adapter lora", "--objective grpo cannot train --adapter lora"),
    (f"{ENHANCED} --logit_bias_head", "--logit_bias_head does nothing with --arch enhanced"),
    (f"{ENHANCED} --beta -1", "--beta -1.0 is not legal"),
    (f"{ENHANCED} --temperature 0", "--temperature 0.0 is not legal"),
    (f"{ENHANCED} --max_cycles 0", "--max_cycles 0 is not legal"),
    (f"{ENHANCED} --stages [1]", "--stages '[1]' is not legal: expected a JSON object"),
    (f"{ENHANCED} --trackers wandb", "--trackers wandb needs a package that is not installed; run: pip install wandb"),
    (f"{ENHANCED} --resume nowhere", "--resume 'nowhere' does not exist"),
    ("--arch hybrid --objective grpo --dataset synthetic", "--objective does nothing with --arch hybrid"),
])
def test_every_bad_flag_is_told_in_one_line_and_nothing_is_written(words, told, capsys, tmp_path):
    import train

    assert train.main([*words.split(), "--save_dir", str(tmp_path / "runs")]) == 2
    assert sum(told in line for line in error_lines(capsys.readouterr().err)) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("saved", "told"), [
    ({"logit_bias_head": True}, "does not see the bias of --logit_bias_head"),
    ({"adapter": "prompt"}, "--objective grpo cannot train --adapter prompt"),
])
def test_what_a_checkpoint_holds_is_checked_as_if_it_were_typed(saved, told):
    found = options.collect("--arch addon --objective grpo --resume x".split(), saved)[1]
    assert len(found) == 1 and told in found[0]


def test_a_tokenizer_that_hides_the_tags_is_told_in_one_line_and_nothing_is_written(plain_tokenizer, tmp_path, capsys):
    import train

    plain_tokenizer.add_special_tokens({"additional_special_tokens": list(REASONING_TOKENS)})
    plain_tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = [*ENHANCED.split(), "--tokenizer", str(tmp_path / "tokenizer"), "--save_dir", str(tmp_path / "runs")]
    assert train.main(words) == 2 and not (tmp_path / "runs").exists()
    (line,) = error_lines(capsys.readouterr().err)
    assert "decoding drops <think>" in line


def test_batch_4_accumulation_2_and_8_generations_are_fine():
    assert options.problems(parsed(f"{ENHANCED} --grpo_batch_size 4 --grpo_accum_steps 2 --num_generations 8")) == []


def test_trl_is_imported_by_grpo_alone_and_grpo_only_where_a_stage_runs():
    for path in ROOT.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = {name for node in tree.body for name in _imported(node)}
        anywhere = {name for node in ast.walk(tree) for name in _imported(node)}
        assert path.stem == "grpo" or "trl" not in anywhere, path
        assert "grpo" not in top, path


def _imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    return {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()


# --- measuring --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reasoner(tiny_host):
    return reasoning_tokenizer(str(tiny_host))


def tiny(reasoner, seed: int = 0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_hrm_model_and_tokenizer(32, 2, 2, 1, 1, 8, tokenizer=reasoner)[0]


def taught(reasoner, problems: list[Problem], steps: int = 60, guessed: tuple[bool, ...] = (False,)):
    """A model that knows these worked examples by heart, each in every one of the ways `guessed`."""
    model, prompt_format = tiny(reasoner), PromptFormat(reasoner)
    questions, answers = zip(*((p.question, p.worked(way)) for p in problems for way in guessed), strict=True)
    batch = token_batch(prompt_format, questions, answers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, prompt_format


def test_a_supervised_batch_scores_the_answer_alone_and_pads_on_both_outer_sides(reasoner):
    batch = token_batch(PromptFormat(reasoner), ["2 + 2?", "Calculate 5 * 8. What is it?"], ["4 and more", "40"])
    for ids, mask, labels in zip(*batch.values(), strict=True):
        scored = labels != -100
        assert torch.equal(ids[scored], labels[scored]) and bool(mask[scored].all())
        assert ids[scored][-1] == reasoner.eos_token_id
        assert not mask[0] or not mask[-1] or bool(mask.all())


def test_measuring_counts_what_the_verifier_and_the_format_say(reasoner):
    problems = [problem_of(example) for _, (_, example) in
                zip(range(3), task_source(SUMS).tasks[0].items(3), strict=False)]
    model, prompt_format = taught(reasoner, problems)
    functions, _ = rewards_of(stage(rewards={"math": 1.0, "format": 1.0}))
    model.train()
    found = measure(model, prompt_format, "math", problems, functions, 40)
    assert model.training
    assert found.completions == [problem.worked() for problem in problems]
    assert found.solved == [True] * 3 and found.format_rate == 1.0 and found.cycles == 2.0
    assert found.lengths == [len(row) for row in prompt_format.targets([p.worked() for p in problems])]
    rows = {row["metric"]: row for row in found.rows({"solved": 0.25})}
    assert rows["solved"]["value"] == rows["reward_math"]["value"] == 1.0 and rows["solved"]["bare"] == 0.25
    assert rows["solved"]["ci_low"] < 1.0 and rows["solved"]["n"] == 3
    short = measure(model, prompt_format, "math", problems, functions, 5)
    assert short.solved == [False] * 3 and short.format_rate == 0.0 and short.means()["truncated"] == 1.0


def test_rewards_and_measures_read_an_answer_as_the_prompt_format_says(reasoner, monkeypatch):
    from grpo import measure as grpo_eval

    problem = problem_of(next(task_source(SUMS).tasks[0].items(3))[1])
    text = f"It is <answer>{problem.answer}</answer>."
    monkeypatch.setattr(grpo_eval, "_completions", lambda *arguments: ([text], [1], [True], (0.0, 0)))
    for way, solved in (("text", False), ("tags", True)):
        functions, _ = rewards_of(stage(rewards={"verifier": 1.0}), tags=False, answer_from=way)
        prompt_format = PromptFormat(reasoner, PromptConfig(answer_from=way))
        found = measure(tiny(reasoner), prompt_format, "math", [problem], functions, 8, tags=False)
        assert (found.solved, found.rewards["verifier"][0] == 1.0) == ([solved], solved)


def test_measuring_is_greedy_whatever_the_model_s_own_decoding_is(reasoner):
    model, prompt_format = tiny(reasoner), PromptFormat(reasoner)
    texts = completions(model, prompt_format, ["2 + 2?", "3 + 3?"], 12)[0]
    model.generation_config.repetition_penalty = 9.0  # instruction-tuned models bring one
    assert completions(model, prompt_format, ["2 + 2?", "3 + 3?"], 12)[0] == texts


def test_a_code_reward_does_not_judge_what_has_no_tests(reasoner, monkeypatch):
    from grpo import measure as grpo_eval

    numbers = Problem("2 + 2?", "4", "file")
    tested = Problem("Write f", "def f(): return 4", "code", tests=("assert f() == 4",))
    texts = [numbers.worked(), tested.worked()]
    monkeypatch.setattr(grpo_eval, "_completions", lambda *arguments: (texts, [1, 1], [True, True], (0.0, 0)))
    for value in (1.0, 0.2):
        def code(prompts, completions, value=value, **columns):
            return [0.0, value]

        found = measure(tiny(reasoner), PromptFormat(reasoner), "math", [numbers, tested], [code], 8)
        assert found.solved == [True, value == 1.0]
    assert measure(tiny(reasoner), PromptFormat(reasoner), "math", [numbers, tested], [], 8).solved == [True, False]


def loop_over(tmp_path: Path, progress, log, chosen: Stage, eval_seed: int = 10**9):
    """A loop over one stage whose model is never asked for anything."""
    import types

    from grpo.stage_loop import StageLoop, StageLoopConfig

    machine = Machine(Accelerator(cpu=True), "none")
    prompt_format = types.SimpleNamespace(answer_from="text")
    trained = types.SimpleNamespace(
        machine=machine, folder=tmp_path, checkpoint=None, has_tags=True, model=None, prompt_format=prompt_format,
        trained=TrainedQuestions(),
    )
    held_out = hold_out([chosen], eval_seed)
    loop = StageLoop(trained, StageLoopConfig("", {}), [chosen], held_out, progress)
    loop.log = log
    return loop


def test_a_stage_s_start_is_measured_again_for_other_questions_or_rewards(tmp_path):
    import types

    from grpo.progress import GrpoProgress

    def start_of(chosen: Stage) -> float:
        log = types.SimpleNamespace(csv_path=tmp_path / "none", evaluation=lambda *rows: None, elapsed_s=0.0)
        loop = loop_over(tmp_path, GrpoProgress(2), log, chosen, eval_seed=0)
        loop._measure = lambda *given: measured.append(1) or Measured(
            "math", [], [], [], [], [], {name: [] for name in chosen.rewards}, None)
        start = loop._start_of(chosen, [], tmp_path)
        assert {f"reward_{name}" for name in chosen.rewards} <= start.keys()
        assert loop.progress.conditions["math"]["n"] == chosen.eval_n
        return len(measured)

    measured: list[int] = []
    weighted, larger = {"math": 1.0, "format": 0.5}, 3
    assert [start_of(stage()), start_of(stage())] == [1, 1]
    assert [start_of(stage(rewards=weighted)), start_of(stage(rewards=weighted, eval_n=larger))] == [2, 3]


def test_an_end_that_was_recorded_but_not_saved_is_recorded_once(tmp_path, monkeypatch):
    import sys
    import types

    from engine.logs import RunLog
    from grpo import stage_loop
    from grpo.progress import GrpoProgress

    stub = types.SimpleNamespace(
        StageRun=lambda chosen, *given, **named: types.SimpleNamespace(stage=chosen),
        train_stage=lambda *given: (True, 2),
    )
    monkeypatch.setitem(sys.modules, "grpo.stage_trainer", stub)
    monkeypatch.setattr(stage_loop, "newest_state", lambda place, warn: place / "state-2")
    chosen = stage()
    measured = Measured("math", [], [], [], [], [], {"math": []}, None)
    with RunLog(tmp_path, None, [], {}, True) as log:
        for step in (2, 4, 5):
            log.eval_rows(stamped(measured.rows(), step))
        loop = loop_over(tmp_path, GrpoProgress(2, start={"math": measured.means()}), log, chosen)
        loop._measure = lambda *given: measured
        loop._save = lambda after: None
        assert loop.run_stage(chosen, 0, types.SimpleNamespace(signal=None)) == 0
        lines = log.csv_path.read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[0] for line in lines if ",solved," in line] == ["2", "4"]


def test_a_start_of_which_a_kill_left_the_rows_alone_gets_its_predictions_and_no_second_rows(tmp_path):
    from engine.logs import RunLog
    from grpo.progress import GrpoProgress

    chosen = stage(rewards={"math": 1.0})
    problems = [Problem("1 + 1", "2", "math"), Problem("2 + 2", "4", "math")]
    measured = Measured("math", problems, ["2", "4"], [1, 1], [True] * 2, [True] * 2, {"math": [1.0, 1.0]}, None)
    with RunLog(tmp_path, None, [], {}, True) as log:
        log.eval_rows(stamped(measured.report().rows, 2))
        for _ in range(2):
            loop = loop_over(tmp_path, GrpoProgress(2), log, chosen)
            loop._measure = lambda *given: measured
            loop._start_of(chosen, [], tmp_path / "none")
            (tmp_path / "none" / "start.json").unlink()
        rows = log.csv_path.read_text(encoding="utf-8").splitlines()
        lines = log.predictions_path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 and sum(",solved," in row for row in rows) == 1


@pytest.mark.parametrize("asks", ["before the stage", "while it is measured"])
def test_a_signal_ends_the_stages_before_the_next_one_and_while_one_is_measured(tmp_path, monkeypatch, capsys, asks):
    import signal

    from engine.stopping import stop_point
    from grpo import stage_loop
    from grpo.progress import GrpoProgress

    def measure(*given):
        signal.raise_signal(signal.SIGTERM)
        stop_point()
        pytest.fail("the measurement went on")

    chosen = stage(rewards={"math": 1.0})
    loop = loop_over(tmp_path, GrpoProgress(2), None, chosen)
    loop.trained.resume = "the same command"
    loop.trained.trainer = SimpleNamespace(autocast=lambda: None)
    monkeypatch.setattr(stage_loop, "measure", measure)
    monkeypatch.setattr(stage_loop, "check_untouched", lambda *given: None)
    if asks == "before the stage":
        monkeypatch.setattr(type(loop.machine), "any_process", lambda self, own: True)
    else:
        monkeypatch.setattr(loop, "run_stage", lambda chosen, index, stop: loop._measure(chosen, []))
    status = loop.run()
    words = "before stage math" if asks == "before the stage" else "while stage math was measured"
    assert status == 143 and f"stopped {words}, saved; go on with: the same command" in capsys.readouterr().err


def test_grpo_on_the_add_on_keeps_off_what_its_deep_supervision_evaluates(capsys):
    import types

    from grpo.run import keep_off

    chosen = stage(name="task", eval_n=4)
    told: list[str] = []
    for n, new in ((8, 0), (1, 3)):
        reserved = Reserve(chosen.tasks, n, 10**9).questions
        machine = types.SimpleNamespace(say=told.append)
        held_out = hold_out([chosen], 10**9)
        older = TrainedQuestions(is_whole=False)  # a checkpoint that does not say what it was trained on
        keep_off(held_out, types.SimpleNamespace(reserved=frozenset(reserved), machine=machine, trained=older))
        assert reserved <= held_out.reserved
        assert len(told) == bool(new) and (not new or f"{new} of 4 held-out questions" in told[0])


def test_progress_is_read_as_older_checkpoints_hold_it(tmp_path):
    from engine.checkpoints import write_checkpoint
    from grpo.progress import PROGRESS, GrpoProgress, read_progress

    conditions = {"rewards": {"math": 1.0}, "n": 2, "questions": "0"}
    done = {"math": {"solved": 0.5}}
    record = {"step": 4, "done": done, "start": {}, "asked": {"math": conditions}, "elapsed_s": 1.5}
    weights = {"model": {"w": torch.ones(1)}}
    folder = write_checkpoint(tmp_path / "step-00000004", weights, {PROGRESS: json.dumps(record)})
    progress = read_progress(folder)
    assert progress == GrpoProgress(4, done, {}, {"math": conditions}, 1.5)
    assert json.loads(progress.document()) == record | {"left_out": 0}


def test_the_closing_table_shows_each_stage_from_its_start_to_its_end_with_intervals():
    start = {"solved": 0.25, "format_rate": 0.5, "reward_math": 0.25, "reward_format": 1.0}
    end = {"solved": 0.75, "format_rate": 1.0, "reward_math": 0.75, "reward_format": 1.0}
    head, row = change_table([Change("math", {"math": 1.0, "format": 0.5}, 100, start, end)]).splitlines()
    assert head.split() == ["stage", "n", "solved", "format", "reward"]
    assert row.split("  ")[0].split() == ["math"] and " 100 " in row
    assert "25.0 % [17.5, 34.3] -> 75.0 % [65.7, 82.5]" in row and "-> 100.0 % [96.3, 100.0]" in row
    assert row.endswith("0.500 -> 0.833")


# --- TRL --------------------------------------------------------------------------------------------------------------


class Everything:
    """What a stage is run with, and what it logged."""

    def __init__(self, folder: Path, the_stage: Stage, functions, stop_after: int | None = None):
        from grpo.stage_trainer import StageRun

        self.lines: list[tuple[int, dict]] = []
        self.run = StageRun(the_stage, folder, functions, [1.0] * len(functions),
                            log=lambda step, numbers: self.lines.append((step, numbers)),
                            stopped=lambda: stop_after is not None and self.seen >= stop_after)

    @property
    def seen(self) -> int:
        return max((step for step, _ in self.lines), default=0)


def length_reward(prompts, completions, completion_ids=None, **columns):
    """Differs inside every group, so that there is always something to learn."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def settings(**changes) -> GrpoConfig:
    base = {"max_completion_length": 6, "grpo_batch_size": 4, "grpo_accum_steps": 2, "num_generations": 4,
            "log_steps": 1, "grpo_save_every": 100, "grpo_lr": 1e-3}
    return options.part(GrpoConfig, parsed(**(base | changes)))


def problems_of(n: int) -> list[Problem]:
    return training_problems([task_source(SUMS)], n, 0, set())


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_a_stage_moves_the_weights_and_logs_every_metric(reasoner, tmp_path):
    from grpo.stage_trainer import train_stage

    model = tiny(reasoner)
    before, adaptive = weights_of(model), model.config.adaptive_cycles
    everything = Everything(tmp_path, stage(config=settings()), [length_reward, *rewards_of(stage())[0]])
    finished, steps = train_stage(model, PromptFormat(reasoner), problems_of(4), everything.run)
    assert finished and steps == len(everything.lines) == 2  # 4 questions x 4 completions / 8
    moved = {name for name, tensor in weights_of(model).items() if not torch.equal(tensor, before[name])}
    assert {"model.embed_tokens.weight", "model.worker.0.qkv.weight"} <= moved
    assert not any(name.startswith(("thought_head", "model.gate")) for name in moved)
    for name in ("reward", "reward_math", "reward_length_reward", "frac_reward_zero_std", "policy_loss", "grad_norm",
                 "entropy", "clip_ratio", "mean_length", "truncated", "repetition", "cycles_used"):
        assert name in everything.lines[0][1], name
    assert everything.lines[0][1]["cycles_used"] == 2.0
    assert "forward" not in vars(model) and model.config.adaptive_cycles == adaptive


def stopping(reasoner):
    """A model whose gate stops every token after its first cycle wherever the gate is asked."""
    model = tiny(reasoner)
    with torch.no_grad():
        model.model.gate.outer.weight.zero_()
        model.model.gate.outer.bias.copy_(torch.tensor([-20.0, 20.0]))
    return model


@pytest.fixture(params=["enhanced", "addon", "addon with LoRA"])
def system(request, tiny_host, tokenizer, reasoner):
    """(model, prompt format): of each, one whose habits in training and evaluation differ as much as they can."""
    if request.param == "enhanced":
        return stopping(reasoner), PromptFormat(reasoner)
    lora = {"lora_layers": 1} if "LoRA" in request.param else {}
    model = tiny_model(tiny_host, init_state="random", segments=2, train_injector_scale=0.5, **lora)
    return model, PromptFormat(tokenizer)


@pytest.mark.parametrize("loss_type", options.FIND["loss_type"].choices)
def test_every_loss_type_takes_a_step(reasoner, tmp_path, loss_type):
    from grpo.stage_trainer import train_stage

    model = tiny(reasoner)
    before = weights_of(model)
    everything = Everything(tmp_path, stage(config=settings(loss_type=loss_type)), [length_reward])
    assert train_stage(model, PromptFormat(reasoner), problems_of(4), everything.run) == (True, 2)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights_of(model).items())


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
def test_a_stage_follows_the_schedule_of_the_flags_from_its_first_step_on(scheduler):
    from grpo.stage_trainer import StageTrainer

    trainer = StageTrainer.__new__(StageTrainer)
    trainer.schedule = GrpoConfig(lr_scheduler=scheduler, lr_min_ratio=0.0, lr=7.0)
    trainer.lr_scheduler = None
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    schedule = trainer.create_scheduler(20, optimizer)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert 0 < rates[0] < rates[4] == rates[5] == 0.5 and trainer.create_scheduler(20, optimizer) is schedule
    expected = {"cosine": 0.5 * (1 + math.cos(math.pi * 10 / 15)), "linear": 1 / 3, "constant": 1.0}[scheduler]
    assert rates[15] == pytest.approx(0.5 * expected)


def test_what_is_rewarded_becomes_likelier(reasoner, tmp_path):
    """Taught to guess and to write steps in equal parts, and rewarded for steps, it writes steps."""
    from grpo.stage_trainer import train_stage

    def steps(prompts, completions, completion_ids=None, **columns):
        return [float("=" in completion[0]["content"]) for completion in completions]

    problems = problems_of(4)
    model, prompt_format = taught(reasoner, problems, steps=80, guessed=(False, True))
    config = settings(grpo_batch_size=32, grpo_accum_steps=1, num_generations=8, max_completion_length=12)
    everything = Everything(tmp_path, stage(epochs=12, config=config), [steps])
    train_stage(model, prompt_format, problems, everything.run)
    shares = [numbers["reward_steps"] for _, numbers in everything.lines]
    assert len(shares) == 12 and shares[0] < 0.8 and shares[-1] > 0.95


def test_an_interrupted_stage_goes_on_inside_it_and_ends_where_an_uninterrupted_one_does(reasoner, tmp_path):
    from grpo.stage_folder import newest_state
    from grpo.stage_trainer import train_stage

    ends = []
    for stops in ((None,), (1, None)):
        folder, done = tmp_path / str(len(stops)), []
        for stop_after in stops:
            model = tiny(reasoner)
            everything = Everything(folder, stage(config=settings()), [length_reward], stop_after)
            done.append(train_stage(model, PromptFormat(reasoner), problems_of(6), everything.run))
        assert done[-1] == (True, 3)
        ends.append(weights_of(model))
        if len(stops) > 1:
            assert done[0] == (False, 2) and newest_state(folder).name == "state-3"
            assert [step for step, _ in everything.lines] == [3]
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, msg=name)


def test_a_damaged_state_of_a_stage_is_named_and_passed_over_and_a_half_written_one_is_none(reasoner, tmp_path):
    from grpo.stage_folder import newest_state
    from grpo.stage_trainer import train_stage

    config = settings(grpo_save_every=1)
    everything = Everything(tmp_path, stage(config=config), [length_reward], 2)
    train_stage(tiny(reasoner), PromptFormat(reasoner), problems_of(6), everything.run)
    states = sorted(path.name for path in tmp_path.iterdir())
    assert len(states) == 2 and newest_state(tmp_path).name == states[-1], states  # the two newest, and nothing else

    told: list[str] = []
    path = tmp_path / states[-1] / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert newest_state(tmp_path, told.append).name == states[0]
    assert len(told) == 1 and f"{path} is damaged" in told[0] and "is passed over" in told[0]
    (tmp_path / states[0] / "manifest.json").unlink()
    assert newest_state(tmp_path) is None

    # One of an earlier version has no hashes.
    (tmp_path / "checkpoint-1").mkdir()
    assert newest_state(tmp_path) is None
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{}")
    assert newest_state(tmp_path).name == "checkpoint-1"


def test_the_kl_term_is_measured_against_the_start_of_the_stage(system, tmp_path):
    from grpo.stage_trainer import train_stage

    model, prompt_format = system
    everything = Everything(tmp_path, stage(config=settings(grpo_lr=1e-2, beta=0.5)), [length_reward])
    train_stage(model, prompt_format, problems_of(6), everything.run)
    kl = [numbers["kl"] for _, numbers in everything.lines]
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and kl[-1] > 1e-5


def test_groups_rewarded_alike_are_told_in_plain_words(reasoner, tmp_path, capsys, monkeypatch):
    from grpo import stage_trainer as grpo

    monkeypatch.setattr(grpo, "PATIENCE", 2)
    model = tiny(reasoner)
    before = weights_of(model)
    everything = Everything(tmp_path, stage(config=settings()), [lambda completions, **rest: [0.2] * len(completions)])
    grpo.train_stage(model, PromptFormat(reasoner), problems_of(4), everything.run)
    assert "nothing is learnt" in capsys.readouterr().err
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(model).items())


def test_a_gradient_that_is_no_number_ends_the_stage_before_its_step(reasoner, tmp_path):
    from engine.optimization import NonFiniteError
    from grpo.stage_trainer import train_stage

    model = tiny(reasoner)
    before = weights_of(model)
    everything = Everything(tmp_path, stage(config=settings()), [lambda completions, **rest: [1e38, -1e38] * 4])
    model.model.skip.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteError, match="the gradient of model"):
        train_stage(model, PromptFormat(reasoner), problems_of(4), everything.run)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(model).items())


def test_a_step_with_a_gradient_that_is_no_number_is_left_out_and_counted(reasoner, tmp_path):
    from engine.nonfinite import LeftOut
    from grpo.stage_trainer import train_stage

    model = tiny(reasoner)
    everything = Everything(tmp_path, stage(config=settings(), size=4), [length_reward])
    everything.run.left_out = LeftOut("skip")
    calls: list[int] = []

    def spoil(gradient):
        calls.append(1)
        return gradient * (float("nan") if len(calls) == 1 else 1.0)

    model.model.skip.register_hook(spoil)
    before = weights_of(model)
    train_stage(model, PromptFormat(reasoner), problems_of(4), everything.run)
    assert [numbers["batches_left_out"] for _, numbers in everything.lines] == [1, 1]
    after = weights_of(model)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items())


# --- the add-on -------------------------------------------------------------------------------------------------------


def test_only_the_add_on_moves(tiny_host, tokenizer, tmp_path):
    from grpo.stage_trainer import train_stage
    from model import is_addon_parameter

    model = tiny_model(tiny_host, init_state="random")
    before = weights_of(model)
    everything = Everything(tmp_path, stage(config=settings()), [length_reward])
    train_stage(model, PromptFormat(tokenizer), problems_of(4), everything.run)
    moved = {name for name, tensor in weights_of(model).items() if not torch.equal(tensor, before[name])}
    assert moved and all(is_addon_parameter(name) for name in moved)
    assert any("h_block" in name for name in moved) and any("injector" in name for name in moved)
    assert model.model.addon.core.init_state == "random"  # as it was


def test_segments_that_a_halting_head_saves_are_not_reported_as_used(tiny_host, tokenizer, tmp_path):
    from grpo.stage_trainer import train_stage

    model = tiny_model(tiny_host, use_act=True, segments=3)
    torch.nn.init.zeros_(model.model.addon.core.halt.weight)
    torch.nn.init.constant_(model.model.addon.core.halt.bias, 5.0)  # enough after the first
    everything = Everything(tmp_path, stage(config=settings()), [length_reward])
    train_stage(model, PromptFormat(tokenizer), problems_of(2), everything.run)
    assert [numbers["cycles_used"] for _, numbers in everything.lines] == [1.0] * len(everything.lines) != []


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_joined_sequence_is_scored_as_it_was_generated(system, temperature):
    """TRL left-pads prompts, joins the completions, and scores in training mode what was generated in the other."""
    from trl.trainer.utils import add_fused_lm_head

    from grpo.stage_trainer import end_of_prompt, rollout_mode

    model, prompt_format = system
    prompts = prompt_format.prompts(["2 + 2?", "Calculate 5 * 8. What is the answer?"])
    ids, mask = pad(prompts, prompt_format.pad_id, "left")
    with rollout_mode(model):
        out = model.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=True, top_k=0,
                                    temperature=temperature, pad_token_id=prompt_format.pad_id, eos_token_id=None,
                                    output_scores=True, return_dict_in_generate=True)
        new = out.sequences[:, ids.shape[1] :]
        generated = torch.stack(out.scores, dim=1).log_softmax(-1).gather(2, new[..., None])[..., 0]
        add_fused_lm_head(model, temperature=temperature)
        if isinstance(model, HRMController):
            end_of_prompt(model)
        joined = torch.cat([mask, torch.ones_like(new)], dim=1)
        labels = out.sequences.masked_fill(joined == 0, -100)
        labels[:, : -new.shape[1]] = -100
        model.train()
        scored = model(input_ids=out.sequences, attention_mask=joined, labels=labels, fused_lm_head=True).log_probs
    torch.testing.assert_close(scored[:, -new.shape[1] :], generated, atol=1e-4, rtol=1e-4)


# --- the commands -----------------------------------------------------------------------------------------------------

TINY = (
    f"{ENHANCED} --d_model 16 --n_heads 2 --n_planner_layers 1 --n_worker_layers 1 --max_cycles 2 --thought_dim 8 "
    "--batch_size 4 --max_steps 2 --warmup_steps 1 --eval_n 2 --mixed_precision none --log_steps 1 --num_threads 1 "
    "--device cpu --report 0 --max_completion_length 4 --grpo_save_every 1"
).split()
TWO = json.dumps({name: {"size": 2, "epochs": 1, "levels": [SUMS]} for name in ("format", "math")})


def watch_training(monkeypatch) -> set[str]:
    """The questions that are trained on from now on, by the warm start and by the stages."""
    import grpo.stage_loop
    from grpo.worked_examples import WorkedExamples

    seen: set[str] = set()
    take = WorkedExamples.take
    problems_of = grpo.stage_loop.stage_problems

    def watched_take(self, count):
        drawn = take(self, count)
        seen.update(problem.question for problem, _ in drawn)
        return drawn

    def watched_problems(*arguments):
        problems = problems_of(*arguments)
        seen.update(problem.question for problem in problems)
        return problems

    monkeypatch.setattr(WorkedExamples, "take", watched_take)
    monkeypatch.setattr(grpo.stage_loop, "stage_problems", watched_problems)
    return seen


def test_a_run_skips_its_finished_stages_and_its_answers_are_shown(tmp_path, tiny_host, capsys, monkeypatch):
    import generate
    import train

    trained_texts = watch_training(monkeypatch)
    words = [*TINY, "--tokenizer", str(tiny_host), "--stages", TWO, "--save_dir", str(tmp_path), "--run_name", "r"]
    assert train.main(words) == 0
    first = capsys.readouterr()
    assert "stage format: 2 questions" in first.err and "stage math: 2 questions" in first.err
    run = tmp_path / "r"
    rows = (run / "eval.csv").read_text(encoding="utf-8")
    for metric in ("solved", "format_rate", "mean_length", "reward_math"):
        assert f"6,math,{metric}," in rows
    assert "0,format,format_rate,0," in rows  # before anything was learnt
    for start in ("2,format,", "4,math,"):  # each stage's own start, once
        assert rows.count(f"\n{start}solved,") == rows.count(f"\n{start}reward_format,") == 1
    for name in ("format", "math"):
        assert re.search(rf"^{name} +2 +[\d.]+ % \[.*\] -> [\d.]+ % \[", first.out, re.MULTILINE)
    assert next(json_lines(run / "samples" / "math.jsonl"))[1]["rewards"]
    assert not list(run.glob("stages/*/state-*"))
    assert train.main(words) == 0
    again = capsys.readouterr()
    assert "stage format is finished, skipped" in again.err and "2 questions" not in again.err
    assert (run / "eval.csv").read_text(encoding="utf-8") == rows
    other = json.loads(TWO)
    other["math"] |= {"rewards": {"math": 1.0, "brevity": 1.0, "verifier": 1.0}, "eval_n": 3}
    assert train.main([*words, "--stages", json.dumps(other)]) == 0
    third = capsys.readouterr()  # the table is of what was measured, and new questions are told
    assert re.findall(r"^math .*", third.out, re.MULTILINE) == re.findall(r"^math .*->.*", first.out, re.MULTILINE)
    assert "WARNING" not in again.err + third.err
    record = trained_by(sorted((run / "checkpoints").iterdir())[-1], goes_on=True)
    asked = [line["prompt_hash"] for _, line in json_lines(run / "predictions.jsonl")]
    assert asked and not set(asked) & set(map(question_hash, trained_texts))
    assert len(trained_texts) >= 6 and all(question in record for question in trained_texts)
    assert generate.main(["--checkpoint", str(run), "--prompt", "1 + 1", "--compare", "--max_new_tokens", "4"]) == 0
    shown = capsys.readouterr().out
    assert "thought" in shown and "solution" in shown
    assert train.main([*words, "--arch", "addon"]) == 2
    told = error_lines(capsys.readouterr().err)
    assert len(told) == 1 and "is a checkpoint of --arch enhanced, not of --arch addon" in told[0]


def test_a_split_completion_is_what_the_answerer_shows():
    text = "<think>1 + 1 = 2</think><SOLUTION>2</SOLUTION>"
    assert (split_completion(text).thought, split_completion(text).solution) == ("1 + 1 = 2", "2")
    assert set(PUBLISHED) == {"format", "math", "reasoning", "code", "chain_of_thought"}


@pytest.mark.slow
def test_a_stopped_command_goes_on_inside_its_stage_and_ends(tmp_path, tiny_host):
    import signal
    import time

    from tiny_runs import command

    many = json.dumps({"format": {"size": 40, "epochs": 1, "levels": [SUMS]}})
    words = [*TINY, "--tokenizer", str(tiny_host), "--stages", many, "--save_dir", str(tmp_path), "--run_name", "r"]
    process = command(*words)
    metrics = tmp_path / "r" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"step": 5' in metrics.read_text(encoding="utf-8")):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=HANG_S)
    assert process.returncode == 143 and "stopped in stage format" in told, told
    again = command(*words)
    _, told = again.communicate(timeout=HANG_S)
    assert again.returncode == 0 and "going on from state-" in told, told
    steps = [json.loads(line)["step"] for line in metrics.read_text(encoding="utf-8").splitlines()]
    assert steps == list(range(1, 43))  # 2 of the warm start, 40 of the stage, none twice and none missing


# --- texts of others --------------------------------------------------------------------------------------------------


def test_a_problem_that_names_control_tokens_stays_text_in_rollouts_and_examples(tokenizer, tiny_host):

    from grpo.stage_trainer import StageTrainer

    for each in (tokenizer, reasoning_tokenizer(str(tiny_host))):
        prompt = PromptFormat(each)
        special = {number for number, token in each.added_tokens_decoder.items() if token.special}
        said = f"Say {each.eos_token} and {each.pad_token}, then <s>"
        chat = [[{"role": "user", "content": text}] for text in ("Say", said)]
        rows = StageTrainer._tokenize_prompts(SimpleNamespace(format=prompt), chat)[0]
        assert rows == prompt.prompts(["Say", said])
        plain, ids = rows
        assert [n for n in ids if n in special] == [n for n in plain if n in special]
        assert said in each.decode(ids, skip_special_tokens=False)

        # A worked example that says such a name keeps its reasoning tags, and its one end.
        example = Problem(said, each.eos_token, "file").worked()
        (target,) = prompt.targets([example])
        assert target.count(prompt.frame.end) == 1 and each.decode(target[:-1]).strip() == example
    tags = [each.convert_tokens_to_ids(tag) for tag in ("<think>", "</think>", "<SOLUTION>", "</SOLUTION>")]
    assert [number for number in target if number in tags] == tags


def test_a_stage_that_goes_on_asks_what_it_asked_whatever_the_clock_says(tmp_path, monkeypatch):
    from grpo.stage_loop import stage_problems

    real = Task._draw
    now = SimpleNamespace(slow=True)

    def draw(self, chunk, offset, seed):
        if offset == 2 and now.slow:
            raise TimeLimitError
        return real(self, chunk, offset, seed)

    def asked():
        stage = SimpleNamespace(levels=(task_source({"toy_add": {}}), CodeSource()), size=8)
        problems = stage_problems(stage, 7, set(), tmp_path / "draws.json", Machine(Accelerator(cpu=True), "none"))
        return [problem.question for problem in problems]

    monkeypatch.setattr(Task, "_draw", draw)
    first = asked()
    now.slow = False
    assert asked() == first
    (tmp_path / "draws.json").unlink()
    assert asked() != first and not (tmp_path / "draws.json").exists()
