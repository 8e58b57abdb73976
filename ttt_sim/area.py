"""Silicon area of a chip from its parts, for chips that state what one instance of each takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ttt_sim.chip import Chip, MemoryLevel


@dataclass(frozen=True, slots=True, kw_only=True)
class AreaEstimate:
    """``parts`` in mm2 by name of the unit or memory; ``missing`` dotted paths that the chip file leaves out.

    ``overhead`` is the share of the silicon that is neither; ``total_mm2`` the parts over the rest, None where one is
    missing.
    """

    parts: Mapping[str, float]
    missing: tuple[str, ...]
    overhead: float
    total_mm2: float | None


def area_estimate(chip: Chip) -> AreaEstimate:
    """Instances x area of the units plus capacity / density of the memories on the die, over 1 - overhead.

    DRAM (a shared bus) and backing memories are other dies unless they state a density.
    """
    parts: dict[str, float] = {}
    missing: list[str] = []
    for unit in chip.units:
        if unit.area_mm2 is None:
            missing.append(f"compute.{unit.name}.area")
        else:
            parts[unit.name] = (unit.count * chip.cores or 1) * unit.area_mm2
    for level in chip.memories:
        if level.density_bytes_per_mm2 is not None:
            parts[level.name] = total_bytes(chip, level) / level.density_bytes_per_mm2
        elif not level.shared_bus and level.scope != "backing":
            missing.append(f"memories.{level.name}.density")
    total = None if missing else sum(parts.values()) / (1 - chip.area_overhead)
    return AreaEstimate(parts=parts, missing=tuple(missing), overhead=chip.area_overhead, total_mm2=total)


def total_bytes(chip: Chip, level: MemoryLevel) -> int:
    """Capacity of all instances of a level."""
    return level.capacity_bytes * (chip.cores if level.scope == "core" else 1)
