"""Physics of a chip file: do its numbers agree with each other and with what silicon can do?

Structure and ranges are the reader's business (:mod:`ttt_sim.config`); a chip that reaches this module was readable.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from itertools import pairwise
from pathlib import Path
from typing import Literal

from ttt_sim.area import area_estimate, total_bytes
from ttt_sim.chip import Chip, ComputeUnit, MemoryLevel
from ttt_sim.config import build_chip, read_chip_file
from ttt_sim.dtypes import DTYPE_BITS
from ttt_sim.units import format_bytes, format_si

#: ``error``: a contradiction, the file cannot be right; ``warning``: probably an oversight; ``note``: worth knowing.
Severity = Literal["error", "warning", "note"]

#: How far a product of stated numbers may lie from the stated total.
TOLERANCE = 0.06
#: Smallest published 6T SRAM cell in volume: 0.021 um2 (TSMC N5; Yeap et al., IEDM 2019,
#: doi:10.1109/IEDM19573.2019.8993577). Array overhead comes on top, so no single die holds more than 5.95 MB per mm2.
SRAM_CELL_MM2 = 0.021e-6
#: Dies that are more SRAM than this leave no room for anything else.
SRAM_DIE_SHARE = 0.7
#: Largest field of an immersion or a 0.33 NA EUV scanner, 26 x 33 mm (https://en.wikichip.org/wiki/mask).
RETICLE_MM2 = 26 * 33
#: A price says little after this many years.
PRICE_YEARS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """``path`` is the dotted key, ``line`` its line in the chip file (0 when it is not in the file)."""

    severity: Severity
    path: str
    line: int
    message: str


def lint_file(chip: str | Path, today: date | None = None) -> list[Finding]:
    """Findings on a chip file and each of its variants, errors first; ``today`` for the age of prices.

    Raises :class:`ConfigError` for a file that cannot be read as a chip.
    """
    file = read_chip_file(chip)
    findings = lint_chip(build_chip(file), today)
    known = {(finding.path, finding.message) for finding in findings}
    for variant in file.variants:
        for finding in lint_chip(build_chip(file, variant=variant), today):
            if (finding.path, finding.message) not in known:
                message = f"variant {variant}: {finding.message}"
                findings.append(
                    Finding(severity=finding.severity, path=finding.path, line=finding.line, message=message)
                )
    for source in file.sources:
        if source not in file.used_sources:
            findings.append(
                Finding(
                    severity="warning",
                    path=f"sources.{source}",
                    line=file.source_lines[source],
                    message="no number refers to this source",
                )
            )
    name, line = build_chip(file).name, file.tree.key_places["name"].line
    if file.path.stem != name:
        message = f"{name!r} differs from the file name {file.path.name!r}"
        findings.append(Finding(severity="warning", path="name", line=line, message=message))
    return _ordered(findings)


def lint_chip(chip: Chip, today: date | None = None) -> list[Finding]:
    """Findings on one chip, errors first, then in line order."""
    findings: list[Finding] = []
    for unit in chip.units:
        findings += _unit_findings(chip, unit)
        findings += _array_findings(chip, unit)
    for level in chip.memories:
        findings += _memory_findings(chip, level)
    findings += _hierarchy_findings(chip)
    findings += _tile_findings(chip)
    findings += _power_findings(chip)
    findings += _link_findings(chip)
    findings += _area_findings(chip)
    findings += _knowledge_findings(chip)
    findings += _price_findings(chip, today or datetime.now(UTC).date())
    return _ordered(findings)


def _ordered(findings: list[Finding]) -> list[Finding]:
    rank = {"error": 0, "warning": 1, "note": 2}
    return sorted(findings, key=lambda finding: (rank[finding.severity], finding.line))


def _finding(chip: Chip, severity: Severity, path: str, message: str) -> Finding:
    """A finding at the line of ``path``, or of the first number below it."""
    below = [place.line for key, place in chip.provenance.items() if key == path or key.startswith(f"{path}.")]
    return Finding(severity=severity, path=path, line=min(below, default=0), message=message)


def _suspect(chip: Chip, *paths: str) -> str:
    """Which of the numbers that contradict each other is the likeliest to be wrong: the least certain one."""
    rank = {"low": 0, "medium": 1, "high": 2}
    stated = {path: chip.provenance[path].certainty for path in paths if path in chip.provenance}
    if not stated:
        return ""
    least = min(stated.values(), key=lambda certainty: rank[certainty])
    doubtful = [path for path, certainty in stated.items() if certainty == least]
    if len(doubtful) == len(stated):
        return f"; all of {least} certainty: {', '.join(stated)}"
    return f"; least certain ({least}): {', '.join(doubtful)}"


def _differs(stated: float, derived: float) -> bool:
    return abs(derived - stated) > TOLERANCE * stated


def _unit_findings(chip: Chip, unit: ComputeUnit) -> Iterator[Finding]:
    path = f"compute.{unit.name}"
    for dtype, peak in unit.peak_per_s.items():
        base = "FLOP/s" if unit.kind == "matrix" and not dtype.startswith("int") else "op/s"
        rate = _ops_per_cycle(unit, dtype)
        if rate is not None:
            instances = unit.count * chip.cores or 1
            factor = 2 if unit.kind == "matrix" else 1
            derived = instances * rate * factor * chip.clock_hz
            if _differs(peak, derived):
                yield _finding(
                    chip,
                    "error",
                    f"{path}.peak.{dtype}",
                    f"{format_si(peak, base)} is stated, but {instances} units x {rate:g} per cycle"
                    f"{' x 2 FLOP' if factor == 2 else ''} x {format_si(chip.clock_hz, 'Hz')} = "
                    f"{format_si(derived, base)} "
                    f"({derived / peak - 1:+.0%}, {TOLERANCE:.0%} allowed)"
                    + _suspect(
                        chip, f"{path}.peak.{dtype}", f"{path}.ops_per_cycle.{dtype}", f"{path}.count", "cores", "clock"
                    ),
                )
        if f"{path}.energy.{dtype}" not in chip.provenance:
            yield _finding(
                chip, "warning", f"{path}.peak.{dtype}", f"no energy.{dtype}: this work counts as free in the energy"
            )
        if unit.kind == "matrix" and f"{path}.efficiency.{dtype}" not in chip.provenance:
            yield _finding(chip, "warning", f"{path}.peak.{dtype}", f"no efficiency.{dtype}: the full peak is taken")


def _array_findings(chip: Chip, unit: ComputeUnit) -> Iterator[Finding]:
    if unit.dataflow == "weight_stationary" and unit.load_cycles == 0 and chip.kind != "example":
        path = f"compute.{unit.name}"
        yield _finding(chip, "warning", path, "no load: putting a stationary tile into the array counts as free")
    if unit.dataflow == "in_array" and chip.kind in ("digital_imc", "analog_imc"):  # whose cells are the memory
        arrays = unit.count * chip.cores or 1
        cells = arrays * unit.rows * unit.cols
        held = {dtype: cells * DTYPE_BITS[dtype] / 8 for dtype in unit.peak_per_s}
        stated = {level.name: total_bytes(chip, level) for level in chip.memories if level.scope != "backing"}
        if not any(abs(have - n) <= TOLERANCE * n for n in held.values() for have in stated.values()):
            yield _finding(
                chip,
                "note",
                f"compute.{unit.name}.geometry",
                f"{arrays:,} arrays x {unit.rows} x {unit.cols} cells hold "
                + ", ".join(f"{format_bytes(n)} of {dtype}" for dtype, n in held.items())
                + "; no memory has that capacity: "
                + ", ".join(f"{name} {format_bytes(have)}" for name, have in stated.items()),
            )


def _ops_per_cycle(unit: ComputeUnit, dtype: str) -> float | None:
    """Multiply-adds or lane operations of one instance per cycle: as stated, or one per cell of a fixed array."""
    if unit.ops_per_cycle:
        return unit.ops_per_cycle.get(dtype)
    # narrower types may run at a multiple of the array's rate, so only the widest one is held against the geometry
    if unit.dataflow == "weight_stationary" and DTYPE_BITS[dtype] == max(DTYPE_BITS[name] for name in unit.peak_per_s):
        return float(unit.rows * unit.cols * unit.depth)
    return None


def _memory_findings(chip: Chip, level: MemoryLevel) -> Iterator[Finding]:
    path = f"memories.{level.name}"
    if level.channel_bytes_per_s is not None:
        derived = level.channels * level.channel_bytes_per_s
        if _differs(level.read_bytes_per_s, derived):
            yield _finding(
                chip,
                "error",
                f"{path}.channel_rate",
                f"{level.channels} channels x {format_si(level.channel_bytes_per_s, 'B/s')} = "
                f"{format_si(derived, 'B/s')}, but "
                f"read_bandwidth is {format_si(level.read_bytes_per_s, 'B/s')} ({TOLERANCE:.0%} allowed)"
                + _suspect(chip, f"{path}.read_bandwidth", f"{path}.channels", f"{path}.channel_rate"),
            )
    if f"{path}.read_energy" not in chip.provenance:
        yield _finding(chip, "warning", path, "no read_energy: traffic here counts as free in the energy")
    if level.shared_bus and level.achievable_frac == 1 and chip.kind != "example":
        yield _finding(chip, "warning", path, "achievable_fraction 1: no DRAM sustains its full bandwidth (refresh)")
    if level.shared_bus and level.read_to_write_s == 0 and chip.kind != "example":
        yield _finding(chip, "warning", path, "shared_bus without turn-around times")
    if not level.volatile and level.endurance_writes is None and chip.writability.mode != "none":
        yield _finding(chip, "warning", path, "non-volatile and written at run time, but no endurance is given")
    if level.endurance_writes is not None and level.volatile and chip.writability.mode == "free":
        yield _finding(
            chip,
            "warning",
            f"{path}.endurance",
            f"{level.endurance_writes:g} writes, but the memory is volatile and its mode is free, as of SRAM and DRAM, "
            "which do not wear out: one of the three is wrong",
        )
    stated = {f"{path}.row_size", f"{path}.write_granularity"} <= chip.provenance.keys()
    if stated and level.row_bytes % level.write_granularity_bytes:
        yield _finding(
            chip,
            "warning",
            f"{path}.write_granularity",
            f"{format_bytes(level.write_granularity_bytes)} does not divide row_size, {format_bytes(level.row_bytes)}: "
            "a row is no whole number of writes" + _suspect(chip, f"{path}.row_size", f"{path}.write_granularity"),
        )


def _hierarchy_findings(chip: Chip) -> Iterator[Finding]:
    for outer, inner in pairwise(chip.memories):
        if outer is chip.backing:
            yield from _backing_findings(chip, outer, inner)
            continue
        path = f"memories.{inner.name}"
        if total_bytes(chip, inner) > total_bytes(chip, outer):
            yield _finding(
                chip,
                "warning",
                f"{path}.capacity",
                f"{format_bytes(total_bytes(chip, inner))} in all, more than {outer.name!r} outside it "
                f"({format_bytes(total_bytes(chip, outer))})"
                + _suspect(chip, f"memories.{outer.name}.capacity", f"{path}.capacity"),
            )
        if inner.read_bytes_per_s < outer.read_bytes_per_s:
            yield _finding(
                chip,
                "warning",
                f"{path}.read_bandwidth",
                f"{format_si(inner.read_bytes_per_s, 'B/s')} is less than that of {outer.name!r} outside it "
                f"({format_si(outer.read_bytes_per_s, 'B/s')})"
                + _suspect(chip, f"memories.{outer.name}.read_bandwidth", f"{path}.read_bandwidth"),
            )


def _backing_findings(chip: Chip, backing: MemoryLevel, main: MemoryLevel) -> Iterator[Finding]:
    """A memory lies behind another because it is larger, though slower."""
    path = f"memories.{backing.name}"
    if backing.capacity_bytes < main.capacity_bytes:
        yield _finding(
            chip,
            "warning",
            f"{path}.capacity",
            f"{format_bytes(backing.capacity_bytes)} is less than that of {main.name!r}, which it is to back "
            f"({format_bytes(main.capacity_bytes)})"
            + _suspect(chip, f"{path}.capacity", f"memories.{main.name}.capacity"),
        )
    if backing.read_bytes_per_s > main.read_bytes_per_s:
        yield _finding(
            chip,
            "warning",
            f"{path}.read_bandwidth",
            f"{format_si(backing.read_bytes_per_s, 'B/s')} is more than that of {main.name!r}, which it backs "
            f"({format_si(main.read_bytes_per_s, 'B/s')})"
            + _suspect(chip, f"{path}.read_bandwidth", f"memories.{main.name}.read_bandwidth"),
        )


def _tile_findings(chip: Chip) -> Iterator[Finding]:
    """The scratchpad must hold the operands of a tile twice, one set in use and one arriving."""
    scratchpad = chip.core_memory
    if scratchpad is None or not chip.has_unit("matrix"):
        return
    unit = chip.unit("matrix")
    bits = max(DTYPE_BITS[dtype] for dtype in unit.peak_per_s)
    needs = {tile: 2 * (tile[0] + tile[1]) * unit.depth * bits // 8 for tile in unit.tiles}
    too_large = {tile: need for tile, need in needs.items() if need > scratchpad.capacity_bytes}
    for tile, need in too_large.items():
        yield _finding(
            chip,
            "error" if len(too_large) == len(needs) else "warning",
            f"memories.{scratchpad.name}.capacity",
            f"{format_bytes(scratchpad.capacity_bytes)} cannot hold the operands of a {tile[0]} x {tile[1]} tile of "
            f"{unit.name!r} twice ({format_bytes(need)} for one step of depth {unit.depth})",
        )


def _power_findings(chip: Chip) -> Iterator[Finding]:
    memory_w = sum(
        level.read_bytes_per_s * level.achievable_frac * level.read_energy_j_per_byte for level in chip.memories
    )
    if not chip.has_unit("matrix"):
        return
    unit = chip.unit("matrix")
    for dtype, peak in unit.peak_per_s.items():
        matrix_w = peak * unit.efficiency[dtype] * unit.energy_j_per_op[dtype]
        total_w = chip.power.idle_w + matrix_w + memory_w
        if total_w > chip.power.limit_w:
            yield _finding(
                chip,
                "note",
                "power.limit",
                f"{dtype} at full rate: idle {chip.power.idle_w:.4g} W + matrix {matrix_w:.4g} W + memories "
                f"{memory_w:.4g} W = "
                f"{total_w:.4g} W, more than the limit of {chip.power.limit_w:.4g} W: such phases will be throttled"
                + _suspect(chip, f"compute.{unit.name}.energy.{dtype}", "power.limit", "power.idle"),
            )


def _link_findings(chip: Chip) -> Iterator[Finding]:
    for link in chip.links:
        path = f"links.{link.name}"
        direct = link.topology in ("ring", "torus", "mesh", "point_to_point")
        if link.peers is not None and direct and f"{path}.count" not in chip.provenance:
            yield _finding(
                chip,
                "warning",
                f"{path}.peers",
                f"{link.peers} chips on a {link.topology} without a count of links: one link of "
                f"{format_si(link.bytes_per_s, 'B/s')} is taken, but each neighbour needs one of its own",
            )
    rate = chip.writability.reupload_bytes_per_s
    hosts = [link for link in chip.links if link.topology == "host"]
    if rate is not None and hosts:
        fastest = max(hosts, key=lambda link: link.bytes_per_s)
        if rate > fastest.bytes_per_s * (1 + TOLERANCE):
            yield _finding(
                chip,
                "error",
                "writability.reupload_bandwidth",
                f"{format_si(rate, 'B/s')}, but the fastest link to the host, {fastest.name!r}, carries "
                f"{format_si(fastest.bytes_per_s, 'B/s')}"
                + _suspect(chip, "writability.reupload_bandwidth", f"links.{fastest.name}.bandwidth"),
            )


def _estimate_findings(chip: Chip) -> Iterator[Finding]:
    """The area of the parts against the die and the reticle."""
    estimate = area_estimate(chip)
    if estimate.total_mm2 is None:
        if chip.kind == "hypothetical":
            yield _finding(
                chip,
                "note",
                "compute",
                f"no area of this design can be estimated, missing: {', '.join(estimate.missing)}",
            )
        return
    split = " + ".join(f"{name} {area:.4g}" for name, area in estimate.parts.items())
    text = f"{split}, over {1 - estimate.overhead:g} of the die, is {estimate.total_mm2:.4g} mm2"
    die = chip.die_area_mm2
    if die is not None and estimate.total_mm2 > die * (1 + TOLERANCE):
        areas = [f"compute.{unit.name}.area" for unit in chip.units]
        densities = [f"memories.{level.name}.density" for level in chip.memories]
        yield _finding(
            chip,
            "error",
            "die_area",
            f"{text}, more than the {die:.4g} mm2 that are stated ({TOLERANCE:.0%} allowed)"
            + _suspect(chip, "die_area", "area_overhead", *areas, *densities),
        )
    if estimate.total_mm2 > RETICLE_MM2 and chip.kind != "wafer_scale":
        yield _finding(
            chip, "warning", "die_area", f"{text}, more than a reticle of 26 x 33 mm ({RETICLE_MM2} mm2): not one die"
        )


def _area_findings(chip: Chip) -> Iterator[Finding]:
    yield from _estimate_findings(chip)
    if chip.die_area_mm2 is None:
        return
    sram = [level for level in chip.memories if level.volatile and not level.shared_bus and level is not chip.backing]
    n_bytes = sum(total_bytes(chip, level) for level in sram)
    area = n_bytes * 8 * SRAM_CELL_MM2
    if area > SRAM_DIE_SHARE * chip.die_area_mm2:
        over = area > chip.die_area_mm2
        yield _finding(
            chip,
            "error" if over else "warning",
            "die_area",
            f"{format_bytes(n_bytes)} of SRAM ({', '.join(level.name for level in sram)}) need at least {area:.4g} "
            f"mm2 at "
            f"0.021 um2 per bit, {'more than' if over else f'over {SRAM_DIE_SHARE:.0%} of'} the die of "
            f"{chip.die_area_mm2:.4g} mm2"
            + _suspect(chip, "die_area", "cores", *(f"memories.{level.name}.capacity" for level in sram)),
        )


def _price_findings(chip: Chip, today: date) -> Iterator[Finding]:
    """A date without a month or a day is taken as the last day of its year or month."""
    if not chip.price.as_of or chip.kind == "example":
        return
    if (today.year - PRICE_YEARS, today.month, today.day) > _last_day(chip.price.as_of):
        path = "price.per_hour" if chip.price.per_hour_usd is not None else "price.purchase"
        yield _finding(chip, "note", path, f"as of {chip.price.as_of}, more than {PRICE_YEARS} years ago")


def _last_day(text: str) -> tuple[int, int, int]:
    parts = [int(part) for part in text.split("-")]
    year, month, day = [*parts, *(12, 31)[len(parts) - 1 :]]
    return year, month, day


def _knowledge_findings(chip: Chip) -> Iterator[Finding]:
    if chip.price.per_hour_usd is None:
        yield _finding(chip, "note", "price", "no per_hour: no cost per token can be given")
    if chip.die_area_mm2 is None and chip.kind != "example":
        yield _finding(chip, "note", "die_area", "not given: SRAM is not checked against the silicon")
    low = [path for path, place in chip.provenance.items() if place.certainty == "low"]
    if low:
        yield Finding(
            severity="note",
            path="sources",
            line=0,
            message=f"{len(low)} of {len(chip.provenance)} numbers are of low certainty: {', '.join(low)}",
        )
