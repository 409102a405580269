"""metrics.jsonl: one line a step, and the arithmetic of its figures.

Columns, all from one convention (docs: figures): `tokens` and `supervised_tokens` count from the start of the run,
without padding; `samples_per_second` counts rows of all GPUs; `tflops`, `mfu` and `hfu` are of one GPU, with model
FLOPs after PaLM (6N + 12Lhs, frozen weights without their weight gradient), mfu over the card's dense peak, null where
that is not known; hfu adds what is computed again. `data_wait_seconds` is what the step waited for its rows.

Owns the file and the figures. Trackers get the same dictionary in `trackers.py`.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from trainwright.model.config import ModelConfig
from trainwright.store import write_text


@dataclass(frozen=True)
class Costs:
    """What a token costs and what the card could do, in FLOP and FLOP/s."""

    flops_per_token: float
    hardware_flops_per_token: float
    peak_flops: float | None
    gpus: int

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        seq_len: int,
        *,
        trained_parameters: int,
        repeated: float,
        peak_flops: float | None,
        gpus: int,
    ) -> Costs:
        """`repeated`: the share of the blocks' forward pass that runs once more (full recomputation: 1), each 2 FLOPs
        a weight and a third of the attention."""
        trained = None if trained_parameters >= config.num_parameters() else trained_parameters
        model = config.flops_per_token(seq_len, trained_parameters=trained)
        attention = sum(block.self_attn.flops_per_token(seq_len, causal=False) for block in config.layers)
        forward = 2 * sum(block.num_active_parameters() for block in config.layers) + attention / 3
        return cls(model, model + repeated * forward, peak_flops, gpus)

    def figures(self, tokens: int, rows: int, seconds: float) -> dict[str, float | None]:
        """Speed of one step: `tokens` without padding and `rows` of all GPUs in `seconds`."""
        rate = tokens / seconds / self.gpus
        achieved = rate * self.flops_per_token
        hardware = rate * self.hardware_flops_per_token
        return {
            "step_seconds": seconds,
            "tokens_per_second_per_gpu": rate,
            "samples_per_second": rows / seconds,
            "tflops": achieved / 1e12,
            "mfu": achieved / self.peak_flops if self.peak_flops else None,
            "hfu": hardware / self.peak_flops if self.peak_flops else None,
        }


class JsonLines:
    """An append-only file of JSON objects that each have a `step`; flushed line by line."""

    def __init__(self, path: Path, *, keep_until: int = 0) -> None:
        """Opens `path`; lines beyond step `keep_until` belong to a future that will be written anew, and go."""
        kept = [line for line in read_lines(path) if line["step"] <= keep_until]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # every line was flushed; one that a full disk refused was told of then
            self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JsonLines file; none where there is no file. A last line that a crash cut off is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
