"""Fine-tuning in little memory on one GPU: ours beside transformers + PEFT + bitsandbytes + Liger, and Unsloth.

    python benchmarks/qlora_gpu.py --rows 8192                what matters most; about 6 minutes
    python benchmarks/qlora_gpu.py --rows 512,load            about 7
    python benchmarks/qlora_gpu.py --rows lora,fp8,int8       about 7
    python benchmarks/qlora_gpu.py --rows long                about 5
    python benchmarks/qlora_gpu.py --tiny --sides ours        a rehearsal on a CPU, sizes of no interest

Random Llama-3-8B, rank 64 on all linear layers (int8: Llama-2-7B, rank 8), random tokens. Every line is printed as it
is measured: median of the measured steps, most memory allocated (and reserved) in any step from the first on. Each line
is a process of its own with a limit of time, and no line begins after `--seconds`. Peers read the random model from a
folder that is written first on the GPU; ours draws its own, but for `load`, which streams it: its first loss must be
the peers', because adapters begin at nothing and nf4 is the same numbers.

Peers' memory is given with torch's fused AdamW (the run that is timed) and, in a second pass, with bitsandbytes'
AdamW8bit. Needs one CUDA GPU and, for peers, these packages where Python finds them (none of their other needs is
imported): transformers, peft, accelerate, bitsandbytes, liger-kernel, trl, datasets, dill, multiprocess, unsloth and
unsloth_zoo (`peers/folders.py` brings them).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
LLAMA3: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "bos_token_id": 128000,
    "eos_token_id": 128001, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA2: dict[str, Any] = {
    **LLAMA3, "intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000, "rope_theta": 10000.0,
    "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 4096,
}  # fmt: skip
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 32}
LITTLE = {"quantize_tables": "nf4", "train": {"optimizer": "adamw8bit"}}
LONG = {"recompute": "full", "offload": "activations", "mlp_tokens": 4096}
ROWS: dict[str, dict[str, Any]] = {
    "512": {"seq_len": 512, "steps": 12, "warmup": 6},
    "8192": {"seq_len": 8192, "warmup": 6},
    "lora": {"seq_len": 8192, "warmup": 6, "quantize": None, "peer_recompute": False},
    "fp8": {"seq_len": 8192, "warmup": 6, "quantize": "fp8", "peers": False},
    "int8": {"seq_len": 512, "batch": 8, "rank": 8, "quantize": "int8", "keys": LLAMA2, "unsloth": False},
    "long": {"seq_len": 81920, "peers": False, "steps": 0, "warmup": 1},
    "load": {"seq_len": 512, "peers": False, "steps": 2, "warmup": 1},
}
# What ours sets in each row, by the name of the line. cap_gib: torch may take no more from the device.
OURS: dict[str, dict[str, dict[str, Any]]] = {
    "512": {
        "little memory": {**LITTLE, "parallel": {"recompute": "full"}},
        "graph": {**LITTLE, "train": {"optimizer": "adamw8bit", "cuda_graph": True}},
        "no recompute": LITTLE,
    },
    "8192": {
        "24 GiB": {
            "train": {"optimizer": "adamw8bit"}, "cap_gib": 24,
            "parallel": {"recompute": "selective", "recompute_memory": 14.0},
        },
        "24 GiB, some to the host": {
            "train": {"optimizer": "adamw8bit"}, "cap_gib": 24,
            "parallel": {
                "recompute": "selective", "recompute_memory": 26.0, "offload": "activations", "offload_share": 0.45
            },
        },
        "24 GiB, graph": {
            "train": {"optimizer": "adamw8bit", "cuda_graph": True}, "cap_gib": 24,
            "parallel": {"recompute": "selective", "recompute_memory": 13.5},
        },
        "24 GiB, small tables": {
            **LITTLE, "cap_gib": 24, "parallel": {"recompute": "selective", "recompute_memory": 16.0}
        },
        "little memory": {**LITTLE, "parallel": LONG},
    },
    "lora": {"any memory": {}, "graph": {"train": {"cuda_graph": True}}},
    "fp8": {"any memory": {}, "graph": {"train": {"cuda_graph": True}}},
    "int8": {
        "12.6 GB": {
            "train": {"optimizer": "adamw8bit"}, "parallel": {"recompute": "selective", "recompute_memory": 2.0},
        },
    },
    "long": {
        f"{tokens:,} tokens": {**LITTLE, "seq_len": tokens, "parallel": LONG, "cap_gib": 24}
        for tokens in (81920, 163840)
    },
    "load": {"streamed": {**LITTLE, "quantize_tables": None, "path": True, "parallel": {"recompute": "full"}}},
}  # fmt: skip
SECONDS = {"long": 240}
"""Of a line's process, where it is not 150."""


