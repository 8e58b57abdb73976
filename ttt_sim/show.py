"""A chip in plain text: every number with its unit, source and certainty, and the figures that follow from them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from ttt_sim.area import area_estimate, total_bytes
from ttt_sim.chip import Chip, MemoryLevel, Provenance
from ttt_sim.units import format_bytes, format_seconds, format_si

WIDTH = 100
_PATH_WIDTH = 46
_VALUE_WIDTH = 16
_CERTAINTY_WIDTH = 8


def describe(chip: Chip, sections: Mapping[str, Sequence[str]] | None = None) -> str:
    """The text of ``ttt_sim show CHIP``, lines of at most 100 characters.

    Sections: what the chip is; derived figures; ``sections``, lines by title; every number as the file states it,
    sources numbered; the sources.
    """
    references = list(dict.fromkeys(place.source for place in chip.provenance.values()))
    lines = [*_identity(chip), ""]
    for title, body in (
        ("Compute, per cycle of the chip's clock", _compute_rows(chip)),
        ("Ridge point: FLOP per byte of main memory above which a kernel is bound by compute", _ridge_rows(chip)),
        ("Memories, outermost first", _memory_rows(chip)),
        ("Delays in cycles", _delay_rows(chip)),
    ):
        lines += [title, *_table(list(body)), ""]
    if area := list(_area_rows(chip)):
        lines += ["Area estimate", *_table(area), ""]
    for title, text in (sections or {}).items():
        lines += [title, *text, ""]
    lines += [f"Numbers ({_certainty_summary(chip)})", *_number_lines(chip, references), "", "Sources"]
    for index, reference in enumerate(references, start=1):
        lines += textwrap.wrap(
            reference, WIDTH, initial_indent=f"  {f'[{index}]':<5}", subsequent_indent=" " * 7, break_on_hyphens=False
        )
    return "\n".join(line.rstrip() for line in lines)


def _identity(chip: Chip) -> Iterator[str]:
    variant = f", variant {chip.variant}" if chip.variant else ""
    yield f"{chip.title}  ({chip.name}{variant})"
    facts = [
        chip.vendor,
        chip.kind,
        f"execution {chip.execution}",
        f"{chip.cores} cores at {format_si(chip.clock_hz, 'Hz')}",
    ]
    if chip.process:
        facts.append(chip.process)
    if chip.die_area_mm2 is not None:
        facts.append(f"{chip.die_area_mm2:g} mm2")
    yield from textwrap.wrap(", ".join(facts), WIDTH)
    if chip.backing is not None:
        main, backing = chip.main_memory, chip.backing
        yield from textwrap.wrap(
            f"memory tiers: {format_bytes(main.capacity_bytes)} in {main.name}; what does not fit there in "
            f"{format_bytes(backing.capacity_bytes)} of {backing.name}, at "
            f"{format_si(backing.read_bytes_per_s, 'B/s')}",
            WIDTH,
        )
    mapping, rules = chip.mapping, chip.writability
    kernels = "one after another" if mapping.serial_kernels else "overlapping"
    placement = "tiles handed out continuously" if mapping.persistent else "tiles in whole waves"
    yield from textwrap.wrap(
        f"kernels: fusion {mapping.fusion}, {kernels}, {placement}, split of a reduction up to {mapping.max_split_k}",
        WIDTH,
    )
    features = [
        text
        for text, present in (
            ("overlaps reading", rules.overlap),
            ("shadow bank", rules.shadow_bank),
            ("transposed read", rules.transposed_read),
        )
        if present
    ]
    yield from textwrap.wrap(f"weights at run time: {', '.join([rules.mode, *features])}", WIDTH)
    if chip.overrides:
        changed = ", ".join(f"{path} = {text}" for path, text in chip.overrides.items())
        yield from textwrap.wrap(f"overridden: {changed}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _compute_rows(chip: Chip) -> Iterator[Sequence[str]]:
    yield "unit", "kind", "dtype", "peak", "per cycle", "sustained", "per core and cycle"
    for unit in chip.units:
        for dtype, peak in unit.peak_per_s.items():
            base = "FLOP" if unit.kind == "matrix" and not dtype.startswith("int") else "op"
            per_cycle = peak / chip.clock_hz
            yield (
                unit.name,
                unit.kind,
                dtype,
                format_si(peak, f"{base}/s"),
                f"{per_cycle:,.0f} {base}",
                f"{unit.efficiency[dtype]:.3g}",
                f"{per_cycle / chip.cores:,.0f}",
            )


def _ridge_rows(chip: Chip) -> Iterator[Sequence[str]]:
    yield "unit", "dtype", "at peak", "achievable"
    memory = chip.main_memory
    for unit in chip.units:
        if unit.kind != "matrix":
            continue
        for dtype, peak in unit.peak_per_s.items():
            ridge = peak / memory.read_bytes_per_s
            achievable = ridge * unit.efficiency[dtype] / memory.achievable_frac
            yield unit.name, dtype, f"{ridge:.4g}", f"{achievable:.4g}"


def _memory_rows(chip: Chip) -> Iterator[Sequence[str]]:
    yield "level", "capacity", "in all", "read B/cyc", "write B/cyc", "read all", "J/B read", "J/B write"
    for level in chip.memories:
        total = total_bytes(chip, level)
        yield (
            f"{level.name} (backing)" if level is chip.backing else level.name,
            format_bytes(level.capacity_bytes) + ("/core" if level.scope == "core" else ""),
            format_bytes(total),
            _per_cycle(chip, level.read_bytes_per_s),
            _per_cycle(chip, level.write_bytes_per_s) + (" (1 bus)" if level.shared_bus else ""),
            format_seconds(total / (level.read_bytes_per_s * level.achievable_frac)),
            format_si(level.read_energy_j_per_byte, "J"),
            format_si(level.write_energy_j_per_byte, "J"),
        )


def _per_cycle(chip: Chip, bytes_per_s: float) -> str:
    per_cycle = bytes_per_s / chip.clock_hz
    return f"{per_cycle:,.0f}" if per_cycle >= 100 else f"{per_cycle:.3g}"


def _delay_rows(chip: Chip) -> Iterator[Sequence[str]]:
    yield "where", "latency", "row miss", "read to write", "write to read"
    for level in chip.memories:
        yield level.name, *(f"{chip.cycles(delay):,}" for delay in _delays(level))
    yield "kernel launch", f"{chip.cycles(chip.overheads.op_launch_s):,}", "", "", ""
    yield "model call", f"{chip.cycles(chip.overheads.call_s):,}", "", "", ""


def _area_rows(chip: Chip) -> Iterator[Sequence[str]]:
    """The split of the estimate; nothing for chips that state no area of a part."""
    estimate = area_estimate(chip)
    if not estimate.parts:
        return
    yield "part", "mm2"
    for name, area in estimate.parts.items():
        yield name, f"{area:.4g}"
    if estimate.total_mm2 is None:
        yield f"no total, missing: {', '.join(estimate.missing)}", ""
        return
    yield f"other ({estimate.overhead:.0%})", f"{estimate.total_mm2 * estimate.overhead:.4g}"
    yield "total", f"{estimate.total_mm2:.4g}"


def _delays(level: MemoryLevel) -> tuple[float, float, float, float]:
    return level.latency_s, level.row_miss_s, level.read_to_write_s, level.write_to_read_s


def _certainty_summary(chip: Chip) -> str:
    counts = {
        certainty: sum(place.certainty == certainty for place in chip.provenance.values())
        for certainty in ("high", "medium", "low")
    }
    return ", ".join(f"{count} {certainty}" for certainty, count in counts.items()) + " certainty"


def _number_lines(chip: Chip, references: list[str]) -> Iterator[str]:
    path_width = max([_PATH_WIDTH, *(len(path) for path in chip.provenance)])
    for path, place in chip.provenance.items():
        head = f"  {path:<{path_width}} {place.text:<{_VALUE_WIDTH}} {place.certainty:<{_CERTAINTY_WIDTH}}"
        yield f"{head}[{references.index(place.source) + 1}]"
        yield from textwrap.wrap(_remark(place), WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _remark(place: Provenance) -> str:
    record = ", ".join(f"{key} {text}" for key, text in place.calibration.items())
    return "; ".join(part for part in (place.note, f"calibrated: {record}" if record else "") if part)


def _table(rows: list[Sequence[str]]) -> Iterator[str]:
    """Rows as aligned columns, the first row a heading; text left, figures right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numeric = [all(row[column][:1].isdigit() or not row[column] for row in rows[1:]) for column in range(len(widths))]
    for row in rows:
        cells = (
            f"{cell:>{width}}" if right else f"{cell:<{width}}"
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        yield f"  {'  '.join(cells)}"
