"""Python in a fresh process that knows nothing of this repository: what a user of a saved folder has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch


def run_apart(code: str, place: Path, **names: str) -> dict[str, torch.Tensor]:
    """Runs `code` with the strings of `names` as variables, its current folder `place`; what it puts into `out`.

    A text in `out` comes back as its bytes, see `text_of`.

    Neither this repository nor that folder is on its path. Raises AssertionError with its stderr where it fails.
    """
    place.mkdir(parents=True, exist_ok=True)
    result = place / "out.safetensors"
    lines = [
        "import importlib.util",
        "import safetensors.torch",
        "import torch",
        "assert not any(importlib.util.find_spec(name) for name in ('model', 'addon', 'host', 'engine'))",
        *(f"{name} = {value!r}" for name, value in names.items()),
        "out = {}",
        code,
        "for name, value in out.items():",
        "    if isinstance(value, str):",
        "        value = torch.tensor(list(value.encode()), dtype=torch.uint8)",
        "    out[name] = value.contiguous()",
        f"safetensors.torch.save_file(out, {str(result)!r})",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(place / "hf_home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-P", "-c", "\n".join(lines)], cwd=place, env=environment, check=False,
                          capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return safetensors_of(result)


def safetensors_of(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file."""
    import safetensors.torch

    return safetensors.torch.load_file(path)


def text_of(tensor: torch.Tensor) -> str:
    """A text that `run_apart` has handed back."""
    return bytes(tensor.tolist()).decode()
