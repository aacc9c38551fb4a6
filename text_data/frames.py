"""The text around a question, and the tokens of a text that goes on behind another."""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PLAIN_CUE = "\nAnswer:"
LINE_BREAK = "\n"  # stands before a text while it is tokenized, where the tokenizer would add a space
EXAMPLE_GAP = "\n\n"  # between solved examples in plain text
NAMED_HEADER = "rg:"  # before the name of one of Reasoning Gym's own system prompts
_QUESTION = "QUESTION-GOES-HERE"
_ANSWER = "ANSWER-GOES-HERE"

TAKEN = ("messages", "add_generation_prompt")  # variables of a template that the question itself fills

IdsOf = Callable[[Any, Sequence[str]], list[list[int]]]  # of a tokenizer and texts


@dataclass(frozen=True)
class Frame:
    """How every prompt of a model is written: prefix + question + suffix.

    A checkpoint keeps it, because a chat template may write another one tomorrow (some show the date).

    prefix, suffix: the text before and after the question.
    chat: True for a chat template's text, which opens and closes itself; False for plain text.
    end: id of the token that ends every target.
    template: the chat template that was given in place of the tokenizer's; None = its own.
    """

    prefix: str
    suffix: str
    chat: bool
    end: int
    template: str | None = None

    def same_text(self, other: Frame) -> bool:
        """Whether both show a question in the same words."""
        return (self.prefix, self.suffix) == (other.prefix, other.suffix)


def render_frame(tokenizer: Any, style: str, header: str | None, path: str | None = None) -> Frame:
    """Today's frame of a tokenizer.

    Args:
        tokenizer: any Hugging Face tokenizer with an end of sequence.
        style: "chat", "plain", or "auto" for chat where the tokenizer has a template.
        header: text before every prompt, or the name of one as `header_text` takes it; None = none.
        path: the file that the template comes from, for messages; None = the tokenizer's own.

    Raises:
        ValueError: `chat` without a template; a template that fails or does not show the question exactly once; as
            `header_text`.
    """
    header = header_text(header)
    if style == "chat" and not tokenizer.chat_template:
        raise ValueError("--prompt_style chat needs a chat template, this tokenizer has none: use auto or plain")
    if style == "plain" or not tokenizer.chat_template:
        prefix = f"{header}\n" if header else ""
        return Frame(prefix, PLAIN_CUE, chat=False, end=tokenizer.eos_token_id)

    turns = _turns(header, [])
    whose = f"--chat_template {path}" if path else "the tokenizer's chat template"

    # Templates are foreign code: a role that one refuses raises TemplateError, others raise what they like.
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        raise ValueError(f"{whose} failed ({error}): {'correct it' if path else 'try --prompt_style plain'}") from error
    if text.count(_QUESTION) != 1 and path:
        raise ValueError(f"{whose} does not show the question once: write the content of each message")
    if text.count(_QUESTION) != 1:
        raise ValueError(f"{whose} does not show the question once: use --prompt_style plain")
    prefix, suffix = text.split(_QUESTION)
    return Frame(prefix, suffix, chat=True, end=_end_of_turn(tokenizer, turns))


def give_template(tokenizer: Any, path: str | None, variables: str | None) -> None:
    """Gives a tokenizer the chat template in a file, and a chat template's variables their values.

    Args:
        tokenizer: any Hugging Face tokenizer; it is changed.
        path: a Jinja file, as models bring it; None keeps the tokenizer's own.
        variables: a JSON object, such as `{"enable_thinking": false}`; None sets none.

    Raises:
        ValueError: no such file, no JSON object, a name that a template cannot be given so, or no template to give to.
    """
    values = template_values(variables)
    if path is not None:
        tokenizer.chat_template = template_text(path)
    if not values:
        return
    if not isinstance(tokenizer.chat_template, str):
        has = "several: choose one by --chat_template FILE" if tokenizer.chat_template else "none"
        raise ValueError(f"--chat_template_kwargs {variables} needs a chat template, this tokenizer has {has}")

    # What the template itself says first holds wherever it is rendered, in an exported folder too.
    lines = ""
    for name, value in values.items():
        lines += f"{{% set {name} = {_literal(value)} %}}"
    if not tokenizer.chat_template.startswith(lines):
        tokenizer.chat_template = lines + tokenizer.chat_template


def _no_number(text: str) -> None:
    """Raises ValueError for NaN and the infinities, which Jinja does not know."""
    raise ValueError(f"{text} is no number of a template")


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it: its null is `none`, which would else be an unknown name."""
    if value is None:
        return "none"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


def template_text(path: str) -> str:
    """The chat template in a file. Raises ValueError where it cannot be read, or holds none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ValueError(f"--chat_template {path} cannot be read: {reason}") from error

    if not text.strip():
        raise ValueError(f"--chat_template {path} is empty: give a Jinja file, or --prompt_style plain without it")
    return text


