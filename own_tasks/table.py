"""The rows of own data that can be used: questions, gold answers, where each stands; and what was left out."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from engine.records import normalise
from own_tasks.source import Row, Source, fingerprint, rows_of
from own_tasks.verifiers import Verifier, verifier_of
from tasks.limits import USUAL, JudgeConfig
from text_data.row_fields import answer_text, chat_texts, prompt_text
from verify.judge import scored

SHOWN = 5  # rows that cannot be used are named one by one up to so many


@dataclass(frozen=True)
class OwnDataConfig:
    """Own data; each field is the flag of its name.

    data: FILE_OR_HUB[:SPLIT]; None = no own data.
    question_field, answer_field: names of a row's fields.
    messages_field: name of the field that holds a chat, in place of these two; None = none.
    eval_data: as data, for evaluation alone; None = some questions of data are held out.
    verifier: how an answer is judged, see `verifiers`.
    before: no flag: (SHA-256, name of the task) of a checkpoint's data; the same bytes keep the name wherever they lie.
    """

    data: str | None = None
    question_field: str = "question"
    answer_field: str = "answer"
    messages_field: str | None = None
    eval_data: str | None = None
    verifier: str = "exact"
    before: tuple[str, str] | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that every row needs."""
        if self.messages_field:
            return (self.messages_field,)
        return (self.question_field, self.answer_field)


class Item(NamedTuple):
    """A row that can be used; `more` has its other fields, `place` the file and the line."""

    question: str
    answer: str
    place: str
    more: Mapping[str, Any]


@dataclass
class Table:
    """The usable rows of one source, one for each normalised question, in their order.

    digest: SHA-256 of the source's bytes; of a data set of the hub, of its questions and answers.
    read: rows there are.
    problems: of rows that cannot be used, one line each.
    repeated: rows whose question was there before; the first one counts.
    differing: those of them with another answer.
    """

    source: Source
    items: list[Item] = field(default_factory=list)
    digest: str = ""
    read: int = 0
    problems: list[str] = field(default_factory=list)
    repeated: int = 0
    differing: int = 0

    @functools.cached_property
    def questions(self) -> frozenset[str]:
        """The normalised questions."""
        return frozenset(normalise(item.question) for item in self.items)

    def notes(self) -> list[str]:
        """What a user should know of the rows, one line each."""
        shown = self.source.shown
        lines = [f"WARNING: {shown} {problem}: left out" for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            rest = len(self.problems) - SHOWN
            lines.append(f"WARNING: {shown}: {rest} further rows cannot be used and are left out")

        if self.repeated:
            line = f"{shown}: {self.repeated} of {self.read} rows repeat a question and are left out"
            if self.differing:
                line = f"WARNING: {line}; {self.differing} of them have another answer than the first, which counts"
            lines.append(line)
        return lines


def table_of(source: Source, config: OwnDataConfig, limits: JudgeConfig = USUAL, most: int | None = None) -> Table:
    """The usable rows of a source; from memory where the same bytes were read the same way before.

    Of a source that is read as a stream, the first `most` rows alone.

    Raises:
        ValueError: one line: it cannot be read, a field is nowhere, no row can be used, the verifier is none.
    """
    return _read_once(source, config, limits.score_timeout_s, fingerprint(source), most)


@functools.lru_cache(maxsize=4)
def _read_once(source: Source, config: OwnDataConfig, timeout_s: float, digest: str, most: int | None) -> Table:
    """The table of a source of this digest."""
    table = Table(source, digest=digest)
    verifier = verifier_of(config.verifier)
    answers: dict[str, str] = {}  # of each normalised question
    fields: dict[str, None] = {}  # that some row has, in their order

    for row in itertools.islice(rows_of(source, config.fields), most):
        table.read += 1
        try:
            item = usable(row, config, verifier, timeout_s, fields)
        except ValueError as error:
            table.problems.append(f"{row.place} {error}")
            continue

        # Of two answers to one question no model can know which is meant.
        question = normalise(item.question)
        if question in answers:
            table.repeated += 1
            table.differing += answers[question] != item.answer
            continue
        answers[question] = item.answer
        table.items.append(item._replace(place=f"{source.shown} {item.place}"))

    _check_table(table, config, fields)
    table.digest = digest or _digest_of(table)
    return table


def _check_table(table: Table, config: OwnDataConfig, fields: Mapping[str, None]) -> None:
    """Raises ValueError where nothing can be used, and says why."""
    place = f"{table.source.flag} {table.source.shown}"
    if not table.read:
        raise ValueError(f"{place} holds no rows: give a file with one question a row")

    # A misspelt field is told before the rows that lack it.
    for name in config.fields:
        if fields and name not in fields:
            flag = _flag_of(name, config)
            raise ValueError(f"{place}: no row has the field {name}: name one of {', '.join(fields)} with --{flag}")

    if not table.items:
        raise ValueError(f"{place}: none of its {table.read} rows can be used; the first: {table.problems[0]}")


def _flag_of(name: str, config: OwnDataConfig) -> str:
    """The flag that chose this field."""
    for flag in ("messages_field", "question_field"):
        if getattr(config, flag) == name:
            return flag
    return "answer_field"


def _digest_of(table: Table) -> str:
    """SHA-256 of the questions and answers."""
    digest = hashlib.sha256()
    for item in table.items:
        digest.update(json.dumps([item.question, item.answer]).encode())
    return digest.hexdigest()


# --- one row ----------------------------------------------------------------------------------------------------------


def usable(row: Row, config: OwnDataConfig, verifier: Verifier, timeout_s: float, fields: dict[str, None]) -> Item:
    """The item of a row, whose names are added to `fields`. Raises ValueError: why it cannot be used."""
    item = _item(row, config, fields)
    _check_gold(item, verifier, timeout_s)
    return item


def _item(row: Row, config: OwnDataConfig, fields: dict[str, None]) -> Item:
    """The item of a row, whose names are added to `fields`. Raises ValueError: a clause behind the row's place."""
    if row.problem:
        raise ValueError(row.problem)
    if not isinstance(row.value, dict):
        raise ValueError(f"is no object with fields, but {type(row.value).__name__}")
    fields |= dict.fromkeys(row.value)

    # Texts that no tokenizer could take are of no use either.
    question, answer = _texts(row.value, config)
    for what, text in (("question", question), ("answer", answer)):
        if not text:
            raise ValueError(f"has no {what}")
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"has a character in its {what} that no text has (NUL, or half of one)")

    more = {name: value for name, value in row.value.items() if name not in config.fields}
    return Item(question, answer, row.place, more)


