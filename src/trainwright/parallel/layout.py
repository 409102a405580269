"""Degrees of parallelism over a world of processes, and the batch arithmetic. No torch.

Owns the divisibility checks of degrees, rows and models, and says the numbers and the nearest layout that works when it
refuses.
Building a device mesh from a layout is `mesh.py`'s work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trainwright.errors import UserError
from trainwright.model.config import ExpertsConfig, MlpConfig, ModelConfig, MoeConfig, linears
from trainwright.recipe.parallel import ParallelRecipe


@dataclass(frozen=True)
class Layout:
    """How `world_size` processes share the work. Axes, outermost first: pp, dp_replicate, dp_shard, cp, tp.

    `ep` divides dp_shard × cp: experts live on the ranks that share the batch.
    """

    world_size: int = 1
    pp: int = 1
    dp_replicate: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    zero: int = 3

    def __post_init__(self) -> None:
        fixed = self.pp * self.dp_replicate * self.cp * self.tp
        if self.world_size % fixed:
            lower = max(n for n in range(1, self.world_size + 1) if fixed % n == 0 and self.world_size % n == 0)
            raise UserError(
                f"pp={self.pp} x dp_replicate={self.dp_replicate} x cp={self.cp} x tp={self.tp} = {fixed} processes "
                f"do not divide the {self.world_size} there are: use a product that divides {self.world_size} "
                f"(such as {lower}), or start a multiple of {fixed}"
            )
        if (self.dp_shard * self.cp) % self.ep:
            raise UserError(
                f"parallel.ep={self.ep} does not divide dp_shard x cp = {self.dp_shard * self.cp}: use a divisor"
            )

    @classmethod
    def of(cls, recipe: ParallelRecipe, world_size: int) -> Layout:
        """The layout that a recipe asks of `world_size` processes."""
        degrees = {name: getattr(recipe, name) for name in ("pp", "dp_replicate", "cp", "tp", "ep", "zero")}
        return cls(world_size=world_size, **degrees)

    @property
    def dp_shard(self) -> int:
        """Data ranks that share shards: what the other axes leave."""
        return self.world_size // (self.pp * self.dp_replicate * self.cp * self.tp)

    @property
    def data_ranks(self) -> int:
        """Ranks that read different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def row_copies(self) -> int:
        """Processes that read the same rows."""
        return self.pp * self.cp * self.tp

    @property
    def token_copies(self) -> int:
        """Processes that see the same tokens' losses."""
        return self.tp

    def accumulation(self, micro_batch_size: int, global_batch_size: int | None, steps: int | None) -> int:
        """Micro batches of one rank in one optimizer step.

        Global batch = micro batch x accumulation x data ranks.
        """
        if global_batch_size is None:
            return steps or 1
        rows = micro_batch_size * self.data_ranks
        if global_batch_size % rows:
            nearest = max(rows, round(global_batch_size / rows) * rows)
            raise UserError(
                f"train.global_batch_size={global_batch_size} is not a multiple of micro_batch_size={micro_batch_size} "
                f"x {self.data_ranks} data ranks = {rows}: use {nearest}"
            )
        return global_batch_size // rows

    def __str__(self) -> str:
        """The published tables' spelling: TP4PP1DP2."""
        extra = (f"CP{self.cp}" if self.cp > 1 else "") + (f"EP{self.ep}" if self.ep > 1 else "")
        return f"TP{self.tp}PP{self.pp}DP{self.data_ranks}{extra}"


def check_model(layout: Layout, config: ModelConfig, seq_len: int, *, kv_replication: bool = True) -> None:
    """Raises UserError where this model cannot be spread like this, with the nearest degree that can."""
    if layout.tp > 1:
        _check_tensor(layout, config, kv_replication)
        if seq_len % (layout.tp * layout.cp):
            unit = layout.tp * layout.cp
            raise UserError(
                f"data.seq_len={seq_len} is not a multiple of cp x tp = {layout.cp} x {layout.tp} = {unit}: "
                f"use {max(unit, round(seq_len / unit) * unit)}"
            )
    if layout.ep > 1:
        experts = {block.mlp.experts.num_experts for block in config.layers if isinstance(block.mlp, MoeConfig)}
        if not experts:
            raise UserError(f"parallel.ep={layout.ep}: this model has no experts: set parallel.ep=1")
        if any(count % layout.ep for count in experts):
            nearest = _nearest(layout.ep, layout.dp_shard * layout.cp, lambda ep: all(n % ep == 0 for n in experts))
            counts = " and ".join(map(str, sorted(experts)))
            raise UserError(f"parallel.ep={layout.ep} does not divide {counts} experts: use parallel.ep={nearest}")