def template_values(variables: str | None) -> dict[str, Any]:
    """The values of `--chat_template_kwargs`. Raises ValueError for what is no JSON object of names that are free."""
    if variables is None:
        return {}
    try:
        values = json.loads(variables, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error)
        raise ValueError(f"--chat_template_kwargs {variables!r} is no JSON ({reason})") from error
    if not isinstance(values, dict):
        raise ValueError(f"--chat_template_kwargs {variables!r}: expected a JSON object, name to value")
    for name in values:
        if not name.isidentifier() or name in TAKEN or keyword.iskeyword(name) or keyword.iskeyword(name.capitalize()):
            raise ValueError(f"--chat_template_kwargs: {name!r} is no variable that a template can be given")
    return values


def header_text(header: str | None) -> str | None:
    """The text that `--system_header` means: `rg:NAME` is Reasoning Gym's prompt of that name, all else is itself.

    Raises:
        ValueError: a name that Reasoning Gym does not have; reasoning-gym is not installed.
    """
    if header is None or not header.startswith(NAMED_HEADER):
        return header
    try:
        from reasoning_gym.utils import SYSTEM_PROMPTS
    except ImportError as error:
        raise ValueError(
            f"--system_header {header} is a prompt of Reasoning Gym, which is not installed: pip install "
            "reasoning-gym==0.1.25"
        ) from error

    name = header.removeprefix(NAMED_HEADER)
    if name not in SYSTEM_PROMPTS:
        there = ", ".join(NAMED_HEADER + known for known in SYSTEM_PROMPTS)
        raise ValueError(f"--system_header {header}: Reasoning Gym has no prompt of that name; choose from {there}")
    return SYSTEM_PROMPTS[name].strip()


def _turns(header: str | None, solved: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """The turns of a chat up to the question: the header, and question and answer of each solved example."""
    turns = []
    if header:
        turns.append({"role": "system", "content": header})
    for question, answer in solved:
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer})
    return [*turns, {"role": "user", "content": _QUESTION}]


def frame_with_examples(
    frame: Frame, tokenizer: Any, header: str | None, solved: Sequence[tuple[str, str]]
) -> Frame:
    """The frame of a question that solved examples stand before, as (question, answer).

    In plain text they stand above one another, each as `frame` writes it, apart by `EXAMPLE_GAP`. In a chat each is a
    pair of turns; where the template cannot show those, they stand in plain text in the user's turn.
    """
    prefix = _chat_prefix(frame, tokenizer, header, solved) if frame.chat else None
    if prefix is None:
        cue = PLAIN_CUE if frame.chat else frame.suffix
        prefix = frame.prefix
        for question, answer in solved:
            prefix += f"{question}{cue} {answer}{EXAMPLE_GAP}"
    return replace(frame, prefix=prefix)


def _chat_prefix(frame: Frame, tokenizer: Any, header: str | None, solved: Sequence[tuple[str, str]]) -> str | None:
    """All that the template writes before the question; None where it cannot show the examples as turns."""
    try:
        today = render_frame(tokenizer, "chat", header)
        turns = _turns(header_text(header), solved)
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception:  # noqa: BLE001 - templates are foreign code
        return None

    # The beginning is the frame's own, which a checkpoint may have kept from another day.
    before, _, after = text.partition(_QUESTION)
    shown = all(part.strip() in before for pair in solved for part in pair)
    if not shown or after != today.suffix or not before.startswith(today.prefix):
        return None
    return frame.prefix + before[len(today.prefix) :]


def kept_frame(
    kept: Mapping[str, Any] | None, tokenizer: Any, style: str, header: str | None
) -> tuple[Frame, str | None]:
    """(the frame that a checkpoint was trained with, a note where the template writes another one today).

    Args:
        kept: the frame's fields as the checkpoint keeps them. None: it is of an earlier version, which kept no frame;
            its prompts are rendered, and its targets end with the end of sequence.
        tokenizer, style, header: as `render_frame` takes them.

    Raises:
        ValueError: as `render_frame`, where no frame was kept.
    """
    if kept is None:
        return replace(render_frame(tokenizer, style, header), end=tokenizer.eos_token_id), None

    # A template that fails today does no harm.
    frame = Frame(**kept)
    try:
        today = render_frame(tokenizer, style, header)
    except ValueError as error:
        return frame, f"the prompts stay as they were in training; today they could not be rendered: {error}"
    if today.same_text(frame):
        return frame, None
    return frame, (
        "the tokenizer's chat template writes another frame around a question today than in training: the prompts "
        "stay as they were in training"
    )