def row_of(name: str, tiny: bool = False) -> dict[str, Any]:
    defaults = {"batch": 1, "rank": 64, "quantize": "nf4", "keys": LLAMA3, "steps": 5, "warmup": 3}
    row = {**defaults, **ROWS[name]}
    if tiny:
        few = {"num_key_value_heads": 2, "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}
        row |= {"keys": {**row["keys"], **TINY, **few}, "seq_len": min(row["seq_len"], 256), "rank": 8, "tiny": True}
    return row


def tokens_of(row: dict[str, Any], seq_len: int) -> Any:
    """Random ids on the CPU, the same for every side."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 300, (row["batch"], seq_len), generator=generator)


# ---- ours ----


def ours(row: dict[str, Any], settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """The trainer's own model, optimizer and step, without data, checkpoints and export."""
    import torch

    from trainwright.data.loader import Batch
    from trainwright.model.checkpoint import load_config
    from trainwright.parallel.mesh import join_world
    from trainwright.recipe.load import load_recipe
    from trainwright.train.build import Sources, adapt, build_model
    from trainwright.train.graph import GraphedPasses
    from trainwright.train.optimizer import build_optimizer
    from trainwright.train.step import LossScale, TrainStep

    seq_len = row["seq_len"] if "tiny" in row else settings.get("seq_len", row["seq_len"])
    keys = {**row["keys"], "max_position_embeddings": max(seq_len, row["keys"]["max_position_embeddings"])}
    read = Path(folder) if settings.get("path") else None
    where = {"path": folder} if read else {"config": keys, "tokenizer": "byte"}
    recipe = load_recipe(
        {
            "model": where,
            "adapter": {"rank": row["rank"], "alpha": 2.0 * row["rank"]},
            "quantize": row["quantize"],
            "quantize_tables": settings.get("quantize_tables"),
            "data": {"path": "unused", "seq_len": seq_len},
            "train": {"steps": 1, "learning_rate": 1e-4, **settings.get("train", {})},
            "parallel": settings.get("parallel", {}),
        }
    )
    world = join_world(recipe.parallel)
    sources = adapt(Sources(load_config(read or keys), None, read), recipe)  # type: ignore[arg-type]
    begin = time.perf_counter()
    model, _ = build_model(recipe, sources, world)
    built = {"built_s": time.perf_counter() - begin, "built_gib": peaks()[0]}
    train = recipe.train
    recorded = train.cuda_graph and world.device.type == "cuda"  # a rehearsal has none
    optimizers = build_optimizer(model, train.optimizer, betas=train.betas, eps=train.eps, weight_decay=0.0)
    graphs = GraphedPasses(optimizers.parameters) if recorded else None
    step = TrainStep(model, optimizers, world, max_grad_norm=1.0, loss_scale=LossScale(False), graphs=graphs)
    ids = tokens_of(row, seq_len)
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)
    positions = torch.arange(seq_len).expand_as(ids)
    batch = Batch(ids, labels, positions, None)
    return {**measure(lambda: step([batch], 1e-4).loss, row, row["batch"] * seq_len), **built}


# ---- peers ----


def peer(side: str, row: dict[str, Any], folder: str) -> dict[str, Any]:
    """A peer's step: forward, backward, clipping, fused AdamW over float32 adapters; then memory with 8-bit states."""
    if side == "unsloth":
        from benchmarks.peers.unsloth_lora import build
    else:
        from benchmarks.peers.hf import build
    import torch

    model, loss_of = build(folder, {**row, "recompute": row.get("peer_recompute", True)})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = tokens_of(row, row["seq_len"]).cuda()

    def step(optimizer: torch.optim.Optimizer) -> Callable[[], float]:
        def run() -> float:
            loss = loss_of(ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return run

    optimizer: Any = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    result = measure(step(optimizer), row, row["batch"] * row["seq_len"])
    del optimizer
    gc.collect()
    from bitsandbytes.optim import AdamW8bit

    little = measure(step(AdamW8bit(trained, lr=1e-4, weight_decay=0.0)), {**row, "warmup": 1, "steps": 1}, 1)
    return {**result, "little_gib": little["peak_gib"]}


def peaks() -> tuple[float, float]:
    """Most memory (allocated, reserved) since the last `restart`, in GiB; nothing on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return 0.0, 0.0
    return torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB


def restart() -> None:
    """Waits for the device and forgets its peaks."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(step: Callable[[], float], row: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Median seconds of a step, most memory in any step, the first loss. Every step ends with the loss on the host.

    The first steps count for memory too: of a recorded graph, whose memory torch does not count again, they tell the
    truth. Without measured steps the last warm-up step is timed.
    """
    restart()
    begin = time.perf_counter()
    first = step()
    seconds = [time.perf_counter() - begin]
    for number in range(1, row["warmup"] + row["steps"]):
        begin = time.perf_counter()
        step()
        if number >= row["warmup"]:
            seconds.append(time.perf_counter() - begin)
    taken = statistics.median(seconds[1:] or seconds)
    allocated, reserved = peaks()
    return {
        "first_loss": first,
        "first_s": seconds[0],
        "step_s": taken,
        "tokens_per_s": tokens / taken,
        "samples_per_s": row["batch"] / taken,
        "peak_gib": allocated,
        "reserved_gib": reserved,
    }


# ---- one process a line ----


def one(side: str, name: str, line: str, folder: str, tiny: bool) -> None:
    import torch

    row = row_of(name, tiny)
    settings = OURS[name][line] if side == "ours" else {}
    if settings.get("cap_gib") and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(settings["cap_gib"] * GIB / total)
    result = ours(row, settings, folder) if side == "ours" else peer(side, row, folder)
    print("RESULT " + json.dumps(result), flush=True)


def child(words: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """A Python process that sees this repository, and no network."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    settings = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    settings |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env={**os.environ, **settings}, timeout=seconds
    )


