"""What README, CONTRIBUTING and docs/ say is true: commands parse, links and paths exist."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

import generate
import options
from test_architecture import ROWS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
               if path.exists() and "results" not in path.parts)
FOLDERS = sorted(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
MADE_BY_USERS = ("runs",)  # folders that a run makes
PUBLISHED = {"working_grpo.py", "test_generation"}  # of another project


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands_of(text: str) -> list[str]:
    """Every command of a page that calls python, on one line: of the indented blocks and of inline code.

    A line that ends in a backslash goes on in the next one. `$B` is what the page set before by `B="..."`.
    """
    text = re.sub(r"\\\n\s*", "", text)
    variables = dict(re.findall(r'^    (\w+)="(.*)"$', text, re.MULTILINE))
    lines = re.findall(r"^    (.*)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
    commands = []
    for line in lines:
        line = re.sub(r"\$(\w+)", lambda found: variables.get(found[1], found[0]), line)
        if re.match(r"python3? (train\.py|generate\.py|scripts/\w+\.py)( |$)", line):
            commands.append(line)
    return commands


COMMANDS = [(name_of(page), line) for page in PAGES for line in commands_of(page.read_text(encoding="utf-8"))]


def words_of(line: str) -> list[str]:
    """[script, argument, ...] of a command; three dots at its end stand for any further arguments."""
    words = shlex.split(line, comments=True)[1:]
    return [word for word in words if word != "..."]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_is_understood(page, line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    script, *argv = words_of(line)
    if "--help" in argv:
        return
    if script == "train.py":
        _, problems = options.collect(argv)
        assert problems == []
    elif script == "generate.py":
        assert generate.problems(generate.build_parser().parse_args(argv)) == []
    else:
        known = script_flags(script, monkeypatch, capsys)
        used = {word.partition("=")[0].replace("-", "_") for word in argv if re.match("--[a-z]", word)}
        assert used <= known


def script_flags(script: str, monkeypatch, capsys) -> set[str]:
    """The flags that the script's own help lists, with underscores in place of hyphens."""
    assert (ROOT / script).is_file()
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as left:
        importlib.import_module(Path(script).stem).main()
    assert left.value.code == 0
    return {flag.replace("-", "_") for flag in re.findall(r"--[a-z][\w-]*", capsys.readouterr().out)}


def test_the_pages_hold_commands():
    pages = {page for page, _ in COMMANDS}
    assert {"README.md", "docs/addon.md", "docs/hybrid.md", "docs/planner_worker.md", "docs/data.md"} <= pages


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", text):
        if re.match(r"https?:", target):
            continue
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor[1:] in anchors(linked), f"{name_of(page)} links to {target}{anchor}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_exist(page):
    """Every path below a folder of the repository, and every name of a Python file, in inline code or a command."""
    text = page.read_text(encoding="utf-8")
    folders = "|".join(folder for folder in FOLDERS if folder not in MADE_BY_USERS)
    paths = set(re.findall(rf"(?<![\w./-])(?:{folders})/[\w./*-]*[\w*/]", text))
    named = {path for path in paths if not re.search(r"/[A-Z]+\b", path)}  # suite/NAME stands for many
    missing = sorted(path for path in named if not list(ROOT.glob(path)))
    modules = set(re.findall(r"`(?:python3? )?(\w+\.py)\b", text)) - PUBLISHED
    missing += sorted(name for name in modules if not list(ROOT.rglob(name)))
    assert missing == []


def test_the_table_of_imports_is_the_one_that_is_tested():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", text, re.MULTILINE)
    shown = [tuple(re.findall(r"`(\w+)`", cells)) for _, cells in rows]
    assert [int(number) for number, _ in rows] == list(range(1, len(ROWS) + 1))
    assert shown == list(ROWS)


def test_every_package_and_root_file_has_its_line():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    described = set(re.findall(r"^\| `([\w/.]+)` \|", text, re.MULTILINE))
    for unit in (unit for units in ROWS for unit in units):
        assert {f"{unit}/", f"{unit}.py"} & described, unit


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_tests_exist(page):
    named = set(re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))) - PUBLISHED
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert {name for name in named if f"def {name}(" not in tests} == set()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_page_names_a_machines_folders(page):
    assert re.findall(r"(?<![\w.])/(?:home|root|tmp|work|Users)/\S*", page.read_text(encoding="utf-8")) == []


# --- the messages of docs/troubleshooting.md --------------------------------------------------------------------------

BY_OTHERS = {"CUDA out of memory"}  # torch's own words


def documented_messages() -> list[str]:
    """The message of every entry: `- ` and inline code that ends its line."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return [found[1].strip() for found in re.findall(r"^- (`+)(.*)\1$", text, re.MULTILINE)]


@pytest.fixture(scope="module")
def constants() -> list[list[str]]:
    """The constant pieces, in their order, of every text in the sources; values stand between two pieces."""
    places = [*ROOT.glob("*.py"), *(path for units in ROWS for unit in units for path in (ROOT / unit).rglob("*.py")),
              *(ROOT / "scripts").glob("*.py")]
    texts = []
    for path in places:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.split(r"\{\w+\}", node.value))
            elif isinstance(node, ast.JoinedStr):
                pieces = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
                texts.append([piece for piece in pieces if piece])
    return texts


def share_said(pieces: list[str], message: str) -> float:
    """The share of a message that the pieces make up, in their order; 0 where one is missing.

    A message that ends in three dots is quoted from its beginning alone: its last piece may be cut there.
    """
    cut = message.endswith("...")
    message = message.removesuffix("...").rstrip()
    start, said = 0, 0
    for piece in pieces:
        place = message.find(piece, start)
        if place >= 0:
            said += len(piece)
            start = place + len(piece)
            continue
        if not cut:
            return 0.0
        kept = next((message[end:] for end in range(start, len(message)) if piece.startswith(message[end:])), "")
        return (said + len(kept)) / len(message) if kept else 0.0
    return said / len(message)


@pytest.mark.parametrize("message", documented_messages())
def test_a_documented_message_is_in_the_source(message, constants):
    if message not in BY_OTHERS:
        assert max(share_said(pieces, message) for pieces in constants) > 0.25, f"nothing in the source says {message}"


def test_a_message_that_changed_is_seen():
    assert share_said(["--", " is not legal: expected "], "--lr 0 is not legal: expected more") > 0.5
    assert share_said(["--", " is not legal: expected "], "--lr 0 is not allowed: expected more") == 0
    assert share_said(["no such folder: ", "check the name"], "no such folder: x check the ...") > 0.5
