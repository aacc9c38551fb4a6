"""Writes a trained add-on as a folder that Hugging Face's libraries read without this repository.

    python scripts/export_model.py runs/NAME --to exported                # the LLM is loaded by its name
    python scripts/export_model.py runs/NAME --to exported --merge_host   # the LLM's weights lie in the folder
    python scripts/export_model.py runs/NAME --to exported --merge_host --push USER/NAME

What the folder holds depends on `--adapter`:

    hrm, mlp, prompt   the add-on's weights and one Python file with the classes that load them:
                       AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    lora               peft's own folder; with --merge_host an ordinary LLM whose weights hold the LoRA

Beside them lie the tokenizer, the generation config, and a model card (README.md) with the solved rates, the command
that trained it, code that uses it, and what the add-on answers to questions that it was not trained on.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import options  # noqa: E402
from addon import exported  # noqa: E402
from addon.adapters import ADAPTER_CONFIG, adapter_of, load_controller, record_of, saved_format  # noqa: E402
from engine.checkpoints import FOLDER, read_checkpoint  # noqa: E402
from engine.files import process_lives  # noqa: E402
from engine.machine import pick_device  # noqa: E402
from engine.resume import resolve_resume  # noqa: E402
from evaluation import Decoding  # noqa: E402
from export_card import Source, card_text  # noqa: E402
from host import end_ids, load_config, load_tokenizer, resolve_name  # noqa: E402
from script_tools import ScriptParser, add_spread_flags, run_script, spread_of  # noqa: E402
from single_file import single_file  # noqa: E402

# What only training needs, and what an exported class does in its own way.
TRAINING = ("AdapterController.from_base", "AdapterController.encode", "AdapterController.segment",
            "AdapterController.addon_parameters")
HRM_TRAINING = ("HRMController.from_base", "HRMController.encode", "HRMController.host_states",
                "HRMController.segment", "HRMController._halting_before", "HRMBackbone.advance",
                "HRMBackbone.recomputed")
PROMPT_TRAINING = ("BaselineController.from_base", "BaselineController.encode", "BaselineController.segment",
                   "BaselineController.__init__", "BaselineController.peft_model")
KINDS = {
    "hrm": (exported.HRMForCausalLM, exported.HRMForCausalLMConfig, HRM_TRAINING),
    "mlp": (exported.HRMForCausalLM, exported.HRMForCausalLMConfig, HRM_TRAINING),
    "prompt": (exported.PromptForCausalLM, exported.PromptForCausalLMConfig, PROMPT_TRAINING),
}
LONGEST_ANSWER = 64  # tokens, where the run sets none


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with status 2 and one line for a mistake."""
    parser = ScriptParser(__doc__)
    parser.add_argument("run", help="a run's folder (its newest checkpoint), RUN@best, or a checkpoint")
    parser.add_argument("--to", type=Path, required=True, help="the folder to write; it must not exist")
    parser.add_argument("--merge_host", action="store_true", help="the LLM's weights go into the folder too")
    parser.add_argument("--push", metavar="REPO", help="also upload the folder to this repository of the hub")
    parser.add_argument("--private", action="store_true", help="--push makes a repository that only you see")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add_spread_flags(parser)
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with a hub model")
    args = parser.parse_args(argv)

    if args.to.exists() and (not args.to.is_dir() or any(args.to.iterdir())):
        parser.error(f"--to {args.to} exists already: give a folder that does not")
    if args.merge_host and args.device_map != "none":
        parser.error(f"--merge_host reads the LLM as a whole, and --device_map {args.device_map} spreads it: keep one")

    if args.private and not args.push:
        parser.error("--private says how --push makes the repository: add --push REPO, or leave it out")
    if args.push:
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(args.push)
        except HFValidationError as error:
            parser.error(f"--push {args.push}: {' '.join(str(error).split())[:200]}")
    return args


# --- what is exported -------------------------------------------------------------------------------------------------


