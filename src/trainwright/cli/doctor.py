"""`trainwright doctor`: what this machine has and what is missing."""

import json
import os
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from trainwright.cli.options import Json, print_table

OPTIONAL = {
    "transformers": "tests and benchmarks only",
    "liger-kernel": "faster kernels: pip install 'trainwright[gpu]'",
    "bitsandbytes": "8-bit optimizers, int8 and nf4 kernels: pip install 'trainwright[gpu]'",
    "flash-attn-4": "attention on Hopper and Blackwell: pip install 'trainwright[flash]'",
    "tensorboard": "event files: pip install 'trainwright[track]'",
    "gguf": "convert import: pip install 'trainwright[formats]'",
    "sentencepiece": "tokenizers of Llama 1/2, Baichuan, ChatGLM: pip install 'trainwright[formats]'",
    "tiktoken": "tokenizers of Llama 3, Qwen 1: pip install 'trainwright[formats]'",
    "zstandard": ".jsonl.zst files: pip install 'trainwright[formats]'",
}


def installed(name: str) -> str | None:
    """The version of a package, or None."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="measure what the device really reaches; later plans take it")
    ] = False,
    as_json: Json = False,
) -> None:
    """What this machine has, what is missing, and which kernel each operation takes.

    With --measure: matrix products, attention, copies, and under torchrun the links between the processes.
    """
    if measure:
        _measure(as_json)
        return
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


def _measure(as_json: bool) -> None:
    """Measures, prints the shares of the datasheet's figures, and writes them where plans find them."""
    from trainwright.bench.measure import measure
    from trainwright.planner.calibration import write_calibration

    first = os.environ.get("RANK", "0") == "0"
    found = measure(lambda line: print(f"measuring {line}", file=sys.stderr) if first else None)
    if not first:
        return
    path = write_calibration(found)
    if as_json:
        print(json.dumps({**asdict(found), "file": str(path)}))
        return
    from rich.table import Table

    table = Table("share of the datasheet", "", box=None, header_style="bold")
    for dtype, share in found.matmul.items():
        table.add_row(f"matrix products, {dtype}", f"{share:.1%}")
    for name, shares in found.attention.items():
        table.add_row(f"attention, {name}, forward and backward", f"{shares.forward:.1%}, {shares.backward:.1%}")
    table.add_row("memory bandwidth", f"{found.bandwidth:.1%}")
    table.add_row("links inside a machine, between machines", f"{found.link:.1%}, {found.node_link:.1%}")
    table.add_row("one kernel's start", f"{found.launch * 1e6:.1f} us")
    print_table(table)
    print(f"wrote {path}: plans of {found.card} take it from now on")
