"""mmrep: any kind of data in one embedding space.

Public names are imported when they are first used (PEP 562): importing mmrep costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmrep.embed.index import Index as Index
    from mmrep.embed.search import open_search as open_search
    from mmrep.encoder import BadSampleError as BadSampleError
    from mmrep.encoder import Encoder as Encoder
    from mmrep.hub.load import load as load
    from mmrep.model import Model as Model
    from mmrep.model import ModelConfig as ModelConfig
    from mmrep.recipe import read_recipe as read_recipe
    from mmrep.recipe import recipe_names as recipe_names
    from mmrep.run import Run as Run
    from mmrep.run import open_run as open_run

__version__ = "0.1.0"

_PUBLIC = {
    "BadSampleError": "mmrep.encoder",
    "Encoder": "mmrep.encoder",
    "Index": "mmrep.embed.index",
    "Model": "mmrep.model",
    "ModelConfig": "mmrep.model",
    "Run": "mmrep.run",
    "load": "mmrep.hub.load",
    "open_search": "mmrep.embed.search",
    "open_run": "mmrep.run",
    "read_recipe": "mmrep.recipe",
    "recipe_names": "mmrep.recipe",
}

__all__ = ["__version__", "list_encoders", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]


def list_encoders(pattern: str = "*") -> list[str]:
    """Names of the registered encoders that match a shell pattern; imports none of them."""
    from mmrep.registry import encoders

    return encoders.names(pattern)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    from mmrep.registry import near

    raise AttributeError(f"module 'mmrep' has no attribute {name!r}{near(name, __all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