def refuse(record: Mapping[str, Any], args: argparse.Namespace, folder: Path) -> None:
    """Raises ValueError for what cannot be exported so, before any weight is loaded."""
    name = record["base_model_name_or_path"]
    if adapter_of(record) == "none":
        raise ValueError(f"{folder} is a run of the bare LLM (--adapter none): there is nothing to export")
    if args.merge_host and record["load_in"] != "none":
        raise ValueError(
            f"--merge_host writes plain weights, and {folder} was trained on an LLM packed in {record['load_in']}: "
            "leave --merge_host out"
        )
    if args.push and not args.merge_host and Path(resolve_name(name)).exists():
        raise ValueError(
            f"--push: the LLM {name} lies on this machine, which others cannot load: add --merge_host"
        )


def brings_code(config: Any) -> bool:
    """Whether an LLM's class comes as Python code with it, which `--trust_remote_code` lets run."""
    return "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})


def load(args: argparse.Namespace) -> Source:
    """What the command line names.

    Raises:
        ValueError: no such checkpoint, a broken one, one of another system, or one that cannot be exported so.
    """
    folder = resolve_resume(args.run, Path("runs"), "the run")
    documents = read_checkpoint(folder, stems=[]).documents
    if ADAPTER_CONFIG not in documents:
        raise ValueError(f"{folder} holds no add-on: its folder is read by transformers as it is (--arch addon alone "
                         "needs an export)")
    refuse(record_of(documents), args, folder)

    record = record_of(documents)
    place = record["base_model_name_or_path"], args.trust_remote_code, record.get("base_revision")
    has_host_code = args.trust_remote_code and brings_code(load_config(*place))
    if has_host_code and adapter_of(record) in KINDS:
        raise ValueError(
            f"{record['base_model_name_or_path']} brings its own Python code, and an exported folder of --adapter "
            f"{adapter_of(record)} reads only LLMs of transformers itself: hand on the checkpoint, for generate.py "
            "--trust_remote_code; --adapter lora can be exported"
        )

    model, record = load_controller(folder, pick_device(args.device), args.trust_remote_code, spread_of(args))
    tokenizer = load_tokenizer(*place)
    rows = model.host.get_input_embeddings().weight.shape[0]
    prompt, note = saved_format(record, tokenizer, rows)

    if note:
        print(note, file=sys.stderr)

    saved = options.read_resolved(documents["config.resolved.yaml"])
    flags = {flag.name: saved.get(flag.name, flag.default) for flag in options.FLAGS}
    run = folder.parent.parent if folder.parent.name == FOLDER else folder
    return Source(folder, run, model, record, prompt, options.Options(**flags), args.merge_host, has_host_code)


# --- writing ----------------------------------------------------------------------------------------------------------


def generation_config(source: Source) -> transformers.GenerationConfig:
    """How the run answered at evaluation: decoding, every end of an answer, its longest length."""
    opts = source.opts
    decoding = Decoding(opts.decode_temperature, opts.decode_top_p, opts.decode_top_k)
    ends = end_ids(source.model.host, source.format.tokenizer) | source.format.ends

    config = transformers.GenerationConfig.from_dict(source.model.generation_config.to_dict())
    config.update(
        eos_token_id=sorted(ends), pad_token_id=source.format.pad_id,
        max_new_tokens=opts.max_new_tokens or LONGEST_ANSWER, **decoding.arguments(),
    )
    return config


def exported_config(source: Source, kind: type, settings: Mapping[str, Any]) -> Any:
    """The config of an exported class with the adapter's own `settings`."""
    record = source.record
    name = resolve_name(record["base_model_name_or_path"])
    if source.merged and Path(name).exists():
        name = Path(name).name  # where it lay is nobody's concern
    frame = source.format.frame
    return kind(
        base_config=source.model.host.config,
        base_model_name=name,
        host_in_folder=source.merged,
        base_revision=record.get("base_revision"),
        base_fingerprint=record["base_fingerprint"],
        load_in=record["load_in"],
        host_dtype=record.get("host_dtype", "stored"),
        host_attention=record.get("attn_implementation"),
        frame={"prefix": frame.prefix, "suffix": frame.suffix, "chat": frame.chat, "end": frame.end},
        **settings,
    )


