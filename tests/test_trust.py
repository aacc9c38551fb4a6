"""What this program promises about input from others: no pickle, no foreign code unasked, no way out of a folder."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import depth_curve
import generate
import options
import train
from engine.checkpoints import CheckpointError, best_checkpoint, read_checkpoint, write_checkpoint
from own_tasks.source import source_of
from own_tasks.task import task_name
from tiny_runs import arguments, newest

ROOT = Path(train.__file__).parent
SOURCES = [
    path for path in sorted(ROOT.rglob("*.py"))
    if not {"tests", "findings", "runs", ".venv", ".git"} & set(path.relative_to(ROOT).parts)
]
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
SWITCHES = ("trust_remote_code", "allow_unconfined_code", "allow_code_tasks")  # each lets foreign code run
SECRETS = {
    "HF_TOKEN": "hf_of-a-test-1", "HUGGING_FACE_HUB_TOKEN": "hf_of-a-test-2", "WANDB_API_KEY": "wb-of-a-test-3",
    "COMET_API_KEY": "comet-of-a-test-4", "SWANLAB_API_KEY": "swan-of-a-test-5", "AWS_SECRET_ACCESS_KEY": "aws-6-test",
}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, call) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def imports(path: Path) -> Iterator[str]:
    """The first part of each imported module's name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def given(call: ast.Call, name: str) -> str | None:
    """The source text of a keyword argument; None where it is not given."""
    return next((ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == name), None)


# --- the source -------------------------------------------------------------------------------------------------------


def test_the_audit_sees_the_program():
    names = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {"train.py", "host.py", "engine/checkpoints.py", "scripts/export_model.py"} <= names and len(names) > 100


