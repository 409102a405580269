"""Published or earlier figures beside ours: ratios, in one FLOP convention, over each card's own peak. No torch.

Every figure is brought to tokens a second and GPU; model FLOPs are then counted after PaLM for both (DESIGN section 5,
frozen weights without their weight gradient), whatever the publisher counted. What the publisher counted is computed
too, so that its own TFLOPs can be met again:

    000  4 L (29 h^2 + 2 s h) + 6 h V a token: recomputation counted, grouped projections as full ones, causal half
    004  6 x 7e9 a token, attention left out

Owns this arithmetic. The documents are `published/`'s, rows of ours `result.py`'s.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from trainwright.bench.published import FOLDER, Published, PublishedRow, read_published
from trainwright.errors import UserError
from trainwright.model.config import ModelConfig
from trainwright.planner.build import build_job, model_config
from trainwright.store import read_json

Row = dict[str, Any]
Flops = Callable[[ModelConfig, int], float]


@dataclass(frozen=True)
class Beside:
    """Somebody's row in our terms. `tflops` and `mfu` are ours (PaLM) of their speed; `own_*` are what they count."""

    source: str
    system: str
    row: str
    device: str
    gpus: int
    peak_tflops: float | None
    tokens_per_second_per_gpu: float | None
    samples_per_second: float | None
    tflops: float | None
    mfu: float | None
    own_tflops: float | None
    own_counts: str | None
    peak_memory_gib: float | None
    oom: bool
    loss: float | None = None


def xtuner_flops(config: ModelConfig, seq_len: int) -> float:
    """Seed 000's FLOPs of a token: of Llama-3-8B at 8192, 74.02e9."""
    hidden, layers = config.hidden_size, config.num_layers
    return 4 * layers * (29 * hidden**2 + 2 * seq_len * hidden) + 6 * hidden * config.vocab_size


def flagperf_flops(config: ModelConfig, seq_len: int) -> float:
    """Seed 004's: six times seven billion, whatever the model's exact size."""
    return 6 * 7e9


THEIRS: dict[str, tuple[str, Flops]] = {
    "000": ("4 L (29 h² + 2 s h) + 6 h V", xtuner_flops),
    "004": ("6 x 7e9", flagperf_flops),
}


@cache
def document(name: str) -> Published:
    """A published document by its seed (`002`) or the name of its file. Raises UserError that lists them."""
    files = sorted(FOLDER.glob("*.yaml"))
    found = next((file for file in files if name in (file.stem, file.stem.partition("_")[0])), None)
    if found is None:
        raise UserError(f"no published document {name}: there are {', '.join(file.stem for file in files)}")
    return read_published(found)


def published_row(name: str, row: str) -> PublishedRow:
    """One row of a document. Raises UserError that names the nearest."""
    rows = document(name).rows
    found = next((each for each in rows if each.name == row), None)
    if found is None:
        nearest = difflib.get_close_matches(row, [each.name for each in rows], n=1, cutoff=0.0)
        raise UserError(f"published document {name} has no row {row!r}: did you mean {nearest[0]!r}?")
    return found


def of_published(row: PublishedRow) -> Beside:
    """A published row in our terms. A sample is counted as a row of `seq_len` tokens."""
    config, seq_len = model_config(row.recipe), row.recipe.data.seq_len
    rate = tokens_per_second_per_gpu(row.figures, seq_len, row.gpus)
    card = row.cluster.card
    peak = card.peak(row.recipe.train.precision)
    tflops = rate * flops_per_token(row, config) / 1e12 if rate else None
    counts, theirs = THEIRS.get(row.seed, (None, None))
    seconds = row.figures.get("seconds_per_sample")
    return Beside(
        source=row.seed,
        system=row.system,
        row=row.name,
        device=card.name,
        gpus=row.gpus,
        peak_tflops=peak / 1e12 if peak else None,
        tokens_per_second_per_gpu=rate,
        samples_per_second=row.figures.get("samples_per_second") or (1 / seconds if seconds else None),
        tflops=tflops,
        mfu=tflops / (peak / 1e12) if tflops and peak else None,
        own_tflops=rate * theirs(config, seq_len) / 1e12 if rate and theirs else None,
        own_counts=counts,
        peak_memory_gib=row.memory_gib,
        oom=row.out_of_memory,
        loss=row.figures.get("loss"),
    )


def tokens_per_second_per_gpu(figures: dict[str, Any], seq_len: int, gpus: int) -> float | None:
    """From whichever way a table says its speed: tokens, samples a second of all GPUs, or seconds a sample."""
    if (rate := figures.get("tokens_per_second_per_gpu")) is not None:
        return float(rate)
    samples = figures.get("samples_per_second")
    if samples is None and figures.get("seconds_per_sample"):
        samples = 1 / figures["seconds_per_sample"]
    return None if samples is None else samples * seq_len / gpus


def flops_per_token(row: PublishedRow, config: ModelConfig) -> float:
    """Model FLOPs after PaLM, frozen weights without their weight gradient."""
    job = build_job(row.recipe, row.cluster, config=config, program=row.program)
    trained = sum(item.numel for item in job.parameters if item.trained)
    return config.flops_per_token(row.recipe.data.seq_len, trained_parameters=trained)


def of_earlier(row: Row, source: str) -> Beside:
    """A row of an earlier results.json."""
    keys = ("peak_tflops", "tokens_per_second_per_gpu", "samples_per_second", "tflops", "mfu", "loss")
    return Beside(
        source=source,
        system=f"trainwright {row.get('trainwright', '')}".strip(),
        row=row["name"],
        device=str(row.get("device", "")),
        gpus=row["gpus"],
        own_tflops=None,
        own_counts=None,
        peak_memory_gib=row.get("peak_memory_gib"),
        oom=row["status"] == "oom",
        **{key: row.get(key) for key in keys},
    )


def read_earlier(path: Path) -> dict[str, Beside]:
    """The rows of a results.json (or of a folder that has one), by name. Raises UserError for any other file."""
    file = path / "results.json" if path.is_dir() else path
    values = read_json(file)
    if not isinstance(values, dict) or not isinstance(values.get("rows"), list):
        raise UserError(f"--compare {path}: it is neither a published document (such as 002) nor a results.json")
    return {row["name"]: of_earlier(row, str(path)) for row in values["rows"] if "name" in row and "status" in row}


def against(ours: Row, theirs: Beside, config: ModelConfig | None) -> dict[str, Any]:
    """What stands beside a row of ours: their figures, and ours over theirs. `config`: of our row's model, to count
    as they do.

    `speed_ratio` is of tokens/s/GPU (card against card); `mfu_ratio` of MFU, which is speed per peak TFLOP of each
    card in one FLOP convention; `memory_ratio` of peak memory; `ours_own_tflops`: our TFLOPs as they count them.
    """
    rate, counts = ours.get("tokens_per_second_per_gpu"), THEIRS.get(theirs.source)
    return {
        **asdict(theirs),
        "ours_own_tflops": rate * counts[1](config, ours["seq_len"]) / 1e12 if rate and counts and config else None,
        "speed_ratio": _ratio(ours.get("tokens_per_second_per_gpu"), theirs.tokens_per_second_per_gpu),
        "mfu_ratio": _ratio(ours.get("mfu"), theirs.mfu),
        "memory_ratio": _ratio(ours.get("peak_memory_gib"), theirs.peak_memory_gib),
    }


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours and theirs else None
