"""From a sample to what a model reads: prompt ids, image tensors, answer ids; and from several of them to one batch.

Teacher and student read the same prompts through the same encoder, so that no template, image or truncation can differ between them. Where their towers
cut images into other tiles, each has an encoder of its own, and models.py proves that text and images are the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, LengthError, ModelError
from ..images import open_image
from ..samples import Sample

Pixels = dict[str, Tensor]
CollatePixels = Callable[[Sequence[Pixels]], Pixels]
Positions = Callable[[Tensor, Pixels, Any], Tensor]  # of ids, image tensors and the processor


@dataclass(frozen=True)
class Prompt:
    """One encoded question: `ids` int64 [P], ending where the answer begins, and the image processor's tensors for its images."""

    ids: Tensor
    pixels: Pixels
    positions: Tensor | None = None  # int64 [P] or, in A axes, [A, P]; None: 0, 1, 2 …
    shown: str = ""  # what its images are known by: the same if they are; '' where nobody has looked

    @property
    def places(self) -> Tensor:
        """The rotary position of every token, [P] or [A, P]."""
        return torch.arange(len(self.ids)) if self.positions is None else self.positions

    @property
    def pictured(self) -> bool:
        """Whether it has an image: some processors give a tensor that tells kinds of tokens for text, too."""
        return any(t.is_floating_point() for t in self.pixels.values())

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.ids, self.places, *self.pixels.values()))


class Encoder:
    """Encodes samples with a Hugging Face processor, remembering the latest prompts up to `cache_bytes`.

    `positions` is a family's rule for the rotary positions of a prompt; without it they are 0, 1, 2 …
    """

    def __init__(self, processor: Any, longest: int = 4096, cache_bytes: int = 1 << 30, positions: Positions | None = None) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.longest, self.positions = longest, positions
        self.eos = int(self.tokenizer.eos_token_id)
        self.pad = int(self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eos)
        # Rows of a head past the vocabulary are padding, of which two models of one family may have different numbers.
        self.vocabulary = 1 + max(self.tokenizer.get_vocab().values())
        # An answer must not hold them: a model would look for an image behind each.
        self.image_tokens = [int(i) for i in (getattr(processor, f"{kind}_token_id", None) for kind in ("image", "video")) if i is not None]
        self.before_answer = self._text_before_answer()
        self._cache: OrderedDict[Sample, Prompt] = OrderedDict()
        self._free = cache_bytes

    def prompt(self, sample: Sample) -> Prompt:
        """The prompt of `sample`, from memory where it was encoded before."""
        # The whole sample is the key: two files of questions may use the same ids.
        if sample in self._cache:
            self._cache.move_to_end(sample)
            return self._cache[sample]
        with torch.inference_mode(False):  # what generation remembers is trained on as well
            prompt = self.encode(sample)
        self._cache[sample] = prompt
        self._free -= prompt.bytes
        while self._free < 0:
            self._free += self._cache.popitem(last=False)[1].bytes
        return prompt

    def encode(self, sample: Sample) -> Prompt:
        """The prompt of `sample`, encoded anew.

        Raises ImageError for an image that can't be read, LengthError for more than `longest` tokens (a prompt is never cut, least of all inside an
        image), and DataError for whatever else the processor refuses.
        """
        images = [open_image(image) for image in sample.images]
        if set(self.tokenizer(sample.prompt, add_special_tokens=False).input_ids).intersection(self.image_tokens):
            raise DataError(f"question '{sample.id}' holds the token that stands for an image in its text; expected images under 'images', remove it there")
        try:
            # Nested: a flat list would be as many questions of one image to some processors.
            encoded = self.processor(text=[self.chat(sample)], images=[images] if images else None, return_tensors="pt", add_special_tokens=False)
        except Exception as error:  # a processor may raise anything at a picture of odd size
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise DataError(
                f"the processor can't read question '{sample.id}' ({reason}); expected a question and images for this model, mend the row"
            ) from error
        ids = encoded.pop("input_ids")[0]
        encoded.pop("attention_mask", None)
        if len(ids) > self.longest:
            raise LengthError(f"question '{sample.id}' takes {len(ids)} tokens with its images; at most {self.longest} are read, raise 'longest' or shorten it")
        pixels = dict(encoded)
        return Prompt(ids, pixels, self.positions(ids, pixels, self.processor) if self.positions else None)

    def chat(self, sample: Sample) -> str:
        """The text of `sample` in the model's chat template, one placeholder for each image, up to where the answer begins."""
        text = self.processor.apply_chat_template(self.turns(sample), add_generation_prompt=True)
        assert isinstance(text, str)
        return text

    def answer(self, text: str) -> list[int]:
        """The ids with which a model answers `text`, its end token included."""
        return [*self.tokenizer(self.before_answer + text, add_special_tokens=False).input_ids, self.eos]

    def text(self, ids: Sequence[int]) -> str:
        """The answer that `ids` spell, without special tokens and outer white space."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    @staticmethod
    def turns(sample: Sample) -> list[dict[str, Any]]:
        """The chat that asks `sample`: one user turn, its images first."""
        images: list[dict[str, Any]] = [{"type": "image"} for _ in sample.images]
        return [{"role": "user", "content": [*images, {"type": "text", "text": sample.prompt}]}]

    def _text_before_answer(self) -> str:
        """What the template puts between the generation prompt and the answer: a space for SmolVLM, nothing for Qwen."""
        turns: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "question"}]}]
        start = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        turns.append({"role": "assistant", "content": [{"type": "text", "text": "ANSWER"}]})
        whole = self.processor.apply_chat_template(turns)
        if not whole.startswith(start) or "ANSWER" not in whole[len(start) :]:
            raise ModelError("the chat template's generation prompt is not how its assistant turn begins; expected a template whose answers can be continued")
        return whole[len(start) : whole.index("ANSWER", len(start))]


def pad_left(rows: Sequence[Tensor], value: int) -> tuple[Tensor, Tensor]:
    """Rows of ids [n_i] as one [B, max n] padded on the left, and the mask of real tokens of the same shape (both int64)."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), value, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return ids, mask


def pad_places(prompts: Sequence[Prompt]) -> Tensor:
    """The rotary positions of several prompts, [B, S] or [A, B, S], padded with 0 on the left."""
    rows = [prompt.places for prompt in prompts]
    places = torch.zeros((*rows[0].shape[:-1], len(rows), max(row.shape[-1] for row in rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        places[..., i, places.shape[-1] - row.shape[-1] :] = row
    return places


def to_device(pixels: Pixels, device: torch.device, dtype: torch.dtype) -> Pixels:
    """Image tensors on `device`, floating ones in `dtype`; masks and grids keep their integer type."""
    return {name: t.to(device, dtype) if t.is_floating_point() else t.to(device) for name, t in pixels.items()}
