"""Pretrains the embedded LLM `assets/tiny_host/` from nothing: tokenizer, corpus, Llama, model card.

    python scripts/pretrain_host.py                       # about 35 minutes on 2 idle cores; run again to resume
    python scripts/pretrain_host.py --steps 20 --documents 40 --output /tmp/host   # a quick look

The corpus is question-and-answer text of Reasoning Gym tasks, balanced to within one document per task, half of it at
`--task_config small` and half at `default` where a task has both. Every question that the evaluation sets reserve is
rejected, so the frozen LLM has never read an evaluation item. Work files lie beside the output, in `<output>.work/`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from engine.batches import IGNORE  # noqa: E402
from engine.checkpoints import read_checkpoint, write_checkpoint  # noqa: E402
from engine.files import read_json, write_text_aside  # noqa: E402
from engine.optimizer_state import pack_optimizer, unpack_optimizer  # noqa: E402
from engine.progress import Progress  # noqa: E402
from reasoning_gym_wrapper import EVAL_SEED, Reserve, Task, make_tasks, train_seed  # noqa: E402
from script_tools import ScriptParser  # noqa: E402

# Short prompts, fast to draw, gold answers, stable under PYTHONHASHSEED, and no scorer or item that executes code.
TASKS = """
ab aiw advanced_geometry base_conversion basic_arithmetic binary_alternation bitwise_arithmetic
caesar_cipher calendar_arithmetic chain_sum color_cube_rotation complex_arithmetic count_bits count_primes
course_schedule cryptarithm decimal_arithmetic decimal_chain_sum dice family_relationships fraction_simplification gcd
gsm_symbolic knights_knaves largest_island lcm leg_counting letter_counting letter_jumble maze mini_sudoku
number_filtering number_format number_sequence number_sorting palindrome_generation power_function
products rotate_matrix sentence_reordering shortest_path simple_equations simple_geometry
spell_backward survo syllogism time_intervals word_sequence_reversal word_sorting kakurasu path_star pool_matrix
manipulate_matrix list_functions
""".split()
RESERVED_PER_TASK = 1024  # evaluation items of each task and difficulty that the corpus must not hold
MAX_TOKENS = 384  # of a document; longer ones are left out
MOST_POSITIONS = 2048  # of the LLM, which reads longer prompts than it was trained on
PLAIN_SHARE = 0.1  # of the documents is plain text, the rest are chats
LENGTH_NOISE = 8  # tokens by which rows of one batch may differ in length, so that batches mix
SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# A digit, an underscore, a punctuation mark and a white-space character are one token each, so rows of a grid have
# equal lengths; only a word of two letters or more may take its leading space along.
SPLIT = r" ?\p{L}{2,}|\p{L}|\p{N}|\s|[^\s\p{L}\p{N}]"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with status 2 and one line for a mistake."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "assets" / "tiny_host")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma list; the default is the shipped host's list")
    parser.add_argument("--documents", type=int, default=2000, help="documents per task")
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--batch_tokens", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=1536)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save_every", type=int, default=200)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    options = parser.parse_args(argv)

    for name in ("documents", "steps", "batch_tokens", "hidden_size", "layers", "vocab_size", "save_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} must be at least 1")
    return options


# --- corpus -----------------------------------------------------------------------------------------------------------


def draw_documents(names: list[str], per_task: int, seed: int) -> list[tuple[str, str]]:
    """(question, answer) pairs, `per_task` of each task, none of them an evaluation question of the default seed.

    Raises:
        SystemExit: a task has too few questions.
    """
    documents: list[tuple[str, str]] = []
    with Progress(len(names), "corpus", "tasks") as progress:
        for done, name in enumerate(names, start=1):
            documents += _task_documents(name, per_task, seed)
            progress.update(done, documents=len(documents))

    random.Random(seed).shuffle(documents)
    return documents


def _task_documents(name: str, per_task: int, seed: int) -> list[tuple[str, str]]:
    """`per_task` (question, answer) pairs of one task, from its difficulties by turns."""
    # A task whose config has none of the fields of `small` has one difficulty.
    levels: list[Task] = []
    for level in ("small", "default"):
        task = make_tasks([name], level)[0]
        if all(task.config != other.config for other in levels):
            levels.append(task)
    reserves = [Reserve([task], RESERVED_PER_TASK, EVAL_SEED, must_fill=False) for task in levels]
    streams = [iter(task.items(train_seed(seed))) for task in levels]

    documents: list[tuple[str, str]] = []
    for attempt in range(per_task * 50):
        _, example = next(streams[attempt % len(streams)])

        # The same question can come from either difficulty, so both reserves are asked.
        if not any(reserve.rejects(example) for reserve in reserves):
            documents.append((example.question, example.target))
        if len(documents) == per_task:
            return documents
    raise SystemExit(f"pretrain_host.py: error: task {name} has too few questions beside its evaluation set; drop it")


def train_tokenizer(documents: list[tuple[str, str]], vocab_size: int):
    """Byte-level BPE over the corpus, as a transformers tokenizer with pad/bos/eos and a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    # Text is split into pieces that no token may cross, then into bytes, so that every text has tokens.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(itertools.chain.from_iterable(documents), trainer)

    pad, bos, eos = SPECIAL[:3]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=SPECIAL[3:],
        model_max_length=MOST_POSITIONS,
        clean_up_tokenization_spaces=False,
        # Given here they are saved with the tokenizer; every document starts with bos, so plain prompts must as well.
        add_bos_token=True,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode_documents(tokenizer, documents: list[tuple[str, str]], seed: int) -> list[np.ndarray]:
    """Token ids of each document that fits MAX_TOKENS; one in ten is plain text, the rest are chats."""
    draw = random.Random(seed + 1)
    texts = []
    for question, answer in documents:
        if draw.random() < PLAIN_SHARE:
            texts.append(f"{tokenizer.bos_token}{question}\nAnswer: {answer}{tokenizer.eos_token}")
        else:
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            texts.append(tokenizer.apply_chat_template(turns, tokenize=False))

    # The template writes the special tokens itself.
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [np.asarray(row, dtype=np.int64) for row in ids if len(row) <= MAX_TOKENS]


