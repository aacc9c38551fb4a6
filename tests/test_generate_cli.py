"""generate.py: prompts in, answers out, as evaluation generated them; mistakes in one line."""

from __future__ import annotations

import shutil

import pytest

import generate
import train
from patience import HANG_S
from tiny_runs import ROOT, arguments, command, error_lines, newest, records

QUESTION = "What is 64 + 76?"  # the first evaluation item of toy_add


@pytest.fixture(scope="module")
def runs(tiny_host, tmp_path_factory):
    """A folder of two runs; the second, `new`, was trained with a sentinel, a header and visible effect."""
    place = tmp_path_factory.mktemp("generate") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.loop.draw_curve", lambda *arguments: None)
        assert train.main(arguments(tiny_host, place, "--run_name", "old", "--max_steps", "1")) == 0
        flags = "--lr 0.05 --warmup_steps 0 --ema 0 --sentinel ## --system_header hm --injector grb --max_steps 8"
        assert train.main(arguments(tiny_host, place, "--run_name", "new", *flags.split())) == 0
    return place


@pytest.fixture
def ask(runs, capsys):
    """Runs generate.py in this process: (exit status, stdout, stderr)."""
    def here(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = generate.main(["--save_dir", str(runs), "--device", "cpu", *argv])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    return here


def said(run_folder) -> dict[str, str]:
    """What the trained model answered to the evaluation's first item, and the bare LLM's score for it."""
    return records(run_folder)["predictions"][0]


def test_the_newest_run_answers_as_it_did_in_evaluation(ask, runs):
    status, out, err = ask("--prompt", QUESTION, "--max_new_tokens", "4")
    assert status == 0 and str(newest(runs / "new")) in err
    assert out == f"> {QUESTION}\nLLM + HRM  {said(runs / 'new')['prediction']}\n"
    assert said(runs / "new")["id"] == "toy_add/00000"


def test_a_checkpoint_or_a_run_may_be_named(ask, runs):
    for place in (runs / "old", newest(runs / "old"), "old"):
        status, out, err = ask("--checkpoint", str(place), "--prompt", QUESTION, "--max_new_tokens", "4")
        assert status == 0 and str(newest(runs / "old")) in err
        assert out.split("\n")[1] == f"LLM + HRM  {said(runs / 'old')['prediction']}".rstrip()


def test_compare_shows_the_bare_llm_beside(ask, tiny_host):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    status, out, _ = ask("--prompt", QUESTION, "--compare", "--max_new_tokens", "4", "--checkpoint", "old")
    lines = out.removesuffix("\n").split("\n")
    tokenizer, host = AutoTokenizer.from_pretrained(tiny_host), AutoModelForCausalLM.from_pretrained(tiny_host)
    turns = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    alone = host.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1]:]
    assert status == 0 and [line[:9].strip() for line in lines] == ["> What is", "bare LLM", "LLM + HRM"]
    assert lines[1] == f"bare LLM   {tokenizer.decode(alone, skip_special_tokens=True).strip()}".rstrip()


def test_several_prompts_are_answered_in_their_order(ask):
    status, out, _ = ask("--prompt", QUESTION, "--prompt", "What is 1 + 1?", "--max_new_tokens", "3")
    assert status == 0 and [line for line in out.splitlines() if line.startswith("> ")] == [
        f"> {QUESTION}", "> What is 1 + 1?"]


def test_sampling_depends_on_the_seed_and_segments_on_the_flag(ask):
    sampled = [ask("--prompt", QUESTION, "--decode_temperature", "3", "--seed", seed)[1] for seed in "112"]
    assert sampled[0] == sampled[1] != sampled[2]
    assert ask("--prompt", QUESTION, "--eval_segments", "7")[0] == 0


def test_interactive_reads_questions_until_the_end_of_input(runs):
    process = command("--save_dir", str(runs), "--interactive", "--max_new_tokens", "4", script="generate.py")
    out, err = process.communicate(f"{QUESTION}\n{'9' * 900}\n{QUESTION}\n", timeout=HANG_S)
    expected = f"> {QUESTION}\nLLM + HRM  {said(runs / 'new')['prediction']}\n"
    assert process.returncode == 0 and out == 2 * expected  # one question too long does not end the talk
    assert "positions: shorten the prompt" in err and "Traceback" not in err


