"""The model card of an exported folder: where the model comes from, what it solves, how it is used, what it breaks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import options
from addon.adapters import adapter_of
from addon_run import all_names, task_config
from batching import PromptFormat
from engine.checkpoints import STEP_NAME
from engine.figures import table_rows
from engine.ownership import known_id
from engine.protocol import Protocol, key_of, read_protocols, typed
from engine.report import percent
from evaluation import Decoding, generate_texts
from export_command import command_text, shown_value
from export_index import TaskNames, eval_results
from host import hub_unreachable, resolve_name
from model import AdapterController
from own_tasks.record import read_record
from own_tasks.task import name_of_data

ELSEWHERE = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Translate into German: Good morning, my friend.",
    "Name three fruits.",
)
ELSEWHERE_TOKENS = 16
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}


@dataclass(frozen=True)
class Source:
    """What is exported.

    folder: the checkpoint.
    run: the run's folder, or the checkpoint's where it lies alone.
    model: the LLM with its adapter, in evaluation mode.
    record: the adapter's.
    format: how questions are put, as in training.
    opts: the flags of the run.
    merged: the LLM's weights go into the folder.
    has_host_code: the LLM's own class is Python code that comes with it.
    """

    folder: Path
    run: Path
    model: AdapterController
    record: dict[str, Any]
    format: PromptFormat
    opts: options.Options
    merged: bool
    has_host_code: bool = False

    @property
    def adapter(self) -> str:
        """The value of --adapter."""
        return adapter_of(self.record)

    @property
    def base(self) -> str:
        """The LLM's name for people; of a folder or file its last part."""
        name = self.record["base_model_name_or_path"]
        return Path(name).name if self.is_local else name

    @property
    def is_local(self) -> bool:
        """Whether the LLM is a folder or a GGUF file of this machine."""
        return Path(resolve_name(self.record["base_model_name_or_path"])).exists()

    @property
    def has_code(self) -> bool:
        """Whether the folder is loaded by a Python file that it holds."""
        return self.adapter != "lora"

    @property
    def own_record(self) -> dict[str, Any]:
        """What the checkpoint keeps of own data and plugins; empty where there are none."""
        return read_record(self.folder)

    @property
    def task_names(self) -> TaskNames:
        """Which of the run's tasks are its own."""
        opts = self.opts
        plugin = self.own_record.get("plugin") or {"tasks": ()}
        return TaskNames(name_of_data(opts.data) if opts.data else None, tuple(plugin["tasks"]))

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        return f"{self.model.title} for {self.base}"

    @property
    def step(self) -> int | None:
        """Batches trained; None where the folder's name does not tell."""
        named = STEP_NAME.fullmatch(self.folder.name)
        return int(named[1]) if named else None


def card_text(source: Source) -> str:
    """The text of README.md, made by huggingface_hub's ModelCard."""
    from huggingface_hub import ModelCard, ModelCardData

    measured = measurements(source)
    results = eval_results(measured[0].rates, source.task_names, measured[0].other) if measured else None
    is_pefts = source.adapter == "lora" and not source.merged
    data = ModelCardData(
        base_model=None if source.is_local else source.base,
        license=licence(source),
        library_name="peft" if is_pefts else "transformers",
        pipeline_tag="text-generation",
        tags=["reasoning", source.adapter],
        model_name=source.title,
        eval_results=results,
    )
    parts = [_head(source), _solved(source, measured), _usage(source), _origin(source), _elsewhere(source)]
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")
    return str(card)


def licence(source: Source) -> str | None:
    """The licence that the LLM's own card names, whose terms hold for what is made of it; None where none is found."""
    from huggingface_hub import ModelCard

    name = resolve_name(source.record["base_model_name_or_path"])
    if not source.is_local and hub_unreachable():
        return None

    place = str(Path(name) / "README.md") if source.is_local else name

    with contextlib.suppress(Exception):  # a card that is missing, private or broken names no licence
        return ModelCard.load(place).data.license
    return None


# --- what it solves ---------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What was solved by one protocol, at its newest evaluation.

    other: the flags of the protocol that are not the run's own, as typed; "" = it is the run's own.
    protocol: how it was measured; None where an earlier version did not record it.
    rows: of the evaluation table, by task and metric.
    """

    other: str
    protocol: Protocol | None
    rows: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)

    @property
    def rates(self) -> list[dict[str, str]]:
        """The rows in their order."""
        return list(self.rows.values())


def measurements(source: Source) -> list[Measured]:
    """The rates of solved items at this checkpoint, those of the run's own protocol first."""
    if source.step is None:
        return []
    path = Path(source.opts.log_csv or source.run / "eval.csv")
    protocols = read_protocols(source.run)
    flags = options.as_dict(source.opts)

    found: dict[str, Measured] = {}
    for row in table_rows(path, known_id(source.run)):
        is_rate = (row.get("metric") or "").startswith("solved") and row.get("ci_low")
        if not is_rate or row.get("step") != str(source.step):
            continue
        protocol = protocols.get(key_of(row))
        other = typed(protocol.other_than(flags), shown_value) if protocol else ""
        measured = found.setdefault(other, Measured(other, protocol))
        measured.protocol = protocol
        measured.rows[row["task"], row["metric"]] = row
    return sorted(found.values(), key=lambda measured: bool(measured.other))


