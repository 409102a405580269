"""Two processes: a fault or a signal of one of them is everybody's, and nobody is left waiting."""

import json
import os
import subprocess
import textwrap
from pathlib import Path

import pytest

from tests.warm import python
from trainwright.train.checkpoint import list_checkpoints
from trainwright.train.metrics import read_lines

PROGRAM = textwrap.dedent("""
    import faulthandler, os, signal, sys, torch
    from pathlib import Path
    from tests.train.small import small_recipe
    from trainwright.parallel.mesh import leave_world
    from trainwright.train.trainer import Trainer
    from trainwright.errors import UserError

    faulthandler.dump_traceback_later(400, exit=True)  # says where a rank waits, should it ever
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    options = ["parallel.timeout_minutes=1", "train.gradient_accumulation_steps=1", "train.steps=8"]

    def say(word, *values):
        (folder / f"{word}-{rank}").write_text(" ".join(map(str, values)))  # two ranks share one stdout

    trainer = Trainer(small_recipe(folder, "name=poisoned", *options, checkpoint={"every": 2}))
    def poison(module, args, out):
        if rank != 1 or trainer.step + 1 != 4 or not torch.is_grad_enabled():
            return out
        return out * torch.tensor([1.0, float("inf")])[:, None, None]
    trainer.model.layers["1"].mlp.down_proj.register_forward_hook(poison)
    try:
        trainer.run()
    except UserError as error:
        say("STOPPED", error)
    trainer.close()

    trainer = Trainer(small_recipe(folder, "name=signalled", *options))
    log = trainer.journal.step
    def log_and_kill(line):
        log(line)
        if rank == 1 and line["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    trainer.journal.step = log_and_kill
    say("ENDED", trainer.run().step)
    trainer.close()

    trainer = Trainer(small_recipe(folder, "name=signalled", *options), resume=True)
    say("RESUMED", trainer.step, trainer.run().step)
    trainer.close()

    trainer = Trainer(small_recipe(folder, "name=whole", *options))
    trainer.run()
    trainer.close()
    leave_world()
""")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which one start of two processes ran and left what each rank says."""
    folder = tmp_path_factory.mktemp("two")
    program = folder / "program.py"
    program.write_text(PROGRAM)
    command = [python(), "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(program), str(folder)]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def said(folder, word):
    return [(folder / f"{word}-{rank}").read_text() for rank in (0, 1)]


def test_a_nan_of_one_rank_stops_both_with_the_same_account(two):
    accounts = said(two, "STOPPED")
    assert accounts[0] == accounts[1]
    # Rank 1 reads rows 2 and 3 of the four; its second one is poisoned.
    assert (
        "step 4: the loss is nan; it came first from the output of layers.1.mlp.down_proj, in row 3 of" in accounts[0]
    )
    assert [c.step for c in list_checkpoints(two / "runs" / "poisoned" / "checkpoints")] == [2]


def test_a_signal_to_one_rank_stops_and_saves_all(two):
    assert said(two, "ENDED") == ["4", "4"]
    assert said(two, "RESUMED") == ["4 8", "4 8"]


def test_two_ranks_resume_bit_for_bit(two):
    runs = [two / "runs" / name for name in ("whole", "signalled")]
    losses = [[line["loss"] for line in read_lines(run / "metrics.jsonl")] for run in runs]
    assert losses[0] == losses[1]
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    ranks = [json.loads((run / "environment.json").read_text())["ranks"] for run in runs]
    assert ranks == [2, 2]
