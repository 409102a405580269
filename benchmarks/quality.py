"""What fewer bits of a frozen base cost in quality: LoRA on a real model, its base whole, in nf4, int8 and fp8.

    python benchmarks/quality.py [--steps 200] [--formats full,bf16,nf4,int8,fp8] [--seeds 0,1,2] [--folder KEPT]

SmolLM2-135M-Instruct (fetched as `tests/smollm2.py` does) learns the shipped arithmetic problems, every token of them,
with adapters of rank 16 on all linear layers: the same rows in the same order, the same adapters at the start, float32
on a CPU. Printed as it is measured: mean training loss of the last tenth of the steps, loss of the held-out split
before and after, and how far each is from full precision's of the same seed. The bound is 1%.

One seed proves little: in one run fp8's rounding moved the losses of training and held-out rows by 1% in opposite
directions. `bf16`, the whole base computed in bf16, is the yardstick. With several seeds the mean over them is printed
with its standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

WHOLE = ("full", "bf16")
"""Bases that are not in fewer bits."""
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def recipe_of(model: Path, name: str, folder: Path, *, steps: int, tokens: int, rows: int, seed: int = 0) -> Any:
    from trainwright.recipe.load import load_recipe

    return load_recipe(
        {
            "name": f"{name}-{seed}",
            "output": str(folder),
            "model": {"path": str(model)},
            "adapter": {"rank": 16, "alpha": 32.0},
            "task": "pretrain",
            "quantize": None if name in WHOLE else name,
            "data": {
                "path": "shipped:arithmetic?rows=3000", "seq_len": tokens, "validation": 0.02, "workers": 0,
                "too_long": "drop",
                "cache": str(folder / "cache"),
            },
            "train": {
                "steps": steps, "micro_batch_size": rows, "learning_rate": 5e-4, "warmup": 0.05, "loss_chunk": 0,
                "precision": "bf16" if name == "bf16" else "fp32", "seed": seed,
            },
            "evaluation": {"every": 0, "generate": 0, "max_batches": 16},
            "checkpoint": {"every": 0},
            "tracking": {"tensorboard": False},
        }
    )  # fmt: skip


def losses(model: Path, name: str, folder: Path, **sizes: int) -> tuple[float, float, float]:
    """(mean training loss of the last tenth of the steps, held-out loss before, and after)."""
    from trainwright.train.trainer import train

    result = train(recipe_of(model, name, folder, **sizes))
    lines = (result.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    every = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    before, after = (result.evaluation[when]["loss"] for when in ("before", "after"))
    return fmean(every[-max(1, len(every) // 10) :]), before, after


def apart(ours: float, full: float) -> float:
    """Relative difference, in percent."""
    return 100 * (ours / full - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--formats", default="full,nf4,int8,fp8")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", default="0", help="of adapters and data order, for example 0,1,2")
    parser.add_argument("--tokens", type=int, default=128, help="a row")
    parser.add_argument("--rows", type=int, default=1, help="a step")
    parser.add_argument("--folder", type=Path, help="keeps the runs; one that is there is not made again")
    arguments = parser.parse_args()
    from tests.smollm2 import model_folder

    sizes = {"steps": arguments.steps, "tokens": arguments.tokens, "rows": arguments.rows}
    formats, seeds = arguments.formats.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    print("| base | seed | training loss, last tenth | apart | held-out before | held-out after | apart |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    found: dict[str, list[float]] = {name: [] for name in formats}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            full: list[float] = []
            for name in formats:
                kept = folder / f"{name}-{seed}.json"
                if not kept.exists():
                    kept.write_text(json.dumps(losses(model_folder(), name, folder, **sizes, seed=seed)))
                last, before, after = json.loads(kept.read_text())
                full = full or [last, after]
                found[name].append(apart(after, full[1]))
                print(
                    f"| {name} | {seed} | {last:.4f} | {apart(last, full[0]):+.2f}% | {before:.4f} | {after:.4f} | "
                    f"{found[name][-1]:+.2f}% |",
                    flush=True,
                )
    if len(seeds) > 1:
        print(
            f"\nheld-out after training, apart from {formats[0]}: mean over {len(seeds)} seeds, and its standard error"
        )
        for name, shares in found.items():
            print(f"{name}: {fmean(shares):+.2f}% +- {stdev(shares) / len(shares) ** 0.5:.2f}%")


if __name__ == "__main__":
    main()
