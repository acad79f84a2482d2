"""Energy as the processor itself counts it: Intel's and AMD's RAPL counters, which Linux shows under /sys/class/powercap.

They count whole packages, whatever runs on them, and often only root may read them; where they can't be read, energy is "not measured".
"""

from __future__ import annotations

import re
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
PACKAGE = re.compile(r"intel-rapl:\d+$")  # a package; intel-rapl:0:1 is a part of one


class EnergyMeter:
    """Joules that all packages have used since the meter was made."""

    def __init__(self, root: Path = POWERCAP) -> None:
        zones = sorted(zone for zone in root.glob("intel-rapl:*") if PACKAGE.match(zone.name))
        self._ranges = {zone: _microjoules(zone / "max_energy_range_uj") for zone in zones}
        self._start = {zone: _microjoules(zone / "energy_uj") for zone in zones}

    def joules(self) -> float | None:
        """None where there is no counter, or one that may not be read. Right while no counter has gone round twice (minutes at full load)."""
        total = 0
        for zone, start in self._start.items():
            now, span = _microjoules(zone / "energy_uj"), self._ranges[zone]
            if start is None or now is None or span is None:
                return None
            total += (now - start) % (span + 1)  # a counter begins at 0 again after its range
        return total / 1e6 if self._start else None


def _microjoules(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
