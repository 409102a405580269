"""The recipe: everything a user asks for, in one typed tree. No torch.

Sections live in `model.py`, `data.py`, `train.py`, `parallel.py`; this file joins them and checks across them.
Reading files, inheritance and overrides are in `load.py`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trainwright.recipe.data import DataRecipe
from trainwright.recipe.model import AdapterRecipe, ModelRecipe, Quantization
from trainwright.recipe.parallel import ParallelRecipe
from trainwright.recipe.strict import Section
from trainwright.recipe.train import CheckpointRecipe, EvaluationRecipe, TrackingRecipe, TrainRecipe


class Recipe(Section):
    """One training run."""

    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200, description="names the run's folder"
    )
    description: str = Field("", description="one line for `trainwright recipes`")
    task: Literal["pretrain", "sft"] = Field("sft", description="pretrain: every token; sft: the answers")
    model: ModelRecipe = Field(description="what is trained")
    adapter: AdapterRecipe | None = Field(None, description="train a small part beside frozen weights")
    quantize: Quantization | None = Field(None, description="frozen weights in 4 or 8 bits; needs an adapter")
    quantize_tables: Quantization | None = Field(None, description="the same for token table and head")
    data: DataRecipe = Field(description="what it is trained on")
    train: TrainRecipe = Field(description="how it is trained")
    parallel: ParallelRecipe = Field(default_factory=ParallelRecipe, description="where it is trained")
    evaluation: EvaluationRecipe = Field(default_factory=EvaluationRecipe, description="held-out checks")
    checkpoint: CheckpointRecipe = Field(default_factory=CheckpointRecipe, description="what is kept")
    tracking: TrackingRecipe = Field(default_factory=TrackingRecipe, description="where figures go")
    output: str = Field("runs", description="folder that holds the run's folder")

    @model_validator(mode="after")
    def _across_sections(self) -> Recipe:
        for key in ("quantize", "quantize_tables"):
            if getattr(self, key) is not None and self.adapter is None:
                raise ValueError(f"{key}={getattr(self, key)} freezes the weights: add an adapter, or drop {key}")
        if self.adapter is not None and self.adapter.init == "loftq" and self.quantize is None:
            raise ValueError("adapter.init=loftq makes up for what rounding the base lost: set quantize, or use pissa")
        if self.task == "pretrain" and self.evaluation.generate:
            raise ValueError("evaluation.generate asks questions, which pretrain data has not: set it to 0")
        parallel = self.parallel
        if self.train.optimizer_in_backward:
            split = next(
                (f"{axis}={getattr(parallel, axis)}" for axis in ("tp", "pp") if getattr(parallel, axis) > 1), None
            )
            where = split or (f"offload={parallel.offload}" if parallel.offload in ("optimizer", "all") else None)
            if where:
                raise ValueError(
                    f"train.optimizer_in_backward=true, and parallel.{where} completes or moves gradients after the "
                    "backward pass: leave one of them out"
                )
        if self.data.seq_len % (parallel.cp * 2) and parallel.cp > 1:
            raise ValueError(
                f"data.seq_len={self.data.seq_len} does not split over parallel.cp={parallel.cp} balanced ranks: "
                f"use a multiple of {parallel.cp * 2}"
            )
        return self
