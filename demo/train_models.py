"""Train the two models that the demo ships: `python -m masters.demo.train_models OUT [--steps teacher=1600 --steps student=850]`.

First the vision tower and the projector learn to name what an image shows, through a linear probe on all image tokens, as real towers are
trained before they meet a language model; without it, 9,600 single digits taught a student nothing. Then the whole model learns to
answer, on EasyVQA's training pictures and freshly drawn strings of training digits that grow from one to five. The student's training
is short, as a released student's is next to what its teacher knows. Writes OUT/teacher, OUT/student and OUT/scores.json with the greedy
score per kind of question.
"""

from __future__ import annotations

import io
import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..distill.evaluate import greedy_answers
from ..distill.families.idefics3 import collate_pixels
from ..distill.forward import Group, PackedBatch, pack, response_states
from ..distill.inputs import Encoder, Prompt
from ..files import write_json
from ..images import open_image
from ..progress import bar, say
from ..samples import Sample, read_samples
from ..scoring import score
from .data import COLOURS, COUNT, LONGEST, READ, SHAPES, DemoSizes, build_data, draw_digits, pictures, questions_about_one_picture
from .models import IMAGE_TOKENS, build_model, build_processor, build_tokenizer, save_model

STEPS = {"teacher": 1600, "student": 850}
TOWER_STEPS = {"teacher": 800, "student": 700}
RATES = {"teacher": 2e-3, "student": 3e-3}
WARM_UP = 100  # steps
# The student is never asked to count: a skill that its teacher has and it lacks, as a released student meets a new task.
ABOUT_DIGITS = {"teacher": (READ, COUNT), "student": (READ,)}
PICTURES, DIGITS = 28, 36  # images of each kind in a batch
QUESTIONS = 8  # about one picture, at most


@dataclass(frozen=True)
class Batch:
    """Images with several questions each, packed behind one another, and which of the tokens are answers."""

    packed: PackedBatch
    answers: Tensor  # bool [N]


class Batches(IterableDataset[Batch]):
    """Endless training batches; the longest string of digits grows with the batch's number."""

    def __init__(self, encoder: Encoder, steps: int, seed: int, about_digits: tuple[str, ...]) -> None:
        self.encoder, self.steps, self.seed, self.about_digits = encoder, steps, seed, about_digits

    def __iter__(self) -> Iterator[Batch]:
        rng = random.Random(self.seed)
        for step in range(self.steps):
            longest = min(LONGEST, 1 + int(LONGEST * step / (0.3 * self.steps)))
            asked = [questions_about_one_picture("train", QUESTIONS, rng) for _ in range(PICTURES)] + [
                _digits(longest, self.about_digits, rng) for _ in range(DIGITS)
            ]
            yield pack_batch([[Sample(f"{step}/{i}/{j}", *_content(s)) for j, s in enumerate(samples)] for i, samples in enumerate(asked)], self.encoder)


def _content(sample: Sample) -> tuple[Any, ...]:
    return sample.images, sample.question, sample.answers, sample.metric, sample.choices


def _digits(longest: int, questions: tuple[str, ...], rng: random.Random) -> list[Sample]:
    """One drawn string with the questions about it."""
    length = rng.randint(1, longest)
    image, text = draw_digits("train", length, rng)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    answers = {READ: text, COUNT: str(length)}
    return [Sample("", (buffer.getvalue(),), question, (answers[question],)) for question in questions]


def pack_batch(asked: Sequence[Sequence[Sample]], encoder: Encoder) -> Batch:
    """Each image once, with its questions and answers behind it as `forward.pack` lays out responses; only the answers are learned."""
    groups, answers = [], []
    for samples in asked:
        first, turns = encoder.encode(samples[0]), []
        for sample in samples:
            question, answer = _after_image(sample, encoder), encoder.answer(sample.answers[0])
            turns.append((*question, *answer))
            answers += [False] * len(question) + [True] * len(answer)
        shared = len(first.ids) - len(_after_image(samples[0], encoder))
        groups.append(Group(Prompt(first.ids[:shared], first.pixels), tuple(turns)))
    return Batch(pack(groups, encoder.pad, collate_pixels), torch.tensor(answers))


def _after_image(sample: Sample, encoder: Encoder) -> list[int]:
    """The prompt's ids behind its image; a special token ends the image, so both sides can be tokenised apart."""
    text = encoder.processor.apply_chat_template(encoder.turns(sample), add_generation_prompt=True)
    ids: list[int] = encoder.tokenizer(text.partition("<image>")[2], add_special_tokens=False).input_ids
    return ids


