"""What benchmarks/runtime.py found, row by row, and the tables made of it: kept in results/runtime.json, written into the documents by tables.py."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

NAMES = {"256m": "SmolVLM-256M", "500m": "SmolVLM-500M", "internvl-1b": "InternVL3.5-1B"}
KINDS = {
    "ours": "masters.runtime",
    "ours@": "masters.runtime, tower on OpenVINO",
    "genai": "onnxruntime-genai, our decoder behind our tower",
    "llama.cpp": "llama.cpp",
    "openvino": "OpenVINO, a loop of its own",
    "transformers.js": "transformers.js",
    "torch": "PyTorch (transformers)",
}
CONTEXTS = (128, 2048)
FIRST_TARGET, TOTAL_TARGET, SHARE_TARGET, COLD_TARGET, MEMORY_TARGET = 0.6, 0.7, 0.85, 1.2, 1.25


@dataclass
class Row:
    """One program at one shape: medians in seconds, or the reason why there are none. `ours_*` are the first program's medians of the same run."""

    shape: str
    program: str
    reason: str = ""
    first: float = 0.0
    total: float = 0.0
    ours_first: float = 0.0
    ours_total: float = 0.0
    warm: float = 0.0  # the first answer of the process, with whatever it compiles
    prompt: int = 0
    rounds: int = 0
    peak: int = 0  # bytes
    needed: int = 0  # bytes of bundle and cache, of ours
    cold: float = 0.0  # seconds from the start of the process to the first token
    speeds: dict[str, float] = field(default_factory=dict)  # context -> tokens a second
    read: dict[str, int] = field(default_factory=dict)  # context -> bytes of weights and cache that a token reads
    bandwidth: dict[str, float] = field(default_factory=dict)  # context -> GB/s at which so many bytes are read over and over
    detail: dict[str, Any] = field(default_factory=dict)
    machine: str = ""
    date: str = ""

    @property
    def kind(self) -> str:
        return self.program.partition(":")[0] + "@" * ("@" in self.program)

    @property
    def ours(self) -> bool:
        return self.kind.startswith("ours")

    def ceiling(self, context: str) -> float:
        """Tokens a second at which memory could deliver what a token reads."""
        return self.bandwidth[context] * 1e9 / self.read[context]


def read_rows(results: dict[str, Any]) -> list[Row]:
    return [Row(**row) for row in results["rows"]]


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """`old` with each of `new` in the place of its program's; what a run did not measure stays as it was."""
    rows = {(row.shape, row.program): row for row in old}
    for row in new:
        before = rows.get((row.shape, row.program))
        if before and not row.reason:
            found = {name: value for name, value in dataclasses.asdict(row).items() if value or name == "reason"}
            row = dataclasses.replace(before, **found)
        rows[row.shape, row.program] = row
    shapes, kinds = list(NAMES), list(KINDS)
    return sorted(rows.values(), key=lambda row: (shapes.index(row.shape), kinds.index(row.kind)))


