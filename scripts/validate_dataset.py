"""Checks every line of a prepared folder and sums it up; exit status 2 if anything is wrong.

    python scripts/validate_dataset.py prepared/mix
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.batches import IGNORE  # noqa: E402
from engine.progress import Progress  # noqa: E402
from script_tools import ScriptParser, file_sha256, run_script  # noqa: E402
from text_data.tokenizer import read_tokenizer, vocabulary_size  # noqa: E402
from text_data.triples import SPLITS, LineIndex, Triple, parse_line, read_meta  # noqa: E402

SHOWN = 10  # bad lines named per split


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = ScriptParser(__doc__)
    parser.add_argument("folder", type=Path, help="the prepared folder")
    return parser.parse_args(argv)


def tokenizer_problems(folder: Path, meta: dict[str, Any]) -> list[str]:
    """What is wrong with the folder's tokenizer.json, one line each."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return [f"{path} is missing"]
    if file_sha256(path) != meta["tokenizer_sha256"]:
        return [f"{path} is not the one meta.json names (sha256)"]

    try:
        size = vocabulary_size(read_tokenizer(path))
    except ValueError as error:
        return [str(error)]
    if size != meta["vocab_size"]:
        return [f"{path} has {size} tokens, meta.json says {meta['vocab_size']}"]
    return []


def checked_triple(line: bytes, meta: dict[str, Any]) -> Triple:
    """The triple of a line, held against what meta.json says. Raises ValueError."""
    triple = parse_line(line, meta["vocab_size"])
    length = max(len(triple.encoder_ids), len(triple.labels))
    if length > meta["max_seq_len"]:
        raise ValueError(f"{length} tokens on one side, meta.json says at most {meta['max_seq_len']}")

    first = triple.decoder_input_ids[0]
    if first != meta["bos_id"]:
        raise ValueError(f"decoder_input_ids starts with {first}, expected bos {meta['bos_id']}")
    return triple


class SplitCheck:
    """Goes through one split's lines and keeps what there is to say of them.

    Args:
        folder: the prepared folder.
        split: "train" or "val".
        meta: the folder's meta.json.
        val_digests: 8 bytes of hash for each line of val. The check of val fills it, that of train looks lines up:
            val is checked first, because it is small enough to be remembered.

    Attributes:
        problems: one line each, of the first SHOWN bad lines and of the split as a whole.
        repeated: good lines of train that stand in val.
    """

    def __init__(self, folder: Path, split: str, meta: dict[str, Any], val_digests: set[bytes]):
        self.path = folder / f"{split}.jsonl"
        self.split = split
        self.meta = meta
        self.val_digests = val_digests
        self.problems: list[str] = []

        self.repeated = 0
        self._bad = 0
        self._tokens = {"encoder": 0, "decoder": 0}
        self._longest = {"encoder": 0, "decoder": 0}
        self._ignored = 0

    def run(self) -> str:
        """Checks every line; returns one line of summary. Raises ValueError where the file cannot be read."""
        index = LineIndex(self.path)
        with Progress(len(index), self.split, "lines") as progress:
            for number in range(len(index)):
                line = index[number]
                try:
                    triple = checked_triple(line, self.meta)
                except ValueError as error:
                    self._note_bad(number, error)
                else:
                    self._note_good(line, triple)
                    progress.update(number + 1)

        # The file as a whole.
        if self._bad > SHOWN:
            self.problems.append(f"{self.path}: {self._bad} bad lines in all, the first {SHOWN} are named")
        samples = self.meta["splits"][self.split]["samples"]
        if len(index) != samples:
            self.problems.append(f"{self.path} holds {len(index)} lines, meta.json says {samples}")
        return self._summary(len(index))

    def _note_bad(self, number: int, error: ValueError) -> None:
        self._bad += 1
        if self._bad <= SHOWN:
            self.problems.append(f"{self.path} line {number + 1}: {error}")

    def _note_good(self, line: bytes, triple: Triple) -> None:
        digest = hashlib.blake2b(line, digest_size=8).digest()
        if self.split == "val":
            self.val_digests.add(digest)
        else:
            self.repeated += digest in self.val_digests

        for side, ids in (("encoder", triple.encoder_ids), ("decoder", triple.labels)):
            self._tokens[side] += len(ids)
            self._longest[side] = max(self._longest[side], len(ids))
        self._ignored += triple.labels.count(IGNORE)

    def _summary(self, lines: int) -> str:
        good = max(lines - self._bad, 1)

        sides = []
        for side, tokens in self._tokens.items():
            sides.append(f"{side} {tokens} tokens (mean {tokens / good:.1f}, longest {self._longest[side]})")
        return f"{self.split}: {lines} triples, {', '.join(sides)}, {self._ignored} labels ignored"


def main(argv: list[str] | None = None) -> int:
    """Prints the summary. Raises ValueError: everything that is wrong, one line each."""
    folder = parse(argv).folder
    meta = read_meta(folder)
    problems = tokenizer_problems(folder, meta)

    summary = []
    repeated = 0
    val_digests: set[bytes] = set()
    for split in reversed(SPLITS):  # val first
        check = SplitCheck(folder, split, meta, val_digests)
        try:
            summary.append(check.run())
        except ValueError as error:
            problems.append(str(error))
        problems += check.problems
        repeated += check.repeated

    if problems:
        raise ValueError("\n".join(problems))

    print("\n".join(summary))
    if repeated:
        print(f"WARNING: {repeated} triples of train stand in val as well", file=sys.stderr)
    print(f"{folder}: every line is good; vocabulary {meta['vocab_size']}, at most {meta['max_seq_len']} tokens a side")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
