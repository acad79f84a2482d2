"""cost.json: what a run has cost, stage by stage, over all its lives, beside what was planned and what generating during training would have cost."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..files import read_json, write_json
from ..page import Table
from .answers import Heard
from .flops import Shape, forward
from .ledger import Counts, read_ledger
from .reading import answered, total
from .recipe import Recipe

SUMMED = ("questions", "answers", "tokens_read", "tokens_written", "forwards")
ORDER = ("check", "mask", "mask trial", "answers", "judging", "signal", "training", "validation", "samples", "student", "interrupted", "end")
NOTES = (
    "Seconds are wall time of all processes of the run, loading included; work that was done again after a kill counts again, under 'interrupted' where "
    "it left no piece. Questions, answers, tokens and operations count once.",
    "Operations follow distill/flops.py (Kaplan et al. 2020; Chowdhery et al. 2022; Dao 2023): what matrices and attention ask for, padding left out. "
    "An image that several questions show is counted with each, though generation encodes it once.",
    "A run that shares a buffer of answers pays for those that it made. A server's devices and operations are not counted, its tokens are.",
    "peak_bytes are the main process's: allocated on its GPU, or resident where it has none.",
)
ONLINE = (
    "Online, every update generates its questions' answers anew, as many as this run learned from, with the teacher under its mask and the student as it is.",
    "by_tokens: every token takes as long as in this run, whose batches were filled; a lower bound.",
    "by_forwards: a forward for an update's few questions takes as long as one of this run's full batches, as where reading the weights takes the time; "
    "an upper bound.",
    "Answers are as long as this run's; loading weights into another engine at every update, which online generation needs with one, is left out.",
)


@dataclass(frozen=True)
class Cost:
    """cost.json as it is written: rows by stage and name, their sum, and the estimate for online generation, None where nothing was generated."""

    stages: tuple[dict[str, Any], ...]
    totals: dict[str, Any]
    online: dict[str, Any] | None


def heard(pairs: Heard, shape: Shape | None) -> Counts:
    """What answering these questions took: prompts read once each, answers written; operations where the model, of this `shape`, is in this process.

    Of what a server has read, and written without telling its tokens, its own figures count.
    """
    given = [(answers, next((a.read for a in answers if a.read is not None), None)) for _, answers in pairs]
    lengths = [[len(answer.ids) or answer.usage[1] for answer in answers if answer.finish != "failed"] for answers, _ in given]
    known = [answered(read, counts) for (_, read), counts in zip(given, lengths, strict=True) if read is not None]
    operations = forward(shape, total(known)) if shape is not None and (known or not pairs) else None
    written = [length for counts in lengths for length in counts]
    read = sum(max(answer.usage[0] for answer in answers) if read is None else int(read.tokens) for answers, read in given if answers)
    return Counts(len(pairs), len(written), read, sum(written), max(written, default=0) if known else 0, operations)


def write_cost(recipe: Recipe, steps: int) -> Cost:
    """Add up a run's ledger, write cost.json and return it. `steps` is how many updates the recipe makes."""
    rows = read_ledger(recipe.out)
    planned = read_json(recipe.out / "plan.json").get("needs", {}).get("work", []) if (recipe.out / "plan.json").exists() else []
    stages = tuple(_with_plan(stage, planned) for stage in summed(rows))
    totals = _totals(stages) | {"lives": max((row["life"] for row in rows), default=0)}
    totals["throughput"] = throughput(rows)
    found = Cost(stages, totals, online(stages, recipe, steps))
    write_json(recipe.out / "cost.json", dataclasses.asdict(found) | {"notes": NOTES})
    return found