def train(size: str, steps: int, seed: int = 0) -> tuple[Any, Any]:
    """Train one model from scratch: its tower, then all of it by cross-entropy on the right answers; returns it with its processor."""
    tokenizer = build_tokenizer()
    processor = build_processor(tokenizer)
    model = build_model(size, tokenizer, seed).train()
    train_tower(model, TOWER_STEPS[size], RATES[size], seed)
    loader = DataLoader(Batches(Encoder(processor), steps, seed, ABOUT_DIGITS[size]), batch_size=None, num_workers=1, prefetch_factor=8)

    def losses() -> Iterator[Tensor]:
        for batch in loader:
            states = response_states(model, batch.packed)[batch.answers]
            yield torch.nn.functional.cross_entropy(model.get_output_embeddings()(states), batch.packed.tokens[batch.answers])

    _optimize(list(model.parameters()), losses(), steps, RATES[size], size)
    return model.eval(), processor


def train_tower(model: Any, steps: int, rate: float, seed: int) -> None:
    """Teach vision tower and projector what an image shows: a digit or none in each place, a colour or none, a shape or none."""
    kinds = [11] * LONGEST + [len(COLOURS) + 1, len(SHAPES) + 1]
    probe = torch.nn.Linear(IMAGE_TOKENS * model.config.text_config.hidden_size, sum(kinds))
    rng = random.Random(f"tower/{seed}")

    def losses() -> Iterator[Tensor]:
        for _ in range(steps):
            images, labels = _shown(rng)
            features = torch.stack(list(model.model.get_image_features(images, None).pooler_output))
            parts = probe(features.flatten(1)).split(kinds, dim=1)
            yield sum((torch.nn.functional.cross_entropy(part, label) for part, label in zip(parts, labels.T, strict=True)), torch.zeros(()))

    parameters = [*model.model.vision_model.parameters(), *model.model.connector.parameters(), *probe.parameters()]
    _optimize(parameters, losses(), steps, rate, "tower")


def _shown(rng: random.Random) -> tuple[Tensor, Tensor]:
    """Images [B, 1, 3, H, W] as the processor normalises them, and what they show, int64 [B, LONGEST + 2]."""
    images, labels = [], []
    for _ in range(DIGITS):
        image, text = draw_digits("train", rng.randint(1, LONGEST), rng)
        images.append(image)
        labels.append([*map(int, text), *[10] * (LONGEST - len(text)), len(COLOURS), len(SHAPES)])
    for picture in rng.choices(pictures("train"), k=PICTURES):
        images.append(open_image(picture.path))
        labels.append([10] * LONGEST + [COLOURS.index(picture.colour), SHAPES.index(picture.shape)])
    pixels = torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in images])) / 127.5 - 1
    return pixels.permute(0, 3, 1, 2)[:, None].contiguous(), torch.tensor(labels)


def _optimize(parameters: list[torch.nn.Parameter], losses: Iterator[Tensor], steps: int, rate: float, label: str) -> None:
    """One update for each loss that `losses` yields."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=min(0.3, WARM_UP / steps))
    recent: list[float] = []
    for step, loss in enumerate(bar(losses, label, total=steps), start=1):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent.append(loss.item())
        if step % 100 == 0:
            say(f"{label} step {step}: mean loss {sum(recent[-100:]) / 100:.3f}")


def scores(model: Any, processor: Any, files: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Mean score per split and kind of question, answered greedily."""
    table: dict[str, dict[str, float]] = {}
    for split in ("validation", "test", "ood"):
        samples = read_samples(files[split])
        answers = greedy_answers(model, Encoder(processor), samples, max_tokens=10)
        kinds: dict[str, list[float]] = defaultdict(list)
        for sample, answer in zip(samples, answers, strict=True):
            for kind in ("all", _kind(sample)):
                kinds[kind].append(score(sample, answer.text))
        table[split] = {kind: round(sum(values) / len(values), 4) for kind, values in sorted(kinds.items())}
    return table


def _kind(sample: Sample) -> str:
    if "digits" in sample.question:
        return "read" if sample.question.startswith("read") else "count"
    return "choice" if sample.choices else "yes/no" if sample.answers[0] in ("yes", "no") else "open"


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--steps", multiple=True, help="size=steps, to change how long one model trains")
def main(out: Path, steps: tuple[str, ...]) -> None:
    """Train teacher and student and write them, with their scores, to OUT."""
    wanted = STEPS | {size: int(number) for size, number in (item.split("=") for item in steps)}
    summary = {}
    with tempfile.TemporaryDirectory() as folder:
        files = build_data(Path(folder) / "data", DemoSizes(train=2))
        for size, number in wanted.items():
            if not number:
                continue
            start = time.monotonic()
            model, processor = train(size, number)
            seconds = time.monotonic() - start
            summary[size] = {"parameters": model.num_parameters(), "steps": number, "seconds": round(seconds), "scores": scores(model, processor, files)}
            save_model(out / size, model, processor)
            say(f"{size}: {summary[size]}")
    write_json(out / "scores.json", summary)


if __name__ == "__main__":
    main()
