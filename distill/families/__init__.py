"""One file a model family, named after its Hugging Face model_type, holding only what differs from the others; default.py for the rest."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from transformers import MODEL_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ...errors import ModelError
from . import default

SUPPORTED = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "default"))


def family_of(model_type: str) -> ModuleType:
    """The module of a family, the default rules for one without a file. Raises ModelError for what is no vision-language model."""
    if model_type in SUPPORTED:
        return importlib.import_module(f".{model_type}", __name__)
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return default
    raise ModelError(
        f"the model type '{model_type}' is not supported; expected one of {', '.join(SUPPORTED)}, or another vision-language model of transformers"
    )


def check_config(config: Any) -> None:
    """Raise ModelError, naming what is missing, if no family's rules fit a model of this configuration."""
    if family_of(config.model_type) is not default:
        return
    text = config.get_text_config()
    if text is config:
        raise ModelError(
            f"the model type '{config.model_type}' has no 'text_config', so its language model is not known; expected one of {', '.join(SUPPORTED)}"
        )
    if hasattr(MODEL_MAPPING.get(type(config), None), "get_rope_index"):
        raise ModelError(f"the model type '{config.model_type}' has positions of several axes, known for {', '.join(SUPPORTED)} alone; expected one of these")


def shares_prompts(config: Any) -> bool:
    """Whether one prompt can stand before several responses: every layer must let a mask decide what a token sees.

    A recurrent layer carries one response's state into the next, and a sliding window counts tokens that are not a response's own.
    """
    return all(kind == "full_attention" for kind in getattr(config.get_text_config(), "layer_types", None) or ())