def _solved(source: Source, measured: Sequence[Measured]) -> str:
    """The tables of solved rates: the run's own first, each other protocol under its name."""
    lines = ["## What it solves", ""]
    if not measured:
        return "\n".join([*lines, "This checkpoint was not evaluated."])

    lines += ["Answers are generated, and right where the task's strict rule and its own scorer accept them. Intervals "
              "are Wilson's, 95 %.", ""]
    if measured[0].other:
        lines += ["The run's own protocol did not measure this checkpoint.", ""]
    for each in measured:
        if each.other:
            lines += [f"Measured by another protocol than the run's own, `{each.other}`:", ""]
        lines += [*_table(each.rates), "", _reading(source, each), ""]
    lines.append(f"One run, seed {source.opts.seed}: the intervals tell how sure the rates are for these weights, not "
                 "what another seed would give.")
    return "\n".join(lines)


def _table(rates: Sequence[dict[str, str]]) -> list[str]:
    """The lines of a table of solved rates."""
    lines = ["| task | metric | n | bare LLM | with the add-on |", "|---|---|---|---|---|"]
    for row in rates:
        interval = (float(row["ci_low"]), float(row["ci_high"]))
        bare = percent(float(row["bare"])) if row.get("bare") else "-"
        value = percent(float(row["value"]), interval)
        lines.append(f"| {row['task']} | {row['metric']} | {row['n']} | {bare} | {value} |")
    return lines


def _reading(source: Source, measured: Measured) -> str:
    """How answers were cut and read in one measurement."""
    flags = measured.protocol.flags if measured.protocol else options.as_dict(source.opts)
    text = (f"`solved` reads an answer as `--answer_from {flags['answer_from']}` does, `solved_strict` takes the whole "
            "text, `solved_extracted` the answer taken out of it.")
    if measured.protocol is None:
        return f"{text} (The run kept no record of this measurement: its flags say so.)"
    tokens = ", ".join(f"{count} of the {who}" for who, count in measured.protocol.tokens.items())
    return f"{text} Answers were cut at so many tokens: {tokens}." if tokens else text


# --- what it is, how it is used ---------------------------------------------------------------------------------------


def _head(source: Source) -> str:
    """The first lines."""
    count = sum(parameter.numel() for parameter in source.model.addon_parameters().values())
    held = source.record.get("host_dtype", "stored")
    packed = source.record["load_in"]
    attention = source.record.get("attn_implementation")
    lines = [
        f"# {source.title}",
        "",
        f"A frozen LLM, {source.base}, and {count:,} parameters trained beside it"
        f"{f' for {source.step} batches' if source.step is not None else ''}.",
        "",
        f"- **LLM**: {source.base}, " + ("its weights are in this folder" if source.merged else
                                         "loaded by its name; its weights are not in this folder"),
        f"- **LLM in training**: weights held as {held}" + (f", packed in {packed}" if packed != "none" else "")
        + (f", attention {attention}" if attention else ""),
        *_autocast(source),
        f"- **Licence**: {licence(source) or 'not found; the terms of the LLM hold for what is made of it'}",
    ]
    return "\n".join(lines)


def _autocast(source: Source) -> list[str]:
    """A line where the add-on was measured in another precision than the folder computes it in."""
    precision = source.record.get("mixed_precision", "none")
    if precision == "none":
        return []
    return [f"- **Add-on in training and evaluation**: {precision} autocast; this folder computes it in float32, so a "
            "few answers may differ from those counted below"]


def usage_code(source: Source, place: str = "FOLDER") -> str:
    """Python that answers a question with the exported folder, in the frame of training."""
    frame = source.format.frame
    arguments = [repr(place)]
    if source.has_code or source.has_host_code:
        arguments.append("trust_remote_code=True")

    # The folder's own Python file holds the LLM as in training; elsewhere the caller says how.
    names = ["AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig"]
    is_packed = source.record["load_in"] != "none"
    if is_packed and not source.has_code:
        arguments.append(f"quantization_config=BitsAndBytesConfig({quantised(source.record['load_in'])})")
        names.append("BitsAndBytesConfig")
    elif source.record.get("host_dtype") in DTYPES and not source.has_code:
        arguments.append(f"dtype={DTYPES[source.record['host_dtype']]!r}")

    if source.record.get("attn_implementation") == "eager" and not source.has_code:  # else it is transformers' choice
        arguments.append("attn_implementation='eager'")

    lines = [
        f"from transformers import {', '.join(sorted(names))}",
        f"model = AutoModelForCausalLM.from_pretrained({', '.join(arguments)})",
        f"tokenizer = AutoTokenizer.from_pretrained({place!r})",
        f"config = GenerationConfig.from_pretrained({place!r})",
        f"question = {ELSEWHERE[0]!r}",
        f"prompt = {frame.prefix!r} + question + {frame.suffix!r}",
        f'inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens={not frame.chat})',
        "ids = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, generation_config=config)",
        "answer = tokenizer.decode(ids[0, inputs.input_ids.shape[1]:], skip_special_tokens=True).strip()",
        "print(answer)",
    ]
    return "\n".join(lines)


