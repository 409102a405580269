"""What the processes of test_launch.py run: three good steps, then rank 1 does what the first argument says."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from trainwright.parallel.mesh import join_world
from trainwright.parallel.watch import begin_watch, report_failure
from trainwright.recipe.parallel import ParallelRecipe


def work(mode: str, folder: Path) -> None:
    world = join_world(ParallelRecipe(timeout_minutes=5))
    watch = begin_watch(folder, world, minutes=0.05)
    for step in range(1, 5):
        watch.beat(step, "training")
        if step == 4 and world.rank == 1:
            if mode == "raise":
                raise ValueError("a tensor\nof the wrong shape")
            if mode == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if mode == "hang":
                time.sleep(60)
        dist.all_reduce(torch.ones(1))
    watch.close()


if __name__ == "__main__":
    try:
        work(sys.argv[1], Path(sys.argv[2]))
    except Exception as error:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        os._exit(report_failure(Path(sys.argv[2]), error, rank, size))
