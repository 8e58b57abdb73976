"""What must hold between the values of a chip file, one function per section; unreadable values are skipped."""

from __future__ import annotations

from typing import Any

from ttt_sim.config.fields import Reader
from ttt_sim.units import FLOP_RATE, OP_RATE

Values = dict[str, Any]


def check_chip(chip: Values, reader: Reader) -> None:
    """Report every contradiction in the values of a chip file to ``reader``."""
    compute = [unit for unit in chip["compute"] or [] if unit["name"] is not None]
    memories = [memory for memory in chip["memories"] or [] if memory["name"] is not None]
    for unit in compute:
        _check_unit(unit, reader)
    _check_compute(compute, reader)
    for memory in memories:
        _check_memory(memory, reader)
    _check_hierarchy(memories, compute, reader)
    _check_links(chip["links"] or [], memories, compute, reader)
    _check_power(chip["power"], reader)
    _check_price(chip["price"], reader)
    _check_writability(chip["writability"], memories, reader)


def _check_compute(compute: list[Values], reader: Reader) -> None:
    kinds: dict[str, str] = {}
    for unit in compute:
        kind, name = unit["kind"], unit["name"]
        if kind in kinds:
            reader.refuse(f"compute.{name}.kind", f"a second {kind} unit beside {kinds[kind]!r}; describe them as one")
        elif kind is not None:
            kinds[kind] = name
    if compute and all(unit["kind"] == "special" for unit in compute):
        reader.refuse("compute", "needs a matrix or a vector unit")


def _check_unit(unit: Values, reader: Reader) -> None:
    path = f"compute.{unit['name']}"
    if unit["kind"] == "matrix":
        if unit["dataflow"] is None and f"{path}.dataflow" not in reader.places:
            reader.refuse(f"{path}.dataflow", "is missing: a matrix unit needs its dataflow")
        if unit["geometry"] is None and f"{path}.geometry" not in reader.places:
            reader.refuse(f"{path}.geometry", "is missing: a matrix unit needs {rows: .., cols: .., depth: ..}")
    elif unit["kind"] is not None:
        for key in ("dataflow", "geometry", "tiles"):
            if unit[key] is not None and unit[key] != "none":
                reader.refuse(f"{path}.{key}", f"belongs to matrix units, {unit['name']!r} is a {unit['kind']} unit")
    _check_tiles(unit, path, reader)
    for key in ("issue", "load", "double_buffer"):
        owners = ("weight_stationary", "in_array") if key == "issue" else ("weight_stationary",)
        if unit["dataflow"] not in owners and f"{path}.{key}" in reader.places:
            reader.refuse(
                f"{path}.{key}",
                f"belongs to {' and '.join(owners)} arrays, {unit['name']!r} is {unit['dataflow'] or 'none'}",
            )
    peak = unit["peak"] or {}
    for table in ("efficiency", "energy", "ops_per_cycle"):
        for dtype in unit[table] or {}:
            if peak and dtype not in peak:
                reader.refuse(f"{path}.{table}.{dtype}", f"has no peak to go with: peak.{dtype} is not given")
    if unit["kind"] in ("vector", "special"):
        for dtype in peak:
            quantity = reader.quantities.get(f"{path}.peak.{dtype}")
            if (
                quantity is not None
                and quantity.dimension is FLOP_RATE
                and reader.place_of(f"{path}.peak.{dtype}").line
            ):
                reader.refuse(
                    f"{path}.peak.{dtype}",
                    f"must be in op/s ({OP_RATE.example}): lane operations, where a fused multiply-add counts once",
                )


def _check_tiles(unit: Values, path: str, reader: Reader) -> None:
    geometry = unit["geometry"] or {}
    rows, cols = geometry.get("rows"), geometry.get("cols")
    if rows is None or cols is None:
        return
    for tile_rows, tile_cols in unit["tiles"] or ():
        if tile_rows % rows or tile_cols % cols:
            reader.refuse(
                f"{path}.tiles", f"[{tile_rows}, {tile_cols}]: must be multiples of the geometry's {rows} x {cols}"
            )


