"""A tiny hybrid on token ids, its batches, what a shut gate leaves of it; tiny runs and prepared folders."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import string
from pathlib import Path

import torch

from hybrid.model import HybridConfig, HybridModel
from text_data.batches import pad_batch
from text_data.synthetic import SimpleTokenizer
from text_data.triples import Triple

VOCABULARY = 40
SHAPE = {
    "vocab_size": VOCABULARY, "d_model": 16, "n_heads": 2, "encoder": "transformer", "encoder_layers": 1,
    "decoder_layers": 2, "state_size": 4, "d_h": 16, "h_len": 2, "l_len": 3, "h_cycles": 2, "l_steps": 2,
    "prefix_len": 3, "halt_threshold": 0.99,
}


def tiny(awake: bool = True, **changes) -> HybridModel:
    """The same model each time, in evaluation mode; `awake`: what starts at zero is random, as after training."""
    torch.manual_seed(0)
    model = HybridModel(HybridConfig(**SHAPE | changes))
    if awake:
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.5)
            model.encoder.core.halt.bias.fill_(-1.0)
    return model.eval()


def bare(model: HybridModel) -> HybridModel:
    """The encoder-decoder without HRM: not shut but gone, so that whoever reaches for it raises."""
    model = copy.deepcopy(model)
    for name in ("core", "bridge", "gate"):
        delattr(model.encoder, name)
    for layer in model.decoder.layers:
        del layer.from_memory
    return model


def triples(count: int = 4, seed: int = 1, longest: int = 9) -> list[Triple]:
    """Random triples of several lengths, of the form that prepared data has."""
    draw = torch.Generator().manual_seed(seed)

    def row(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most + 1, (1,), generator=draw))
        return torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()

    found = []
    for _ in range(count):
        said = [*row(1, 5), 2]
        found.append(Triple(row(3, longest), [1, *said[:-1]], said))
    return found


def batch_of(rows: list[Triple]) -> dict[str, torch.Tensor]:
    return pad_batch(rows, 0)


def logits_of(model: HybridModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(batch["encoder_ids"], batch["encoder_mask"], batch["decoder_input_ids"]).logits


# --- runs


RUN = (
    "--arch hybrid --d_model 16 --n_heads 2 --d_h 16 --encoder transformer --encoder_layers 1 --decoder_layers 1 "
    "--state_size 4 --h_len 2 --l_len 2 --prefix_len 2 --batch_size 4 --max_steps 3 --eval_n 6 --eval_batch_size 4 "
    "--mixed_precision none --log_steps 1 --num_threads 1 --device cpu --report 0 --max_seq_len 24 --warmup_steps 1"
).split()


def write_prepared(folder: Path, train: int = 12, val: int = 5, seed: int = 0, characters: str = string.printable,
                   length: int = 12) -> Path:
    """A prepared folder of continuations: counted letters, cut at a random place. Returns it."""
    tokenizer, draw = SimpleTokenizer(characters), random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("val", val)):
        lines = []
        for _ in range(count):
            text = "".join(draw.choice("abc ") for _ in range(draw.randint(4, length)))
            cut = draw.randint(1, len(text) - 1)
            said = [*tokenizer.encode(text[cut:]), tokenizer.eos_id]
            row = Triple(tokenizer.encode(text[:cut]), [tokenizer.bos_id, *said[:-1]], said)
            lines.append(json.dumps(row._asdict()))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = tokenizer.tokenizer.to_str()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    meta = {"vocab_size": tokenizer.vocab_size, "pad_id": tokenizer.pad_id, "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id, "max_seq_len": 2 * length, "splits": {
                "train": {"samples": train}, "val": {"samples": val}},
            "tokenizer_sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


def rows_of(folder: Path, split: str) -> list[Triple]:
    """The triples of a prepared folder, read without prepared_data."""
    return [Triple(**json.loads(line)) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
