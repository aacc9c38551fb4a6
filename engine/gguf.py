"""GGUF files as base models: each is converted once to an ordinary folder, which everything else then reads.

transformers 5.23 reads such a file whole for every config, tokenizer and model (about 20 s for 98 MB), and keeps the
weights packed, which nothing can be trained beside or saved from. The folder has plain float32 weights.

Of several processes that want the same folder one converts and the others wait. The folder gets its name when it is
whole; what a killed process left is removed by the next one that converts the same file.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from engine.locks import locked

SUFFIX = ".gguf"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
MARK = ".converting-"  # begins the names of unfinished folders


def no_place(name: str) -> str:
    """What to say of a name that is no folder here and cannot be one of the hub either; "" where it can be one."""
    if name.endswith(SUFFIX):
        return "there is no such GGUF file: check the path"
    if not HUB_NAME.fullmatch(name):
        return "there is no such folder, and a name of the hub is OWNER/NAME: check the path"

    return ""


def is_gguf(path: Path) -> bool:
    """Whether `path` is a GGUF file, by its name and its first four bytes."""
    if path.suffix != SUFFIX or not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def folder_of(path: Path) -> Path:
    """The folder that a GGUF file is converted to. Raises ValueError for another kind of file, and as `converted`."""
    if not is_gguf(path):
        raise ValueError(
            f"--model_name {path} is a file, and no GGUF file: give a folder as save_pretrained writes it, a GGUF file "
            "or a hub name"
        )
    try:
        return converted(path)
    except ValueError as error:
        raise ValueError(f"--model_name {error}") from error


def converted(path: Path) -> Path:
    """The folder of a GGUF file's model and tokenizer, made where there is none yet.

    It lies below the cache folder of Hugging Face's libraries (HF_HOME), by the file's name, size and time of change.

    Raises:
        ValueError: the file holds no model that transformers can convert, or the folder cannot be written.
    """
    from huggingface_hub.constants import HF_HOME

    state = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = Path(HF_HOME) / "gguf" / f"{path.stem}-{key}"
    if not folder.is_dir():
        convert(path, folder)
    return folder


def convert(path: Path, folder: Path) -> None:
    """Writes the model and the tokenizer of the GGUF file `path` to `folder`, in float32, whole or not at all.

    Where another process is at it, this one waits for it and does nothing more.

    Raises:
        ValueError: as `converted`.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{path}: GGUF files need the package gguf: pip install gguf==0.19.0")

    def waits() -> None:
        print(f"{path}: another process converts it, waiting", file=sys.stderr)

    lock = folder.parent / f"{MARK}{folder.name}.lock"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock, waits):
            try:
                if not folder.is_dir():
                    print(f"{path} is converted once, to {folder}", file=sys.stderr)
                    _write(path, folder)
            finally:
                lock.unlink(missing_ok=True)
    except MemoryError:
        raise
    except Exception as error:  # the reader of foreign files raises what it likes
        # On a file system without locks another process may have been as far at the same time.
        if not folder.is_dir():
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{path} cannot be converted: {reason}") from error


def _write(path: Path, folder: Path) -> None:
    """Converts beside the folder and renames; removes first what killed processes left of it."""
    mark = f"{MARK}{folder.name}-"
    for leftover in folder.parent.glob(f"{glob.escape(mark)}*"):
        shutil.rmtree(leftover, ignore_errors=True)

    # A name of its own: processes of several machines may share the folder, and have the same number.
    with tempfile.TemporaryDirectory(prefix=mark, dir=folder.parent) as aside:
        whole = Path(aside) / "model"
        _save(path, whole)
        os.rename(whole, folder)


def _save(path: Path, folder: Path) -> None:
    """Reads the file by transformers and writes an ordinary folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
