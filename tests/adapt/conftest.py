"""What the tests of this folder share."""

import pytest

from tests.train.small import small_recipe
from trainwright.train.trainer import train


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with the small model's weights and tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    result = train(small_recipe(folder, "train.steps=60"))
    return result.model