def _check_tensor(layout: Layout, config: ModelConfig, kv_replication: bool) -> None:
    """Heads and widths must divide; KV heads are copied; the vocabulary may end unevenly."""
    tp, free = layout.tp, layout.world_size // (layout.pp * layout.dp_replicate * layout.cp)
    sizes = _divisible_sizes(config)
    for size, what in sizes:
        if size % tp:
            nearest = _nearest(tp, free, lambda degree: all(n % degree == 0 for n, _ in sizes))
            raise UserError(f"parallel.tp={tp} does not divide {size} {what}: use parallel.tp={nearest}")
    kv = min((block.self_attn.num_kv_heads for block in config.layers), default=tp)
    if kv % tp and not kv_replication:
        raise UserError(
            f"parallel.tp={tp} does not divide {kv} KV heads and parallel.kv_replication=false refuses to copy them: "
            f"use parallel.tp={_nearest(tp, free, lambda degree: kv % degree == 0)}, or set it to true"
        )
    if (tp - 1) * -(-config.vocab_size // tp) >= config.vocab_size:
        raise UserError(f"parallel.tp={tp} is too much for a vocabulary of {config.vocab_size}: use a smaller degree")
    _check_blocks(tp, free, config)


def _check_blocks(tp: int, free: int, config: ModelConfig) -> None:
    """Where columns are cut, weights that share a scale go to one rank."""
    leaves = ((path, leaf) for path, leaf in linears(config) if path.endswith((".o_proj", ".down_proj")))
    cut = {(leaf.in_features, leaf.quantization.block): path for path, leaf in leaves if leaf.quantization}
    for (width, block), path in cut.items():
        if width % (tp * block):
            nearest = _nearest(tp, free, lambda degree: degree == 1 or not any(n % (degree * b) for n, b in cut))
            raise UserError(
                f"parallel.tp={tp} cuts the {width} columns of {path} inside blocks of {block} nf4 weights: use "
                f"parallel.tp={nearest}, or quantize=int8"
            )


def _divisible_sizes(config: ModelConfig) -> list[tuple[int, str]]:
    sizes: dict[tuple[int, str], None] = {}
    for block in config.layers:
        sizes[(block.self_attn.num_heads, "attention heads")] = None
        mlp: MlpConfig | ExpertsConfig = block.mlp.experts if isinstance(block.mlp, MoeConfig) else block.mlp
        sizes[(mlp.intermediate_size, "columns of the MLP (intermediate_size)")] = None
    return list(sizes)


def _nearest(degree: int, limit: int, works: Callable[[int], bool]) -> int:
    """The degree nearest to the one asked for that divides `limit` processes and works; 1 always does."""
    return min((n for n in range(1, limit + 1) if limit % n == 0 and works(n)), key=lambda n: (abs(n - degree), n))


def kv_heads_of_rank(num_heads: int, num_kv_heads: int, tp: int, rank: int) -> list[int]:
    """The KV heads that a tp rank's query heads read, in their order.

    One each where its query heads share them evenly; else one for every query head.
    """
    own = range(rank * num_heads // tp, (rank + 1) * num_heads // tp)
    read = [head // (num_heads // num_kv_heads) for head in own]
    distinct = sorted(set(read))
    return distinct if len({read.count(head) for head in distinct}) == 1 else read


def shared_bytes(size: int) -> int:
    """Of the buffer that peers read so many bytes from: eight sizes between two powers of two, so that an embedding and
    a head with its norm come to the same."""
    step = max(16, 1 << max(0, (size - 1).bit_length() - 4))
    return -(-size // step) * step
