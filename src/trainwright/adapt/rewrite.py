"""From the recipe's `adapter` and `quantize` keys to a rewritten config tree, in one call. No torch.

Training builds from the result and the planner counts it, so both see the same adapters and formats.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trainwright.adapt.files import stored_adapters
from trainwright.adapt.lora import Lora, add_adapters
from trainwright.adapt.published import linear_groups, published_names
from trainwright.adapt.quantize import Kind, add_quantization
from trainwright.errors import UserError
from trainwright.model.config import ModelConfig, linears
from trainwright.recipe.model import AdapterRecipe


def adapted_config(
    config: ModelConfig, adapter: AdapterRecipe | None, quantize: Kind | None = None, tables: Kind | None = None
) -> ModelConfig:
    """`config` with weights in fewer bits and adapters beside them; unchanged where the recipe names neither.

    With `adapter.path`, adapters are where that folder has them, with its ranks and scales.
    """
    config = add_quantization(config, quantize, tables)
    if adapter is None:
        return config
    lora = Lora(adapter.rank, adapter.alpha, adapter.dropout, adapter.rslora, adapter.dora, adapter.init)
    if adapter.path is not None:
        stored = stored_adapters(Path(adapter.path), config)
        found = {path: replace(item, dropout=adapter.dropout) for path, item in stored.items()}
        return check(add_adapters(config, lora, [], overrides=found), stored=True)
    return check(add_adapters(config, lora, adapter.targets, aliases=published_names(config)))


def check(config: ModelConfig, *, stored: bool = False) -> ModelConfig:
    """Raises UserError for adapters that cannot be. One that is `stored` has the rank that it has."""
    for path, linear in linears(config):
        lora = linear.adapter
        if isinstance(lora, Lora) and lora.dora and ".experts." in path:
            raise UserError(f"adapter.dora: {path} is a stack of experts, which DoRA does not adapt: set dora=false")
        widest = min(linear.in_features, linear.out_features)
        if isinstance(lora, Lora) and lora.rank > widest and not stored:
            raise UserError(
                f"adapter.rank={lora.rank} is more than {path} is wide ({linear.in_features} x {linear.out_features}): "
                f"use at most {widest}, or leave it out of adapter.targets"
            )
    leaves = dict(linears(config))
    for group in linear_groups(config):
        loras = [leaves[path].adapter for path in group.ours]
        if None in loras and any(isinstance(lora, Lora) and lora.dora for lora in loras):
            raise UserError(
                f"adapter.dora: {', '.join(group.ours)} are one module, {group.theirs[0]}, in the published model, and "
                "DoRA adapts all of it or none: name all of them in adapter.targets"
            )
    return config
