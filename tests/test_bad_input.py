"""What users get wrong, put to the whole commands: exit status 2, one line that names it, nothing written.

Flags, YAML, tasks, own data, checkpoints, model folders, tokenizers, stages and suite files. `tests/test_options.py`
has the flags and YAML one by one, `tests/suite` and `tests/grpo/test_problem_files.py` the lines of their files.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.numpy

import generate
import train
from tiny_runs import TINY, newest

GOOD = "".join(json.dumps({"question": f"What is {a} + {a}?", "answer": str(2 * a)}) + "\n" for a in range(40))
NESTED = "[" * 20_000
HUGE = "1" + "0" * 5000
CODE = "a.py"


class Case(NamedTuple):
    """One mistake: `words` behind the tiny command, {d} the current folder; `told` stands in the one line."""

    words: str
    told: str
    files: dict[str, str | bytes] = {}


def own(content: str | bytes, told: str, more: str = "", name: str = "data.jsonl") -> Case:
    """Own data of this content."""
    return Case(f"--task none --data {name} --eval_n 4 {more}", told, {name: content})


def yaml(content: str | bytes, told: str = "--config a.yaml cannot be read") -> Case:
    return Case("--config a.yaml", told, {"a.yaml": content})


def config(text: str, told: str) -> Case:
    """--task_config."""
    return Case(f"--task chain_sum --task_config {shlex.quote(text)}", told)


def plugin(content: str | bytes, told: str) -> Case:
    return Case("--task mine --plugin a.py", told, {"a.py": content})


FLAGS = {
    "unknown flag": Case("--d_hh 3", "unknown flag --d_hh"),
    "value without flag": Case("stray", "unexpected argument stray"),
    "no value": Case("--seed", "--seed needs a value"),
    "nan": Case("--lr nan", "--lr nan is not legal"),
    "inf": Case("--lr inf", "--lr inf is not legal"),
    "huge number": Case(f"--seed {HUGE}", "--seed "),
    "other digits": Case("--seed ١.٥", "--seed "),
    "NUL in a name": Case("--run_name 'a\\0b/'", "--run_name"),
    "run name with a slash": Case("--run_name a/b", "--run_name a/b is not legal"),
    "run name is a parent": Case("--run_name ..", "--run_name .. is not legal"),
    "run name too long": Case(f"--run_name {'a' * 300}", "--run_name"),
    "save_dir is a file": Case("--save_dir a.py", "a.py", {"a.py": ""}),
    "save_dir inside a file": Case("--save_dir a.py/b", "a.py", {"a.py": ""}),
    "log_csv is a folder": Case("--log_csv .", "--log_csv"),
    "log_csv is another table": Case("--log_csv a.csv", "a.csv", {"a.csv": "x,y\n1,2\n"}),
    "resume nothing": Case("--resume nowhere", "--resume 'nowhere' does not exist"),
    "resume a file": Case("--resume a.py", "--resume 'a.py'", {"a.py": ""}),
    "resume auto without runs": Case("--resume auto", "no whole checkpoint in any run"),
    "evaluate nothing": Case("--eval_only --run_name a", "has no checkpoint"),
    "unknown tracker": Case("--trackers paper", "--trackers paper is not legal"),
    "unknown device": Case("--device abacus", "--device abacus is not legal"),
    "absent device": Case("--device cuda", "--device cuda is not available here"),
    "fp16 on a cpu": Case("--mixed_precision fp16", "needs CUDA"),
    "huge width": Case("--d_h 1048576 --n_heads 2", "million parameters, which need more than"),
    "hybrid's flag": Case("--h_cycles 2", "--h_cycles does nothing with --arch addon"),
    "hybrid with a plugin": Case(
        "--only --arch hybrid --dataset synthetic --plugin a.py",
        "--plugin does nothing with --arch hybrid, only with addon and enhanced: leave it out", {"a.py": "1 / 0"},
    ),
    "hybrid without data": Case("--only --arch hybrid", "--dataset"),
    "hybrid on nothing": Case("--only --arch hybrid --dataset nowhere", "nowhere"),
}
YAML = {
    "empty list": yaml("- a\n"),
    "two documents": yaml("lr: 1\n---\nlr: 2\n"),
    "no utf-8": yaml(b"task: \xff\n"),
    "utf-16": yaml("task: toy_add\n".encode("utf-16")),
    "NUL": yaml("task: \0\n"),
    "python object": yaml("lr: !!python/object/apply:os.system ['echo']\n"),
    "open bracket": yaml("lr: [1\n"),
    "deep": yaml(NESTED),
    "deep mapping": yaml("".join(" " * n + "a:\n" for n in range(800)), "a.yaml"),
    "self reference": yaml("model: &m {inner: *m}\n"),
    "bad date": yaml("seed: 2024-99-99\n"),
    "huge number": yaml(f"seed: {HUGE}\n", "a.yaml"),
    "twice": yaml("lr: 1\nlr: 2\n", "line 2: lr is given twice"),
    "unknown key": yaml("modl: x\n", "unknown key modl"),
    "number as key": yaml("3: x\n", "unknown key 3"),
    "null": yaml("seed: null\n", "seed "),
    "nan": yaml("lr: .nan\n", "lr "),
    "list for number": yaml("seed: [1]\n", "seed "),
    "config in config": yaml("config: b.yaml\n", "config belongs on the command line only"),
    "half a surrogate": yaml('run_name: "a\\ud83d"\n', "run_name "),
    "a folder": Case("--config .", "Is a directory"),
    "missing": Case("--config nowhere.yaml", "No such file"),
}
TASKS = {
    "unknown task": Case("--task chain_smu", "chain_smu"),
    "empty name": Case("--task ''", "--task"),
    "path as task": Case("--task ../toy_add", "../toy_add"),
    "two ways": Case("--task toy_add --tasks chain_sum", "both set"),
    "unknown of several": Case("--task none --tasks toy_add,nope", "nope"),
    "runs code": Case("--task countdown", "executes code"),
    "config no json": config("{bad", "--task_config"),
    "config a list": config("[1]", "--task_config"),
    "config a number": config("3", "--task_config"),
    "config unknown key": config('{"min_term": 2}', "min_term"),
    "config of text": config('{"min_terms": "two"}', "min_terms"),
    "config of null": config('{"min_terms": null}', "min_terms"),
    "config of a list": config('{"min_terms": [2]}', "min_terms"),
    "config upside down": config('{"min_terms": 9, "max_terms": 2}', "terms"),
    "config negative": config('{"min_terms": -1}', "terms"),
    "config nan": config('{"min_terms": NaN}', "min_terms"),
    "config huge": config(f'{{"min_terms": {HUGE}}}', "--task_config"),
    "config of one task a list": config('{"chain_sum": [1]}', "chain_sum"),
    "config deep": config('{"a":' * 5000, "--task_config"),
    "config missing file": config("nowhere.yaml", "nowhere.yaml"),
    "config seed": config('{"seed": "x"}', "seed"),
    "mix of nobody": Case("--task none --tasks toy_add,chain_sum --mix nope=2", "nope"),
    "mix of nothing": Case("--task none --tasks toy_add,chain_sum --mix toy_add=0,chain_sum=0", "--mix"),
    "mix nan": Case("--task none --tasks toy_add,chain_sum --mix toy_add=nan", "--mix"),
    "reserve unknown": Case("--reserve_tasks nope", "nope"),
    "plugin missing": Case("--task mine --plugin nowhere.py", "--plugin nowhere.py cannot be read"),
    "plugin a folder": Case("--task mine --plugin .", "--plugin"),
    "plugin no python": plugin("def (", "--plugin a.py"),
    "plugin raises": plugin("1 / 0", "ZeroDivisionError"),
    "plugin exits": plugin("raise SystemExit(0)", "--plugin a.py"),
    "plugin without tasks": plugin("x = 1", "--plugin a.py"),
    "plugin binary": plugin(b"\xff\xfe\0", "--plugin a.py"),
}
DATA = {
    "missing": Case("--task none --data nowhere.jsonl", "there is no such file"),
    "a folder without data": Case("--task none --data .", "holds no rows"),
    "unknown kind": own("x", "data.docx", name="data.docx"),
    "empty": own("", "holds no rows"),
    "blank lines": own("\n \n", "holds no rows"),
    "binary": own(bytes(range(256)) * 4, "data.jsonl"),
    "utf-16": own(GOOD.encode("utf-16"), "data.jsonl"),
    "a list of scalars": own("[1]\n" * 9, "data.jsonl"),
    "scalars": own('"a"\n3\nnull\n' * 9, "data.jsonl"),
    "no json": own("question: a\n" * 9, "data.jsonl"),
    "one line for all": own(GOOD.replace("\n", ","), "line 1"),
    "deep": own(NESTED + "\n", "data.jsonl"),
    "huge number": own(f'{{"question": "a", "answer": {HUGE}}}\n', "data.jsonl"),
    "no field": own('{"prompt": "a", "answer": "b"}\n' * 9, "question"),
    "no answers": own('{"question": "a", "answer": ""}\n' * 9, "data.jsonl"),
    "null answers": own('{"question": "a", "answer": null}\n' * 9, "data.jsonl"),
    "answers that are lists": own('{"question": "a", "answer": {"b": 1}}\n' * 9, "data.jsonl"),
    "nan answers": own('{"question": "a", "answer": NaN}\n' * 9, "data.jsonl"),
    "infinite answers": own('{"question": "a", "answer": -Infinity}\n' * 9, "data.jsonl"),
    "half a surrogate": own('{"question": "a\\ud83d", "answer": "b"}\n' * 9, "data.jsonl"),
    "one question": own('{"question": "a", "answer": "b"}\n' * 40, "too few"),
    "too few": own(GOOD, "too few to hold out", "--eval_n 40"),
    "chat of text": own('{"messages": "hello"}\n' * 9, "messages", "--messages_field messages"),
    "chat without an answer": own('{"messages": [{"role": "user", "content": "a"}]}\n' * 9, "messages",
                                  "--messages_field messages"),
    "chat of numbers": own('{"messages": [1, 2]}\n' * 9, "messages", "--messages_field messages"),
    "json object": own('{"a": 1}', "data.json", name="data.json"),
    "json deep": own(NESTED, "data.json", name="data.json"),
    "json cut": own(f"[{GOOD.splitlines()[0]},", "data.json", name="data.json"),
    "csv without rows": own("question,answer\n", "data.csv", name="data.csv"),
    "csv of other columns": own("a,b\n1,2\n", "data.csv", name="data.csv"),
    "csv with NUL": own(b"question,answer\na\0,b\n" * 9, "data.csv", name="data.csv"),
    "csv ragged": own("question,answer\n" + "a,b,c,d\n" * 9, "data.csv", name="data.csv"),
    "csv binary": own(bytes(range(128, 256)) * 9, "data.csv", name="data.csv"),
    "parquet of text": own("question,answer\n", "data.parquet", name="data.parquet"),
    "parquet empty": own(b"", "data.parquet", name="data.parquet"),
    "parquet cut": own(b"PAR1" + bytes(40), "data.parquet", name="data.parquet"),
    "unknown verifier": own(GOOD, "--verifier same", "--verifier same"),
    "verifier no regex": own(GOOD, "no regular expression", "--verifier 'regex:('"),
    "verifier missing": own(GOOD, "nowhere:f", "--verifier nowhere:f"),
    "verifier without function": own(GOOD, "--verifier json:nope", "--verifier json:nope"),
    "verifier no function": own(GOOD, "--verifier json:__doc__", "--verifier json:__doc__"),
    "verifier of a path": own(GOOD, "--verifier", "--verifier ../x:f"),
    "gold is no number": own('{"question": "a", "answer": "b"}\n' * 9, "data.jsonl", "--verifier number"),
    "eval data missing": own(GOOD, "--eval_data nowhere.jsonl", "--eval_data nowhere.jsonl"),
    "eval data is the data": own(GOOD, "--eval_data", "--eval_data data.jsonl"),
    "retain missing": Case("--retain nowhere.txt", "nowhere.txt"),
    "retain empty": Case("--retain a.txt", "a.txt", {"a.txt": ""}),
    "retain binary": Case("--retain a.txt", "a.txt", {"a.txt": b"\xff\xfe\xfd"}),
}


def stages(given: object, told: str, files: dict[str, str | bytes] | None = None) -> Case:
    """GRPO's stages of the planner/worker LM."""
    text = given if isinstance(given, str) else json.dumps(given)
    return Case(f"{ENHANCED} --stages {shlex.quote(text)}", told, files or {})