def run(side: str, name: str, line: str, folder: str, seconds: float, tiny: bool) -> dict[str, Any]:
    """The line's result, or why there is none."""
    words = [str(Path(__file__)), "--one", side, name, line, "--folder", folder, *(["--tiny"] if tiny else [])]
    try:
        done = child(words, seconds)
    except subprocess.TimeoutExpired:
        return {"why": f"not done after {seconds:.0f} s"}
    found = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")]
    if found:
        return dict(json.loads(found[-1].removeprefix("RESULT ")))
    text = done.stderr + done.stdout
    if "OutOfMemoryError" in text or "CUDA out of memory" in text:
        return {"why": "out of memory"}
    last = [line for line in text.strip().splitlines() if line.strip()]
    print("\n".join(last[-25:]), file=sys.stderr, flush=True)
    return {"why": " | ".join(last[-2:])[-300:]}


def show(name: str, side: str, line: str, found: dict[str, Any], spent: float) -> None:
    if "why" in found:
        print(f"| {name} | {side} {line} | {found['why']} | [{spent:.0f} s]", flush=True)
        return
    little = f" ({found['little_gib']:.2f} with 8-bit states)" if "little_gib" in found else ""
    built = f" built in {found['built_s']:.0f} s, {found['built_gib']:.2f} GiB" if "built_s" in found else ""
    print(
        f"| {name} | {side} {line} | {found['tokens_per_s']:,.0f} | {found['samples_per_s']:.2f} | "
        f"{found['step_s'] * 1000:,.1f} | {found['peak_gib']:.2f}{little} | {found['reserved_gib']:.2f} | "
        f"{found['first_loss']:.4f} |{built}, first step {found['first_s']:.0f} s [{spent:.0f} s]",
        flush=True,
    )


def write_folder(folder: str, keys: dict[str, Any]) -> None:
    """The random model that peers read, made on the device."""
    words = f"from benchmarks.peers.hf import *; write_random_model({folder!r}, {keys!r})"
    done = child(["-c", words], 150)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--sides", default="ours,unsloth,hf")
    parser.add_argument("--lines", help="of ours, only these, by name, with ; between (all)")
    parser.add_argument("--folder", default="/tmp/qlora")
    parser.add_argument("--seconds", type=float, default=520, help="no line begins later")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: small sizes, any device")
    parser.add_argument("--one", nargs=3, metavar=("SIDE", "ROW", "LINE"))
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a line's process ends with this one
    tiny = arguments.tiny
    if arguments.one:
        one(*arguments.one, arguments.folder, tiny)
        return
    print("| row | side | tokens/s | samples/s | ms a step | peak GiB | reserved GiB | first loss |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    sides, begin = arguments.sides.split(","), time.perf_counter()
    for name in arguments.rows.split(","):
        row = row_of(name, tiny)
        folder = str(Path(arguments.folder) / ("llama2" if ROWS[name].get("keys") is LLAMA2 else "llama3"))
        only = arguments.lines.split(";") if arguments.lines else OURS[name]
        lines = [("ours", line) for line in OURS[name] if "ours" in sides and line in only]
        lines += [(side, "-") for side in sides if side != "ours" and row.get("peers", True) and row.get(side, True)]
        for side, line in lines:
            now = time.perf_counter()
            if now - begin > arguments.seconds:
                show(name, side, line, {"why": "no time left"}, 0)
                continue
            reads = side != "ours" or OURS[name][line].get("path")
            if reads and not Path(folder, "config.json").exists():
                write_folder(folder, row["keys"])
            show(
                name, side, line, run(side, name, line, folder, SECONDS.get(name, 150), tiny), time.perf_counter() - now
            )


if __name__ == "__main__":
    main()