def _end_of_turn(tokenizer: Any, turns: list[dict[str, str]]) -> int:
    """Id of the special token that the template puts behind an answer; without one, the end of sequence.

    Gemma closes a turn with <end_of_turn> and Phi-3 with <|end|>, while their end of sequence is another token.
    """
    answered = [*turns, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(answered, tokenize=False, add_generation_prompt=False)
    except Exception:  # as above: this template shows no answers
        return tokenizer.eos_token_id

    behind = text.partition(_ANSWER)[2].lstrip()
    ids = plain_ids(tokenizer, [behind])[0]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if ids and ids[0] in special:
        return ids[0]
    return tokenizer.eos_token_id


# --- tokens -----------------------------------------------------------------------------------------------------------


def plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens around it."""
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]


def text_ids(tokenizer: Any, texts: Sequence[str], opened: bool = False) -> list[list[int]]:
    """Token ids of each text, in which the name of a special token is text as any other.

    `opened` adds the special tokens that the tokenizer puts around a text.
    """
    rows = tokenizer(
        list(texts), add_special_tokens=opened, split_special_tokens=True, return_attention_mask=False
    )
    return rows["input_ids"]


def adds_space(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a space in front of every text, as SentencePiece does: then pieces do not join."""
    alone, behind_a_line_break = plain_ids(tokenizer, ["a", LINE_BREAK + "a"])
    return alone != behind_a_line_break[-len(alone) :]


def continuation_ids(
    tokenizer: Any, texts: Sequence[str], anchors: Sequence[str], ids_of: IdsOf = plain_ids
) -> list[list[int]]:
    """Token ids of each text as it goes on behind an anchor: those that follow the anchor's own in their joint text.

    The first of `anchors` counts whose tokens stay as they are when the text joins it. Behind none, the text stands
    alone, and SentencePiece puts a space in front of it. `ids_of` tokenizes: `plain_ids` or `text_ids`.
    """
    rows = ids_of(tokenizer, texts)
    for anchor in reversed(anchors):
        before = ids_of(tokenizer, [anchor])[0]
        joined = ids_of(tokenizer, [anchor + text for text in texts])
        for index, row in enumerate(joined):
            if row[: len(before)] == before:
                rows[index] = row[len(before) :]
    return rows


def anchors_of(tokenizer: Any, text: str) -> list[str]:
    """What a text that goes on behind `text` is tokenized with, see `continuation_ids`."""
    anchors = [text] if text else []
    if adds_space(tokenizer):
        anchors.append(LINE_BREAK)
    return anchors


# --- special tokens in texts ------------------------------------------------------------------------------------------


class Guard:
    """Keeps texts of others from becoming control tokens, while those of the frame around them are.

    Texts that name no special token are tokenized in one piece with their frame, as ever. Only where one does, the
    frame's own special tokens are taken apart from what lies between them.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        special = [token for token in tokenizer.added_tokens_decoder.values() if token.special and token.content]
        self._tokens = {token.content: token for token in special}

        # A longer name may begin with a shorter one.
        names = sorted(self._tokens, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) if names else r"(?!)")

    def names_one(self, text: str) -> bool:
        """Whether a text names a special token."""
        return self._names.search(text) is not None

    def framed(self, prefix: str, text: str, suffix: str, opened: bool) -> list[int]:
        """Token ids of prefix + text + suffix, of which only the frame may hold special tokens.

        `opened` adds the special tokens that the tokenizer puts around a text.
        """
        head, before = self._head(prefix)
        after, tail = self._tail(suffix)
        run = before + text + after
        if not head and not tail:
            return text_ids(self.tokenizer, [run], opened)[0]

        # Behind a special token SentencePiece adds no space.
        anchors = anchors_of(self.tokenizer, "") if head else []
        middle = continuation_ids(self.tokenizer, [run], anchors, text_ids)[0]
        first, last = plain_ids(self.tokenizer, [head, tail])
        opening, closing = self._around(head + tail) if opened else ([], [])
        return [*opening, *first, *middle, *last, *closing]

    def continued(self, text: str, anchors: Sequence[str]) -> list[int]:
        """`continuation_ids` of a text that names special tokens; anchors count from their last one on."""
        tails = [self._head(anchor)[1] for anchor in anchors]
        return continuation_ids(self.tokenizer, [text], [tail for tail in tails if tail], text_ids)[0]

    def _head(self, text: str) -> tuple[str, str]:
        """A text in two: up to its last special token, with the white space that this one swallows; and the rest."""
        end = 0
        for match in self._names.finditer(text):
            end = match.end()
            if self._tokens[match[0]].rstrip:
                end = len(text) - len(text[end:].lstrip())
        return text[:end], text[end:]

    def _tail(self, text: str) -> tuple[str, str]:
        """A text in two: before its first special token and the white space that this one swallows; and the rest."""
        match = self._names.search(text)
        start = len(text)
        if match:
            start = match.start()
            if self._tokens[match[0]].lstrip:
                start = len(text[:start].rstrip())
        return text[:start], text[start:]

    def _around(self, text: str) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer puts before and after a text when it opens and closes it."""
        opened = self.tokenizer(text, add_special_tokens=True, return_attention_mask=False)["input_ids"]
        plain = plain_ids(self.tokenizer, [text])[0]
        for start in range(len(opened) - len(plain) + 1):
            if opened[start : start + len(plain)] == plain:
                return opened[:start], opened[start + len(plain) :]
        return [], []