def _texts(value: Mapping[str, Any], config: OwnDataConfig) -> tuple[str, str]:
    """(question, answer) of a row's fields, "" for what is not there. Raises ValueError."""
    for name in config.fields:
        if name not in value:
            raise ValueError(f"has no field {name}")
    if config.messages_field:
        return chat_texts(value[config.messages_field], config.messages_field)

    # A question may be a number that the file's format has read as one.
    question = value[config.question_field]
    if isinstance(question, int | float) and not isinstance(question, bool):
        question = str(question)
    return prompt_text(question, config.question_field), answer_text(value[config.answer_field], config.answer_field)


def _check_gold(item: Item, verifier: Verifier, timeout_s: float) -> None:
    """Raises ValueError where the gold answer fails its own verifier: a clause that goes on from the row's place."""
    given = scored(verifier, item.answer, entry_of(item, "", 0), timeout_s)
    if given.solved:
        return

    if given.timed_out:
        raise ValueError(f"has an answer that takes longer than --score_timeout_s {timeout_s:g} to judge")
    if given.raised:
        raise ValueError(f"has an answer on which --verifier {verifier.text} raises: {_raised(item, verifier)}")
    raise ValueError(f"has an answer that {verifier.needs}: {' '.join(item.answer.split())[:40]!r}")


def _raised(item: Item, verifier: Verifier) -> str:
    """What the verifier raises on the gold answer."""
    try:
        verifier.score_answer(item.answer, entry_of(item, "", 0))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - foreign functions raise what they like
        return " ".join(f"{type(error).__name__}: {error}".split())
    return "nothing this time"


def entry_of(item: Item, task: str, index: int) -> dict[str, Any]:
    """The item as Reasoning Gym has it, for verifiers: `metadata["row"]` has the row's other fields."""
    metadata = {"source_dataset": task, "source_index": index, "place": item.place, "row": dict(item.more)}
    return {"question": item.question, "answer": item.answer, "metadata": metadata}
