"""Checkpoints: written whole or not at all, verified when read, rotated, found again on resume. No pickle anywhere.

A checkpoint is a folder `<run>/checkpoints/step-00001234/` holding safetensors files, text documents and, written last,
`manifest.json` with the size and sha256 of every other file. Tensors travel as flat dicts {name: tensor}.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.files import process_lives, reason_of, sync_folder, write_problem, write_synced, write_text_aside

if TYPE_CHECKING:  # torch loads where tensors are read or written, so that documents alone are read at once
    from torch import Tensor

FORMAT, VERSION = "hrm-checkpoint", 1
MANIFEST, BEST, FOLDER = "manifest.json", "best.json", "checkpoints"
UNVERIFIED = ("README.md",)  # for people: editing the model card must not make a checkpoint unreadable
STEP_NAME = re.compile(r"step-(\d+)")
LEFTOVER_NAME = re.compile(r"\.(tmp|old)-(.+)-(\d+)")
EARLIER = "resume from an earlier checkpoint or copy this one again"


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or found; one line for the user."""


@dataclass
class Checkpoint:
    """What a checkpoint folder holds: tensors by file stem, then by name (any shape, CPU); documents by file name."""

    folder: Path
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    documents: dict[str, str] = field(default_factory=dict)


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` belongs: `<run>/checkpoints/step-00001234`."""
    return Path(run) / FOLDER / f"step-{step:08d}"


def disk_check(folder: Path) -> None:
    """Raises CheckpointError when `folder` cannot be created or written. Leaves nothing behind, either way."""
    folder = Path(folder).absolute()
    probe = folder / f".tmp-disk_check-{os.getpid()}"
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_synced(probe, b"can this folder be written?\n" * 128)
    except OSError as error:
        raise CheckpointError(write_problem(folder, error, 4096)) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
            for place in missing:  # deepest first; rmdir removes empty folders only, so nobody's file can be lost
                place.rmdir()


def _fill(temporary: Path, tensors: dict[str, dict[str, Tensor]], documents: dict[str, str]) -> None:
    import safetensors.torch

    files: dict[str, dict[str, Any]] = {}
    names = [f"{stem}.safetensors" for stem in tensors] + list(documents)
    clash = len({*names, MANIFEST}) <= len(names)
    assert not clash and all(name == Path(name).name for name in names), f"plain, distinct names only: {names}"
    for name in names:
        # a clone of its own for each name: safetensors refuses tensors that share memory or have holes
        plain = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.get(Path(name).stem, {}).items()}
        content = (documents[name].encode() if name in documents
                   else safetensors.torch.save(plain, metadata={"format": "pt"}))
        write_synced(temporary / name, content)
        files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest = {"format": FORMAT, "version": VERSION, "files": files}
    write_synced(temporary / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    sync_folder(temporary)


def _swap_in(temporary: Path, folder: Path) -> None:
    """Renames `temporary` to `folder`; an existing folder steps aside first and comes back if that fails."""
    aside = folder.with_name(f".old-{folder.name}-{os.getpid()}")
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
    try:
        os.rename(temporary, folder)
    finally:
        if aside.exists() and not folder.exists():
            os.rename(aside, folder)
    sync_folder(folder.parent)
    sync_folder(folder.parent.parent)  # `checkpoints` itself may be new
    shutil.rmtree(aside, ignore_errors=True)


def write_checkpoint(folder: Path, tensors: dict[str, dict[str, Tensor]], documents: dict[str, str]) -> Path:
    """Writes a checkpoint whole or not at all; an existing `folder` is replaced and survives a failure.

    `tensors` maps file stem -> {name: tensor of any shape, dtype and device}, `documents` maps file name -> text.
    Returns `folder`. Raises CheckpointError when the disk refuses, after removing what was begun.
    """
    folder = Path(folder).absolute()
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a dead run that had our process number
        temporary.mkdir(parents=True)
        _fill(temporary, tensors, documents)
        _swap_in(temporary, folder)
    except OSError as error:
        needed = sum(t.nbytes for group in tensors.values() for t in group.values())
        shutil.rmtree(temporary, ignore_errors=True)  # before free space is measured for the message
        needed += sum(map(len, documents.values()))
        raise CheckpointError(write_problem(folder, error, needed)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """{file name: {"sha256": hex, "bytes": int}} of a checkpoint folder. Raises CheckpointError."""
    path = folder / MANIFEST
    if not path.exists():
        what = f"has no {MANIFEST}, so is no checkpoint of ours" if folder.is_dir() else "is no checkpoint folder"
        raise CheckpointError(f"{folder} {what}; give the path of a step-NNNNNNNN folder written by train.py")
    try:
        manifest = json.loads(path.read_bytes())
        found = (manifest["format"], manifest["version"])
        # .name: a forged manifest must not reach outside its folder
        files = {Path(name).name: {"sha256": str(entry["sha256"]), "bytes": int(entry["bytes"])}
                 for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {reason_of(error)}); {EARLIER}") from error
    if found != (FORMAT, VERSION):
        raise CheckpointError(f"{folder} has format {found[0]} version {found[1]}, this program reads {FORMAT} version "
                              f"{VERSION}; use the release that wrote it")
    return files


def _read_verified(path: Path, expected: dict[str, Any]) -> bytes:
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


def read_checkpoint(folder: Path, stems: Sequence[str] | None = None) -> Checkpoint:
    """Reads and verifies a checkpoint; all tensors on the CPU.

    `stems` limits which tensor files are read, hashed and required, and makes the document paired with a skipped one
    (`training_state.json`) optional. Raises CheckpointError for a missing, truncated, altered or foreign checkpoint.
    """
    folder = Path(folder)
    files, result = _read_manifest(folder), Checkpoint(folder)
    missing = [stem for stem in stems or () if f"{stem}.safetensors" not in files]
    if missing:
        raise CheckpointError(f"{folder} has no {missing[0]}.safetensors, only {', '.join(files)}; give another")
    stored = {Path(name).stem for name in files if name.endswith(".safetensors")}
    skipped = stored - set(stored if stems is None else stems)
    for name, expected in files.items():
        path, is_tensors = folder / name, name.endswith(".safetensors")
        if path.stem in skipped and (is_tensors or not path.exists()):
            continue
        if name in UNVERIFIED:
            result.documents[name] = path.read_text(errors="replace") if path.is_file() else ""
            continue
        content = _read_verified(path, expected)
        if is_tensors:
            import safetensors.torch

            result.tensors[path.stem] = safetensors.torch.load(content)
        else:
            result.documents[name] = content.decode()
    return result


def _defect(folder: Path) -> str | None:
    """What makes a checkpoint unusable as far as names and sizes tell, or None. Hashes nothing."""
    try:
        files = _read_manifest(folder)
    except CheckpointError as error:
        return str(error)
    sizes = {name: (folder / name).stat().st_size if (folder / name).is_file() else None for name in files}
    wrong = [name for name in files if name not in UNVERIFIED and sizes[name] != files[name]["bytes"]]
    return f"{wrong[0]} is missing or has another size" if wrong else None


def checkpoint_folders(run: Path) -> list[Path]:
    """All `step-NNN` folders of a run, complete or not, lowest step first."""
    place = Path(run) / FOLDER
    found = [f for f in place.iterdir() if STEP_NAME.fullmatch(f.name) and f.is_dir()] if place.is_dir() else []
    return sorted(found, key=lambda f: (int(f.name.removeprefix("step-")), f.name))


def _tidy(run: Path, delete: bool) -> None:
    """Puts back a checkpoint that was being replaced when its run died; `delete`s whatever else dead runs left."""
    place = Path(run) / FOLDER
    for path in list(place.iterdir()) if place.is_dir() else []:
        match = LEFTOVER_NAME.fullmatch(path.name)
        with contextlib.suppress(FileNotFoundError):
            # this process writes and tidies in turn, so what bears its own number is a dead run's
            if not match or (int(match[3]) != os.getpid() and process_lives(int(match[3]))):
                continue
            target = path.with_name(match[2])
            if match[1] == "old" and not target.exists() and _defect(path) is None:
                os.rename(path, target)
            elif delete:
                shutil.rmtree(path, ignore_errors=True)


def _whole(run: Path) -> list[Path]:
    return [folder for folder in checkpoint_folders(run) if _defect(folder) is None]


def newest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None. Temporary and incomplete folders do not count."""
    with contextlib.suppress(OSError):  # putting back needs write access, looking does not
        _tidy(run, delete=False)  # a reader on another machine cannot tell whether the writer lives
    return next(iter(reversed(_whole(run))), None)


def rotate(run: Path, limit: int, keep: Collection[Path] = ()) -> list[Path]:
    """Keeps the newest `limit` complete checkpoints (0 = all), all in `keep` and the marked best; returns the removed.

    Folders that are not whole checkpoints are left for the user to judge. Raises CheckpointError.
    """
    if limit < 0:
        raise CheckpointError(f"checkpoint_limit is {limit}, expected 0 (keep all) or more; give --checkpoint_limit 3")
    kept = {Path(folder).resolve() for folder in (*keep, *(best_checkpoint(run) or ())[:1])}
    removed = [f for f in _whole(run)[:-limit] if f.resolve() not in kept] if limit else []
    try:
        _tidy(run, delete=True)
        for folder in removed:  # renamed first: a deletion cut short must not leave half a checkpoint under its name
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
        record = json.loads(path.read_bytes())
        name, metric, value = str(record["checkpoint"]), str(record["metric"]), float(record["value"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({reason_of(error)}); remove it, evaluation rewrites it") from error
    folder = Path(run) / FOLDER / name
    return (folder, metric, value) if STEP_NAME.fullmatch(name) and folder.is_dir() else None


def resolve_resume(text: str, save_dir: Path, flag: str = "--resume",
                   fits: Callable[[Path], bool] = lambda folder: True) -> Path:
    """The checkpoint folder meant by `--resume TEXT`: a checkpoint, a run, its `checkpoints` folder, or 'auto'.

    A run or `checkpoints` folder stands for its newest whole checkpoint, `RUN@best` for its marked best, 'auto' for the
    one written last in any run of `save_dir`, among those that `fits` accepts. A name that is no path is looked up in
    `save_dir`.

    Raises:
        CheckpointError: nothing is found.
    """
    save_dir = Path(save_dir)
    runs = [place.parent for place in sorted(save_dir.glob(f"*/{FOLDER}"))]
    if text == "auto":
        whole = [folder for run in runs if newest_checkpoint(run) for folder in _whole(run)]
        whole.sort(key=lambda place: ((place / MANIFEST).stat().st_mtime_ns, place.name), reverse=True)
        found = next(filter(fits, whole), None)
        if found is None:
            what = "none of the checkpoints is of that kind" if whole else "no whole checkpoint"
            raise CheckpointError(f"{flag} auto: {what} in any run of {save_dir}; train one first")
        return found
    name, wants_best = text.removesuffix("@best"), text.endswith("@best")
    places = [Path(os.path.abspath(p)) for p in (Path(name), save_dir / name) if name.strip()]
    place = next((p for p in places if p.exists()), None)
    if place is not None and ((place / MANIFEST).exists() or STEP_NAME.fullmatch(place.name)):
        _read_manifest(place)
        return place
    run = place.parent if place and place.name == FOLDER else place
    if run is None or not (run / FOLDER).is_dir():
        what = "does not exist" if place is None else "is neither a checkpoint nor a run"
        known = [str(known) for run in runs for known in (run, *checkpoint_folders(run))]
        near = difflib.get_close_matches(str(save_dir / text), known, cutoff=0.3) or known[:3] or ["none here"]
        raise CheckpointError(f"{flag} {text!r} {what}; give a checkpoint, a run or 'auto'; near: {', '.join(near)}")
    best = best_checkpoint(run) if wants_best else None
    if wants_best and (best is None or _defect(best[0])):
        raise CheckpointError(f"{flag} {text!r}: no best checkpoint is marked in {run}; train with --save_best_model")
    newest = best[0] if best else newest_checkpoint(run)
    if newest is None:
        broken = [f"{folder.name}: {_defect(folder)}" for folder in checkpoint_folders(run)] or ["none was written"]
        raise CheckpointError(f"{flag} {text!r} holds no whole checkpoint ({broken[-1]}); give another")
    return newest
