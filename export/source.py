"""Reading the Hugging Face folder that is to be exported, and refusing one that is incomplete before anything is written."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging

from ..errors import ModelError
from ..files import read_json

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Source:
    """A vision-language model on the CPU in float32, its processor, and its family's module."""

    folder: Path
    model: Any
    processor: Any
    family: ModuleType
    preprocessing: dict[str, Any]

    @property
    def model_type(self) -> str:
        return str(self.model.config.model_type)

    def end_tokens(self) -> set[int]:
        """The ids that end an answer."""
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            ends = self.model.config.get_text_config().eos_token_id
        return {ends} if isinstance(ends, int) else set(ends or ())


def load_source(folder: Path) -> Source:
    """Load the folder. Raises ModelError, saying what is missing or wrong, for anything but a whole model of a supported family."""
    config = _read_config(folder)
    family = load_family(str(config.get("model_type")), config)
    check_weights(folder)
    _check_image_token(folder, family, config)
    try:
        processor = family.load_processor(folder)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"the processor in {folder} can't be loaded ({_first_line(error)}); save it again with processor.save_pretrained") from None
    model = _load_model(folder)
    return Source(folder, model, processor, family, family.preprocessing(model, processor))


def load_family(model_type: str, config: dict[str, Any] | None = None) -> ModuleType:
    """The family's module in export/families. Raises ModelError for a type that has none."""
    supported = families()
    if model_type not in supported:
        kind = "is no vision-language model" if config is not None and "vision_config" not in config else "is not supported"
        raise ModelError(f"the model_type '{model_type}' {kind}; expected one of {', '.join(supported)}")
    return importlib.import_module(f"{__package__}.families.{model_type}")


def families() -> tuple[str, ...]:
    """The model_types that can be exported, sorted."""
    return tuple(sorted(file.stem for file in (Path(__file__).parent / "families").glob("*.py") if file.stem != "__init__"))


def check_weights(folder: Path) -> None:
    """Raise ModelError unless every file of weights is here: one safetensors file, or an index with all its shards."""
    if (folder / INDEX).is_file():
        shards = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing or not shards:
            found = f"{len(missing)} of {len(shards)} shards are missing from {folder}, first {missing[0]}" if missing else f"{folder / INDEX} names no shard"
            raise ModelError(f"{found}; download or copy the model again")
    elif not (folder / "model.safetensors").is_file():
        raise ModelError(f"{folder} holds a config but no weights; expected model.safetensors or {INDEX} with its shards, download or copy the model again")


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModelError(f"no model folder at {folder}; expected a Hugging Face folder with config.json and weights")
    if not (folder / "config.json").is_file():
        raise ModelError(f"no config.json in {folder}; expected a Hugging Face folder, as written by save_pretrained")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ModelError(f"{folder / 'config.json'} holds no JSON object; expected a Hugging Face config, download or copy the model again")
    return config


def _check_image_token(folder: Path, family: ModuleType, config: dict[str, Any]) -> None:
    """The tokenizer as it stands in the folder: a processor would add a missing token silently, with an id that the model never learned."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"the tokenizer in {folder} can't be loaded ({_first_line(error)}); save it again with tokenizer.save_pretrained") from None
    expected, found = config.get("image_token_id"), tokenizer.get_vocab().get(family.IMAGE_TOKEN)
    if found is None or (expected is not None and found != expected):
        what = "lacks it" if found is None else f"gives it the id {found}"
        raise ModelError(
            f"the model's image token is '{family.IMAGE_TOKEN}' with id {expected}, the tokenizer in {folder} {what}; use the model's own tokenizer"
        )


def _load_model(folder: Path) -> Any:
    logging.disable_progress_bar()
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    except Exception as error:  # safetensors and transformers raise many kinds for a damaged file
        raise ModelError(f"the weights in {folder} can't be loaded ({_first_line(error)}); download or copy the model again") from None
    finally:
        logging.enable_progress_bar()
    # transformers fills what is missing with random numbers and a warning.
    wrong = sorted(report["missing_keys"]) or sorted(str(key) for key in report["mismatched_keys"])
    if wrong:
        raise ModelError(f"{len(wrong)} tensors of the model are missing from the weights in {folder} or have another shape, first {wrong[0]}; copy it again")
    return model.eval()


def _first_line(error: Exception) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]
