"""The base of every recipe section: frozen, and strict about keys."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a recipe. An unknown key is an error; `load.py` turns it into one line that names the nearest key."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())
