"""Where a run's figures can be watched: TensorBoard, Weights & Biases, trackio. metrics.jsonl stays the record; these follow it.

Every figure stands at the number of updates done, 0 being the untouched student. A run that was killed repeats the steps after its checkpoint:
TensorBoard is told to forget them first, the others, which can't forget, are not sent them again. A tracker that fails is left out, and the run goes on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import sys
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ..errors import missing_extra
from ..files import read_json, write_json
from ..progress import say
from . import ranks
from .recipe import Recipe, recipe_values
from .train import MetricsLog
from .watch import Finding, Watch, Watched

# The group and the name of each figure of metrics.jsonl; others stand under 'other'.
NAMES = {
    "loss": "loss/total",
    "loss_distill": "loss/distillation",
    "grad_norm": "gradient_norm/total",
    "grad_norm_distill": "gradient_norm/distillation",
    "grad_norm_policy": "gradient_norm/policy",
    "divergence": "student/divergence",
    "kl": "student/kl",
    "entropy": "student/entropy",
    "response_tokens": "responses/tokens",
    "reward_accuracy": "rewards/accuracy",
    "reward_distillation": "rewards/distillation",
    "reward_expected": "rewards/expected",
    "unjudged": "rewards/unjudged",
    "zero_spread": "rewards/zero_spread_groups",
    "ratio": "teacher/mask_ratio",
    "seconds": "speed/seconds_per_step",
    "validation_accuracy": "validation/accuracy",
    "validation_low": "validation/low",
    "validation_high": "validation/high",
    "validation_tokens": "validation/tokens",
    "validation_commonest": "validation/commonest_answer",
    "since_start": "validation/since_start",
    "since_start_error": "validation/since_start_error",
    "since_best": "validation/since_best",
    "since_best_error": "validation/since_best_error",
    "since_baseline": "validation/since_baseline",
    "since_baseline_error": "validation/since_baseline_error",
}
RANKED = {"right_outranks_total": "rewards/right_outranks_wrong/total", "right_outranks_distillation": "rewards/right_outranks_wrong/distillation"}
# What is sent at one place, in order, but for tables: metrics.jsonl does not know of them, and one is rather lost than sent twice.
KINDS = ("table", "step", "evaluation")
TABLE = KINDS[0]
AXIS = "updates"
LATEST = 50  # updates that the status line speaks of
NOT_FIGURES = {"kind", "step", "stage", "pairs", "questions", "tokens", "operations"}


@dataclass(frozen=True)
class Cell:
    """One question of a table of answers: its image, small, and its texts by column."""

    image: Image.Image | None
    texts: Mapping[str, str]


class Tracker(Protocol):
    """What takes the figures of a kind of row at a number of updates, and tables of answers."""

    def figures(self, place: int, kind: str, values: Mapping[str, float]) -> None: ...

    def table(self, place: int, name: str, rows: Sequence[Cell]) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """metrics.jsonl, behind it the trackers that the recipe names, and what watches the rows of a run of `total` updates (watch.py).

    It begins at the step `first` that a run continues at. The main process writes.
    """

    def __init__(self, recipe: Recipe, first: int, total: int = sys.maxsize) -> None:
        self.recipe, path = recipe, recipe.out / "metrics.jsonl"
        self.watch = Watch(Watched(total, recipe.objective.policy > 0, recipe.train.keep))
        self.trackers: dict[str, Tracker] = {}
        self.latest: deque[Mapping[str, Any]] = deque(maxlen=LATEST)
        if not ranks.is_main():
            return
        start = _start(recipe.out, path, first)
        self.metrics = MetricsLog(path, first)
        for row in self.metrics.kept:
            self.watch.add(row)
        for name in recipe.track:
            if tracker := self._try(name, partial(OPEN[name], recipe, start)):
                self.trackers[name] = tracker

    def write(self, row: Mapping[str, Any]) -> None:
        """A row for metrics.jsonl; the file comes first, so that no tracker ever shows what it lacks."""
        if not ranks.is_main():
            return
        self.metrics.write(row)
        self.latest += [row] if row["kind"] == "step" else []
        for name, tracker in list(self.trackers.items()):
            self._try(name, partial(tracker.figures, row["step"] + 1, row["kind"], figures(row)))
        for finding in self.watch.add(row):
            self._tell(finding)

    def _tell(self, finding: Finding) -> None:
        """Say once what goes wrong, and keep it."""
        say(f"WATCH: {finding}")
        self.metrics.write(finding.row())
        self.table(finding.step, "findings", [Cell(None, {"finding": finding.name, "figure": finding.said, "advice": finding.advice})])

    def status(self) -> str:
        """The latest updates in a few words: the mean loss, and how often a right answer got a higher reward than a wrong one."""
        if not self.latest:
            return ""
        pairs = sum(row["pairs"] for row in self.latest)
        ranked = {key: sum(row[key] for row in self.latest) / pairs for key in RANKED if pairs}
        shares = ", ".join(f"{key.removeprefix('right_outranks_')} {share:.0%}" for key, share in ranked.items())
        return f"loss {sum(row['loss'] for row in self.latest) / len(self.latest):.4g}" + (f", right above wrong: {shares}" if shares else "")

    def table(self, step: int, title: str, rows: Sequence[Cell]) -> None:
        """A table of answers as they are after the update `step`."""
        for name, tracker in list(self.trackers.items()):
            self._try(name, partial(tracker.table, step + 1, title, rows))

    def close(self) -> None:
        for name, tracker in list(self.trackers.items()):
            self._try(name, tracker.close)
        self.trackers = {}

    def _try(self, name: str, what: Callable[[], Any]) -> Any:
        """A tracker's own trouble, such as a server that can't be reached, is told once and ends nothing but its tracking."""
        try:
            return what()
        except Exception as error:  # each library raises its own kinds
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            say(f"{name} takes no more figures ({reason}); the run goes on, and {self.recipe.out / 'metrics.jsonl'} holds them all")
            self.trackers.pop(name, None)
            return None


def check_installed(names: Sequence[str]) -> None:
    """Raise MissingExtraError for a tracker whose package is not there."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise missing_extra(name, EXTRAS[name])


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """A row of metrics.jsonl as figures by their grouped names; counts of pairs as shares of all pairs of their step."""
    left_out = NOT_FIGURES | set(RANKED) | ({"ratio"} if row["kind"] == "evaluation" else set())  # the step's row at the same place has it
    found = {NAMES.get(key, f"other/{key}"): float(value) for key, value in row.items() if key not in left_out}
    if row.get("pairs"):
        found |= {name: row[key] / row["pairs"] for key, name in RANKED.items() if key in row}
    if row.get("seconds") and row.get("questions"):
        found["speed/questions_per_second"] = row["questions"] / row["seconds"]
    return found