def test_no_pickle_is_read_and_no_text_becomes_code():
    """The sandbox's marshal is its own: the tests, compiled by the caller, on their way into the confined process."""
    found = []
    for path in SOURCES:
        found += [(path, name) for name in PICKLES & set(imports(path))]
        for name, call in calls(path):
            unsafe = name in ("yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "pd.read_pickle")
            unsafe |= name == "torch.load" and given(call, "weights_only") != "True"
            unsafe |= name == "yaml.load" and given(call, "Loader") != "StrictLoader"
            unsafe |= given(call, "allow_pickle") not in (None, "False") or given(call, "shell") not in (None, "False")
            found += [(path, ast.unparse(call))] if unsafe else []
    assert "class StrictLoader(yaml.SafeLoader)" in (ROOT / "options.py").read_text(encoding="utf-8")
    sandbox = [(path, name) for path, name in found if path.parent.name == "sandbox"]
    assert found == sandbox and {name for _, name in sandbox} == {"marshal"}


def test_foreign_code_is_trusted_only_where_a_flag_says_so():
    for path in SOURCES:
        for _, call in calls(path):
            assert given(call, "trust_remote_code") != "True", path


# --- foreign code runs only when it is typed --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SWITCHES)
def test_no_checkpoint_and_no_file_turns_foreign_code_on(name, tmp_path, capsys):
    saved = train.kept({name: True, "segments": 2}, anew=False)
    assert name not in saved and name in options.INVOCATION
    path = tmp_path / "theirs.yaml"
    path.write_text(f"{name}: true\n", encoding="utf-8")
    assert train.main(["--config", str(path)]) == 2
    assert f"{name} belongs on the command line only: type --{name} in each call" in capsys.readouterr().err
    assert getattr(options.parse([f"--{name}"]), name)
    path.write_text(f"{name}: false\n", encoding="utf-8")
    assert not getattr(options.parse(["--config", str(path)]), name)


@pytest.mark.parametrize("name", SWITCHES)
def test_what_a_run_records_does_not_turn_foreign_code_on(name):
    text = options.rerun_text(options.parse([f"--{name}"]))
    assert f"{name}: false" in text


def test_no_checkpoint_allows_code_to_run(tiny_host, tmp_path, capsys, monkeypatch):
    """A checkpoint of an earlier version, or a forged one, says that it may."""
    assert train.main(arguments(tiny_host, tmp_path / "runs", "--run_name", "r")) == 0
    run = tmp_path / "runs" / "r"
    checkpoint = newest(run)
    documents = read_checkpoint(checkpoint, stems=[]).documents
    text = documents["config.resolved.yaml"]
    for name in ("allow_unconfined_code", "allow_code_tasks"):
        assert f"{name}: false" in text
        text = text.replace(f"{name}: false", f"{name}: true")
    text = text.replace("task: toy_add", "task: codeio")
    (checkpoint / "config.resolved.yaml").write_text(text, encoding="utf-8")
    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    content = text.encode()
    manifest["files"]["config.resolved.yaml"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert read_checkpoint(checkpoint, stems=[]).documents["config.resolved.yaml"] == text

    monkeypatch.setattr("suite.spec.runner.confinement", lambda: "no user namespaces")
    row = {"text": "Write f.", "code": "def f(x):\n    return x", "test_list": ["assert f(1) == 1"], "task_id": 1}
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    capsys.readouterr()
    words = ["--resume", str(run), "--eval_only", "--eval_suite", f"mbpp={tmp_path / 'mbpp.jsonl'}"]
    assert train.main(words) == 2
    told = capsys.readouterr().err
    assert "task codeio executes code" in told and "type --allow_code_tasks to accept that" in told
    with pytest.raises(ValueError, match="task codeio executes code .*: type --allow_code_tasks to accept that"):
        depth_curve.main([str(run), "--segments", "1", "--device", "cpu"])

    # Without the task the suite is what is refused.
    assert train.main([*words, "--task", "toy_add"]) == 2
    assert "accept the risk with --allow_unconfined_code" in capsys.readouterr().err


def test_the_code_of_a_model_folder_does_not_run(tiny_host, tmp_path, capsys):
    """Harmless code that would leave a file."""
    host = tmp_path / "theirs"
    host.mkdir()
    for path in tiny_host.iterdir():
        (host / path.name).write_bytes(path.read_bytes())
    config = json.loads((host / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs", "AutoModelForCausalLM": "theirs.Lm"}}
    (host / "config.json").write_text(json.dumps(config), encoding="utf-8")
    mark = tmp_path / "it ran"
    (host / "theirs.py").write_text(f"open({str(mark)!r}, 'w').close()\n", encoding="utf-8")
    assert train.main(arguments(host, tmp_path / "runs")) == 2
    assert capsys.readouterr().err.strip().endswith("read it, then add --trust_remote_code") and not mark.exists()


# --- names cannot leave their folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "a/../../outside.json", "..\\outside.json"])
def test_a_forged_manifest_reads_nothing_outside_its_checkpoint(name, tmp_path):
    folder = write_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000001", {}, {"a.json": "{}"})
    (folder.parent / "outside.json").write_text("secret", encoding="utf-8")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(b"secret").hexdigest()
    manifest["files"] = {name: {"bytes": 6, "sha256": digest}}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(CheckpointError):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", ["../../other", "/tmp", "step-00000001/..", "", "."])
def test_a_forged_mark_of_the_best_leads_nowhere(name, tmp_path):
    record = {"checkpoint": name, "metric": "solved", "value": 1}
    (tmp_path / "best.json").write_text(json.dumps(record), encoding="utf-8")
    assert best_checkpoint(tmp_path) is None


@pytest.mark.parametrize("name", ["../up", "a/b", "..", ".hidden", "a\\b", "a\nb", "/abs"])
def test_a_run_s_name_is_one_folder(name):
    assert not options.FIND["run_name"].allows(name)


def test_a_task_s_name_is_that_of_its_file_alone(tmp_path):
    path = tmp_path / "a..b" / "..name.jsonl"
    path.parent.mkdir()
    path.write_text("{}", encoding="utf-8")
    name = task_name(source_of(str(path), "--data"))
    assert "/" not in name and name not in ("", ".", "..")


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_no_secret_of_the_environment_is_written_or_told(tiny_host, tmp_path, monkeypatch, capsys):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    words = arguments(tiny_host, tmp_path / "runs", "--run_name", "r", "--report", "1", "--trackers", "tensorboard")
    status = train.main(words)
    out, err = capsys.readouterr()
    if status == 2 and "tensorboard" in err:  # an optional package
        assert train.main(arguments(tiny_host, tmp_path / "runs", "--run_name", "r", "--report", "1")) == 0
    run = tmp_path / "runs" / "r"
    assert train.main(["--resume", str(run), "--eval_only"]) == 0
    assert generate.main(["--checkpoint", str(newest(run)), "--prompt", "1 + 1", "--max_new_tokens", "2"]) == 0
    assert train.main(["--resume", str(run), "--lr", "nan"]) == 2  # messages of errors as well
    told = "".join(capsys.readouterr()) + out + err
    written = b"".join(path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file())
    assert len(written) > 1000
    for value in SECRETS.values():
        assert value not in told and value.encode() not in written


# --- the page that lists it -------------------------------------------------------------------------------------------


def test_every_promise_names_a_test_that_is_there():
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 25 and [name for name in named if f"def {name}(" not in tests] == []
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith(("| promise", "|---"))]
    assert all("`test_" in row for row in rows)
