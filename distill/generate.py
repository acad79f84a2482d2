"""Answers from a model in this process: one prefill a prompt, then n samples on its cache, batch by batch.

Every answer draws from random numbers of its own, keyed by question, seed and place, so that neither the batch it was in nor an
interruption changes what is sampled.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..samples import Sample
from . import ranks
from .features import KeptFeatures
from .inputs import CollatePixels, Encoder, Prompt, pad_left, pad_places, to_device
from .parallel import STAND_IN, within
from .reading import Reading, prompt_reading

Ended = Callable[[Tensor], bool]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the defaults are the paper's (arXiv 2512.22238). A temperature of 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float = 1.05
    max_tokens: int = 64

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def warpers(self, forbidden: Sequence[int] = ()) -> LogitsProcessorList:
        """transformers' own processors in the order of its `generate`; `forbidden` ids are never drawn."""
        chain: list[Any] = [SuppressTokensLogitsProcessor(list(forbidden))] if forbidden else []
        if self.repetition_penalty != 1.0:
            chain.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if not self.greedy:
            chain.append(TemperatureLogitsWarper(self.temperature))
            chain += [TopKLogitsWarper(self.top_k)] if self.top_k else []
            chain += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
        return LogitsProcessorList(chain)


@dataclass(frozen=True)
class Generated:
    """One answer: its text, the ids that were sampled (end token included), and why it ended ('stop', 'length' or, for the `reason`, 'failed')."""

    text: str
    ids: tuple[int, ...]
    finish: str
    reason: str = ""
    told: bool = True  # whether the ids come from the engine, and not from its text
    read: Reading | None = field(default=None, compare=False)  # the prompt, where it was read in this process
    usage: tuple[int, int] = field(default=(0, 0), compare=False)  # tokens of prompt and answer as a server has counted them


def failed(reason: str) -> Generated:
    """An answer that was asked for and did not come."""
    return Generated("", (), "failed", reason)


GREEDY = Sampling(temperature=0, repetition_penalty=1.0)


def batches_by_length(samples: Sequence[Sample], size: int, images: Mapping[str, str] | None = None) -> Iterator[list[Sample]]:
    """Batches of prompts of similar length, so that little of a batch is padding.

    With `images`, by what the images of each sample's id are known, questions about the same ones are neighbours where none is twice as long as another.
    """
    known, groups = images or {}, defaultdict[tuple[int, str], list[Sample]](list)
    for sample in sorted(samples, key=lambda sample: (len(sample.prompt), sample.id)):
        groups[len(sample.prompt).bit_length(), (known.get(sample.id) if sample.images else None) or sample.id].append(sample)
    # A group stands where its shortest question does; a question without images, or whose images are not known, is a group of its own.
    order = [sample for group in groups.values() for sample in group]
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _all(done: Tensor) -> bool:
    return bool(done.all())


def generate_own(
    model: Any,
    encoder: Encoder,
    collate_pixels: CollatePixels,
    samples: Sequence[Sample],
    count: int,
    sampling: Sampling,
    seed: int = 0,
    key: str = "",
    prompts: Sequence[Prompt] | None = None,
    features: KeptFeatures | None = None,
) -> list[list[Generated]]:
    """`generate` for this process's part of a batch, which may be none of it.

    Where weights are in shares, all processes must compute the same layers at the same time: one that has no picture looks at the stand-in.
    """
    if not samples and ranks.count() == 1:
        return []
    asked, read = list(samples), [encoder.prompt(sample) for sample in samples] if prompts is None else list(prompts)
    if ranks.count() > 1 and not any(prompt.pictured for prompt in read):
        asked, read = [*asked, STAND_IN], [*read, encoder.prompt(STAND_IN)]
    more = (sampling, seed, key, read, ranks.all_true, features)
    answers: list[list[Generated]] = within(model, generate, encoder, collate_pixels, asked, count, *more)
    return answers[: len(samples)]


