"""`trainwright doctor`: what this machine has and what is missing."""

import json
import sys
from importlib.metadata import PackageNotFoundError, version

from trainwright.cli.options import Json, print_table

OPTIONAL = {
    "transformers": "tests and benchmarks only",
    "liger-kernel": "faster kernels: pip install 'trainwright[gpu]'",
    "bitsandbytes": "8-bit optimizers, int8 and nf4 kernels: pip install 'trainwright[gpu]'",
    "tensorboard": "event files: pip install 'trainwright[track]'",
    "gguf": "convert import: pip install 'trainwright[formats]'",
    "sentencepiece": "tokenizers of Llama 1/2, Baichuan, ChatGLM: pip install 'trainwright[formats]'",
    "tiktoken": "tokenizers of Llama 3, Qwen 1: pip install 'trainwright[formats]'",
    "zstandard": ".jsonl.zst files: pip install 'trainwright[formats]'",
}


def installed(name: str) -> str | None:
    """The version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def doctor(as_json: Json = False) -> None:
    """What this machine has, what is missing, and which kernel each operation takes."""
    import torch

    from trainwright.device import describe_devices
    from trainwright.model.kernels import chosen_backends

    devices, kernels = describe_devices(), chosen_backends()
    packages = {name: installed(name) for name in OPTIONAL}
    python = sys.version.split()[0]
    if as_json:
        found = {"python": python, "torch": torch.__version__, "devices": devices}
        print(json.dumps({**found, "kernels": kernels, "packages": packages}))
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False)
    table.add_row("python", python)
    table.add_row("torch", torch.__version__)
    for device in devices:
        table.add_row("device", ", ".join(f"{key} {value}" for key, value in device.items()))
    for operation, backend in kernels.items():
        table.add_row(operation, backend)
    for name, version_found in packages.items():
        table.add_row(name, version_found or f"[yellow]absent[/yellow]: {escape(OPTIONAL[name])}")
    print_table(table)
