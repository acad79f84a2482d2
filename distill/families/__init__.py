"""One file a model family, named after its Hugging Face model_type, holding only what differs from the others."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from ...errors import ModelError

SUPPORTED = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def family_of(model_type: str) -> ModuleType:
    """The module of a family. Raises ModelError, naming the supported ones, for any other."""
    if model_type not in SUPPORTED:
        raise ModelError(f"the model type '{model_type}' is not supported; expected one of {', '.join(SUPPORTED)}")
    return importlib.import_module(f".{model_type}", __name__)
