"""One training run as the estimates see it: recipe, model, layout, cluster, program, batch. No torch.

Owns how they are put together, from the very objects that training builds from, and what each pipeline stage holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from trainwright.model.config import BlockConfig, ModelConfig
from trainwright.parallel.layout import Layout
from trainwright.parallel.split import RowSplit, choose_row_split, estimate_costs, split_layers
from trainwright.planner.calibration import Calibration
from trainwright.planner.hardware import Cluster
from trainwright.planner.parameters import Parameter, parameters
from trainwright.planner.program import Program
from trainwright.recipe.schema import Recipe


@dataclass(frozen=True)
class Stage:
    """What one pipeline rank holds. `in_flight`: micro batches whose activations it keeps at most."""

    index: int
    layers: tuple[int, ...]
    embedding: bool
    head: bool
    in_flight: float


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one shape in a stage: what is counted for one holds for all."""

    layer: int
    count: int
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class Job:
    """Everything that memory and time depend on. `accumulation`: micro batches of a rank in one optimizer step."""

    recipe: Recipe
    config: ModelConfig
    layout: Layout
    cluster: Cluster
    calibration: Calibration
    program: Program
    micro_batch: int
    accumulation: int

    @property
    def seq_len(self) -> int:
        return self.recipe.data.seq_len

    @property
    def tokens(self) -> int:
        """Tokens of one micro batch that one rank sees."""
        return self.micro_batch * self.seq_len // self.layout.cp

    @property
    def stream_tokens(self) -> int:
        """The same where tensor parallel ranks share out the stream and the norms."""
        return self.tokens // self.layout.tp if self.program.sequence_parallel else self.tokens

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.layout.data_ranks

    @property
    def recompute(self) -> str:
        return self.recipe.parallel.recompute

    @property
    def shards(self) -> int:
        """Ranks that share one copy of what is sharded."""
        return self.layout.dp_shard * self.layout.cp if self.layout.zero else 1

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        return parameters(self.config, tuple(self.recipe.model.frozen))

    @cached_property
    def by_layer(self) -> dict[int | None, tuple[Parameter, ...]]:
        """Parameters of each layer; None: those outside of the layers."""
        found: dict[int | None, list[Parameter]] = {None: []}
        for item in self.parameters:
            found.setdefault(item.layer, []).append(item)
        return {layer: tuple(items) for layer, items in found.items()}

    @cached_property
    def kinds(self) -> dict[int, int]:
        """Layer -> the first layer that is like it in shape and in what is trained."""
        first: dict[tuple[object, ...], int] = {}
        found = {}
        for layer, block in enumerate(self.config.layers):
            key = (block, tuple(item.trained for item in self.by_layer.get(layer, ())))
            found[layer] = first.setdefault(key, layer)
        return found

    def groups(self, stage: Stage) -> list[LayerGroup]:
        """The stage's layers by kind."""
        counts: dict[int, int] = {}
        for layer in stage.layers:
            counts[self.kinds[layer]] = counts.get(self.kinds[layer], 0) + 1
        return [LayerGroup(layer, count, self.by_layer.get(layer, ())) for layer, count in counts.items()]

    def outer(self, stage: Stage) -> tuple[Parameter, ...]:
        """Embedding, final norm and head, as far as the stage has them. A tied head's stage has the token table too."""
        tied = self.config.lm_head.tied

        def here(item: Parameter) -> bool:
            if item.name.startswith(("norm.", "project_out.", "lm_head.")):
                return stage.head
            return stage.embedding or (tied and stage.head and item.name.startswith("embed_tokens."))

        return tuple(item for item in self.by_layer[None] if here(item))

    @cached_property
    def trained(self) -> frozenset[str]:
        """Names of what is trained."""
        return frozenset(item.name for item in self.parameters if item.trained)

    @cached_property
    def row_split(self) -> RowSplit:
        """How attention crosses the context parallel ranks, for the heads of one tensor parallel rank."""
        attention = self.config.layers[0].self_attn
        tp = self.layout.tp
        heads, kv = -(-attention.num_heads // tp), -(-attention.num_kv_heads // tp)
        return choose_row_split(heads, kv, self.layout.cp, self.recipe.parallel.cp_method)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """One a pipeline rank."""
        pp, schedule = self.layout.pp, self.recipe.parallel.pp_schedule
        if pp == 1:
            return (Stage(0, tuple(range(self.config.num_layers)), True, True, 1),)
        chunks = 1 if schedule == "1f1b" else 2
        parts = _split(self.config, self.seq_len, self.recompute, pp * chunks)
        return tuple(self._stage(rank, parts, chunks) for rank in range(pp))

    def _stage(self, rank: int, parts: tuple[range, ...], chunks: int) -> Stage:
        pp, last = self.layout.pp, len(parts) - 1
        if chunks == 1:
            mine, in_flight = [rank], float(pp - rank)
        elif self.recipe.parallel.pp_schedule == "zbv":  # there and back: rank 0 has the first and the last
            mine, in_flight = [rank, last - rank], float(pp)
        else:  # round and round (Narayanan et al. 2021, section 2.2)
            mine, in_flight = [rank, rank + pp], ((pp - rank - 1) * 2 + pp + 1) / chunks
        layers = tuple(layer for part in mine for layer in parts[part])
        return Stage(rank, layers, 0 in mine, last in mine, min(in_flight, float(self.accumulation)))

    def block(self, layer: int) -> BlockConfig:
        return self.config.layers[layer]

    def is_trained(self, name: str) -> bool:
        return name in self.trained

    def changed(self, **changes: object) -> Job:
        return replace(self, **changes)  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def _split(config: ModelConfig, seq_len: int, recompute: str, stages: int) -> tuple[range, ...]:
    """The layers of each stage, as training splits them."""
    return split_layers(estimate_costs(config, seq_len, recompute), stages)
