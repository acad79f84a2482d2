"""SmolVLM: its weights, masks, tiles and prompts follow Idefics3's rules; only the names of its classes differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, Idefics3Processor

from ...files import read_json
from .idefics3 import IMAGE_TOKEN, INPUTS, image_features, preprocessing, text_parts, vision_example, vision_module, vision_parts

__all__ = ["IMAGE_TOKEN", "INPUTS", "image_features", "load_processor", "preprocessing", "text_parts", "vision_example", "vision_module", "vision_parts"]


def load_processor(folder: Path) -> Any:
    """SmolVLM's image processor and tokenizer in Idefics3's processor, which writes the same prompts for images.

    SmolVLM's own also reads videos, and can't be built without torchvision and num2words for that alone.
    """
    settings = read_json(folder / "processor_config.json") if (folder / "processor_config.json").is_file() else {}
    template = folder / "chat_template.jinja"
    return Idefics3Processor(
        AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True),
        AutoTokenizer.from_pretrained(folder, local_files_only=True),
        image_seq_len=settings.get("image_seq_len", 64),
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
    )
