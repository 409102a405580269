"""The training room. `trainwright.train(recipe)` is its front door: the package itself can be called.

A function and a sub-package of one name cannot both be attributes of `trainwright`, so the package carries the call.
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from trainwright.train.trainer import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