def write_with_code(source: Source, to: Path) -> None:
    """Weights, config and the Python file of an add-on that no library knows."""
    model_class, config_class, left_out = KINDS[source.adapter]
    settings = source.model.config.settings()
    state = source.model.addon_state()
    if source.merged:
        if settings.get("lora_layers"):
            source.model.peft_lora.merge_and_unload()
            settings["lora_layers"] = 0
            state = source.model.addon_state()
        config = exported_config(source, config_class, settings)
        whole = model_class(config, source.model.host)
        whole.load_addon_state(state)
        whole.save_pretrained(to)
    else:
        config = exported_config(source, config_class, settings)
        config.save_pretrained(to)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        content = safetensors.torch.save(tensors, metadata={"format": "pt"})
        (to / exported.ADDON_WEIGHTS).write_bytes(content)
    write_code(to, model_class, config_class, TRAINING + left_out)


def write_code(to: Path, model_class: type, config_class: type, left_out: Sequence[str]) -> None:
    """The Python file of two exported classes, and the entries of config.json that lead to it."""
    module = f"modeling_{config_class.model_type}"
    title = f"{model_class.__doc__.splitlines()[0]}\n\nMade of the project's modules by its scripts/export_model.py.\n"
    roots = [(exported.__name__, config_class.__name__), (exported.__name__, model_class.__name__)]
    (to / f"{module}.py").write_text(single_file(roots, title, left_out), encoding="utf-8")

    entries = json.loads((to / "config.json").read_text(encoding="utf-8"))
    entries["base_config"].pop("_name_or_path", None)  # where the LLM lay on this machine

    entries["architectures"] = [model_class.__name__]
    entries["auto_map"] = {"AutoConfig": f"{module}.{config_class.__name__}",
                           "AutoModelForCausalLM": f"{module}.{model_class.__name__}"}
    (to / "config.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def write_lora(source: Source, to: Path) -> None:
    """peft's own folder, or an ordinary LLM with LoRA merged into its weights."""
    if source.merged:
        source.model.peft_model().merge_and_unload().save_pretrained(to)
        return

    model = source.model.peft_model()
    model.peft_config["default"].base_model_name_or_path = resolve_name(source.record["base_model_name_or_path"])
    model.save_pretrained(to, save_embedding_layers=False)


def remove_leftovers(to: Path) -> None:
    """Removes what killed calls left of `to`; a process that is still alive keeps its folder."""
    for leftover in to.absolute().parent.glob(f".tmp-{glob.escape(to.name)}-*"):
        process = leftover.name.rpartition("-")[2]
        if process.isdigit() and not process_lives(int(process)):
            shutil.rmtree(leftover, ignore_errors=True)


def write(source: Source, to: Path) -> None:
    """The whole folder, under its own name only when all of it is there.

    Raises:
        OSError: it cannot be written; nothing is left under its name.
    """
    # Answers to other questions come first: merging changes the model.
    card = card_text(source)
    aside = to.absolute().with_name(f".tmp-{to.name}-{os.getpid()}")
    remove_leftovers(to)
    try:
        aside.mkdir(parents=True)
        generation = generation_config(source)
        if source.adapter == "lora":
            write_lora(source, aside)
        else:
            write_with_code(source, aside)
        generation.save_pretrained(aside)
        source.format.tokenizer.save_pretrained(aside)
        (aside / "README.md").write_text(card, encoding="utf-8")
        for path in aside.iterdir():  # some writers let nobody else read
            path.chmod(path.stat().st_mode | 0o044)

        if to.exists():  # empty, as was asked for
            to.rmdir()
        os.rename(aside, to)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def push(folder: Path, repo: str, private: bool) -> str:
    """Uploads the folder; returns its address. Raises ValueError where the hub refuses, naming what stays here."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=address.repo_id, commit_message="Add an exported add-on")
    except Exception as error:  # of whatever kind: the network, the hub's refusal, no login
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"--push {repo}: the hub did not take the folder ({reason}); it is whole in {folder}: log in with `hf auth "
            f"login`, then `hf upload {repo} {folder}`"
        ) from error
    return str(address)


def main(argv: list[str] | None = None) -> int:
    """The exit status. Raises ValueError and OSError for the user's mistakes."""
    args = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    source = load(args)
    write(source, args.to)
    print(f"exported: {args.to} ({source.title})")

    if args.push:
        print(f"pushed: {push(args.to, args.push, args.private)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
