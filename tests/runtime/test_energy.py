"""The energy meter over trees of files laid out as Linux lays out RAPL's counters."""

from __future__ import annotations

from pathlib import Path

import pytest

from masters.runtime.energy import EnergyMeter


def zone(root: Path, name: str, energy: int | str, span: int = 262_143_328_850) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{span}\n")
    return folder


def test_joules_of_all_packages_without_their_parts(tmp_path: Path) -> None:
    first, second, part = (zone(tmp_path, name, 1_000_000) for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"))
    meter = EnergyMeter(tmp_path)
    assert meter.joules() == 0
    for folder, energy in ((first, 3_500_000), (second, 1_250_000), (part, 9_000_000)):
        (folder / "energy_uj").write_text(f"{energy}\n")
    assert meter.joules() == pytest.approx(2.75)


def test_a_counter_that_began_again(tmp_path: Path) -> None:
    folder = zone(tmp_path, "intel-rapl:0", 9_000_000, span=9_999_999)
    meter = EnergyMeter(tmp_path)
    (folder / "energy_uj").write_text("500000\n")
    assert meter.joules() == pytest.approx(1.5)


def test_what_can_not_be_read_is_not_measured(tmp_path: Path) -> None:
    assert EnergyMeter(tmp_path / "missing").joules() is None
    zone(tmp_path, "intel-rapl:0", 1)
    zone(tmp_path, "intel-rapl:1", "no number")
    assert EnergyMeter(tmp_path).joules() is None