def stage(told: str, files: dict[str, str | bytes] | None = None, **settings: object) -> Case:
    """One stage with these settings in place of good ones."""
    good = {"size": 2, "eval_n": 2, "levels": [{"chain_sum": {}}]}
    return stages({"format": good | settings}, told, files)


ENHANCED = (
    "--only --arch enhanced --objective grpo --d_model 16 --n_heads 2 --n_planner_layers 1 --n_worker_layers 1 "
    "--max_cycles 2 --thought_dim 8 --batch_size 4 --max_steps 2 --device cpu --tokenizer {host}"
)
STAGES = {
    "no json": stages("{bad", "--stages"),
    "a list": stages([1], "stages"),
    "a number": stages(3, "stages"),
    "text": stages('"format"', "stages"),
    "empty": stages({}, "none is given"),
    "deep": stages('{"format":' * 5000, "--stages"),
    "unknown": stages({"formt": {}}, "no stage 'formt'"),
    "stage is a list": stages({"format": [1]}, "stage format: expected settings"),
    "stage is a number": stages({"format": 0}, "stage format: expected settings"),
    "unknown setting": stage("unknown setting 'sise'", sise=3),
    "size 0": stage("size must be", size=0),
    "size nan": stage("size must be", size=float("nan")),
    "size inf": stage("size must be", size=float("inf")),
    "size text": stage("size must be", size="2"),
    "size null": stage("size must be", size=None),
    "size list": stage("size must be", size=[2]),
    "size true": stage("size must be", size=True),
    "size half": stage("size must be", size=2.5),
    "epochs negative": stage("epochs must be", epochs=-1),
    "loss unknown": stage("loss_type must be", loss_type="best"),
    "loss a list": stage("loss_type must be", loss_type=["dapo"]),
    "rewards a list": stage("rewards must be a mapping", rewards=["math"]),
    "rewards unknown": stage("maths", rewards={"maths": 1}),
    "rewards nan": stage("the weight of math must be", rewards={"math": float("nan")}),
    "rewards text": stage("the weight of math must be", rewards={"math": "much"}),
    "rewards none": stage("reward", rewards={}),
    "reward missing module": stage("nowhere", rewards={"nowhere:f": 1}),
    "levels null": stage("levels", levels=None),
    "levels empty": stage("levels", levels=[]),
    "levels of text": stage("levels", levels=["chain_sum"]),
    "levels unknown task": stage("chain_smu", levels=[{"chain_smu": {}}]),
    "levels bad settings": stage("min_term", levels=[{"chain_sum": {"min_term": 2}}]),
    "levels settings a list": stage("chain_sum", levels=[{"chain_sum": [1]}]),
    "levels settings text": stage("min_terms", levels=[{"chain_sum": {"min_terms": "two"}}]),
    "levels that run code": stage("executes code", levels=[{"countdown": {}}]),
    "levels missing file": stage("nowhere.yaml", levels="nowhere.yaml"),
    "levels missing lines": stage("nowhere.jsonl", levels="nowhere.jsonl"),
    "levels a folder": stage("a directory", levels="."),
    "levels bad yaml": stage("a.yaml", {"a.yaml": "- [\n"}, levels="a.yaml"),
    "levels deep yaml": stage("a.yaml", {"a.yaml": NESTED}, levels="a.yaml"),
    "levels python yaml": stage("a.yaml", {"a.yaml": "!!python/name:os.system\n"}, levels="a.yaml"),
    "levels binary yaml": stage("a.yaml", {"a.yaml": b"\xff\xfe\0"}, levels="a.yaml"),
    "problems empty": stage("a.jsonl", {"a.jsonl": ""}, levels="a.jsonl"),
    "problems of lists": stage("a.jsonl", {"a.jsonl": "[1]\n"}, levels="a.jsonl"),
    "problems cut": stage("a.jsonl", {"a.jsonl": '{"prompt": "a"'}, levels="a.jsonl"),
    "problems without answers": stage("a.jsonl", {"a.jsonl": '{"prompt": "a"}\n'}, levels="a.jsonl"),
    "problems deep": stage("a.jsonl", {"a.jsonl": NESTED}, levels="a.jsonl"),
    "batch and group": stage("not divisible by num_generations", num_generations=7),
}


