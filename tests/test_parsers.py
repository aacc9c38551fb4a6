"""Every parser of a text that users write, on generated input: it is read, or refused with a reason; no other error.

The commands turn a ValueError and an OSError into a line and exit status 2; any other one would be a traceback.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import options
from engine.checkpoints import best_checkpoint, newest_checkpoint, read_checkpoint
from engine.figures import read_losses
from engine.files import json_lines, named_paths, parse_json
from engine.ownership import claim, known_id
from engine.resume import resolve_resume
from engine.run_records import read_run
from engine.tables import check_csv, open_table
from grpo.arithmetic import sound_share
from grpo.problem_files import file_source
from grpo.problems import sum_steps
from grpo.stages import StagesConfig, stages_of
from own_tasks.choice import mix_weights
from own_tasks.source import source_of
from own_tasks.table import OwnDataConfig, chat_texts, table_of
from own_tasks.verifiers import verifier_of
from reasoning_gym_wrapper import Task
from suite.questions import SuiteItem, read_questions
from suite.spec import suite_problems
from text_data.answers import bare, boxed_answer, gold_of, marked_answer, same_text, tagged_answer
from text_data.documents import read_documents
from text_data.fences import without_lone_fence
from text_data.numbers import final_number, one_number, readings
from text_data.tokenizer import parse_tokenizer
from text_data.triples import parse_line, read_meta

FEW = 40
MANY = 10_000

# --- what is generated ------------------------------------------------------------------------------------------------

ODD = [
    "\0", "\ufeff", "\u2028", "\x85", "\r", "\ud83d", "١", "½", "∞", "NaN", "-Infinity", "1e999", "0x", "null", "[",
    "{", '"', "\\", "'", ",", "=", ":", "#", "-", "$", "\\boxed{", "<|eos|>", "</solution>", "```", "&a", "*a",
    "!!python/name:a", "{{", "}}", "9" * 400, "(" * 300, " " * 300,
]
LETTERS = st.text(string.printable, max_size=20)
TEXTS = st.one_of(LETTERS, st.text(max_size=20), st.sampled_from(ODD))
NUMBERS = st.one_of(
    st.integers(-5, 20), st.sampled_from([10**30, -(10**400)]), st.floats(), st.floats(-2, 9), st.booleans(), st.none()
)


def trees(keys: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """What JSON and YAML hold, most mappings under these keys."""
    leaves = st.one_of(NUMBERS, TEXTS)
    return st.recursive(
        leaves, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=4)),
        max_leaves=8,
    )


@st.composite
def near(draw: st.DrawFn, *good: str) -> str:
    """A good text with a few odd pieces in it, and a few of its own left out or doubled; or any text."""
    if draw(st.integers(0, 9)) == 0:
        return draw(TEXTS)
    text = draw(st.sampled_from(good))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 6)))
        put = draw(st.one_of(st.just(""), st.just(text[start:end] * 2), TEXTS))
        text = text[:start] + put + text[end:]
    return text


def rows(*good: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """A file of JSON lines: good rows, rows with other values under the same keys, lines that are none, odd bytes."""
    keys = st.sampled_from(sorted({key for row in good for key in row}))
    other = st.tuples(st.sampled_from(good), st.dictionaries(keys, trees(keys), max_size=2))
    row = st.one_of(other.map(lambda pair: pair[0] | pair[1]), trees(keys)).map(json.dumps)
    line = st.one_of(row, near(*map(json.dumps, good)))
    file = st.lists(line, max_size=5).map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass"))
    return st.one_of(file, file, file, file, st.binary(max_size=40), file.map(lambda made: made[:-3]))


def texts_of(made: bytes | str) -> bytes:
    return made if isinstance(made, bytes) else made.encode("utf-8", "surrogatepass")


# --- what reads it: a function of (folder, generated value) -----------------------------------------------------------

Parser = Callable[[Path, Any], object]
GSM = {"question": "a", "answer": "b #### 3", "split": "test"}
SCIENCE = {"question": "a", "choices": ["b", "c"], "answer": 1, "image": None, "lecture": "d", "solution": "e"}
OWN = {"question": "What is 1 + 1?", "answer": "2", "messages": [{"role": "user", "content": "a"},
                                                                {"role": "assistant", "content": "b"}]}
PROBLEM = {"prompt": "What is 1 + 1?", "answer": "2", "task": "sum"}
DOCUMENT = {"text": "One.", "messages": [{"role": "user", "content": "a"}], "question": "b", "answer": "c"}
STAGE = {"format": {"size": 2, "epochs": 1, "levels": [{"chain_sum": {"min_terms": 2}}], "rewards": {"math": 1.0},
                    "eval_n": 2, "loss_type": "dapo", "warm": 1.0, "guess": 0.1, "grpo_lr": 1e-5, "num_generations": 2}}
STAGE_KEYS = st.sampled_from(
    ["format", "math", "size", "levels", "rewards", "chain_sum", "min_terms", "epochs", "eval_n"]
)
TRIPLE = '{"encoder_ids": [3, 4], "decoder_input_ids": [1, 5], "labels": [5, 2]}'
META = ('{"vocab_size": 9, "pad_id": 0, "bos_id": 1, "eos_id": 2, "max_seq_len": 8, '
        '"splits": {"train": {"samples": 1}}, "tokenizer_sha256": "0"}')
TABLE = ("step,task,metric,value,n,ci_low,ci_high,bare,segments_used,elapsed_s,run,chance\n"
         "1,a,solved,0.5,4,0.1,0.9,,1,2.5,r-1,\n")
RECORD = '{"run": "r-1", "folder": "/r"}'
MANIFEST = '{"format": "hrm-checkpoint", "version": 1, "files": {"a.json": {"bytes": 2, "sha256": "0"}}}'
ANSWERS = near("so 3 * 4 = 12, and \\boxed{12}", "#### 1,234.5", "<answer>1/2</answer>", "The answer is (B).",
               "12 - 3 = <<12-3=9>>9", "```python\ndef f(): return 1\n```", "1. first\n2. -7/3")


def file(name: str, read: Callable[[Path], object]) -> Parser:
    """Writes the generated text to a file of this name, and reads it."""

    def parse(folder: Path, made: bytes | str) -> object:
        path = folder / name
        path.write_bytes(texts_of(made))
        return read(path)
    return parse


def all_of(made: Iterator[Any]) -> list[Any]:
    return list(made)


def words(folder: Path, made: list[str]) -> object:
    return options.settle(options.read(made))


def config(path: Path) -> object:
    return options.settle(options.read(["--config", str(path)]))


def own(name: str, **fields: Any) -> Parser:
    return file(name, lambda path: table_of(source_of(str(path), "--data"), OwnDataConfig(str(path), **fields)))


def checkpoint(name: str) -> Parser:
    """A checkpoint with one generated file."""

    def read(path: Path) -> object:
        newest_checkpoint(path.parents[2])
        return read_checkpoint(path.parent)

    def parse(folder: Path, made: bytes | str) -> object:
        place = folder / "checkpoints" / "step-00000001"
        place.mkdir(parents=True, exist_ok=True)
        (place / "a.json").write_text("{}", encoding="utf-8")
        return file(name, read)(place, made)
    return parse


def owned(path: Path) -> object:
    claimed = claim(path.parent)
    claimed.release()
    return known_id(path.parent)


def best(path: Path) -> object:
    return best_checkpoint(path.parent), resolve_resume(f"{path.parent}@best", path.parent)


def table(path: Path) -> object:
    check_csv(path)
    open_table(path, "r-1", own=True)
    return read_run(path.parent)


READERS = (marked_answer, boxed_answer, tagged_answer, gold_of, bare, final_number, one_number, readings,
           without_lone_fence, sum_steps)
NAMES = st.sampled_from([flag.name for flag in options.FLAGS])
SPELT = st.sampled_from([f"--{flag.name}" for flag in options.FLAGS])
FLAG_WORDS = st.lists(st.one_of(
    SPELT, st.sampled_from(["--help", "--", "-", "=", "--=", "-1"]), st.tuples(SPELT, TEXTS).map("=".join), TEXTS,
    st.integers(-5, 20).map(str)), max_size=6)
LEAVES = [f"{flag.name}: {flag.default}\n" for flag in options.FLAGS[::3]]
PARSERS: dict[str, tuple[st.SearchStrategy[Any], Parser]] = {
    "command line": (FLAG_WORDS, words),
    "yaml text": (near("model: {hrm: {d_h: 64}}\nlr: 1e-3\n", "tasks: [a, b]\n", *LEAVES), file("a.yaml", config)),
    "yaml tree": (trees(NAMES).map(json.dumps), file("a.yaml", config)),
    "resolved configuration": (near(*LEAVES, "".join(LEAVES[:3])), lambda folder, made: options.read_resolved(made)),
    "json": (near('{"a": [1, "b", null]}'), lambda folder, made: parse_json(texts_of(made))),
    "json lines": (rows(OWN), file("a.jsonl", lambda path: all_of(json_lines(path)))),
    "task settings": (trees(st.sampled_from(["min_terms", "max_terms", "min_digits", "size", "seed"])),
                      lambda folder, made: Task("chain_sum", made if isinstance(made, dict) else {"min_terms": made})),
    "mix": (near("toy_add=2,chain_sum=1.5"), lambda folder, made: mix_weights(made, ["toy_add", "chain_sum"])),
    "named paths": (near("a=b,c", "perplexity=x\\,y,synthetic"), lambda folder, made: named_paths(made)),
    "suite": (near("synthetic,gsm8k=nowhere", "perplexity=a,b"), lambda folder, made: suite_problems(made)),
    "suite gsm8k": (rows(GSM), file("a.jsonl", lambda path: read_questions(SuiteItem("gsm8k", path)))),
    "suite science_qa": (rows(SCIENCE), file("a.jsonl", lambda path: read_questions(SuiteItem("science_qa", path)))),
    "suite synthetic": (rows({"prompt": "1 + 1", "answer": "2"}),
                        file("a.jsonl", lambda path: read_questions(SuiteItem("synthetic", path)))),
    "own jsonl": (rows(OWN), own("a.jsonl")),
    "own json": (near(json.dumps([OWN, OWN]), json.dumps({"1": OWN})), own("a.json")),
    "own chats": (rows(OWN), own("a.jsonl", messages_field="messages")),
    "chat": (trees(st.sampled_from(["role", "content", "from", "value", "type", "text"])),
             lambda folder, made: chat_texts(made, "messages")),
    "verifier": (near("regex:(\\d+)", "exact", "regex:[a-z]+(?P<a>x)").filter(
        lambda made: made.startswith("regex") or ":" not in made), lambda folder, made: verifier_of(made)),
    "stages text": (near(json.dumps(STAGE)).filter(lambda made: ":f" not in made),
                    lambda folder, made: stages_of(StagesConfig(arch="enhanced", stages=made))),
    "stages tree": (trees(STAGE_KEYS).map(json.dumps),
                    lambda folder, made: stages_of(StagesConfig(arch="enhanced", stages=made))),
    "stage settings": (st.dictionaries(st.sampled_from(sorted(STAGE["format"])), trees(STAGE_KEYS), max_size=3).map(
        lambda made: json.dumps({"format": STAGE["format"] | made})),
        lambda folder, made: stages_of(StagesConfig(arch="enhanced", stages=made))),
    "problems": (rows(PROBLEM), file("a.jsonl", file_source)),
    "documents": (rows(DOCUMENT), file("a.jsonl", lambda path: all_of(read_documents([path])))),
    "text": (near(" = Title = \n\n One . \n", "One.\n\nTwo."),
             file("a.txt", lambda path: all_of(read_documents([path])))),
    "triple": (near(TRIPLE), lambda folder, made: parse_line(texts_of(made), 9)),
    "triple tree": (trees(st.sampled_from(["encoder_ids", "decoder_input_ids", "labels"])).map(json.dumps),
                    lambda folder, made: parse_line(made.encode(), 9)),
    "meta": (st.one_of(near(META), trees(st.sampled_from(list(json.loads(META)))).map(json.dumps)),
             file("meta.json", lambda path: read_meta(path.parent))),
    "tokenizer": (near('{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'),
                  lambda folder, made: parse_tokenizer(made, "tokenizer.json")),
    "answers": (ANSWERS, lambda folder, made: [read(made) for read in READERS]),
    "two answers": (st.tuples(ANSWERS, ANSWERS), lambda folder, made: (same_text(*made), sound_share(*made))),
    "evaluation table": (near(TABLE, TABLE * 2), file("eval.csv", table)),
    "metrics": (rows({"step": 1, "loss": 0.5, "elapsed_s": 1.0}), file("metrics.jsonl", read_losses)),
    "run's record": (st.one_of(near(RECORD), trees(st.sampled_from(["run", "folder"])).map(json.dumps)),
                     file("run.json", owned)),
    "best": (st.one_of(near('{"checkpoint": "step-00000001", "metric": "solved", "value": 0.5}'),
                       trees(st.sampled_from(["checkpoint", "metric", "value"])).map(json.dumps)),
             file("best.json", best)),
    "manifest": (st.one_of(near(MANIFEST), trees(st.sampled_from(
        ["format", "version", "files", "bytes", "sha256", "a.json"])).map(json.dumps)), checkpoint("manifest.json")),
}


def check(name: str, folder: Path, examples: int) -> None:
    """No generated input makes the parser raise what the commands do not tell."""
    strategy, parse = PARSERS[name]

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(strategy)
    def never_a_traceback(made: Any) -> None:
        try:
            parse(folder, made)
        except (ValueError, OSError) as error:
            assert str(error).strip(), "refused without a reason"

    never_a_traceback()


@pytest.mark.parametrize("name", PARSERS)
def test_generated_input_is_read_or_refused_with_a_reason(name, tmp_path):
    check(name, tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARSERS)
def test_ten_thousand_generated_inputs_are_read_or_refused_with_a_reason(name, tmp_path):
    check(name, tmp_path, MANY)