@dataclass(frozen=True)
class Start:
    """Where trackers begin: the run's name among others, the number of updates done, and the last place and kind of row that was sent."""

    run: str
    done: int
    sent: tuple[int, int]

    def is_new(self, place: int, kind: str) -> bool:
        """Whether a row was not sent in an earlier life of the run."""
        return (place, KINDS.index(kind)) > self.sent


def _start(out: Path, metrics: Path, first: int) -> Start:
    """Read, and keep in trackers.json, what trackers were sent in this run's earlier lives: all that metrics.jsonl held at the end of each."""
    path = out / "trackers.json"
    if first == 0 or not path.exists():  # a run that begins anew has no past
        shutil.rmtree(out / "tensorboard", ignore_errors=True)
        start = Start(uuid.uuid4().hex[:8], first, (-1, 0))
    else:
        before = read_json(path)
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        sent = [(row["step"] + 1, KINDS.index(row["kind"])) for row in rows if row["kind"] in KINDS]
        start = Start(before["run"], first, max([tuple(before["sent"]), *sent]))
    write_json(path, {"run": start.run, "sent": start.sent})
    return start


class TensorBoard:
    """Event files in the run folder's tensorboard/."""

    def __init__(self, recipe: Recipe, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # The first update of this life is shown at done + 1; a reader drops what stands there from an earlier one.
        self.writer = SummaryWriter(recipe.out / "tensorboard", purge_step=start.done + 1 if start.done else None)

    def figures(self, place: int, kind: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, place)
        self.writer.flush()  # a killed process loses what waits

    def table(self, place: int, name: str, rows: Sequence[Cell]) -> None:
        import numpy as np

        for number, row in enumerate(rows):
            if row.image:
                self.writer.add_image(f"{name}/{number}", np.asarray(row.image.convert("RGB")), place, dataformats="HWC")
            text = "\n".join(f"**{column}**: {_markdown(value)}\n" for column, value in row.texts.items())
            self.writer.add_text(f"{name}/{number}", text, place)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, online or, with WANDB_MODE=offline, in the run folder's wandb/."""

    def __init__(self, recipe: Recipe, start: Start) -> None:
        import wandb

        self.wandb, self.start = wandb, start
        settings: dict[str, Any] = {"console": "off", "x_transaction_log_flush_interval": 1.0}  # bars are no log; a killed process loses what waits
        known = wandb.Settings(**{name: value for name, value in settings.items() if name in wandb.Settings.model_fields})
        named: dict[str, Any] = {"project": recipe.project, "name": recipe.out.name, "id": start.run, "dir": recipe.out}
        self.run = wandb.init(**named, resume="allow", config=recipe_values(recipe), settings=known)
        # W&B's own steps only ever count up, one for each call; charts are drawn over this.
        self.run.define_metric(AXIS)
        self.run.define_metric("*", step_metric=AXIS)

    def figures(self, place: int, kind: str, values: Mapping[str, float]) -> None:
        if self.start.is_new(place, kind):
            self.run.log({**values, AXIS: place})

    def table(self, place: int, name: str, rows: Sequence[Cell]) -> None:
        if self.start.is_new(place, TABLE) and rows:
            columns = list(rows[0].texts)
            cells = [[self.wandb.Image(row.image) if row.image else None, *(row.texts[column] for column in columns)] for row in rows]
            self.run.log({name: self.wandb.Table(columns=["image", *columns], data=cells), AXIS: place})

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of trackio, on this machine or, with TRACKIO_SPACE_ID or TRACKIO_SERVER_URL, where that says."""

    def __init__(self, recipe: Recipe, start: Start) -> None:
        import trackio

        self.trackio, self.start = trackio, start
        with contextlib.redirect_stdout(sys.stderr):  # results alone go to stdout
            self.run = trackio.init(recipe.project, f"{recipe.out.name}-{start.run}", config=recipe_values(recipe), resume="allow", embed=False)

    def figures(self, place: int, kind: str, values: Mapping[str, float]) -> None:
        if self.start.is_new(place, kind):
            self.run.log(dict(values), step=place)

    def table(self, place: int, name: str, rows: Sequence[Cell]) -> None:
        if self.start.is_new(place, TABLE) and rows:
            columns = list(rows[0].texts)
            cells = [[self.trackio.Image(row.image) if row.image else "", *(_markdown(row.texts[column]) for column in columns)] for row in rows]
            self.run.log({name: self.trackio.Table(columns=["image", *columns], data=cells)}, step=place)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self.trackio.finish()


def _markdown(text: str) -> str:
    """A text that a page would read as Markdown or HTML, shown as it is."""
    return "".join(f"&#{ord(letter)};" if letter in "&<>*_`[]#|\\!~" else letter for letter in text)


OPEN: dict[str, Callable[[Recipe, Start], Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio}
EXTRAS = {"tensorboard": "distill", "wandb": "wandb", "trackio": "trackio"}