class Batches:
    """Batch number k of about `batch_tokens` tokens, rows of like length; a function of (seed, k) alone.

    Args:
        rows: token ids of each document, (its length,).
        batch_tokens: most tokens of a batch, padding included; a longer row is a batch of its own.
        seed: of the order of rows and batches, another in each epoch.
        pad: id that fills rows up on the right.
    """

    def __init__(self, rows: list[np.ndarray], batch_tokens: int, seed: int, pad: int):
        self.rows = rows
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.pad = pad
        self._plans: dict[int, list[list[int]]] = {}

    def _plan(self, epoch: int) -> list[list[int]]:
        """Places of the rows of each batch of an epoch."""
        if epoch in self._plans:
            return self._plans[epoch]

        # Rows of like length stand together; a little noise puts them into other batches in every epoch.
        draw = random.Random(f"{self.seed}/{epoch}")
        keys = [(len(row) + draw.uniform(0, LENGTH_NOISE), place) for place, row in enumerate(self.rows)]
        plan = []
        batch: list[int] = []
        for _, place in sorted(keys):
            if batch and (len(batch) + 1) * len(self.rows[place]) > self.batch_tokens:
                plan.append(batch)
                batch = []
            batch.append(place)
        plan.append(batch)

        draw.shuffle(plan)
        self._plans[epoch] = plan
        return plan

    def __getitem__(self, number: int) -> torch.Tensor:
        """(rows, longest row) int64 ids, padded on the right."""
        epoch = 0
        while number >= len(self._plan(epoch)):
            number -= len(self._plan(epoch))
            epoch += 1

        rows = [self.rows[place] for place in self._plan(epoch)[number]]
        batch = np.full((len(rows), max(map(len, rows))), self.pad)
        for filled, ids in zip(batch, rows, strict=True):
            filled[: len(ids)] = ids
        return torch.from_numpy(batch)