@torch.no_grad()  # inference mode would leave weights that FSDP2 gathers unfit for training
def generate(
    model: Any,
    encoder: Encoder,
    collate_pixels: CollatePixels,
    samples: Sequence[Sample],
    count: int,
    sampling: Sampling,
    seed: int = 0,
    key: str = "",
    prompts: Sequence[Prompt] | None = None,
    ended: Ended = _all,
    features: KeptFeatures | None = None,
) -> list[list[Generated]]:
    """`count` answers to each sample of one batch. The images are encoded, and the prompt is read, once for all of them.

    The random numbers of an answer follow from `seed`, `key`, the sample's id and the answer's place alone. `prompts` are the samples' where they
    were encoded already, `features` what this model made of images before. `ended` tells from which rows are done whether to go on.
    """
    model.eval()
    prompts = [encoder.prompt(sample) for sample in samples] if prompts is None else prompts
    ids, mask = pad_left([prompt.ids for prompt in prompts], encoder.pad)
    ids, mask, places = ids.to(model.device), mask.to(model.device), pad_places(prompts).to(model.device)
    if features:
        pixels = features.inputs(model, collate_pixels, prompts)
    else:
        pixels = to_device(collate_pixels([prompt.pixels for prompt in prompts]), model.device, model.dtype)
    out = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True, logits_to_keep=1, **pixels)
    cache = out.past_key_values
    # As for beams: unlike repeating, this is known of recurrent layers' states, too.
    cache.reorder_cache(torch.arange(len(ids), device=model.device).repeat_interleave(count))
    # What the repetition penalty has seen: padding must not be penalised, since a pad token may be the end token.
    seen = torch.where(mask.bool(), ids, ids[:, -1:]).repeat_interleave(count, dim=0)
    draws = torch.from_numpy(np.stack([_uniforms(f"{seed}/{key}/{sample.id}/{j}", sampling.max_tokens) for sample in samples for j in range(count)]))
    # Neither an image token nor a row past the vocabulary, which the partner may lack, can be an answer's.
    forbidden = [*encoder.image_tokens, *range(encoder.vocabulary, out.logits.shape[-1])]
    draws, warpers = draws.to(model.device), sampling.warpers(forbidden)
    # Answers count on from the prompt's end, in all axes alike.
    end = places.reshape(-1, *ids.shape).amax((0, 2)).repeat_interleave(count) + 1

    def pick(logits: Tensor, seen: Tensor, place: int) -> Tensor:
        scores = warpers(seen, logits.float())
        return scores.argmax(-1) if sampling.greedy else draw(scores, draws[:, place])

    def step(token: Tensor, mask: Tensor, place: int) -> Tensor:
        positions = (end + place)[:, None].expand(*places.shape[:-2], -1, -1)
        return model(input_ids=token, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits[:, -1]

    logits, mask = out.logits[:, -1].repeat_interleave(count, dim=0), mask.repeat_interleave(count, dim=0)
    rows = _decode(step, pick, logits, seen, mask, encoder.eos, sampling.max_tokens, ended)
    answers = [_generated(row, encoder) for row in rows.tolist()]
    read = [prompt_reading(prompt, model.config) for prompt in prompts]
    return [[dataclasses.replace(answer, read=read[i]) for answer in answers[i * count : (i + 1) * count]] for i in range(len(read))]


def _decode(
    step: Callable[[Tensor, Tensor, int], Tensor],
    pick: Callable[[Tensor, Tensor, int], Tensor],
    logits: Tensor,
    seen: Tensor,
    mask: Tensor,
    eos: int,
    longest: int,
    ended: Ended,
) -> Tensor:
    """Ids [B, T] of one answer a row, T <= `longest`; after a row's end token its places repeat the end token."""
    done, tokens = torch.zeros(len(seen), dtype=torch.bool, device=seen.device), []
    for place in range(longest):
        token = torch.where(done, eos, pick(logits, seen, place))
        tokens.append(token)
        done |= token == eos
        if ended(done) or place + 1 == longest:
            break
        seen = torch.cat([seen, token[:, None]], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = step(token[:, None], mask, place)
    return torch.stack(tokens, dim=1)


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Sample one id a row from logits [B, V] by inverting the distribution function at `uniform` [B] in [0, 1)."""
    cumulative = scores.double().softmax(-1).cumsum(-1)
    index = torch.searchsorted(cumulative, uniform.double()[:, None] * cumulative[:, -1:], right=True)
    return index.clamp(max=scores.shape[-1] - 1)[:, 0]


def _uniforms(key: str, count: int) -> np.ndarray:
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little")).random(count)


def _generated(row: list[int], encoder: Encoder) -> Generated:
    ended = encoder.eos in row
    ids = tuple(row[: row.index(encoder.eos) + 1] if ended else row)
    return Generated(encoder.text(ids), ids, "stop" if ended else "length")
