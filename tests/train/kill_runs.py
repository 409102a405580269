"""Runs a small recipe again and again in forked processes that are killed; `test_resume.py` starts it.

The parent imports everything once and computes nothing, so that forking is safe and an attempt starts at once.
Prints one JSON object: for each run, its losses, its weights' digest, and how often it was killed.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import trainwright.train.trainer as trainer_module
from tests.train.small import small_recipe
from trainwright.train.metrics import read_lines

CHECKPOINTS = {"every": 3, "keep_last": 2}


def attempt(folder: Path, name: str, stale_random_numbers: bool) -> None:
    """One process of one run. Dropout makes every step depend on the random numbers."""
    recipe = small_recipe(folder, f"name={name}", "train.steps=16", evaluation={"every": 4}, checkpoint=CHECKPOINTS)
    if stale_random_numbers:
        trainer_module.set_rng_state = lambda *arguments: None
    trainer = trainer_module.Trainer(recipe, resume=True)
    for layer in trainer.model.layers.values():
        layer.mlp.register_forward_hook(
            lambda module, _, out: torch.nn.functional.dropout(out, 0.2, training=module.training)
        )
    trainer.run()
    trainer.close()


def started(folder: Path, name: str, stale: bool) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        attempt(folder, name, stale)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def ended(pid: int) -> bool:
    """Whether the process is over, without taking its status."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def finish(folder: Path, name: str, chance: random.Random | None, stale: bool = False) -> dict:
    """Attempts until one comes to its end; with `chance`, each may be killed at a random step and moment."""
    metrics = folder / "runs" / name / "metrics.jsonl"
    kills = 0
    while True:
        pid = started(folder, name, stale)
        if chance is not None and kills < 3:
            target, pause = chance.randint(1, 15), chance.uniform(0, 0.03)
            while (
                len(read_lines(metrics)) < target
                and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            ):
                time.sleep(0.002)
            time.sleep(pause)
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            kills += 1
            continue
        if status:
            sys.exit(f"{name} failed with status {status}")
        break
    weights = (folder / "runs" / name / "model" / "model.safetensors").read_bytes()
    keys = ("step", "loss", "grad_norm", "lr", "tokens", "supervised_tokens")
    evaluations = read_lines(folder / "runs" / name / "evaluation.jsonl")
    return {
        "lines": [[line[key] for key in keys] for line in read_lines(metrics)],
        "evaluations": [[line["step"], line["loss"]] for line in evaluations],
        "weights": hashlib.sha256(weights).hexdigest(),
        "kills": kills,
    }


def main() -> None:
    folder = Path(sys.argv[1])
    results = {"whole": finish(folder, "whole", None)}
    for seed in (1, 2, 3):
        results[f"killed-{seed}"] = finish(folder, f"killed-{seed}", random.Random(seed))
    results["stale"] = finish(folder, "stale", random.Random(4), stale=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