# --- training ---------------------------------------------------------------------------------------------------------


def build_model(options: argparse.Namespace, tokenizer):
    """A Llama of the asked shape with random weights, drawn by the seed; heads are 64 wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    heads = max(options.hidden_size // 64, 1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=MOST_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """The rate of batch `step` (from 0): a short linear warm-up, then a half cosine down to 5 % of the peak."""
    warmup = min(100, options.steps // 10 + 1)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    return options.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(options.steps - warmup, 1))))


def build_optimizer(model, lr: float) -> tuple[torch.optim.AdamW, list[str]]:
    """AdamW that decays matrices alone, and the names of its parameters in its order."""
    parameters = list(model.named_parameters())
    matrices = [(name, p) for name, p in parameters if p.ndim >= 2]
    rest = [(name, p) for name, p in parameters if p.ndim < 2]
    groups = [
        {"params": [p for _, p in matrices], "weight_decay": 0.1},
        {"params": [p for _, p in rest], "weight_decay": 0.0},
    ]
    names = [name for name, _ in matrices + rest]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95)), names


def train_step(model, optimizer, ids: torch.Tensor, pad: int, lr: float) -> float:
    """One batch of ids (B, S), padded on the right. Returns its loss, the mean over tokens in nats."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    labels = ids.masked_fill(ids == pad, IGNORE)

    # Rows are padded on the right, so a causal mask alone keeps pads out of every scored position.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def train(options: argparse.Namespace, model, batches: Batches, work: Path) -> tuple[float, float]:
    """Trains to `--steps`, saving every `--save_every`; resumes from the work folder.

    Returns the smoothed loss and the seconds of training, those before a resume included.
    """
    optimizer, order = build_optimizer(model, options.lr)
    step, smooth, seconds = restore(model, optimizer, order, work)
    began = time.monotonic() - seconds
    model.train()
    with Progress(options.steps, "pretraining", "steps") as progress:
        progress.update(step)
        while step < options.steps:
            loss = train_step(model, optimizer, batches[step], batches.pad, learning_rate(step, options))
            step += 1
            smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
            if step % 10 == 0:
                progress.update(step, loss=smooth)

            # A batch is a function of its number, so model, moments and step are all there is to keep.
            if step % options.save_every == 0 or step == options.steps:
                seconds = time.monotonic() - began
                keep(model, optimizer, order, work, {"step": step, "loss": smooth, "seconds": seconds})
    return smooth, seconds


def keep(model, optimizer, order: list[str], work: Path, state: dict[str, float]) -> None:
    """Writes all that a resumed run needs into the work folder."""
    moments, document = pack_optimizer(optimizer, order)
    write_checkpoint(
        work / "state",
        {"model": dict(model.state_dict()), "optimizer": moments},
        {"state.json": json.dumps({**state, "optimizer": document})},
    )


def restore(model, optimizer, order: list[str], work: Path) -> tuple[int, float | None, float]:
    """Loads what `keep` wrote. Returns batches done, smoothed loss, seconds; (0, None, 0.0) for a new run."""
    if not (work / "state").is_dir():
        return 0, None, 0.0
    saved = read_checkpoint(work / "state")
    state = json.loads(saved.documents["state.json"])
    model.load_state_dict(saved.tensors["model"])
    unpack_optimizer(optimizer, order, saved.tensors["optimizer"], state["optimizer"])
    return state["step"], state["loss"], state.get("seconds", 0.0)


# --- output -----------------------------------------------------------------------------------------------------------


