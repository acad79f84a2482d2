"""A few questions with their images and answers, every some updates: samples/NNNNNNN.html, a page on its own, and the same in the trackers.

Validation questions show what the student says now; training questions also what the masked teacher and the student said before, how that was
judged, and what the objective pays for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..files import write_text
from ..images import open_image
from ..page import IMAGE_SIDE, Example, Table, draw_table, gallery, whole_page
from ..samples import Sample
from . import ranks
from .evaluate import greedy_answers
from .judge import judge
from .objective import RowStats
from .responses import DistinctResponse
from .trackers import Cell, RunLog
from .train import Shaped, Step, Trainer

COLUMNS = ("Question", "Response", "From", "Times", "Verdict", "Divergence", "Distillation reward", "Reward", "Advantage")


@dataclass(frozen=True)
class Shown:
    """A question, what the student answers now, and its responses as rows of COLUMNS after the first."""

    sample: Sample
    answer: str
    responses: tuple[tuple[str, ...], ...] = ()

    @property
    def right(self) -> bool:
        return judge(self.sample, self.answer).value == 1.0


def evenly(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` samples spread over all, the same every time."""
    count = min(count, len(samples))
    return [samples[i * len(samples) // count] for i in range(count)]


def show(
    trainer: Trainer,
    validation: Sequence[Sample],
    training: Sequence[Sample],
    responses: Mapping[str, Sequence[DistinctResponse]],
    teacher: Any,
    log: RunLog,
    step: Step,
) -> None:
    """Ask the student these questions and write the tables. All processes take part, the main one writes."""
    recipe, asked = trainer.recipe, [*validation, *training]
    with trainer.autocast():
        answers = [answer.text for answer in greedy_answers(trainer.hooked, trainer.encoder, asked, recipe.answers.max_tokens, label="answering a few")]
    groups = [responses[sample.id] for sample in training]
    paid = _paid(trainer, groups, *trainer.assess(training, groups, teacher)) if training else []
    if not ranks.is_main():
        return
    first = [Shown(sample, answer) for sample, answer in zip(validation, answers, strict=False)]
    second = [Shown(sample, answer, rows) for sample, answer, rows in zip(training, answers[len(validation) :], paid, strict=True)]
    write_text(recipe.out / "samples" / f"{step.number + 1:07d}.html", _page(first, second, step))
    log.table(step.number, "validation_answers", [_cell(shown) for shown in first])
    log.table(step.number, "training_responses", [_cell(shown) for shown in second])


def _paid(trainer: Trainer, groups: Sequence[Sequence[DistinctResponse]], stats: RowStats, shaped: Shaped) -> list[tuple[tuple[str, ...], ...]]:
    """For each group its responses as rows of COLUMNS after the first."""
    figures = zip(stats.divergence.tolist(), shaped.distillation.tolist(), shaped.total.tolist(), shaped.advantage.tolist(), strict=True)
    return [tuple((*_said(trainer, response), *(f"{value:.3f}" for value in next(figures))) for response in group) for group in groups]


def _said(trainer: Trainer, response: DistinctResponse) -> tuple[str, str, str, str]:
    source = "truth" if response.from_truth else "teacher" if response.from_teacher else "student"
    verdict = {None: "none", 1.0: "right", 0.0: "wrong"}.get(response.verdict, f"{response.verdict}")
    return trainer.encoder.text(response.ids) or "(empty)", source, str(response.count), verdict


def _page(validation: Sequence[Shown], training: Sequence[Shown], step: Step) -> str:
    rows = tuple((shown.sample.id, *row) for shown in training for row in shown.responses)
    note = "Reward and advantage are what the next update would use. A response given by both counts as the teacher's."
    table = draw_table(Table("Responses and what they are paid", COLUMNS, rows, note)) if rows else ""
    sections = {"Validation": gallery([_example(shown) for shown in validation]), "Training": gallery([_example(shown) for shown in training]) + table}
    title = f"Answers after {step.number + 1:,} updates, teacher masked by {step.ratio:g}"
    return whole_page(title, {name: body for name, body in sections.items() if body})


def _example(shown: Shown) -> Example:
    image = shown.sample.images[0] if shown.sample.images else None
    return Example(image, shown.sample.prompt, " | ".join(shown.sample.answers), {"student": (shown.answer, shown.right)})


def _cell(shown: Shown) -> Cell:
    image = open_image(shown.sample.images[0]) if shown.sample.images else None
    if image:
        image.thumbnail((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.LANCZOS)
    texts = {"id": shown.sample.id, "question": shown.sample.prompt, "truth": " | ".join(shown.sample.answers), "student": shown.answer}
    texts["verdict"] = "right" if shown.right else "wrong"
    if shown.responses:
        texts["responses"] = "; ".join(
            f"{text} ({source} x{times}, {verdict}, reward {reward}, advantage {gain})" for text, source, times, verdict, _, _, reward, gain in shown.responses
        )
    return Cell(image, texts)
