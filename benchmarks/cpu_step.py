"""One training step of SmolLM2-135M on a CPU: ours beside transformers.Trainer's, in one run, on the same rows.

    python benchmarks/cpu_step.py [--length 512] [--rows 1] [--rounds 4] [--precision fp32 bf16]

Both take the same random weights (written once by us, read by transformers), the same tokens, AdamW, clipping at 1.0.
Rounds alternate, so that a busy machine slows both; the table has medians and their ratio, of the wall clock and of the
process's CPU time, which other work on the machine disturbs less. A step is everything between two batches: forward,
backward, clipping, update, zeroing, and the loop around them. The first round's losses must agree.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple, Protocol

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
STEPS = 4  # of one round; the first is not counted


class Moment(NamedTuple):
    """The wall clock and the process's CPU time, in seconds."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Moment:
        return cls(time.perf_counter(), time.process_time())

    def since(self, before: Moment) -> Moment:
        return Moment(self.wall - before.wall, self.cpu - before.cpu)


class Side(Protocol):
    """Runs one round; returns what each step took and the round's mean loss."""

    def __call__(self) -> tuple[list[Moment], float]: ...


def ours(folder: Path, ids: torch.Tensor, labels: torch.Tensor, precision: str) -> Side:
    """Our step, as the trainer calls it."""
    from trainwright.data.loader import Batch
    from trainwright.model.checkpoint import load_model
    from trainwright.parallel.layout import Layout
    from trainwright.parallel.mesh import World
    from trainwright.train.optimizer import build_optimizer
    from trainwright.train.step import LossScale, TrainStep

    model = load_model(folder, dtype=torch.float32).train()
    model.compute_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    optimizers = build_optimizer(model, "adamw", betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    world = World(0, Layout(), torch.device("cpu"))
    step = TrainStep(model, optimizers, world, max_grad_norm=1.0, loss_scale=LossScale(False))
    shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    batch = Batch(ids, shifted, positions, None)

    def round_of_steps() -> tuple[list[Moment], float]:
        spent, losses = [], []
        for _ in range(STEPS):
            start = Moment.now()
            losses.append(step([batch], 1e-5).loss)
            spent.append(Moment.now().since(start))
        return spent[1:], mean(losses)

    return round_of_steps


def theirs(folder: Path, ids: torch.Tensor, labels: torch.Tensor, precision: str) -> Side:
    """The same by transformers.Trainer with its defaults, timed by a callback from step to step."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [{"input_ids": ids[i], "labels": labels[i]} for i in range(ids.shape[0])] * STEPS
    marks: list[Moment] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            marks.append(Moment.now())

        def on_train_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            marks.append(Moment.now())

    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=ids.shape[0],
        max_steps=STEPS,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        bf16=precision == "bf16",
        use_cpu=True,
        logging_strategy="steps",
        logging_steps=STEPS,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()])
    trainer.pop_callback(transformers.PrinterCallback)

    def round_of_steps() -> tuple[list[Moment], float]:
        marks.clear()
        trainer.train()
        spent = [after.since(before) for before, after in pairwise(marks)]
        return spent[1:], float(trainer.state.log_history[0]["loss"])

    return round_of_steps


def write_model(folder: Path) -> None:
    """Random weights of SmolLM2-135M's shape."""
    from trainwright.model.checkpoint import load_config, save_model
    from trainwright.model.transformer import Transformer

    keys = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    save_model(Transformer(load_config(keys)).init_weights(0), folder)


def compare(folder: Path, ids: torch.Tensor, precision: str, rounds: int) -> str:
    """One row of the table."""
    sides = [make(folder, ids, ids.clone(), precision) for make in (ours, theirs)]
    spent: list[list[Moment]] = [[], []]
    losses: list[list[float]] = [[], []]
    for number in range(rounds):
        for side in (0, 1) if number % 2 else (1, 0):
            steps, loss = sides[side]()
            spent[side] += steps
            losses[side].append(loss)
    if abs(losses[0][0] - losses[1][0]) > 2e-3 * losses[1][0]:
        raise SystemExit(f"the sides do not compute the same: loss {losses[0][0]} and {losses[1][0]}")
    wall = [median(step.wall for step in side) for side in spent]
    cpu = [median(step.cpu for step in side) for side in spent]
    figures = f"{wall[0]:.3f} | {wall[1]:.3f} | {wall[0] / wall[1]:.3f} | {cpu[0] / cpu[1]:.3f}"
    return f"| {precision} | {figures} | {ids.numel() / wall[0]:,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    words = parser.parse_args()
    torch.manual_seed(0)
    ids = torch.randint(0, 49152, (words.rows, words.length))
    threads = torch.get_num_threads()
    print(f"SmolLM2-135M, {words.rows} x {words.length} tokens, {threads} threads, torch {torch.__version__}")
    print("| precision | ours, s | transformers.Trainer, s | ratio | ratio of CPU time | ours, tokens/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_model(folder)
        for precision in words.precision:
            print(compare(folder, ids, precision, words.rounds), flush=True)


if __name__ == "__main__":
    main()