def suite(spec: str, told: str, content: str | bytes | None = None, more: str = "") -> Case:
    """The evaluation suite; {f} its file."""
    name = "a.jsonl"
    files = {} if content is None else {name: content}
    return Case(f"--eval_suite {shlex.quote(spec.replace('{f}', name))} {more}", told, files)


SUITE = {
    "no name": suite("=a.jsonl", "has no name", "x"),
    "unknown": suite("gsm9k={f}", "unknown entry 'gsm9k'", "x"),
    "without file": suite("gsm8k", "gsm8k needs a file"),
    "missing file": suite("gsm8k=nowhere.jsonl", "nowhere.jsonl is no file"),
    "a folder": suite("gsm8k=.", "is a folder"),
    "twice": suite("synthetic,synthetic", "named twice"),
    "only commas": suite(",,", "has no name"),
    "empty": suite("gsm8k={f}", "holds no question", ""),
    "no json": suite("gsm8k={f}", "a.jsonl", "x\n"),
    "a list": suite("gsm8k={f}", "a.jsonl", "[1]\n"),
    "deep": suite("gsm8k={f}", "a.jsonl", NESTED),
    "huge": suite("gsm8k={f}", "a.jsonl", HUGE),
    "binary": suite("gsm8k={f}", "a.jsonl", b"\xff\xfe\0"),
    "no answer": suite("gsm8k={f}", "a.jsonl", '{"question": "a"}\n'),
    "number for text": suite("gsm8k={f}", "a.jsonl", '{"question": 3, "answer": "#### 3"}\n'),
    "null": suite("gsm8k={f}", "a.jsonl", '{"question": null, "answer": null}\n'),
    "other entry's file": suite("mbpp={f}", "a.jsonl", '{"question": "a", "answer": "#### 3"}\n'),
    "options of text": suite("science_qa={f}", "a.jsonl", '{"question": "a", "choices": "b", "answer": 0}\n'),
    "answer out of range": suite("science_qa={f}", "a.jsonl", '{"question": "a", "choices": ["b"], "answer": 7}\n'),
    "code that fails": suite("mbpp={f}", "a.jsonl",
                             '{"text": "a", "code": "def f(: pass", "test_list": ["assert f() == 1"]}\n'),
    "perplexity of nothing": suite("perplexity={f}", "a.jsonl", ""),
    "perplexity of numbers": suite("perplexity={f}", "a.jsonl", '{"text": 3}\n'),
    "split that is not there": suite("gsm8k={f}", "a.jsonl", '{"question": "a", "answer": "#### 3", "split": "x"}\n',
                                     "--eval_suite_split test"),
}
AREAS = {"flags": FLAGS, "yaml": YAML, "tasks": TASKS, "data": DATA, "stages": STAGES, "suite": SUITE}
CASES = {f"{area}: {name}": case for area, cases in AREAS.items() for name, case in cases.items()}