def test_an_empty_line_ends_the_talk(ask, monkeypatch):
    typed = iter(["a\udcff", "What is 1 + 1?", "  "])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    status, out, err = ask("--interactive", "--max_new_tokens", "2")
    assert "'a\\udcff' is no UTF-8 text" in err
    assert status == 0 and out.startswith("> What is 1 + 1?\n") and next(typed, "read") == "read"


@pytest.mark.parametrize("argv,told", [
    ([], 'nothing to answer: add --prompt "..." or --interactive'),
    (["--prompt", " "], "--prompt ' ' is empty: type a question"),
    (["--prompt", "a\udcff"], "--prompt 'a\\udcff' is no UTF-8 text without NUL: type another question"),
    (["--prompt", QUESTION, "--max_new_tokens", "0"], "--max_new_tokens 0 is not legal: expected at least 1"),
    (["--prompt", QUESTION, "--decode_temperature", "-1"], "--decode_temperature -1.0 is not legal"),
    (["--prompt", QUESTION, "--decode_temperature", "nan"], "--decode_temperature nan is not legal"),
    (["--prompt", QUESTION, "--decode_top_p", "0"], "--decode_top_p 0.0 is not legal"),
    (["--prompt", QUESTION, "--checkpoint", "nowhere"], "--checkpoint 'nowhere' does not exist"),
    (["--prompt", QUESTION, "--checkpoint", "README.md"], "--checkpoint 'README.md' is neither a checkpoint nor a run"),
    (["--prompt", QUESTION, "--max_new_tokens", "many"], "argument --max_new_tokens: invalid int value: 'many'"),
    (["--prompt"], "argument --prompt: expected one argument"),
    (["--promt", QUESTION], "unrecognized arguments: --promt"),
    (["--prompt", "9" * 900], "prompt and answer may take "),
    (["--prompt", QUESTION, "--prompt", "9" * 900], "prompt and answer may take "),
    (["--prompt", QUESTION, "--max_new_tokens", "600"], "prompt and answer may take "),
    (["--prompt", QUESTION, "--device", "cuda"], "--device cuda is not available here"),
])
def test_each_mistake_is_one_line(ask, argv, told):
    status, out, err = ask(*argv)
    lines = [line for line in err.splitlines() if " + HRM on cpu" not in line]
    (line,) = error_lines("\n".join(lines), "generate.py")
    assert status == 2 and out == "" and line.startswith(told)


def test_without_any_run_it_says_to_train_one(tmp_path, capsys):
    assert generate.main(["--save_dir", str(tmp_path / "none"), "--prompt", QUESTION]) == 2
    (line,) = error_lines(capsys.readouterr().err, "generate.py")
    assert line == f"--checkpoint auto: no whole checkpoint in any run of {tmp_path / 'none'}; train one first"


def test_a_base_model_that_has_changed_or_gone_is_one_line(ask, runs, tiny_host, tmp_path, capsys):
    host = tmp_path / "host"
    shutil.copytree(tiny_host, host)
    assert train.main(arguments(host, tmp_path / "runs", "--max_steps", "1", "--run_name", "mine")) == 0
    shutil.rmtree(host)
    status, out, err = ask("--checkpoint", str(tmp_path / "runs" / "mine"), "--prompt", QUESTION)
    (line,) = error_lines(err, "generate.py")
    assert status == 2 and out == "" and str(host) in line


def test_ctrl_c_ends_quietly(ask, monkeypatch):
    def interrupted(*rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "show", interrupted)
    status, _, err = ask("--prompt", QUESTION)
    assert status == 130 and "Traceback" not in err


def test_a_run_on_a_packed_model_is_answered_by_a_packed_one(ask, tmp_path):
    flags = ["--load_in", "8bit", "--max_steps", "1"]
    assert train.main(arguments(ROOT / "assets" / "tiny_host", tmp_path, *flags)) == 0
    status, out, err = ask("--save_dir", str(tmp_path), "--prompt", QUESTION, "--max_new_tokens", "4")
    assert status == 0, err
    assert out.startswith(f"> {QUESTION}\nLLM + HRM") and " in 8bit + HRM on cpu" in err
