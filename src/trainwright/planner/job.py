"""One training run as the estimates see it: recipe, model, layout, cluster, program, batch. No torch.

Owns how they are put together, from the very objects that training builds from, and what each pipeline stage holds.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from trainwright.model.config import AttentionConfig, BlockConfig, MlpConfig, ModelConfig, MoeConfig
from trainwright.parallel.layout import Layout, kv_heads_of_rank
from trainwright.parallel.split import PartCosts, RowSplit, choose_row_split, in_flight, stages_of_rank
from trainwright.planner.calibration import Calibration
from trainwright.planner.collectives import ranks_reached
from trainwright.planner.hardware import Cluster
from trainwright.planner.parameters import ModelParts, Parameter
from trainwright.planner.program import Program
from trainwright.recipe.schema import Recipe

Value = TypeVar("Value")


@dataclass(frozen=True)
class Stage:
    """What one pipeline rank holds. `in_flight`: micro batches whose activations it keeps at most."""

    index: int
    layers: tuple[int, ...]
    embedding: bool
    head: bool
    in_flight: float
    sharers: float = 1.0
    """Micro batches that share `recompute_memory`: as many as the schedule would keep of a long step."""


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
    model: ModelParts
    layout: Layout
    cluster: Cluster
    calibration: Calibration
    program: Program
    micro_batch: int
    accumulation: int
    clocked: PartCosts | None = None
    """Seconds of the parts, where training cuts its pipeline by the clock."""
    _known: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """What `make` gives, made once for this job: layers of one kind in all stages ask for the same."""
        if key not in self._known:
            self._known[key] = make()
        value: Value = self._known[key]
        return value

    @property
    def config(self) -> ModelConfig:
        return self.model.config

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
    def entering_tokens(self) -> int:
        """Tokens of what a layer's first products keep of their input."""
        return self.stream_tokens if self.program.gathers_again else self.tokens

    def rows_sent(self, part: MoeConfig) -> float:
        """Rows of one micro batch that a rank sends to the ranks of the experts, itself among them; in the mean as many
        come."""
        experts, chosen = part.experts.num_experts, part.top_k
        return self.tokens * (ranks_reached(experts, chosen, self.layout.ep) if self.program.rows_once else chosen)

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

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return self.model.parameters

    @property
    def by_layer(self) -> dict[int | None, tuple[Parameter, ...]]:
        return self.model.by_layer

    @property
    def kinds(self) -> dict[int, int]:
        return self.model.kinds

    def alike(self, stage: Stage) -> Hashable:
        """Equal for stages of which a rank holds and does the same."""
        kinds = tuple(self.kinds[layer] for layer in stage.layers)
        return kinds, stage.embedding, stage.head, stage.in_flight, stage.sharers

    def groups(self, stage: Stage) -> list[LayerGroup]:
        """The stage's layers by kind."""
        counts: dict[int, int] = {}
        for layer in stage.layers:
            counts[self.kinds[layer]] = counts.get(self.kinds[layer], 0) + 1
        return [LayerGroup(layer, count, self.by_layer.get(layer, ())) for layer, count in counts.items()]

    def outer(self, stage: Stage) -> tuple[Parameter, ...]:
        """Embedding, final norm and head, as far as the stage has them. A tied head's stage has the token table too; a
        rank with both ends of a pipeline (zbv) has it twice."""
        tied = self.config.lm_head.tied

        def here(item: Parameter) -> bool:
            if item.name.startswith(("norm.", "project_out.", "lm_head.")):
                return stage.head
            return stage.embedding or (tied and stage.head and item.name.startswith("embed_tokens."))

        found = tuple(item for item in self.by_layer[None] if here(item))
        if tied and self.layout.pp > 1 and stage.embedding and stage.head:
            found += tuple(item for item in found if item.name.startswith("embed_tokens."))
        return found

    @property
    def trained(self) -> frozenset[str]:
        """Names of what is trained."""
        return self.model.trained

    @cached_property
    def row_split(self) -> RowSplit:
        """How attention crosses the context parallel ranks, for the heads of one tensor parallel rank."""
        heads, kv = self.heads(self.config.layers[0].self_attn)
        return choose_row_split(heads, kv, self.layout.cp, self.recipe.parallel.cp_method)

    def heads(self, attention: AttentionConfig) -> tuple[int, int]:
        """(query heads, KV heads) of one tensor parallel rank; KV heads that do not divide are copied."""
        tp, kv = self.layout.tp, attention.num_kv_heads
        if kv % tp == 0:
            return attention.num_heads // tp, kv // tp
        return -(-attention.num_heads // tp), len(kv_heads_of_rank(attention.num_heads, kv, tp, 0))

    @property
    def fsdp(self) -> bool:
        """Whether weights are gathered from shards in the compute type: our own program on several processes, or with
        states in host memory."""
        return (self.layout.world_size > 1 or self.states_in_host) and self.program.weights_sharded_from == 1

    @property
    def experts_alone(self) -> bool:
        """Whether FSDP leaves a rank's experts out, which no other rank holds: they are cast where they are used."""
        layout = self.layout
        held_once = (
            self.program.experts_alone and layout.ep > 1 and layout.ep == self.shards and layout.dp_replicate == 1
        )
        return self.fsdp and held_once and layout.zero == 3 and layout.pp == 1 and not self.states_in_host

    def gates_apart(self, part: MlpConfig) -> bool:
        """Whether the MLP's gated product is an operation of its own."""
        return self.program.gated_apart and part.gate_proj is not None and part.activation == "silu"

    @property
    def copies(self) -> bool:
        """Whether copy engines move shards: those of ranks in one machine."""
        inside = self.shards * self.layout.tp <= self.cluster.gpus_per_node
        return self.program.copies and self.fsdp and self.shards > 1 and inside and self.layout.pp == 1

    @property
    def copies_reduce(self) -> bool:
        """Whether they bring gradients too: where each backward pass ends in a sum over ranks."""
        return self.copies and self.layout.zero >= 2

    @property
    def summed_once(self) -> bool:
        """Whether gradients are summed over ranks once a step: those of its micro batches are added up whole before."""
        return self.fsdp and (self.layout.zero <= 1 or self.layout.pp > 1)

    @property
    def states_in_host(self) -> bool:
        """Whether weights, gradients and optimizer states wait in host memory, where the update runs."""
        return self.recipe.parallel.offload in ("optimizer", "all")

    @property
    def activations_in_host(self) -> bool:
        return self.recipe.parallel.offload in ("activations", "all")

    @property
    def away(self) -> float:
        """The share of layers whose activations wait in host memory."""
        return self.recipe.parallel.offload_share if self.activations_in_host else 0.0

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """One a pipeline rank."""
        layout, parallel = self.layout, self.recipe.parallel
        if layout.pp == 1:
            return (Stage(0, tuple(range(self.config.num_layers)), True, True, 1),)
        owned = [stages_of_rank(rank, layout.pp, parallel.pp_schedule, parallel.pp_stages) for rank in range(layout.pp)]
        counts = tuple(parallel.pp_layers) if isinstance(parallel.pp_layers, list) else None
        costs = self.clocked or self.model.costs(self.seq_len, self.recompute)
        parts = self.model.split(costs, layout.pp * len(owned[0]), counts, len(owned[0]))
        return tuple(self._stage(rank, mine, parts) for rank, mine in enumerate(owned))

    def _stage(self, rank: int, mine: tuple[int, ...], parts: tuple[range, ...]) -> Stage:
        """A rank's stages, and how many micro batches wait in them at most, in units of all of them."""
        layers = tuple(layer for part in mine for layer in parts[part])
        most = in_flight(rank, self.layout.pp, self.recipe.parallel.pp_schedule, len(mine))
        return Stage(rank, layers, 0 in mine, len(parts) - 1 in mine, min(most, float(self.accumulation)), most)

    def block(self, layer: int) -> BlockConfig:
        return self.config.layers[layer]

    def is_trained(self, name: str) -> bool:
        return name in self.trained
