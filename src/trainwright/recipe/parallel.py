"""Where it is trained: the `parallel` key of a recipe. Degrees only; `parallel/layout.py` does the arithmetic."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainwright.recipe.strict import Section


class ParallelRecipe(Section):
    """Degrees of each kind of parallelism. What is left of the GPUs is data parallel."""

    dp_replicate: int = Field(1, ge=1, description="groups that hold a whole copy; shards live inside a group")
    zero: Literal[0, 1, 2, 3] = Field(3, description="what data ranks shard: 1 optimizer, 2 + gradients, 3 + weights")
    fsdp_transport: Literal["auto", "nccl", "copy"] = Field(
        "auto", description="what moves shards inside a machine: NCCL's kernels, or the GPUs' copy engines"
    )
    tp: int = Field(1, ge=1, description="tensor parallel degree, with sequence-parallel norms")
    async_tp: bool = Field(False, description="overlap tp's exchanges with products (GPUs of one machine)")
    cp: int = Field(1, ge=1, description="context parallel degree: a sequence split over GPUs")
    cp_method: Literal["auto", "ulysses", "ring"] = Field("auto", description="how attention crosses the split")
    pp: int = Field(1, ge=1, description="pipeline stages")
    pp_schedule: Literal["1f1b", "interleaved", "zbv"] = Field("1f1b", description="order of micro batches")
    pp_stages: int = Field(2, ge=2, description="interleaved: stages of a rank")
    pp_layers: list[int] | Literal["auto", "estimated", "measured"] = Field(
        "auto", description="layers of each stage, or their costs: by FLOPs, or by the clock (auto: on accelerators)"
    )
    ep: int = Field(1, ge=1, description="expert parallel degree, inside the data ranks")
    recompute: Literal["none", "selective", "full"] = Field("none", description="activations computed again backward")
    recompute_memory: float | None = Field(
        None, ge=0, description="selective: GiB that kept results of a rank may take; empty keeps all dear ones"
    )
    mlp_tokens: int | None = Field(
        None, ge=1, description="tokens that pass an MLP at once, for rows whose MLP is most of a layer's memory"
    )
    offload: Literal["none", "optimizer", "activations", "all"] = Field(
        "none", description="what waits in host memory; optimizer: masters and gradients too, and the update runs there"
    )
    offload_share: float = Field(
        1.0, gt=0, le=1, description="activations: this share of the layers, so that the copies hide behind computation"
    )
    kv_replication: bool = Field(True, description="copy KV heads when tp does not divide them; false refuses")
    timeout_minutes: float = Field(10.0, gt=0, description="a collective that hangs longer ends the run")
