"""The tokenizer of the planner/worker model: any Hugging Face tokenizer, given the reasoning tags as tokens.

Each tag of `reasoning_format.REASONING_TOKENS` becomes one id, and none of them is "special": decoding with
`skip_special_tokens=True` keeps them, so that a reward function sees the format it is to judge.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken

from enhanced.reasoning_format import REASONING_TOKENS
from host import DEFAULT_HOST, HostError, load_tokenizer

PAD = "<|pad|>"
EOS = "<|eos|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def reasoning_tokenizer(name_or_dir: str | None = None) -> Any:
    """The tokenizer `name_or_dir` (a hub name or a folder; None: the embedded one), ready for the reasoning format.

    Added where missing: the reasoning tags, an end-of-sequence token, a padding token that is not the end of sequence
    (else the model would never learn to stop), and a chat template with an assistant prompt. Padding is on the left.

    Raises:
        ValueError: no such tokenizer, or one that cannot hold the tags as tokens of their own.
    """
    try:
        tokenizer = load_tokenizer(name_or_dir or DEFAULT_HOST)
    except HostError as error:
        raise ValueError(str(error).replace("--model_name", "--tokenizer", 1)) from error

    # The order of these additions fixes the ids of what is added.
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in REASONING_TOKENS])
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": EOS})
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD})
    if not has_assistant_prompt(tokenizer):
        tokenizer.add_tokens([AddedToken(role, special=True, normalized=False) for role in ROLES])
        tokenizer.chat_template = CHAT_TEMPLATE

    # Prompts of a batch end in one column, behind which all answers begin.
    tokenizer.padding_side = "left"
    check_reasoning_tokenizer(tokenizer)
    return tokenizer


def has_assistant_prompt(tokenizer: Any) -> bool:
    """True when the chat template ends a conversation differently where the assistant is to speak next.

    Raises ValueError where the template fails.
    """
    if not tokenizer.chat_template:
        return False
    turn = [{"role": "user", "content": "?"}]

    # Templates are foreign code, which raises what it likes.
    try:
        plain = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=False)
        prompted = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # noqa: BLE001 - see above
        raise ValueError(f"the tokenizer's chat template failed ({error}): choose another --tokenizer") from error
    return len(prompted) > len(plain)


def check_reasoning_tokenizer(tokenizer: Any) -> None:
    """Refuses a tokenizer that splits a reasoning tag, hides one when decoding, or pads with the end of sequence.

    Raises:
        ValueError: one line that names every fault.
    """
    # A tag is one token, and comes back when that token is decoded.
    split = []
    hidden = []
    for tag in REASONING_TOKENS:
        ids = tokenizer.encode(tag, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            split.append(tag)
        elif tag not in tokenizer.decode(ids, skip_special_tokens=True):
            hidden.append(tag)

    faults = []
    if split:
        faults.append(f"no single token for {' '.join(split)}")
    if hidden:
        faults.append(f"decoding drops {' '.join(hidden)}")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        faults.append("no padding token of its own")
    if faults:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}: {'; '.join(faults)}: "
            "make it with reasoning_tokenizer(), or name one saved by this project"
        )
