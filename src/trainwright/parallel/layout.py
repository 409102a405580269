"""Degrees of parallelism over a world of processes, and the batch arithmetic. No torch.

Owns the divisibility checks, and says the numbers and the nearest layout that works when it refuses.
Building a device mesh from a layout is `mesh.py`'s work.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainwright.errors import UserError
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
