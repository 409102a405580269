"""Tiny models of every family, adapted, for the tests of this folder."""

from pathlib import Path

import torch

from tests.golden import golden_dir
from trainwright.adapt.peft import adapters_of
from trainwright.adapt.rewrite import adapted_config
from trainwright.adapt.setup import freeze_base, start_adapters
from trainwright.model.checkpoint import load_config, load_weights
from trainwright.model.transformer import Transformer
from trainwright.recipe.model import AdapterRecipe


def adapter(**settings) -> AdapterRecipe:
    return AdapterRecipe(**({"rank": 4, "alpha": 8.0} | settings))


def adapted_model(
    folder: Path | str, recipe: AdapterRecipe, quantize=None, tables=None, family=None, trained=True
) -> Transformer:
    """The model of a folder with adapters that are not zero, in evaluation mode; `trained=False`: as they begin."""
    config = adapted_config(load_config(folder, family), recipe, quantize, tables)
    model = Transformer(config)
    load_weights(model, folder)
    start_adapters(model, seed=0)
    freeze_base(model)
    if not trained:
        return model.eval()
    generator = torch.Generator().manual_seed(1)
    for module in adapters_of(model).values():
        with torch.no_grad():
            module.lora_b.normal_(0, 0.05, generator=generator)
            if getattr(module, "magnitude", None) is not None:
                module.magnitude.mul_(torch.rand(module.magnitude.shape, generator=generator) + 0.5)
    return model.eval()


def golden_model(family: str, recipe: AdapterRecipe, **settings) -> Transformer:
    return adapted_model(golden_dir(family), recipe, family=family, **settings)
