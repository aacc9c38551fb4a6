"""What `--resume` means: a checkpoint, a run, the best of a run, or what was written last; and what is passed over."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

from engine.checkpoints import (
    FOLDER,
    MANIFEST,
    STEP_NAME,
    CheckpointError,
    best_checkpoint,
    checkpoint_folders,
    damage_of,
    newest_checkpoint,
    put_back,
    read_manifest,
)


def resolve_resume(
    text: str, save_dir: Path, flag: str = "--resume", fits: Callable[[Path], bool] | None = None
) -> Path:
    """The checkpoint folder meant by `--resume TEXT`.

    Args:
        text: a checkpoint; a run or its `checkpoints` folder, for its newest whole checkpoint; `RUN@best`, for its
            marked best; or 'auto', for the one written last in any run of `save_dir`.
        save_dir: the folder of all runs. A name that is no path is looked up in it.
        flag: the flag that gave `text`, for messages.
        fits: False leaves a checkpoint out of 'auto'; None takes any.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    save_dir = Path(save_dir)
    if text == "auto":
        return _newest_of_all(save_dir, flag, fits)

    # A path as it stands comes before a run of that name.
    name = text.removesuffix("@best")
    places = [Path(os.path.abspath(path)) for path in (Path(name), save_dir / name) if name.strip()]
    place = next((path for path in places if path.exists()), None)
    if place is not None and ((place / MANIFEST).exists() or STEP_NAME.fullmatch(place.name)):
        read_manifest(place)
        return place

    # Not a checkpoint, so a run or its folder of checkpoints.
    run = place.parent if place and place.name == FOLDER else place
    if run is None or not (run / FOLDER).is_dir():
        what = "does not exist" if place is None else "is neither a checkpoint nor a run"
        near = ", ".join(_near(text, save_dir))
        raise CheckpointError(f"{flag} {text!r} {what}; give a checkpoint, a run or 'auto'; near: {near}")
    if text.endswith("@best"):
        best = best_checkpoint(run)
        if best is None:
            raise CheckpointError(f"{flag} {text!r}: no best checkpoint is marked in {run}; train with "
                                  "--save_best_model")
        return best[0]  # whoever reads it tells what is damaged

    newest = newest_checkpoint(run)
    if newest is None:
        raise CheckpointError(f"{flag} {text!r} holds no whole checkpoint ({newest_damage(run)}); give another")
    return newest


def newest_damage(run: Path) -> str:
    """What is wrong with the newest checkpoint of a run that has no whole one."""
    broken = [f"{folder.name}: {damage_of(folder)}" for folder in checkpoint_folders(run)]
    return broken[-1] if broken else "none was written"


def passed_over(checkpoint: Path, save_dir: Path | None) -> list[str]:
    """The damaged checkpoints that a call would rather have gone on from than from `checkpoint`, one line each.

    Args:
        checkpoint: the one it goes on from.
        save_dir: where the call looked for what was written last in any run; None = in the checkpoint's run alone.
    """
    if save_dir is None:
        folders = checkpoint_folders(checkpoint.parent.parent)
        later = [folder for folder in folders if int(folder.name[5:]) > int(checkpoint.name[5:])]
    else:
        since = checkpoint.stat().st_mtime_ns
        folders = [folder for run in _runs(save_dir) for folder in checkpoint_folders(run)]
        later = [folder for folder in folders if folder != checkpoint and folder.stat().st_mtime_ns >= since]

    lines = []
    for folder in later:
        damage = damage_of(folder)
        if damage:
            lines.append(f"{damage}: {folder} is passed over, {checkpoint} is the newest whole checkpoint")
    return lines


def _runs(save_dir: Path) -> list[Path]:
    """Folders of runs that have checkpoints, by name."""
    return [place.parent for place in sorted(save_dir.glob(f"*/{FOLDER}"))]


def _newest_of_all(save_dir: Path, flag: str, fits: Callable[[Path], bool] | None) -> Path:
    """The checkpoint written last in any run, among those that fit. Raises CheckpointError."""
    folders: list[Path] = []
    for run in _runs(save_dir):
        put_back(run)
        folders += checkpoint_folders(run)
    folders.sort(key=written_and_name, reverse=True)

    # Hashed one by one: the first is rarely damaged.
    is_any_whole = False
    for folder in folders:
        if damage_of(folder) is None:
            is_any_whole = True
            if fits is None or fits(folder):
                return folder
    what = "none of the checkpoints is of that kind" if is_any_whole else "no whole checkpoint"
    raise CheckpointError(f"{flag} auto: {what} in any run of {save_dir}; train one first")


def written_and_name(folder: Path) -> tuple[int, str]:
    """When a checkpoint was written, in ns, and its name; of one without a manifest 0."""
    manifest = folder / MANIFEST
    return manifest.stat().st_mtime_ns if manifest.exists() else 0, folder.name


def _near(text: str, save_dir: Path) -> list[str]:
    """Runs and checkpoints that `text` may have meant, else the first few."""
    places = [str(place) for run in _runs(save_dir) for place in (run, *checkpoint_folders(run))]
    return difflib.get_close_matches(str(save_dir / text), places, cutoff=0.3) or places[:3] or ["none here"]