def everything_in(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of every file, b"" of every folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else b""
    return found


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder of the command, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(here, tiny_host, capsys) -> Callable[..., str]:
    """Runs a command that must refuse its call, and returns the one line that it says."""

    def run(main: Callable[[list[str]], int], words: list[str], prog: str = "train.py") -> str:
        before = everything_in(here)
        capsys.readouterr()
        try:
            status = main(words)
        except SystemExit as error:  # argparse
            status = error.code
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("WARNING: ")]
        assert status == 2 and out == "", (status, out, err[-2000:])
        assert len(lines) == 1 and lines[0].startswith(f"{prog}: error: "), err[:3000]
        assert everything_in(here) == before, "something was written"
        return lines[0]
    return run


def words_of(case: Case, host: Path) -> list[str]:
    words = [word.replace("{host}", str(host)) for word in shlex.split(case.words)]
    if words[:1] == ["--only"]:  # a system of its own
        return words[1:]
    return [*TINY, "--model_name", str(host), *words]


def write(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line_and_nothing_is_written(name, here, tiny_host, refused):
    case = CASES[name]
    write(here, case.files)
    line = refused(train.main, words_of(case, tiny_host))
    assert case.told in line and len(line) < 1000


# --- folders that are damaged -----------------------------------------------------------------------------------------

Damage = Callable[[Path], object]


def cut(name: str, to: int = 40) -> Damage:
    """The file ends after so many bytes."""
    return lambda folder: os.truncate(folder / name, to)


def replaced(name: str, content: str | bytes) -> Damage:
    return lambda folder: write(folder, {name: content})


def gone(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def a_folder(name: str) -> Damage:
    """A folder stands where the file was."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()
    return damage


def flipped(name: str) -> Damage:
    """One bit is another one."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 4
        (folder / name).write_bytes(content)
    return damage


def changed(name: str, **settings: object) -> Damage:
    """A JSON file with these settings; None takes one out."""

    def damage(folder: Path) -> None:
        document = json.loads((folder / name).read_text(encoding="utf-8")) | settings
        document = {key: value for key, value in document.items() if value is not None}
        write(folder, {name: json.dumps(document)})
    return damage


def weights(change: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    """Other tensors in model.safetensors."""

    def damage(folder: Path) -> None:
        tensors = dict(safetensors.numpy.load_file(folder / "model.safetensors"))
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return damage


def without_numbers(tensors: dict[str, np.ndarray]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = np.full_like(tensor, np.nan)


def narrow(tensors: dict[str, np.ndarray]) -> None:
    for name in list(tensors):
        if "mlp" in name:
            tensors[name] = tensors[name][:8].copy()


MODELS: dict[str, Damage] = {
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no config": gone("config.json"),
    "config empty": replaced("config.json", ""),
    "config cut": cut("config.json"),
    "config a list": replaced("config.json", "[1]"),
    "config a number": replaced("config.json", "3"),
    "config null": replaced("config.json", "null"),
    "config binary": replaced("config.json", b"\xff\xfe\0"),
    "config deep": replaced("config.json", NESTED),
    "config a folder": a_folder("config.json"),
    "model_type unknown": changed("config.json", model_type="lama"),
    "model_type a list": changed("config.json", model_type=[1]),
    "model_type missing": changed("config.json", model_type=None),
    "model_type that is not generative": changed("config.json", model_type="vit"),
    "an encoder-decoder": changed("config.json", model_type="t5", is_encoder_decoder=True),
    "width 0": changed("config.json", hidden_size=0),
    "width negative": changed("config.json", hidden_size=-32),
    "width text": changed("config.json", hidden_size="wide"),
    "width null": replaced("config.json", '{"model_type": "llama", "hidden_size": null}'),
    "width of another model": changed("config.json", hidden_size=64),
    "heads 0": changed("config.json", num_attention_heads=0),
    "heads that do not divide": changed("config.json", num_attention_heads=5),
    "layers missing in the weights": changed("config.json", num_hidden_layers=3),
    "layers text": changed("config.json", num_hidden_layers="two"),
    "vocabulary 0": changed("config.json", vocab_size=0),
    "vocabulary smaller than the tokenizer's": changed("config.json", vocab_size=100),
    "eps text": changed("config.json", rms_norm_eps="small"),
    "activation unknown": changed("config.json", hidden_act="sine"),
    "rope unknown": changed("config.json", rope_scaling={"rope_type": "rubber", "factor": 2}),
    "dtype unknown": changed("config.json", dtype="float33", torch_dtype="float33"),
    "code of its own": changed("config.json", model_type="mine", auto_map={"AutoConfig": "mine.Mine"}),
    "no weights": gone("model.safetensors"),
    "weights empty": replaced("model.safetensors", ""),
    "weights cut": cut("model.safetensors", 4000),
    "weights text": replaced("model.safetensors", "these are no weights"),
    "weights of a huge header": replaced("model.safetensors", b"\xff" * 64),
    "weights without numbers": weights(without_numbers),
    "weights of another shape": weights(narrow),
    "weights of nothing": weights(dict.clear),
    "weights a folder": a_folder("model.safetensors"),
    "index to nowhere": lambda folder: (gone("model.safetensors")(folder), replaced(
        "model.safetensors.index.json", '{"metadata": {}, "weight_map": {"a": "nowhere.safetensors"}}')(folder)),
    "index of text": lambda folder: (gone("model.safetensors")(folder), replaced(
        "model.safetensors.index.json", "{")(folder)),
    "index out of the folder": lambda folder: (gone("model.safetensors")(folder), replaced(
        "model.safetensors.index.json", '{"metadata": {}, "weight_map": {"a": "../../secret.safetensors"}}')(folder)),
    "pickled weights": lambda folder: (gone("model.safetensors")(folder), replaced(
        "pytorch_model.bin", b"cposix\nsystem\n(S'touch broken'\ntR.")(folder)),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "tokenizer empty": replaced("tokenizer.json", ""),
    "tokenizer cut": cut("tokenizer.json", 200),
    "tokenizer a list": replaced("tokenizer.json", "[]"),
    "tokenizer binary": replaced("tokenizer.json", b"\xff\xfe\0"),
    "tokenizer deep": replaced("tokenizer.json", NESTED),
    "tokenizer without a model": changed("tokenizer.json", model=None),
    "tokenizer of an unknown kind": changed("tokenizer.json", model={"type": "Magic"}),
    "tokenizer without words": changed("tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": []},
                                       added_tokens=[]),
    "tokenizer a folder": a_folder("tokenizer.json"),
    "tokenizer config cut": cut("tokenizer_config.json"),
    "tokenizer config a list": replaced("tokenizer_config.json", "[1]"),
    "tokenizer class unknown": changed("tokenizer_config.json", tokenizer_class="Nope", auto_map={
        "AutoTokenizer": ["mine.Mine", None]}),
    "template of bad syntax": replaced("chat_template.jinja", "{% for %}"),
    "template that raises": replaced("chat_template.jinja", "{{ 1 / 0 }}"),
    "template of an endless loop's size": replaced("chat_template.jinja", "{% for a in range(10**9) %}x{% endfor %}"),
    "template that reaches for python": replaced("chat_template.jinja", "{{ messages.__class__.__mro__ }}"),
    "generation config a list": replaced("generation_config.json", "[1]"),
    "generation config of text": changed("generation_config.json", eos_token_id="end"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_damaged_model_folder_is_one_line(name, here, tiny_host, refused):
    host = Path(shutil.copytree(tiny_host, here / "host"))
    MODELS[name](host)
    line = refused(train.main, [*TINY, "--model_name", "host"])
    names_it = ("--model_name host", "choose another model", "choose a model", "chat template")
    assert any(told in line for told in names_it) and len(line) < 1000


TOKENIZERS = [name for name in MODELS if name.startswith(("tokenizer", "no tokenizer", "template"))]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_damaged_tokenizer_of_the_planner_is_one_line(name, here, tiny_host, refused):
    host = Path(shutil.copytree(tiny_host, here / "host"))
    MODELS[name](host)
    words = words_of(stages({"format": {"size": 2, "eval_n": 2, "levels": [{"chain_sum": {}}]}}, ""), Path("host"))
    line = refused(train.main, words)
    assert "--tokenizer" in line and len(line) < 1000


@pytest.fixture(scope="module")
def runs(tiny_host, tmp_path_factory) -> Path:
    """The folder of a finished run of the add-on, called `done`."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.loop.draw_curve", lambda *arguments: None)
        words = [*TINY, "--model_name", str(tiny_host), "--save_dir", str(folder), "--run_name", "done"]
        assert train.main(words) == 0
    return folder


HURTS: dict[str, Callable[[str], Damage]] = {
    "gone": gone, "empty": lambda name: replaced(name, ""), "cut": cut, "flipped": flipped, "a folder": a_folder,
    "other": lambda name: replaced(name, "x" * 50),
}
FILES = ("adapter_model.safetensors", "adapter_config.json", "config.resolved.yaml", "training_state.safetensors",
         "training_state.json", "trained_questions.json", "run.json", "manifest.json")


@pytest.mark.parametrize("hurt", HURTS)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_one_line_that_names_the_file(file, hurt, here, runs, refused):
    shutil.copytree(runs, here / "runs")
    checkpoint = newest(here / "runs" / "done")
    HURTS[hurt](file)(checkpoint)
    line = refused(train.main, ["--resume", str(checkpoint), "--max_steps", "9"])
    assert str(checkpoint) in line and (file.split(".")[0] in line or hurt in ("gone", "a folder"))


@pytest.mark.parametrize("hurt", HURTS)
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "config.resolved.yaml",
                                  "manifest.json"])
def test_a_damaged_checkpoint_answers_nothing(file, hurt, here, runs, refused):
    shutil.copytree(runs, here / "runs")
    checkpoint = newest(here / "runs" / "done")
    HURTS[hurt](file)(checkpoint)
    line = refused(generate.main, ["--checkpoint", str(checkpoint), "--prompt", "1 + 1"], "generate.py")
    assert str(checkpoint) in line


@pytest.mark.parametrize(("words", "told"), [
    ("--prompt a", "no whole checkpoint in any run"),
    ("--checkpoint nowhere --prompt a", "nowhere"),
    ("--checkpoint . --prompt a", "is neither a checkpoint nor a run"),
    ("--checkpoint {run}", "nothing to answer"),
    ("--checkpoint {run} --prompt ''", "is empty"),
    ("--checkpoint {run} --prompt a --max_new_tokens 0", "--max_new_tokens 0 is not legal"),
    ("--checkpoint {run} --prompt a --decode_temperature nan", "--decode_temperature nan is not legal"),
    ("--checkpoint {run} --prompt a --decode_top_p 2", "--decode_top_p 2"),
    ("--checkpoint {run} --prompt a --dataset b", "not on --dataset b"),
    ("--checkpoint {run}@best --prompt a", "no best checkpoint is marked"),
])
def test_a_question_that_cannot_be_put_is_one_line(words, told, here, runs, refused):
    words = [word.replace("{run}", str(runs / "done")) for word in shlex.split(words)]
    assert told in refused(generate.main, words, "generate.py")
