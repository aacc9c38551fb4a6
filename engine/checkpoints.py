"""Checkpoints: written whole or not at all, verified when read, rotated, found again on resume. No pickle anywhere.

A checkpoint is a folder `<run>/checkpoints/step-00001234/` holding safetensors files, text documents and, written last,
`manifest.json` with the size and sha256 of every other file. Tensors travel as flat dicts {name: tensor}.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import files as of_files
from engine.files import process_lives, reason_of, sync_folder, write_problem, write_synced, write_text_aside

if TYPE_CHECKING:  # torch loads where tensors are read or written, so that documents alone are read at once
    from torch import Tensor

FORMAT = "hrm-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
BEST = "best.json"
FOLDER = "checkpoints"
TENSORS = ".safetensors"
UNVERIFIED = ("README.md",)  # for people: editing the model card must not make a checkpoint unreadable
STEP_NAME = re.compile(r"step-(\d+)")
LEFTOVER_NAME = re.compile(r"\.(tmp|old)-(.+)-(\d+)")
EARLIER = "resume from an earlier checkpoint or copy this one again"


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or found; one line for the user."""


@dataclass
class Checkpoint:
    """What a checkpoint folder holds.

    folder: where it was read.
    tensors: file stem -> name -> tensor of any shape, on the CPU.
    documents: file name -> text.
    """

    folder: Path
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    documents: dict[str, str] = field(default_factory=dict)


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` belongs: `<run>/checkpoints/step-00001234`."""
    return Path(run) / FOLDER / f"step-{step:08d}"


# --- writing ----------------------------------------------------------------------------------------------------------


def disk_check(folder: Path, flag: str = "--save_dir") -> None:
    """Raises CheckpointError, which names `flag`, when `folder` cannot be created or written. Leaves nothing behind."""
    folder = Path(folder).absolute()
    probe = folder / f".tmp-disk_check-{os.getpid()}"
    missing = [place for place in (folder, *folder.parents) if not place.exists()]

    # Permissions alone do not tell: the disk may be full, or the file system read-only.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_synced(probe, b"can this folder be written?\n" * 128)
    except OSError as error:
        raise CheckpointError(write_problem(folder, error, 4096, flag)) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
            for place in missing:  # deepest first; rmdir removes empty folders only, so nobody's file can be lost
                place.rmdir()


def write_checkpoint(folder: Path, tensors: dict[str, dict[str, Tensor]], documents: dict[str, str]) -> Path:
    """Writes a checkpoint whole or not at all; an existing `folder` is replaced and survives a failure.

    Args:
        folder: where it shall stand.
        tensors: file stem -> {name: tensor of any shape, dtype and device}.
        documents: file name -> text.

    Returns `folder`. Raises CheckpointError when the disk refuses, after removing what was begun.
    """
    folder = Path(folder).absolute()
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")

    # Filled under another name: a crash at any moment leaves the old checkpoint or the new one under its own.
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a dead run that had our process number
        temporary.mkdir(parents=True)
        _fill(temporary, tensors, documents)
        _swap_in(temporary, folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)  # before free space is measured for the message
        needed = sum(t.nbytes for group in tensors.values() for t in group.values())
        needed += sum(map(len, documents.values()))
        raise CheckpointError(write_problem(folder, error, needed)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _fill(temporary: Path, tensors: dict[str, dict[str, Tensor]], documents: dict[str, str]) -> None:
    """Writes every file of a checkpoint, the manifest last. Raises OSError."""
    names = [*(stem + TENSORS for stem in tensors), *documents]
    is_distinct = len({*names, MANIFEST}) > len(names)
    assert is_distinct and all(name == Path(name).name for name in names), f"plain, distinct names only: {names}"

    # Hashed as they are written, not as they are read back: what the disk spoils is then found.
    files: dict[str, dict[str, Any]] = {}
    for name in names:
        content = documents[name].encode() if name in documents else _tensor_bytes(tensors[Path(name).stem])
        write_synced(temporary / name, content)
        files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}

    _write_manifest(temporary, files)


def _write_manifest(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """The seal of a folder, whose files are as `read_manifest` gives them: without it, it is no checkpoint. OSError."""
    manifest = {"format": FORMAT, "version": VERSION, "files": files}
    write_synced(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    sync_folder(folder)


def seal(folder: Path) -> None:
    """Hashes what somebody else has written to a flat folder, so that `damage_of` knows it. Raises OSError."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.name] = {"sha256": digest, "bytes": path.stat().st_size}
    _write_manifest(folder, files)


def _tensor_bytes(tensors: dict[str, Tensor]) -> bytes:
    """The content of a safetensors file. Each name has a clone: the format takes no shared memory and no holes."""
    import safetensors.torch

    clones = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(clones, metadata={"format": "pt"})


def _swap_in(temporary: Path, folder: Path) -> None:
    """Renames `temporary` to `folder`; an existing folder steps aside first and comes back if that fails."""
    # A rename cannot replace a folder that holds files, so there are two.
    aside = folder.with_name(f".old-{folder.name}-{os.getpid()}")
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
    try:
        os.rename(temporary, folder)
    finally:
        if aside.exists() and not folder.exists():
            os.rename(aside, folder)

    # The new name must be on the disk before the old content goes; `checkpoints` itself may be new.
    sync_folder(folder.parent)
    sync_folder(folder.parent.parent)
    shutil.rmtree(aside, ignore_errors=True)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_checkpoint(folder: Path, stems: Sequence[str] | None = None) -> Checkpoint:
    """Reads and verifies a checkpoint; all tensors on the CPU.

    Args:
        folder: a checkpoint.
        stems: the tensor files that are read, hashed and required; None = all. The document paired with a skipped one
            (`training_state.json`) is optional.

    Raises:
        CheckpointError: a missing, truncated, altered or foreign checkpoint.
    """
    folder = Path(folder)
    files = read_manifest(folder)
    missing = [stem for stem in stems or () if stem + TENSORS not in files]
    if missing:
        raise CheckpointError(f"{folder} has no {missing[0]}{TENSORS}, only {', '.join(files)}; give another")

    # Stems whose tensors nobody asked for.
    skipped: set[str] = set()
    if stems is not None:
        skipped = {Path(name).stem for name in files if name.endswith(TENSORS)} - set(stems)

    result = Checkpoint(folder)
    for name, expected in files.items():
        path = folder / name

        # Two kinds of files may be missing: those skipped, and what is for people alone.
        if path.stem in skipped and (name.endswith(TENSORS) or not path.exists()):
            continue
        if name in UNVERIFIED:
            result.documents[name] = path.read_text(errors="replace") if path.is_file() else ""
            continue

        content = read_verified(path, expected)
        if name.endswith(TENSORS):
            import safetensors.torch

            result.tensors[path.stem] = safetensors.torch.load(content)
        else:
            result.documents[name] = content.decode()
    return result


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """{file name: {"sha256": hex, "bytes": int}} of a checkpoint folder. Raises CheckpointError."""
    path = folder / MANIFEST
    if not path.exists():
        what = f"has no {MANIFEST}, so is no checkpoint of ours" if folder.is_dir() else "is no checkpoint folder"
        raise CheckpointError(f"{folder} {what}; give the path of a step-NNNNNNNN folder written by train.py")

    files = {}
    try:
        manifest = of_files.parse_json(path.read_bytes())
        kind = manifest["format"]
        version = manifest["version"]
        for name, entry in manifest["files"].items():
            plain_name = Path(name).name  # a forged manifest must not reach outside its folder
            files[plain_name] = {"sha256": str(entry["sha256"]), "bytes": int(entry["bytes"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {reason_of(error)}); {EARLIER}") from error

    if (kind, version) != (FORMAT, VERSION):
        raise CheckpointError(f"{folder} has format {kind} version {version}, this program reads {FORMAT} version "
                              f"{VERSION}; use the release that wrote it")
    return files


def read_verified(path: Path, expected: dict[str, Any]) -> bytes:
    """The content of a file whose size and sha256 are as `expected`. Raises CheckpointError."""
    try:
        if not path.is_file():
            raise CheckpointError(f"checkpoint file {path} is missing; {EARLIER}")
        size = path.stat().st_size
        if size != expected["bytes"]:
            state = "truncated" if size < expected["bytes"] else "too long"
            raise CheckpointError(f"{path} is {state}: {size} bytes, expected {expected['bytes']}; {EARLIER}")
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {reason_of(error)}; check its permissions") from error
    if hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise CheckpointError(f"{path} is damaged or was edited: its sha256 differs from {MANIFEST}; {EARLIER}")
    return content


def _defect(folder: Path) -> str | None:
    """What makes a checkpoint unusable as far as names and sizes tell, or None. Hashes nothing."""
    try:
        files = read_manifest(folder)
    except CheckpointError as error:
        return str(error)
    for name, entry in files.items():
        path = folder / name
        if name not in UNVERIFIED and (not path.is_file() or path.stat().st_size != entry["bytes"]):
            return f"{name} is missing or has another size"
    return None


def damage_of(folder: Path) -> str | None:
    """What makes a checkpoint unusable, in one line, or None. Hashes every file, once as long as none changes.

    A run asks several times for its newest whole checkpoint.
    """
    try:
        files = read_manifest(folder)
        for name, entry in files.items():
            if name in UNVERIFIED:
                continue
            path = folder / name
            known = _state_of(path), entry["sha256"]
            if _verified.get(path) != known:
                read_verified(path, entry)
                _verified[path] = known
    except (CheckpointError, OSError) as error:
        return reason_of(error).removesuffix(f"; {EARLIER}")
    return None


_verified: dict[Path, tuple[tuple[int, ...], str]] = {}  # files found whole -> what they were then, and their sha256


def _state_of(path: Path) -> tuple[int, ...]:
    """What changes where a file is written again; empty where there is none."""
    if not path.exists():
        return ()
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


# --- the checkpoints of a run -----------------------------------------------------------------------------------------


def checkpoint_folders(run: Path) -> list[Path]:
    """All `step-NNN` folders of a run, complete or not, lowest step first."""
    place = Path(run) / FOLDER
    if not place.is_dir():
        return []

    folders = [folder for folder in place.iterdir() if STEP_NAME.fullmatch(folder.name) and folder.is_dir()]
    return sorted(folders, key=_step_and_name)


def _step_and_name(folder: Path) -> tuple[int, str]:
    return int(folder.name.removeprefix("step-")), folder.name


def _whole(run: Path) -> list[Path]:
    """The run's complete checkpoints, lowest step first."""
    return [folder for folder in checkpoint_folders(run) if _defect(folder) is None]


def newest_checkpoint(run: Path) -> Path | None:
    """The whole checkpoint of the highest step, or None. Temporary, incomplete and damaged folders do not count."""
    put_back(run)
    return next((folder for folder in reversed(checkpoint_folders(run)) if damage_of(folder) is None), None)


def put_back(run: Path) -> None:
    """Gives a checkpoint that was being replaced when its run died its name again."""
    with contextlib.suppress(OSError):  # putting back needs write access, looking does not
        _tidy(run, delete=False)  # a reader on another machine cannot tell whether the writer lives


def _tidy(run: Path, delete: bool) -> None:
    """Puts back a checkpoint that was being replaced when its run died; `delete`s whatever else dead runs left."""
    place = Path(run) / FOLDER
    if not place.is_dir():
        return
    for path in list(place.iterdir()):
        match = LEFTOVER_NAME.fullmatch(path.name)
        if not match:
            continue
        kind, name, process = match.groups()
        with contextlib.suppress(FileNotFoundError):
            # This process writes and tidies in turn, so what bears its own number is a dead run's.
            if int(process) != os.getpid() and process_lives(int(process)):
                continue
            target = path.with_name(name)
            if kind == "old" and not target.exists() and _defect(path) is None:
                os.rename(path, target)
            elif delete:
                shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(run: Path) -> None:
    """Puts back or removes what dead runs left among the checkpoints, where no `rotate` follows.

    A run that was struck in its last save may have nothing more to save.
    """
    with contextlib.suppress(OSError):
        _tidy(run, delete=True)


def rotate(run: Path, limit: int, keep: Collection[Path] = ()) -> list[Path]:
    """Removes old checkpoints of a run. Folders that are not whole checkpoints are left for the user to judge.

    Args:
        run: the run's folder.
        limit: how many of the newest stay; 0 = all.
        keep: checkpoints that stay whatever their age, as the marked best does.

    Returns the removed folders. Raises CheckpointError: a limit below 0, or a folder that cannot be removed.
    """
    if limit < 0:
        raise CheckpointError(f"checkpoint_limit is {limit}, expected 0 (keep all) or more; give --checkpoint_limit 3")

    # What stays, by its real path: the caller may name a checkpoint through a link.
    spared = {Path(folder).resolve() for folder in keep}
    best = best_checkpoint(run)
    if best:
        spared.add(best[0].resolve())
    oldest = _whole(run)[:-limit] if limit else []
    removed = [folder for folder in oldest if folder.resolve() not in spared]

    try:
        _tidy(run, delete=True)
        for folder in removed:
            # Renamed first: a deletion cut short must not leave half a checkpoint under its name.
            doomed = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
            os.rename(folder, doomed)
            shutil.rmtree(doomed)
    except OSError as error:
        raise CheckpointError(f"cannot remove old checkpoints of {run}: {reason_of(error)}; do it by hand") from error
    return removed


def mark_best(run: Path, folder: Path, metric: str, value: float) -> None:
    """Records `folder`, a checkpoint of `run`, as its best by `metric`. Raises CheckpointError, WriteError."""
    if not math.isfinite(value):
        raise CheckpointError(f"{metric} is {value}, which cannot be a best value; evaluate again")
    record = json.dumps({"checkpoint": Path(folder).name, "metric": metric, "value": float(value)})
    write_text_aside(Path(run) / BEST, record + "\n")


def best_checkpoint(run: Path) -> tuple[Path, str, float] | None:
    """(folder, metric, value) of the marked best, or None if there is none any more. Raises CheckpointError."""
    path = Path(run) / BEST
    if not path.exists():
        return None

    try:
        record = of_files.parse_json(path.read_bytes())
        name = str(record["checkpoint"])
        metric = str(record["metric"])
        value = float(record["value"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged ({reason_of(error)}); remove it, evaluation rewrites it") from error

    # Its folder may have been removed by hand; a forged name must not reach outside the run.
    folder = Path(run) / FOLDER / name
    if not STEP_NAME.fullmatch(name) or not folder.is_dir():
        return None
    return folder, metric, value
