"""Checks every line of a prepared folder and sums it up; exit status 2 if anything is wrong.

    python scripts/validate_dataset.py prepared/mix
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.batches import IGNORE  # noqa: E402
from engine.logs import Progress  # noqa: E402
from script_tools import ScriptParser, run_script, sha256  # noqa: E402
from text_data.tokenizer import parse_tokenizer, vocabulary_size  # noqa: E402
from text_data.triples import SPLITS, LineIndex, parse_line, read_meta  # noqa: E402

SHOWN = 10  # bad lines named per split


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("folder", type=Path, help="the prepared folder")
    return parser.parse_args(argv)


def tokenizer_problems(folder: Path, meta: dict) -> list[str]:
    """What is wrong with the folder's tokenizer.json, one line each."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return [f"{path} is missing"]
    if sha256(path) != meta["tokenizer_sha256"]:
        return [f"{path} is not the one meta.json names (sha256)"]
    try:
        size = vocabulary_size(parse_tokenizer(path.read_text(encoding="utf-8"), str(path)))
    except ValueError as error:
        return [str(error)]
    return [f"{path} has {size} tokens, meta.json says {meta['vocab_size']}"] if size != meta["vocab_size"] else []


def check_split(folder: Path, split: str, meta: dict, val: set[bytes]) -> tuple[list[str], str, int]:
    """(problems, one line of summary, lines of train that are in val); `val` gets a digest of each line of val."""
    path, bad, problems = folder / f"{split}.jsonl", 0, []
    index, totals = LineIndex(path), Counter(encoder=0, decoder=0, ignored=0)
    longest, shared = [0, 0], 0
    with Progress(len(index), split, "lines") as progress:
        for number in range(len(index)):
            line = index[number]
            try:
                triple = parse_line(line, meta["vocab_size"])
                length = max(len(triple.encoder_ids), len(triple.labels))
                if length > meta["max_seq_len"]:
                    raise ValueError(f"{length} tokens on one side, meta.json says at most {meta['max_seq_len']}")
                if triple.decoder_input_ids[0] != meta["bos_id"]:
                    raise ValueError(f"decoder_input_ids starts with {triple.decoder_input_ids[0]}, expected bos "
                                     f"{meta['bos_id']}")
            except ValueError as error:
                bad += 1
                if bad <= SHOWN:
                    problems.append(f"{path} line {number + 1}: {error}")
                continue
            digest = hashlib.blake2b(line, digest_size=8).digest()
            shared += split == "train" and digest in val
            if split == "val":
                val.add(digest)
            longest = [max(longest[0], len(triple.encoder_ids)), max(longest[1], len(triple.labels))]
            totals.update(encoder=len(triple.encoder_ids), decoder=len(triple.labels),
                          ignored=triple.labels.count(IGNORE))
            progress.update(number + 1)
    if bad > SHOWN:
        problems.append(f"{path}: {bad} bad lines in all, the first {SHOWN} are named")
    if len(index) != meta["splits"][split]["samples"]:
        problems.append(f"{path} holds {len(index)} lines, meta.json says {meta['splits'][split]['samples']}")
    good = max(len(index) - bad, 1)
    sides = (f"{side} {totals[side]} tokens (mean {totals[side] / good:.1f}, longest {most})"
             for side, most in zip(("encoder", "decoder"), longest, strict=True))
    return problems, f"{split}: {len(index)} triples, {', '.join(sides)}, {totals['ignored']} labels ignored", shared


def main(argv: list[str] | None = None) -> int:
    folder = parse(argv).folder
    meta = read_meta(folder)
    problems, summary, val, shared = tokenizer_problems(folder, meta), [], set(), 0
    for split in reversed(SPLITS):  # val first: it is the one whose digests are worth their memory
        try:
            found, line, shared = check_split(folder, split, meta, val)
        except ValueError as error:
            found, line = [str(error)], f"{split}: not read"
        problems += found
        summary.append(line)
    if problems:
        raise ValueError("\n".join(problems))
    print("\n".join(summary))
    if shared:
        print(f"WARNING: {shared} triples of train stand in val as well", file=sys.stderr)
    print(f"{folder}: every line is good; vocabulary {meta['vocab_size']}, at most {meta['max_seq_len']} tokens a side")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
