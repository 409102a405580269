"""torchtitan from its wheel, on random tokens, timed between two waits for the device: one rank of a torchrun job.

    torchrun --nproc-per-node 4 benchmarks/peers/titan.py RUN.json OUT.json

RUN.json: {"model": "llama3", "flavor": "8B", "arguments": {...}, "settings": {"training.seq_len": 8192, ...},
"warm": 4, "steps": 12}. `arguments` changes torchtitan's own sizes (n_layers), `settings` are keys of its JobConfig.
Its trainer, its step and its parallelism run as they are; only the rows (drawn here, so nothing is read or fetched) and
the clock are ours. Written for torchtitan 0.2.2 with torch 2.11. Without a GPU it runs on gloo, for rehearsals.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


def stand_in_for_datasets() -> None:
    """torchtitan imports the package `datasets` for text that is not read here."""
    for name in ("datasets", "datasets.distributed"):
        module: Any = ModuleType(name)
        module.Dataset, module.load_dataset, module.split_dataset_by_node = object, None, None
        sys.modules[name] = module


def stand_in_for_a_gpu() -> None:
    """Lets torchtitan's start-up questions to its device be answered by a CPU. Before its first import."""
    nothing = lambda *_, **__: None  # noqa: E731
    answers = SimpleNamespace(
        set_device=nothing, current_device=lambda: 0, get_device_name=lambda _: "cpu", synchronize=nothing,
        get_device_properties=lambda _: SimpleNamespace(total_memory=1 << 34), memory_stats=lambda _: {},
        reset_peak_memory_stats=nothing, empty_cache=nothing,
    )  # fmt: skip
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda _: answers


def rows_of(vocabulary: int) -> Any:
    """A builder of dataloaders that give random tokens without end, another stream on each data rank."""
    from torchtitan.components.dataloader import BaseDataLoader

    class RandomRows(BaseDataLoader):
        def __init__(self, dp_rank: int, job_config: Any, **_: Any) -> None:
            self.shape = (job_config.training.local_batch_size, job_config.training.seq_len + 1)
            self.source = torch.Generator().manual_seed(dp_rank)

        def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
            while True:
                ids = torch.randint(0, vocabulary, self.shape, generator=self.source)
                yield {"input": ids[:, :-1].contiguous()}, ids[:, 1:].contiguous()

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            pass

    return RandomRows


def job_config(run: dict[str, Any]) -> Any:
    """torchtitan's defaults with the run's settings."""
    from torchtitan.config import JobConfig

    config = JobConfig()
    settings = {
        "model.name": "measured", "model.flavor": "measured", "training.steps": run["steps"],
        "metrics.log_freq": 10**6, "checkpoint.enable": False, "comm.train_timeout_seconds": 600, **run["settings"],
    }  # fmt: skip
    for key, value in settings.items():
        *path, name = key.split(".")
        part = config
        for step in path:
            part = getattr(part, step)
        if not hasattr(part, name):
            raise SystemExit(f"torchtitan has no setting {key}")
        setattr(part, name, value)
    return config


def main() -> None:
    run, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    began = time.perf_counter()
    gpu = torch.cuda.is_available()
    stand_in_for_datasets()
    if not gpu:
        stand_in_for_a_gpu()
    from torchtitan.protocols.train_spec import get_train_spec, register_train_spec
    from torchtitan.tools.logging import init_logger
    from torchtitan.train import Trainer

    spec = get_train_spec(run["model"])
    sizes = replace(spec.model_args[run["flavor"]], **run.get("arguments", {}))
    register_train_spec(
        "measured",
        replace(
            spec,
            model_args={"measured": sizes},
            build_tokenizer_fn=None,
            build_dataloader_fn=rows_of(sizes.vocab_size),
        ),
    )
    marks: dict[int, float] = {}

    class Timed(Trainer):  # type: ignore[misc]
        def train_step(self, data_iterator: Any) -> None:
            super().train_step(data_iterator)
            if self.step in (1, run["warm"], run["steps"]):
                if gpu:
                    torch.cuda.synchronize()
                marks[self.step] = time.perf_counter()

    init_logger()
    config = job_config(run)
    trainer = Timed(config)
    for module in () if gpu else (module for part in trainer.model_parts for module in part.modules()):
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    trainer.train()
    ranks = torch.distributed.get_world_size()
    rows = config.training.global_batch_size
    if rows < 0:
        degrees = config.parallelism
        others = degrees.tensor_parallel_degree * degrees.context_parallel_degree * degrees.pipeline_parallel_degree
        rows = config.training.local_batch_size * (ranks // others)
    seconds = (marks[run["steps"]] - marks[run["warm"]]) / (run["steps"] - run["warm"])
    peaks = [torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30] if gpu else [0.0, 0.0]
    everyone: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(everyone, peaks)
    if torch.distributed.get_rank() == 0:
        found = {
            "tokens_per_second_per_gpu": rows * config.training.seq_len / seconds / ranks,
            "step_seconds": seconds,
            "peak_memory_gib": max(allocated for allocated, _ in everyone),
            "reserved_memory_gib": max(reserved for _, reserved in everyone),
            "first_step_seconds": marks[1] - began,
        }
        out.write_text(json.dumps(found))
    trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