def model_card(options: argparse.Namespace, model, tokens: int, loss: float, seconds: float, used: int) -> str:
    """The README.md of the host: `tokens` seen, final `loss`, `seconds` of training, documents `used`."""
    parameters = sum(p.numel() for p in model.parameters())
    tasks = options.tasks.split(",")
    dropped = options.documents * len(tasks) - used
    return f"""---
license: apache-2.0
pipeline_tag: text-generation
---

# tiny_host

A {parameters / 1e6:.2f} M-parameter Llama ({options.layers} layers, width {options.hidden_size},
{model.config.vocab_size} tokens) that exists to be frozen: the embedded LLM of this repository, small enough to train
an HRM add-on on two CPU cores.

- **Data**: {used} question-and-answer texts drawn from {len(tasks)} Reasoning Gym tasks (reasoning-gym 0.1.25),
  balanced to within one document per task, at small and default difficulty, less the {dropped} that are longer than
  {MAX_TOKENS} tokens; every question that the evaluation sets reserve (the first {RESERVED_PER_TASK} of each task and
  difficulty at evaluation seed {EVAL_SEED}) was rejected. No other text.
- **Steps**: {options.steps} of about {options.batch_tokens} tokens ({tokens / 1e6:.1f} M tokens seen), AdamW, peak
  learning rate {options.lr}, bf16 autocast, seed {options.seed}; {seconds / 60:.0f} minutes on a 2-core CPU.
- **Final training loss** (smoothed): {loss:.3f} nats per token, question and answer tokens alike.
- **Tokenizer**: byte-level BPE; a digit, an underscore, a punctuation mark and a space before any of them are one token
  each.
- **Licence**: Apache-2.0, weights and tokenizer.
- **Reproduce**: `python scripts/pretrain_host.py`

Tasks: {", ".join(tasks)}.
"""


def load_documents(options: argparse.Namespace, work: Path) -> list[tuple[str, str]]:
    """The corpus, drawn once and kept in the work folder so that a resumed run starts at once."""
    path = work / "documents.json"
    if not path.exists():
        drawn = draw_documents(options.tasks.split(","), options.documents, options.seed)
        write_text_aside(path, json.dumps(drawn), "--output")
    return [tuple(pair) for pair in read_json(path)]


def save(options: argparse.Namespace, model, tokenizer, card: str) -> None:
    """Writes model (in bfloat16), tokenizer and card into the output folder."""
    model = model.to(torch.bfloat16).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    write_text_aside(options.output / "README.md", card, "--output")


def begin_work(options: argparse.Namespace) -> Path:
    """The work folder of these settings. Raises SystemExit where it holds a run with others."""
    work = options.output.with_name(options.output.name + ".work")
    work.mkdir(parents=True, exist_ok=True)

    # What neither changes the result nor what has been done so far may differ.
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("threads", "save_every")}
    text = json.dumps(settings)
    path = work / "settings.json"
    if path.exists() and path.read_text() != text:
        raise SystemExit(f"pretrain_host.py: error: {work} holds a run with other settings: delete it or repeat those")
    write_text_aside(path, text, "--output")
    return work


def main(argv: list[str] | None = None) -> None:
    """Draws, trains, writes. Raises SystemExit for the user's mistakes."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    work = begin_work(options)

    documents = load_documents(options, work)
    tokenizer = train_tokenizer(documents, options.vocab_size)
    rows = encode_documents(tokenizer, documents, options.seed)
    batches = Batches(rows, options.batch_tokens, options.seed, tokenizer.pad_token_id)
    model = build_model(options, tokenizer)
    count = sum(p.numel() for p in model.parameters())
    print(f"{len(rows)} documents, {sum(map(len, rows)) / 1e6:.1f} M tokens, {count / 1e6:.2f} M parameters")

    loss, seconds = train(options, model, batches, work)
    tokens = sum(int((batches[k] != batches.pad).sum()) for k in range(options.steps))
    save(options, model, tokenizer, model_card(options, model, tokens, loss, seconds, len(rows)))
    shutil.rmtree(work)
    print(f"{options.output}: loss {loss:.3f}, {seconds / 60:.1f} minutes of training")


if __name__ == "__main__":
    main()