def summed(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a stage and name: seconds of all lines, and what the last line of every unit counts."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["stage"], row["name"]), []).append(row)
    order = sorted(groups, key=lambda key: (ORDER.index(key[0]) if key[0] in ORDER else len(ORDER), key[1]))
    return [{"stage": stage, "name": name, **_sum(groups[stage, name])} for stage, name in order]


def _sum(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    last = list({line["unit"]: line for line in lines}.values())
    found: dict[str, Any] = {"seconds": sum(line["seconds"] for line in lines)}
    found |= {key: sum(line[key] for line in last) for key in SUMMED}
    operations = [line["operations"] for line in last]
    found["operations"] = None if None in operations else sum(operations)
    for key, on_gpu in (("gpu_hours", True), ("cpu_hours", False)):
        found[key] = sum(line["seconds"] * line["processes"] for line in lines if (line["device"] != "cpu") == on_gpu) / 3600
    # Each process computes its part of a batch: forwards that run side by side take the time of one.
    found["pieces"] = sum(line["forwards"] > 0 for line in last)
    found["forward_seconds"] = sum(line["seconds"] * line["processes"] for line in lines if line["forwards"])
    return found | {"peak_bytes": max(line["peak_bytes"] for line in lines)}


def throughput(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Tokens a second as `machine` takes them: written in answers, read in training. The first piece of a life's stage, which holds loading, is left out."""
    kinds = {"answer_tokens_per_second": ("answers", "tokens_written"), "tokens_per_second": ("training", "tokens_read")}
    found: dict[str, float | None] = {}
    for name, (stage, key) in kinds.items():
        pieces = [row for before, row in itertools.pairwise(rows) if (row["stage"], row["name"], row["life"]) == (stage, before["name"], before["life"])]
        seconds = sum(row["seconds"] for row in pieces)
        found[name] = sum(row[key] for row in pieces) / seconds if seconds else None
    return found


def _totals(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sums = {key: sum(stage[key] for stage in stages) for key in ("seconds", "tokens_read", "tokens_written", "gpu_hours", "cpu_hours")}
    known = [stage["operations"] for stage in stages if stage["operations"] is not None]
    return sums | {"operations": sum(known), "peak_bytes": max((stage["peak_bytes"] for stage in stages), default=0)}


def _with_plan(stage: dict[str, Any], planned: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A stage with what plan.json says of it, and measured over planned."""
    for row in planned:
        if (row["stage"], row["name"]) == (stage["stage"], stage["name"]):
            keys = [key for key in ("tokens_read", "tokens_written", "operations", "seconds") if row.get(key) and stage.get(key)]
            ratios = {key: stage[key] / row[key] for key in keys}
            return stage | {"planned": {k: v for k, v in row.items() if k not in ("stage", "name")}, "measured_over_planned": ratios}
    return stage


def online(stages: Sequence[Mapping[str, Any]], recipe: Recipe, steps: int) -> dict[str, Any] | None:
    """What generating at every update, with as many answers, would have cost: forwards, seconds within two bounds, and the factor on the run's."""
    generated = [stage for stage in stages if stage["stage"] == "answers" and stage["tokens_written"]]
    if not generated or not steps:
        return None
    epochs, sources = recipe.train.epochs, sum(count > 0 for count in (recipe.answers.teacher, recipe.answers.student))
    seconds = sum(stage["seconds"] for stage in generated)
    local = [stage for stage in generated if stage["forwards"]]
    by_tokens = epochs * seconds
    found: dict[str, Any] = {
        "answers": epochs * sum(stage["answers"] for stage in generated),
        "tokens_written": epochs * sum(stage["tokens_written"] for stage in generated),
        "seconds_offline": seconds,
        "seconds_by_tokens": by_tokens,
    }
    most = by_tokens
    if local:
        taken = sum(stage["forward_seconds"] for stage in local) / sum(stage["forwards"] for stage in local)
        # As many as the longest answer of a batch has tokens, on average over this run's.
        longest = sum(stage["forwards"] for stage in local) / sum(stage["pieces"] for stage in local)
        forwards = round(steps * sources * longest)
        most = max(by_tokens, forwards * taken)
        found |= {"forwards_offline": sum(stage["forwards"] for stage in local), "forwards": forwards, "seconds_by_forwards": forwards * taken}
    rest = sum(stage["seconds"] for stage in stages) - seconds
    whole = rest + seconds
    found |= {"factor_of_generation": [by_tokens / seconds, most / seconds], "factor_of_run": [(rest + by_tokens) / whole, (rest + most) / whole]}
    return found | {"assumptions": ONLINE}


def cost_table(found: Cost) -> Table:
    """The cost in one short table."""
    columns = ("stage", "seconds", "questions", "answers", "tokens read", "written", "operations", "device-hours", "peak GB", "seconds / planned")
    rows = [_row(f"{stage['stage']} {stage['name']}".strip(), stage) for stage in found.stages]
    return Table("What it cost", columns, (*rows, _row("all", {"questions": 0, "answers": 0, **found.totals})), _note(found))


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first one to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [[line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))] for line in (head, *rows)]
    return "\n".join("  ".join(line) for line in lines)


def _row(name: str, stage: Mapping[str, Any]) -> tuple[str, ...]:
    hours = stage["gpu_hours"] + stage["cpu_hours"]
    operations = "server's" if stage["operations"] is None else f"{stage['operations']:.2e}" if stage["operations"] else "–"
    numbers = [f"{stage[key]:,}" if stage[key] else "–" for key in ("questions", "answers", "tokens_read", "tokens_written")]
    ratio = stage.get("measured_over_planned", {}).get("seconds")
    return (name, f"{stage['seconds']:,.1f}", *numbers, operations, f"{hours:,.4f}", f"{stage['peak_bytes'] / 1e9:.2f}", f"{ratio:.2f}" if ratio else "–")


def _note(found: Cost) -> str:
    totals = found.totals
    said = f"{totals['gpu_hours']:,.4f} GPU-hours, {totals['cpu_hours']:,.4f} CPU-hours (processes x seconds)."
    if found.online:
        low, high = found.online["factor_of_run"]
        said += f" Generating at every update would have made the run {low:.1f} to {high:.1f} times as long; cost.json says under which assumptions."
    return said
