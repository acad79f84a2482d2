"""What the PyTorch model makes of an image file and a question, stage by stage: the truth that a bundle is held to."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.image_utils import load_image

from .source import Source

# Which kind each token of a prompt is of; follows from the ids, and no graph takes it.
TOKEN_MARKS = ("mm_token_type_ids",)


@dataclass(frozen=True)
class Prompt:
    """Images and question as the Hugging Face processor has them: ids int64 [S], the vision tower's inputs, and what else the model wants of the ids."""

    ids: np.ndarray
    pixels: dict[str, torch.Tensor]
    marks: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """The model's own numbers: features f32 [image tokens, D], embeddings of the ids f32 [S, D] before the features take their places,
    logits f32 [steps, V], tokens int64 [steps]; logits[0] belong to the prompt's last position and give tokens[0]."""

    name: str
    image: bytes
    question: str
    prompt: Prompt
    features: np.ndarray
    embeds: np.ndarray
    logits: np.ndarray
    tokens: np.ndarray


def encode(source: Source, question: str, images: Sequence[bytes | Path]) -> Prompt:
    """The processor's own way from image files to tensors."""
    with tempfile.TemporaryDirectory() as folder:
        opened = [load_image(str(_as_file(image, Path(folder) / str(number)))) for number, image in enumerate(images)]
    content = [*({"type": "image", "image": image} for image in opened), {"type": "text", "text": question}]
    encoded = source.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = encoded.pop("input_ids")[0].numpy()
    tensors = {name: value for name, value in encoded.items() if isinstance(value, torch.Tensor) and name != "attention_mask"}
    marks = {name: tensors.pop(name) for name in TOKEN_MARKS if name in tensors}
    return Prompt(ids, tensors, marks)


def refer(source: Source, name: str, image: bytes, question: str, prompt: Prompt, steps: int) -> Reference:
    """Run the model on an encoded prompt with one image, for up to `steps` tokens."""
    with torch.no_grad(), _tower_once(source.model.model):
        features = source.family.image_features(source.model, prompt.pixels).numpy()
        tokens, logits = greedy(source, prompt, steps)
        embeds = source.model.get_input_embeddings()(torch.from_numpy(prompt.ids)).numpy()
    # A row may go on behind the embedding, with zeros for text.
    embeds = np.pad(embeds, ((0, 0), (0, features.shape[-1] - embeds.shape[-1])))
    return Reference(name, image, question, prompt, features, embeds, logits, tokens)


@contextmanager
def _tower_once(model: Any) -> Iterator[None]:
    """Within, the features of one prompt's images are computed once: of a large model they take most of the time, and generation asks for them again."""
    compute = model.get_image_features
    found: list[Any] = []

    def remembered(*inputs: Any, **options: Any) -> Any:
        if not found:
            found.append(compute(*inputs, **options))
        return found[0]

    model.get_image_features = remembered
    try:
        yield
    finally:
        del model.get_image_features


def greedy(source: Source, prompt: Prompt, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `steps` greedy tokens int64 [n], the end token included where the model gives one, and the logits f32 [n, V] that chose them."""
    ends = source.end_tokens()
    if hasattr(source.model.model, "rope_deltas"):
        source.model.model.rope_deltas = None  # the last prompt's, by which a prompt without images would be placed
    tokens: list[int] = []
    logits: list[np.ndarray] = []
    ids, pixels, cache = torch.from_numpy(prompt.ids)[None], prompt.pixels | prompt.marks, None
    with torch.no_grad():
        while len(tokens) < steps and not (tokens and tokens[-1] in ends):
            out = source.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **pixels)
            logits.append(out.logits[0, -1].float().numpy())
            tokens.append(int(logits[-1].argmax()))
            ids, pixels, cache = torch.tensor([[tokens[-1]]]), {}, out.past_key_values
    return np.array(tokens, np.int64), np.stack(logits)


def _as_file(image: bytes | Path, place: Path) -> Path:
    if isinstance(image, Path):
        return image
    place.write_bytes(image)
    return place
