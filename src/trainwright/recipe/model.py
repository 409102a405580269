"""What is trained: the `model`, `adapter` and `quantize` keys of a recipe. No torch."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from trainwright.recipe.strict import Section


class ModelRecipe(Section):
    """Weights from `path`, or random weights of the shape `config`."""

    path: str | None = Field(
        None, description="folder with config.json and safetensors, or a hub id: hf:owner/name, modelscope:owner/name"
    )
    config: str | dict[str, Any] | None = Field(
        None, description="random weights: a named model (`trainwright models`), a config.json, or its keys inline"
    )
    family: str | None = Field(None, description="says the family outright where config.json cannot tell")
    tokenizer: str | None = Field(
        None, description="tokenizer folder, file, hub id, or `byte`; default: the model's own"
    )
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="config.json keys to change, for example num_hidden_layers: 2"
    )
    attention: Literal["auto", "cudnn", "flash", "sdpa", "eager"] = Field(
        "auto",
        description="attention backend; auto takes the fastest that this device has; flash: FA3 or FA4 where installed",
    )
    frozen: list[str] = Field(default_factory=list, description="parameters that stay fixed: name patterns with *")

    @model_validator(mode="after")
    def _one_source(self) -> ModelRecipe:
        if (self.path is None) == (self.config is None):
            raise ValueError("model needs exactly one of `path` (trained weights) and `config` (random weights)")
        return self


PLAIN_STARTS = ("kaiming", "gaussian")
"""Starts of an adapter that leave the base alone: A random, B zero."""
STARTS = r"kaiming|gaussian|pissa(_niter_[0-9]+)?|olora|loftq"


class AdapterRecipe(Section):
    """A small trained part beside frozen weights."""

    kind: Literal["lora"] = Field("lora", description="low-rank adapters (Hu et al. 2021)")
    rank: int = Field(16, ge=1, description="rank of the two small matrices")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    targets: str | list[str] = Field(
        "all-linear", description="all-linear, module names (ours or the published ones), or patterns with *"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) (Kalajdzievski 2023)")
    dora: bool = Field(False, description="train magnitude and direction apart (Liu et al. 2024)")
    init: str = Field(
        "kaiming",
        description="how A and B start: kaiming or gaussian, with B at zero; pissa, pissa_niter_N or olora, as a part "
        "that leaves the base; loftq, as what rounding the base lost",
    )
    path: str | None = Field(None, description="go on from an adapter folder in PEFT's format")

    @model_validator(mode="after")
    def _known_start(self) -> AdapterRecipe:
        if not re.fullmatch(STARTS, self.init):
            raise ValueError(
                f"adapter.init={self.init} is no start: use kaiming, gaussian, pissa, pissa_niter_N with a number of "
                "iterations (4 to 16), olora, or loftq"
            )
        if self.path is not None and self.from_base:
            raise ValueError(f"adapter.init={self.init} makes a new start, adapter.path goes on: leave one out")
        return self

    @property
    def from_base(self) -> bool:
        """Whether A and B begin as a part of the base."""
        return self.init not in PLAIN_STARTS


Quantization = Literal["nf4", "int8", "fp8"]