def quantised(load_in: str) -> str:
    """Arguments of BitsAndBytesConfig, as `engine.placement.quantisation` gives them."""
    return {"8bit": "load_in_8bit=True", "4bit": "load_in_4bit=True, bnb_4bit_quant_type='nf4'"}[load_in]


def libraries(source: Source) -> list[str]:
    """The packages that the folder needs."""
    needs = ["transformers", "torch"]
    if source.adapter in ("hrm", "mlp"):
        needs.append("einops")

    has_lora = source.adapter == "lora" or getattr(source.model.config, "lora_layers", 0) > 0
    if has_lora and not source.merged:
        needs.append("peft")

    if source.record["load_in"] != "none":
        needs.append("bitsandbytes")
    return needs


def _usage(source: Source) -> str:
    """Code, and what it needs."""
    lines = ["## Use it", "", f"Needs {', '.join(libraries(source))}.", "", "```python", usage_code(source), "```"]
    if source.has_code:
        lines += ["", "`trust_remote_code=True` runs the Python file of this folder: read it first."]
    elif source.has_host_code:
        lines += ["", "`trust_remote_code=True` runs the Python code that comes with the LLM: read it first."]

    lines += ["", "The prompt must have this frame: the add-on was trained in no other."]

    sentinel = source.record["prompt"].get("sentinel")
    if sentinel:
        lines += ["", f"Cut the answer at {json.dumps(sentinel)}, which ends every answer."]
    return "\n".join(lines)


def command(source: Source) -> str:
    """The command that trained it, see `export_command`."""
    plugin = read_record(source.folder).get("plugin")
    return command_text(source.opts, source.base, plugin["path"] if plugin else None)


def _origin(source: Source) -> str:
    """Tasks, seeds and the command."""
    opts = source.opts
    names = ", ".join(all_names(opts, source.folder))
    difficulty = shown_value("task_config", task_config(opts))

    lines = ["## How it was trained", "", f"- **Tasks**: {names}, difficulty `{difficulty}`",
             f"- **Seeds**: {opts.seed} for training, {opts.eval_seed} for the items of the evaluation",
             "- **Command**, in the project that made it:", "", "```", command(source), "```"]
    return "\n".join(lines)


# --- what it breaks ---------------------------------------------------------------------------------------------------


def _elsewhere(source: Source) -> str:
    """What the LLM answers to questions that are no task, alone and with the add-on."""
    decoding = Decoding(max_new_tokens=ELSEWHERE_TOKENS)
    ours = generate_texts(source.model, source.format, ELSEWHERE, decoding)

    with source.model.bare() as host:
        bare = generate_texts(host, source.format, ELSEWHERE, decoding)
    changed = sum(one != other for one, other in zip(ours, bare, strict=True))

    lines = [
        "## What it does to other prompts",
        "",
        f"{_where_on(source.opts)} Of {len(ELSEWHERE)} questions that are no task, it changed the answer to {changed} "
        f"(greedy, the first {ELSEWHERE_TOKENS} tokens). No perplexity or benchmark was measured for this card.",
        "",
        "| question | bare LLM | with the add-on |",
        "|---|---|---|",
    ]

    for question, one, other in zip(ELSEWHERE, bare, ours, strict=True):
        lines.append(f"| {question} | {_cell(one)} | {_cell(other)} |")
    return "\n".join(lines)


def _where_on(opts: options.Options) -> str:
    """For which prompts the add-on is on, and what it was trained to do with other text."""
    text = "other text"
    if opts.retain:
        text = f"text like that of `--retain {shown_value('retain', opts.retain)}`"
    if opts.prompt_gate:
        return (f"A gate decides for each prompt whether the add-on is on (`--prompt_gate`). It learned to be open for "
                f"the tasks above and shut for {text}. Where it is shut, the answer is the LLM's own. Where it opens "
                "for another prompt, expect an answer in the tasks' manner.")
    if opts.retain:
        return (f"The add-on is on for every prompt. It was trained on the tasks above, and to leave {text} as the LLM "
                "has it. Expect little change there, and answers in the tasks' manner to prompts of other kinds.")
    return ("The add-on is on for every prompt, and was trained on the tasks above alone. Expect it to answer anything "
            "else in their manner.")


def _cell(text: str) -> str:
    """An answer in a cell of a table, its line breaks and bars made harmless."""
    shown = json.dumps(text, ensure_ascii=False)[1:-1]
    return "`" + shown.replace("`", "'").replace("|", "\\|") + "`" if shown else "(nothing)"
