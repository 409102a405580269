"""The peers as folders of unpacked wheels that PYTHONPATH takes: for GPU machines that reach no package index.

    python benchmarks/peers/folders.py FOLDER [ours adapters torchtitan ...] [--python 3.12]
    PYTHONPATH=src:FOLDER/ours:FOLDER/torchtitan python benchmarks/speed_gpu.py --rows bf16

Run it where there is an index, for a Linux machine on x86-64 that has torch for CUDA 13, transformers, accelerate and
peft. `ours` is what Trainwright needs beside those. What no benchmark here touches (other CUDA versions, web pages,
bytecode) is left out, so that a folder is some tens of megabytes. Folders that are there are made anew.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

WHEELS = {
    "ours": ["pydantic", "pydantic-core", "annotated-types", "typing-inspection"],
    "adapters": [
        "bitsandbytes",
        "liger-kernel",
        "trl==1.15.0",
        "datasets==4.3.0",
        "dill",
        "multiprocess",
        "xxhash",
        "einops",
        "msgspec",
        "cut-cross-entropy",
        "psutil",
        "unsloth",
        "unsloth_zoo",
    ],
    "torchtitan": ["torchtitan==0.2.2", "torchdata", "tyro", "docstring_parser", "typeguard", "torchao"],
}
NEEDLESS = (
    "bitsandbytes/libbitsandbytes_*.so",
    "studio",
    "unsloth_cli",
    "test",
    "bin",
    "**/__pycache__",
)
NEEDED = "libbitsandbytes_cuda130.so"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64", "any")


def fill(folder: Path, wheels: list[str], python: str) -> None:
    """Unpacks the wheels, and nothing that they require, into the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--no-compile"]
    command += ["--python-version", python, *platforms, "--target", str(folder), *wheels]
    if subprocess.run(command).returncode:
        sys.exit(f"{folder}: pip could not bring {' '.join(wheels)}")
    for pattern in NEEDLESS:
        for path in sorted(folder.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != NEEDED:
                path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(WHEELS)}; all without any")
    parser.add_argument("--python", default="3.12", help="version there (3.12)")
    options = parser.parse_args()
    if unknown := set(options.sets) - set(WHEELS):
        parser.error(f"no set {', '.join(sorted(unknown))}: there are {', '.join(WHEELS)}")
    for name in options.sets or WHEELS:
        folder = options.folder / name
        fill(folder, WHEELS[name], options.python)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{folder}  {size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
