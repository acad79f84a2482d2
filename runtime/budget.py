"""Budgets: what a bundle may take and must reach on a device, and the verdict on each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import RecipeError

# What each key means, with its unit; `min_` keys are lower limits, all others upper ones.
WHAT = {
    "min_accuracy": "accuracy, mean",
    "max_drop": "accuracy lost against PyTorch, upper end of its interval",
    "first_token_p90_ms": "first token, p90, ms",
    "decode_p50_ms": "decode per token, p50, ms",
    "peak_rss_mb": "peak memory of a process, MB",
    "bundle_mb": "bundle, MB",
    "cold_start_ms": "cold start: process start to first token, ms",
}


@dataclass(frozen=True)
class Budget:
    """The limits of a budget file; None is no limit."""

    min_accuracy: float | None = None
    max_drop: float | None = None
    first_token_p90_ms: float | None = None
    decode_p50_ms: float | None = None
    peak_rss_mb: float | None = None
    bundle_mb: float | None = None
    cold_start_ms: float | None = None


@dataclass(frozen=True)
class Gate:
    """One limit: what it is about, what was measured, and 'pass', 'fail' or 'not measured'."""

    name: str
    what: str
    measured: float | None
    budget: float
    verdict: str


def read_budget(path: Path) -> Budget:
    """The budget in a YAML file. Raises RecipeError, naming file and key, for one that is missing, damaged, unknown or no number."""
    import yaml  # only a check with a budget needs it

    try:
        limits = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise RecipeError(f"no budget at {path}; expected a YAML file with keys of {', '.join(WHAT)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML ({' '.join(str(error).split())[:120]}); expected lines such as 'min_accuracy: 0.8'") from None
    if not isinstance(limits, dict):
        raise RecipeError(f"{path} holds {type(limits).__name__}; expected lines such as 'min_accuracy: 0.8'")
    for key, value in limits.items():
        if key not in WHAT:
            raise RecipeError(f"{path} has the unknown key '{key}'; expected keys of {', '.join(WHAT)}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RecipeError(f"{path} has {key}: {value!r}; expected a number")
    return Budget(**limits)


def judge(budget: Budget, measured: Mapping[str, float | None]) -> tuple[Gate, ...]:
    """A gate for every limit that is set, against the figure of the same name."""
    limits = {name: limit for name, limit in dataclasses.asdict(budget).items() if limit is not None}
    return tuple(Gate(name, WHAT[name], measured.get(name), limit, verdict(name, measured.get(name), limit)) for name, limit in limits.items())


def verdict(name: str, measured: float | None, limit: float) -> str:
    if measured is None:
        return "not measured"
    return "pass" if (measured >= limit if name.startswith("min_") else measured <= limit) else "fail"
