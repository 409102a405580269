"""From the start of the processes to the end of the first step, by phase: an 8B model read from safetensors.

    python benchmarks/start_gpu.py [--gpus 4] [--folder /tmp/trainwright-start] [--out FILE]
    python benchmarks/start_gpu.py --small --gpus 2        the same program on CPU processes, tiny

Random weights of Llama-3-8B's shape are written in bf16, as a download leaves them. Then torchrun starts a run of them
(ZeRO-3, rows of 8,192, compiled layers) that ends with its first step, twice: with nothing compiled before, and with
the programs that the first left behind. The files are in the system's cache both times. Seconds of the main rank.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

from speed_gpu import measure, ours
from speed_rows import LLAMA3, Row, micro

ROW = Row({"": micro(1)}, steps=(0, 1))
RUNS = ("nothing compiled", "compiled before")


def write_weights(recipe: dict[str, Any], folder: Path) -> float:
    """A folder of safetensors with random weights; -> GiB."""
    import torch

    from trainwright.device import default_device
    from trainwright.model.checkpoint import save_model
    from trainwright.model.source import load_config
    from trainwright.model.transformer import Transformer

    device = default_device()
    config = load_config(recipe["model"]["config"], overrides=recipe["model"]["overrides"])
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
    model.to_empty(device=device)
    model.tie_weights()
    model.reset_buffers(device)
    save_model(model.init_weights(0), folder)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the runs need it
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**30


def work(recipe: dict[str, Any], out: Path) -> None:
    """One rank: the trainer's parts and one step of it."""
    from trainwright.recipe.load import load_recipe
    from trainwright.train.trainer import Trainer

    trainer = Trainer(load_recipe(recipe), force=True)
    trainer.clock = time.perf_counter()
    try:
        trainer._one_step(list(islice(trainer.loader, trainer.loader.accumulation)), False)
    finally:
        trainer.close()
    if trainer.world.is_main:
        out.write_text(json.dumps({"phases": trainer.startup.phases, "loss": trainer.loss}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/trainwright-start"))
    parser.add_argument("--out", type=Path, default=None, help="the phases of both runs, as JSON")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(json.loads(options.worker[0].read_text()), options.worker[1])
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    options.layers, options.profile = None, False
    recipe = ours(ROW, ROW.ours[""], options)["recipe"]
    weights = options.folder / "weights"
    size = write_weights(recipe, weights)
    recipe["model"] |= {"path": str(weights), "config": None, "overrides": {}}
    found: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(RUNS):
        log = options.folder / f"{number}.log"
        found[name] = measure([__file__, "--worker"], recipe, ROW, options, log)
        if "error" in found[name]:
            print(f"{name}: {found[name]['error']}  ({log})", flush=True)
            return 1
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
    model = "tiny" if options.small else LLAMA3
    print(f"{model}, {size:.1f} GiB of safetensors, {options.gpus} processes, seconds")
    print(f"{'phase':<24}" + "".join(f"{name:>18}" for name in RUNS))
    phases = [found[name]["phases"] for name in RUNS]
    for phase in phases[0]:
        print(f"{phase:<24}" + "".join(f"{each.get(phase, 0.0):>18.1f}" for each in phases))
    print(f"{'first step done after':<24}" + "".join(f"{sum(each.values()):>18.1f}" for each in phases))
    return 0


if __name__ == "__main__":
    sys.exit(main())
