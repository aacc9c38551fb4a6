"""What a checkpoint keeps of own data and plugins, and what has changed since."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.checkpoints import read_checkpoint
from engine.machine import errors_of
from engine.state import OWN_DATA
from own_tasks.functions import changed_functions, folders_in, function_record
from own_tasks.task import OwnTask
from tasks.plugins import Plugin, load_plugin


def document_of(task: OwnTask | None, plugin: Plugin | None, functions: Sequence[str] = ()) -> dict[str, str]:
    """{file name: text} for a checkpoint; empty where there is nothing to keep.

    `functions` are those of the user's own that the run names, verifiers and rewards.
    """
    record: dict[str, Any] = {}
    if task:
        record["data"] = task.record()
    if plugin:
        record["plugin"] = plugin.record()
    own = function_record(functions)
    if own:
        record["functions"] = own

    # Most runs have none of them.
    if not record:
        return {}
    return {OWN_DATA: json.dumps(record, indent=2)}


def read_record(checkpoint: Path | None) -> dict[str, Any]:
    """What a checkpoint keeps; empty where it keeps nothing, or cannot be read: its reader tells what is wrong."""
    if checkpoint is None:
        return {}

    try:
        return dict(json.loads(read_checkpoint(checkpoint, stems=[]).documents.get(OWN_DATA, "{}")))
    except (ValueError, TypeError, OSError):
        return {}


def data_before(checkpoint: Path | None) -> tuple[str, str] | None:
    """(SHA-256, name of the task) of the data that the checkpoint was trained on; None where it has none."""
    data = read_record(checkpoint).get("data", {})
    for source in data.get("sources", []):
        if source["flag"] == "--data":
            return source["sha256"], data["task"]

    return None


def folders_before(checkpoint: Path | None) -> dict[str, str]:
    """Function -> the folder in which its module lay when the checkpoint was written."""
    return folders_in(read_record(checkpoint).get("functions", {}))


def plugin_problems(checkpoint: Path | None, names: Sequence[str], plugin: str | None) -> list[str]:
    """Why the tasks `names` cannot all be looked up, at most one line; loads the plugin where one is typed."""
    lines = missing_plugin(read_record(checkpoint), names, plugin)
    if plugin:
        lines += errors_of(load_plugin, plugin)
    return lines


def missing_plugin(record: Mapping[str, Any], names: Sequence[str], plugin: str | None) -> list[str]:
    """One line where a task of the checkpoint's plugin is named and the plugin is not typed."""
    before = record.get("plugin")
    if not before or plugin:
        return []

    needed = [name for name in names if name in before["tasks"]]
    if not needed:
        return []

    return [f"task {needed[0]} comes from a plugin, which runs only when it is typed: add --plugin "
            f"{before['path']}"]


def changes(record: Mapping[str, Any], task: OwnTask | None, plugin: Plugin | None) -> list[str]:
    """One line for each file that is not what it was when the checkpoint was written."""
    lines = []
    tables = []
    if task:
        tables = task.tables

    # Each source is known by its flag: a file that was moved is still the same data.
    known = {source["flag"]: source for source in record.get("data", {}).get("sources", [])}
    for table in tables:
        before = known.get(table.source.flag)
        if before and before["sha256"] != table.digest:
            lines.append(
                f"WARNING: {table.source.flag} {table.source.shown} has changed since the checkpoint (sha256 "
                f"{before['sha256'][:12]}, now {table.digest[:12]}; {before['questions']} questions, now "
                f"{len(table.items)}): questions that are evaluated now may have been trained on"
            )

    before = record.get("plugin")
    if before and plugin and before["sha256"] != plugin.sha256:
        lines.append(f"WARNING: --plugin {Path(plugin.path).name} has changed since the checkpoint (sha256 "
                     f"{before['sha256'][:12]}, now {plugin.sha256[:12]}): its tasks may be others")
    return lines + changed_functions(record.get("functions", {}))