def answers_table(rows: list[Row]) -> str:
    """From the picture's file to a token; every ratio is to the first program's time in the same run."""
    lines = ["| program | first token, s | | 50th token, s | | peak memory, MB | first answer of the process, s |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        if row.reason:
            lines.append(f"| {row.program} | {_plain(row.reason)} | | | | | |")
        elif row.total:
            times = f"{row.first:.2f} | {row.first / row.ours_first:.2f}x | {row.total:.2f} | {row.total / row.ours_total:.2f}x"
            lines.append(f"| {row.program} | {times} | {row.peak / 1e6:,.0f} | {row.warm:.1f} |")
    return "\n".join(lines)


def decode_table(rows: list[Row]) -> str:
    """Tokens a second, and how much that is of what memory allows."""
    heads = " | ".join(f"tokens/s at {int(context):,} | MB a token | allowed | share" for context in map(str, CONTEXTS))
    lines = [f"| program | {heads} |", "|" + "---|" * (1 + 4 * len(CONTEXTS))]
    for row in rows:
        if row.speeds:
            lines.append(f"| {row.program} | " + " | ".join(_decode(row, str(context)) for context in CONTEXTS) + " |")
    return "\n".join(lines)


def _decode(row: Row, context: str) -> str:
    if context not in row.speeds:
        return " | | |"
    speed = row.speeds[context]
    if context not in row.read:
        return f"{speed:.0f} | | |"
    return f"{speed:.0f} | {row.read[context] / 1e6:.0f} | {row.ceiling(context):.0f} | {speed / row.ceiling(context):.0%}"


def verdicts(rows: list[Row]) -> list[str]:
    """Each target, with the best of our settings against the best of the other programs."""
    found = []
    mine, others = [row for row in rows if row.ours and row.total], [row for row in rows if not row.ours and row.total]
    for what, place, target in (("first token", "first", FIRST_TARGET), ("50th token", "total", TOTAL_TARGET)):
        if mine and others:
            # Ratios to the same run's first program, so that rows of two runs compare.
            best, peer = (min(those, key=lambda row, place=place: getattr(row, place) / getattr(row, f"ours_{place}")) for those in (mine, others))  # type: ignore[misc]
            ratio = getattr(best, place) / getattr(best, f"ours_{place}") / (getattr(peer, place) / getattr(peer, f"ours_{place}"))
            found.append(f"- {what}: {best.program} takes {ratio:.2f}x of {peer.program}, the best other program (target {target}x)")
    for context in map(str, CONTEXTS):
        if those := [row for row in rows if row.ours and context in row.speeds]:
            best = max(those, key=lambda row, context=context: row.speeds[context])  # type: ignore[misc]
            share = best.speeds[context] / best.ceiling(context)
            allowed = f"{best.ceiling(context):.0f} that {best.bandwidth[context]:.1f} GB/s allow"
            found.append(f"- decode at {int(context):,}: {best.program}, {best.speeds[context]:.0f} of {allowed}, {share:.0%} (target {SHARE_TARGET:.0%})")
    for row in rows:
        if row.cold:
            found.append(f"- cold start of {row.program}, files in the page cache: {row.cold:.2f} s to the first token (target {COLD_TARGET} s for 256m)")
        if row.needed and row.peak:
            times = f"{row.peak / row.needed:.2f}x of bundle and cache, {row.needed / 1e6:,.0f} MB"
            found.append(f"- peak memory of {row.program}: {times} (target {MEMORY_TARGET}x)")
    return found


def speed_tables(rows: list[Row]) -> str:
    """All shapes: answers, decoding, targets."""
    parts = []
    for shape, name in NAMES.items():
        those = [row for row in rows if row.shape == shape]
        if those:
            prompt = next((row.prompt for row in those if row.prompt), 0)
            rounds = sorted({row.rounds for row in those if row.rounds})
            title = f"### {name}, a prompt of {prompt} tokens, medians of {' to '.join(map(str, rounds[:: max(1, len(rounds) - 1)]))} rounds"
            parts += [title, answers_table(those)]
            if any(row.speeds for row in those):
                parts.append(decode_table(those))
            parts.append("\n".join(verdicts(those)))
    machines = sorted({f"{row.machine} ({row.date})" for row in rows if row.machine})
    return "\n\n".join([*parts, "\n".join(f"Machine: {machine}." for machine in machines)])


def summary_table(rows: list[Row]) -> str:
    """A row a kind of program, its best settings at each shape by the time to the 50th token."""
    shapes = [shape for shape in NAMES if any(row.shape == shape and row.total for row in rows)]
    lines = ["| first / 50th token, s | " + " | ".join(NAMES[shape] for shape in shapes) + " |", "|---|" + "---|" * len(shapes)]
    for kind, name in KINDS.items():
        cells = []
        for shape in shapes:
            those = [row for row in rows if row.shape == shape and row.kind == kind and row.total]
            best = min(those, key=lambda row: row.total / row.ours_total, default=None)
            cells.append(f"{best.first:.2f} / {best.total:.2f}" if best else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _plain(reason: str) -> str:
    return "does not run here: " + reason[:200].replace("|", "/").replace("\n", " ")