def _check_memory(memory: Values, reader: Reader) -> None:
    path = f"memories.{memory['name']}"

    def above(key: str, limit: str) -> bool:
        value, bound = memory[key], memory[limit]
        return value is not None and bound is not None and value > bound

    if above("channel_groups", "channels") or (
        memory["channels"] and memory["channel_groups"] and memory["channels"] % memory["channel_groups"]
    ):
        reader.refuse(
            f"{path}.channel_groups",
            f"{memory['channel_groups']}: must divide the {memory['channels']} channels evenly",
        )
    for key in ("interleave", "row_size", "write_granularity"):
        # a default that exceeds a tiny capacity is cut to it when the chip is built
        if above(key, "capacity") and f"{path}.{key}" in reader.places:
            reader.refuse(f"{path}.{key}", f"{memory[key]} B: must not exceed the capacity of {memory['capacity']} B")
    if memory["row_miss"] and memory["row_size"] is None and f"{path}.row_size" not in reader.places:
        reader.refuse(f"{path}.row_miss", "needs row_size: without rows there is nothing to miss")
    if memory["shared_bus"] is False:
        for key in ("read_to_write", "write_to_read"):
            if memory[key]:
                reader.refuse(f"{path}.{key}", "needs shared_bus: true, separate ports never turn around")
    elif memory["shared_bus"] and above("write_bandwidth", "read_bandwidth"):
        reader.refuse(
            f"{path}.write_bandwidth", "must not exceed read_bandwidth: with shared_bus: true both use one bus"
        )
    if memory["endurance"] is not None and memory["volatile"] and f"{path}.volatile" not in reader.places:
        reader.refuse(f"{path}.endurance", "belongs to memory that wears out: say volatile: false, or true on purpose")


def _check_hierarchy(memories: list[Values], compute: list[Values], reader: Reader) -> None:
    if memories and memories[0]["scope"] == "core":
        name = memories[0]["name"]
        reader.refuse(
            f"memories.{name}.scope",
            "the outermost level must have scope chip; describe memory that is spread over the cores by its total",
        )
    for place, memory in enumerate(memories):
        if memory["scope"] == "backing" and (place or not any(level["scope"] == "chip" for level in memories)):
            reader.refuse(
                f"memories.{memory['name']}.scope",
                "a backing memory comes first in the list, before the main memory of scope chip",
            )
    inner_core = None
    for memory in memories[1:]:
        if memory["scope"] == "core":
            inner_core = memory["name"]
        elif memory["scope"] == "chip" and inner_core is not None:
            reader.refuse(
                f"memories.{memory['name']}.scope",
                f"a level of the whole chip cannot lie inside {inner_core!r} of one core; list memories outermost "
                f"first",
            )
    names = {unit["name"] for unit in compute}
    for memory in memories:
        if memory["name"] in names:
            reader.refuse(
                f"memories.{memory['name']}.name", f"{memory['name']!r} is already the name of a compute unit"
            )


def _check_links(links: list[Values], memories: list[Values], compute: list[Values], reader: Reader) -> None:
    """Times and energies are told by the name of the part."""
    names = {memory["name"]: "memory" for memory in memories} | {unit["name"]: "compute unit" for unit in compute}
    for link in links:
        if link["name"] in names:
            reader.refuse(
                f"links.{link['name']}.name", f"{link['name']!r} is already the name of a {names[link['name']]}"
            )


def _check_power(power: Values | None, reader: Reader) -> None:
    if power and power["idle"] is not None and power["limit"] is not None and power["idle"] >= power["limit"]:
        reader.refuse(
            "power.idle",
            f"{power['idle']:g} W: must be below the limit of {power['limit']:g} W, or nothing is left to work with",
        )


def _check_price(price: Values | None, reader: Reader) -> None:
    if price and (price["per_hour"] or price["purchase"]) and price["as_of"] == "":
        reader.refuse("price.as_of", "is missing: a price needs its date, YYYY-MM")


def _check_writability(rules: Values | None, memories: list[Values], reader: Reader) -> None:
    if not rules or rules["mode"] is None:
        return
    mode = rules["mode"]
    timed = rules["reupload_time"] or rules["reupload_bandwidth"]
    if mode == "reupload" and not timed:
        reader.refuse("writability.mode", "reupload needs reupload_time or reupload_bandwidth")
    if mode != "reupload" and timed:
        key = "reupload_time" if rules["reupload_time"] else "reupload_bandwidth"
        reader.refuse(f"writability.{key}", f"belongs to mode reupload, the mode is {mode}")
    if mode == "none":
        for key in ("overlap", "shadow_bank", "accumulate"):
            if rules[key]:
                reader.refuse(f"writability.{key}", "true contradicts mode none: weights are never written")
    if mode != "program_verify":
        for memory in memories:
            if memory["write_pulses"] is not None and memory["write_pulses"] > 1:
                reader.refuse(
                    f"memories.{memory['name']}.write_pulses", f"belongs to mode program_verify, the mode is {mode}"
                )
