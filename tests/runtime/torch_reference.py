"""The PyTorch model behind a bundle, asked as transformers' documentation says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from masters.runtime.chat import Message, user_message


@dataclass(frozen=True)
class Torch:
    """The model and its processor."""

    model: Any
    processor: Any

    def inputs(self, messages: Sequence[Message], images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        return dict(self.processor(text=prompt, images=[list(images)] if images else None, return_tensors="pt"))

    @torch.no_grad()
    def generate(self, question: str, images: Sequence[Image.Image] = (), tokens: int = 24, **options: Any) -> list[int]:
        inputs = self.inputs([user_message(question, len(images))], images)
        made = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **options)
        return [int(token) for token in made[0, inputs["input_ids"].shape[1] :]]

    @torch.no_grad()
    def logits(self, messages: Sequence[Message], images: Sequence[Image.Image]) -> np.ndarray:
        return np.asarray(self.model(**self.inputs(messages, images)).logits[0, -1])


def picture(seed: int, width: int = 50, height: int = 80) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))
