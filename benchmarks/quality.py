"""What fewer bits of a frozen base cost in quality: LoRA on a real model, its base whole, in nf4, int8 and fp8.

    python benchmarks/quality.py [--steps 200] [--formats full,nf4,int8,fp8] [--tokens 128] [--rows 1]

SmolLM2-135M-Instruct (fetched as `tests/smollm2.py` does) learns the shipped arithmetic problems, every token of them,
with adapters of rank 16 on all linear layers: the same rows in the same order, the same adapters at the start, float32
on a CPU. Printed as it is measured: mean training loss of the last tenth of the steps, loss of the held-out split
before and after, and how far each is from full precision's. The bound is 1%.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def recipe_of(model: Path, quantize: str | None, folder: Path, *, steps: int, tokens: int, rows: int) -> Any:
    from trainwright.recipe.load import load_recipe

    return load_recipe(
        {
            "name": quantize or "full",
            "output": str(folder),
            "model": {"path": str(model)},
            "adapter": {"rank": 16, "alpha": 32.0},
            "task": "pretrain",
            "quantize": quantize,
            "data": {
                "path": "shipped:arithmetic?rows=3000", "seq_len": tokens, "validation": 0.02, "workers": 0,
                "too_long": "drop",
                "cache": str(folder / "cache"),
            },
            "train": {
                "steps": steps, "micro_batch_size": rows, "learning_rate": 5e-4, "warmup": 0.05, "precision": "fp32",
                "loss_chunk": 0,
            },
            "evaluation": {"every": 0, "generate": 0, "max_batches": 16},
            "checkpoint": {"every": 0},
            "tracking": {"tensorboard": False},
        }
    )  # fmt: skip


def losses(model: Path, quantize: str | None, folder: Path, **sizes: int) -> tuple[float, float, float]:
    """(mean training loss of the last tenth of the steps, held-out loss before, and after)."""
    from trainwright.train.trainer import train

    result = train(recipe_of(model, quantize, folder, **sizes))
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
    parser.add_argument("--tokens", type=int, default=128, help="a row")
    parser.add_argument("--rows", type=int, default=1, help="a step")
    parser.add_argument("--folder", type=Path, help="keeps the runs; one that is there is not made again")
    arguments = parser.parse_args()
    from tests.smollm2 import model_folder

    sizes = {"steps": arguments.steps, "tokens": arguments.tokens, "rows": arguments.rows}
    print("| base | training loss, last tenth | apart | held-out before | held-out after | apart |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        full: list[float] = []
        for name in arguments.formats.split(","):
            kept = folder / f"{name}.json"
            if not kept.exists():
                kept.write_text(json.dumps(losses(model_folder(), None if name == "full" else name, folder, **sizes)))
            last, before, after = json.loads(kept.read_text())
            full = full or [last, after]
            print(
                f"| {name} | {last:.4f} | {apart(last, full[0]):+.2f}% | {before:.4f} | {after:.4f} | "
                f"{apart(after, full[1]):+.2f}% |",
                flush=True,
            )


if __name__ == "__main__":
    main()
