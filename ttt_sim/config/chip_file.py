"""Chip files to :class:`~ttt_sim.chip.Chip`: finding them, applying variants and overrides, reporting all faults."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt_sim import data_files
from ttt_sim.chip import (
    Chip,
    ComputeUnit,
    Library,
    Link,
    MappingRules,
    MemoryLevel,
    Overheads,
    Power,
    Price,
    Writability,
)
from ttt_sim.config.chip_rules import check_chip
from ttt_sim.config.chip_schema import CHIP
from ttt_sim.config.fields import OVERRIDE, Field, Number, Reader, TileList
from ttt_sim.config.groups import item_name
from ttt_sim.config.yaml_reader import (
    Place,
    Problems,
    YamlList,
    YamlMapping,
    YamlNode,
    YamlScalar,
    parse_yaml,
    read_yaml,
)
from ttt_sim.data_files import did_you_mean
from ttt_sim.errors import ConfigError

FOLDER = "hw_configs"
_SUFFIXES = (".yaml", ".yml")
_NOT_SETTABLE = ("name",)
#: A file with none of these is one of another kind.
_TELLING_KEYS = ("execution", "clock", "cores", "compute", "memories")
Values = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChipFile:
    """A chip file that was read and found free of errors, all variants included."""

    path: Path
    label: str
    tree: YamlMapping
    sha256: str
    variants: tuple[str, ...]
    sources: Mapping[str, str]
    used_sources: frozenset[str]
    source_lines: Mapping[str, int]


def chip_names() -> list[str]:
    """Names of the built-in chips."""
    return data_files.names(FOLDER, ".yaml")


def load_chip(
    chip: str | Path, *, variant: str | None = None, overrides: Mapping[str, str | float | int] | None = None
) -> Chip:
    """Load a chip by name or path.

    ``chip``       built-in name, path of a YAML file, or either followed by ``:VARIANT``
    ``variant``    device name under ``variants:``
    ``overrides``  dotted path (``memories.hbm.read_bandwidth``, list items by name) to a quantity as files write it, or
                   to a number (no text) in base units; applied after the variant, with the same checks

    Raises :class:`ConfigError` with everything that is wrong, one line each.
    """
    chip, named_variant = split_variant(chip)
    if variant is not None and named_variant is not None and variant != named_variant:
        raise ConfigError(f"two variants given: {named_variant!r} in the chip's name and {variant!r}")
    return build_chip(read_chip_file(chip), variant=variant or named_variant, overrides=overrides)


def read_chip_file(chip: str | Path, content: bytes | None = None) -> ChipFile:
    """Read and check a chip file with all its variants; raises :class:`ConfigError` with everything that is wrong.

    ``content``  what the file will hold, to be checked before it is written
    """
    path = _resolve(chip) if content is None else Path(chip)
    label = _label(path)
    tree, raw = read_yaml(path, label, content)
    if not tree.entries.keys() & set(_TELLING_KEYS):
        raise ConfigError(f"{tree.place}: is not a chip file, it has none of the keys {', '.join(_TELLING_KEYS)}")
    problems = Problems()
    values, reader = _read(tree, problems)
    used = set(reader.used_sources)
    variants = (values["variants"] or {}) if values else {}
    known = {(place, key) for place, key, _ in problems.found}
    for name, body in variants.items():
        varied, of_variant = tree, Problems()
        for key, node in body.entries.items():
            varied = _set(varied, key, node, f"variants.{name}.{key}", body.key_places[key], of_variant)
        if known:  # a path may be unknown only because the section it leads to could not be read
            of_variant.found.clear()
        _, varied_reader = _read(varied, of_variant)
        used |= varied_reader.used_sources
        problems.found.extend(problem for problem in of_variant.found if problem[:2] not in known)
    problems.raise_if_any()
    sources = tree.entries["sources"]
    lines = {key: place.line for key, place in sources.key_places.items()} if isinstance(sources, YamlMapping) else {}
    return ChipFile(
        path=path,
        label=label,
        tree=tree,
        sha256=hashlib.sha256(raw).hexdigest(),
        variants=tuple(variants),
        sources=reader.sources,
        used_sources=frozenset(used),
        source_lines=lines,
    )


def build_chip(
    file: ChipFile, *, variant: str | None = None, overrides: Mapping[str, str | float | int] | None = None
) -> Chip:
    """The chip that ``file`` describes, as ``variant`` and with ``overrides``; see :func:`load_chip`."""
    problems = Problems()
    tree = file.tree
    if variant is not None:
        if variant not in file.variants:
            known = f"; it has {', '.join(file.variants)}" if file.variants else "; it has no variants"
            raise ConfigError(f"{file.label}: unknown variant {variant!r}{did_you_mean(variant, file.variants)}{known}")
        body = _mapping(_mapping(tree.entries["variants"]).entries[variant])
        for key, node in body.entries.items():
            tree = _set(tree, key, node, key, body.key_places[key], problems)
    leaves = dict(CHIP.leaves(tree, ""))
    texts = {path: _text_of(value, leaves.get(path)) for path, value in (overrides or {}).items()}
    for path, text in texts.items():
        tree = _override(tree, path, text, problems)
    problems.raise_if_any()
    values, reader = _read(tree, problems)
    problems.raise_if_any()
    if values is None:
        raise AssertionError("a chip without problems was not read")
    return _build(values, reader, variant=variant or "", sha256=file.sha256, overrides=texts)


def _read(tree: YamlMapping, problems: Problems) -> tuple[Values | None, Reader]:
    sources = tree.entries.get("sources")
    known: dict[str, str] = {}
    if isinstance(sources, YamlMapping):
        known = {key: node.text for key, node in sources.entries.items() if isinstance(node, YamlScalar)}
    reader = Reader(problems=problems, sources=known)
    if isinstance(sources, YamlMapping) and OVERRIDE in known:
        problems.add(sources.key_places[OVERRIDE], f"sources.{OVERRIDE}", "is a reserved name, choose another")
    values = CHIP.read(tree, "", reader)
    if values is not None:
        check_chip(values, reader)
    return values, reader


def split_variant(chip: str | Path) -> tuple[str | Path, str | None]:
    """Chip and variant of ``chip:VARIANT``."""
    if isinstance(chip, Path) or ":" not in chip or Path(chip).exists():
        return chip, None
    name, _, variant = chip.rpartition(":")
    return name, variant


def _resolve(chip: str | Path) -> Path:
    if isinstance(chip, str) and not chip.endswith(_SUFFIXES) and "/" not in chip and "\\" not in chip:
        return data_files.find(FOLDER, chip, ".yaml")
    path = Path(chip)
    if path.is_dir():
        raise ConfigError(f"{chip}: is a folder, expected a chip file or one of the chips {', '.join(chip_names())}")
    if not path.exists():
        built_in = chip_names()
        hint = f"; {path.stem} is a built-in chip, use that name" if path.stem in built_in else ""
        near = did_you_mean(path.stem, built_in) if not hint else ""
        raise ConfigError(f"{chip}: no such file{hint}{near}")
    return path


def _label(path: Path) -> str:
    """How messages name the file: relative to the working folder where it lies below it."""
    resolved, here = path.resolve(), Path.cwd()
    return str(resolved.relative_to(here)) if resolved.is_relative_to(here) else str(path)


def _text_of(value: str | float | int, leaf: Field | None) -> str:
    """An override as a file would write it: a number for a quantity with a unit is in its base unit."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) or not isinstance(leaf, Number) or not math.isfinite(value):
        return str(value).strip()
    return f"{value} {leaf.base_unit}".strip()


def _override(tree: YamlMapping, path: str, text: str, problems: Problems) -> YamlMapping:
    place = Place(label=OVERRIDE)
    leaf = dict(CHIP.leaves(tree, "")).get(path)
    node: YamlNode = YamlScalar(place=place, text=text)
    if isinstance(leaf, Number):
        entries: dict[str, YamlNode] = {
            "value": node,
            "source": YamlScalar(place=place, text=OVERRIDE),
            "certainty": YamlScalar(place=place, text="high"),
        }
        node = YamlMapping(place=place, entries=entries)
    elif isinstance(leaf, TileList):
        node = parse_yaml(text, OVERRIDE, place=place) or node
    return _set(tree, path, node, path, place, problems)


def _set(
    tree: YamlMapping, path: str, node: YamlNode, shown_path: str, place: Place, problems: Problems
) -> YamlMapping:
    """``tree`` with the value at dotted ``path`` replaced or added; reports a path that the schema does not know."""
    known = dict(CHIP.leaves(tree, ""))
    for name in _NOT_SETTABLE:
        known.pop(name)
    if path in known:
        return _mapping(_replaced(tree, tuple(path.split(".")), node))
    below = [key for key in known if key.startswith(f"{path}.")]
    if below:
        hint = f", it holds {', '.join(below[:6])}{', ...' if len(below) > 6 else ''}"
    else:
        hint = did_you_mean(path, list(known))
    problems.add(place, shown_path, f"unknown path{hint}")
    return tree


def _replaced(tree: YamlNode | None, keys: tuple[str, ...], node: YamlNode) -> YamlNode:
    if not keys:
        return node
    if isinstance(tree, YamlList):
        items = tuple(_replaced(item, keys[1:], node) if item_name(item) == keys[0] else item for item in tree.items)
        return YamlList(place=tree.place, items=items)
    entries = dict(tree.entries) if isinstance(tree, YamlMapping) else {}
    places = dict(tree.key_places) if isinstance(tree, YamlMapping) else {}
    entries[keys[0]] = _replaced(entries.get(keys[0]), keys[1:], node)
    places.setdefault(keys[0], node.place)
    return YamlMapping(place=tree.place if tree is not None else node.place, entries=entries, key_places=places)


def _mapping(node: YamlNode) -> YamlMapping:
    if not isinstance(node, YamlMapping):
        raise AssertionError(f"{node.place}: expected a mapping")
    return node


def _build(values: Values, reader: Reader, *, variant: str, sha256: str, overrides: Mapping[str, str]) -> Chip:
    mapping, overheads, power = values["mapping"], values["overheads"], values["power"]
    price, rules = values["price"], values["writability"]
    return Chip(
        name=values["name"],
        title=values["title"],
        vendor=values["vendor"],
        kind=values["kind"],
        execution=values["execution"],
        clock_hz=values["clock"],
        cores=values["cores"],
        units=tuple(_unit(unit) for unit in values["compute"]),
        memories=tuple(_memory(memory) for memory in values["memories"]),
        links=tuple(
            Link(
                name=link["name"],
                topology=link["topology"],
                bytes_per_s=link["bandwidth"],
                latency_s=link["latency"],
                count=link["count"],
                scope=link["scope"],
                energy_j_per_byte=link["energy"],
                start_s=link["start"],
                short_frac=link["short_fraction"],
                bulk_frac=link["bulk_fraction"],
                bulk_start_s=link["bulk_start"],
                peers=link["peers"],
            )
            for link in values["links"]
        ),
        mapping=MappingRules(
            fusion=mapping["fusion"],
            serial_kernels=mapping["serial_kernels"],
            persistent=mapping["persistent"],
            max_split_k=mapping["max_split_k"],
            multicast=mapping["multicast"],
            attention_efficiency=mapping["attention_efficiency"],
            cache_frac=mapping["cache_fraction"],
        ),
        overheads=Overheads(op_launch_s=overheads["op_launch"], call_s=overheads["call"]),
        power=Power(limit_w=power["limit"], idle_w=power["idle"]),
        price=Price(per_hour_usd=price["per_hour"], purchase_usd=price["purchase"], as_of=price["as_of"]),
        writability=Writability(
            mode=rules["mode"],
            overlap=rules["overlap"],
            shadow_bank=rules["shadow_bank"],
            transposed_read=rules["transposed_read"],
            accumulate=rules["accumulate"],
            granularity=rules["granularity"],
            reupload_s=rules["reupload_time"],
            reupload_bytes_per_s=rules["reupload_bandwidth"],
        ),
        library=_library(values["library"]),
        process=values["process"],
        die_area_mm2=values["die_area"],
        area_overhead=values["area_overhead"],
        variant=variant,
        file_sha256=sha256,
        overrides=dict(overrides),
        provenance=dict(reader.provenance),
    )


def _unit(unit: Values) -> ComputeUnit:
    geometry = unit["geometry"] or {"rows": 1, "cols": 1, "depth": 1}
    default_tiles = ((geometry["rows"], geometry["cols"]),) if unit["kind"] == "matrix" else ()
    return ComputeUnit(
        name=unit["name"],
        kind=unit["kind"],
        count=unit["count"],
        peak_per_s=dict(unit["peak"]),
        efficiency={dtype: unit["efficiency"].get(dtype, 1.0) for dtype in unit["peak"]},
        energy_j_per_op={dtype: unit["energy"].get(dtype, 0.0) for dtype in unit["peak"]},
        dataflow=unit["dataflow"] or "none",
        rows=geometry["rows"],
        cols=geometry["cols"],
        depth=geometry["depth"],
        tiles=unit["tiles"] or default_tiles,
        startup_cycles=unit["startup"],
        issue_cycles=unit["issue"],
        load_cycles=unit["load"],
        double_buffer=unit["double_buffer"],
        ops_per_cycle=dict(unit["ops_per_cycle"]),
        area_mm2=unit["area"],
    )


def _library(rules: Values) -> Library:
    return Library(
        kernel_cycles=rules["kernel"],
        reduction_cycles=rules["reduction"],
        small_tile_loss=rules["small_tile_loss"],
        drain_frac=rules["drain_fraction"],
        warm_frac=rules["warm_fraction"],
        stream_frac=dict(rules["stream_fraction"]),
        row_cycles=rules["row"],
        row_bytes=rules["row_capacity"] or 0,
        attention_rows=rules["attention_rows"],
        attention_short_rows=rules["attention_short_rows"],
        attention_packing=rules["attention_packing"],
        attention_setup_cycles=rules["attention_setup"],
        attention_start_cycles=rules["attention_start"],
        decode_start_cycles=rules["decode_start"],
        decode_row_cycles=rules["decode_row"],
        attention_tail=rules["attention_tail"],
        softmax_exposed=rules["softmax_exposed"],
        core_fetch_bytes_per_cycle=rules["core_fetch"],
        split_fill=rules["split_fill"],
        max_split=rules["max_split"],
        combine_cycles=rules["combine"],
        combine_split_cycles=rules["combine_split"],
        regroup_cycles=rules["regroup"],
        scan_setup_cycles=rules["scan_setup"],
        scan_start_cycles=rules["scan_start"],
        scan_chunk_cycles=rules["scan_chunk"],
        scan_fetch_bytes_per_cycle=rules["scan_fetch"],
        scan_chunk_tokens=rules["scan_chunk_tokens"],
    )


def _memory(memory: Values) -> MemoryLevel:
    read, pulses = memory["read_bandwidth"], memory["write_pulses"]
    read_energy = memory["read_energy"]
    write_energy = read_energy if memory["write_energy"] is None else memory["write_energy"]
    capacity = memory["capacity"]
    return MemoryLevel(
        name=memory["name"],
        scope=memory["scope"],
        capacity_bytes=capacity,
        read_bytes_per_s=read,
        write_bytes_per_s=(memory["write_bandwidth"] or read) / pulses,
        shared_bus=memory["shared_bus"],
        channels=memory["channels"],
        channel_groups=memory["channel_groups"],
        banks_per_channel=memory["banks_per_channel"],
        interleave_bytes=min(memory["interleave"], capacity),
        row_bytes=memory["row_size"] or capacity,
        row_miss_s=memory["row_miss"],
        latency_s=memory["latency"],
        read_to_write_s=memory["read_to_write"],
        write_to_read_s=memory["write_to_read"],
        achievable_frac=memory["achievable_fraction"],
        read_energy_j_per_byte=read_energy,
        write_energy_j_per_byte=write_energy * pulses,
        write_granularity_bytes=memory["write_granularity"],
        volatile=memory["volatile"],
        endurance_writes=memory["endurance"],
        write_pulses=pulses,
        channel_bytes_per_s=memory["channel_rate"],
        transfer_start_s=memory["transfer_start"],
        transfer_engines=memory["transfer_engines"],
        density_bytes_per_mm2=memory["density"],
    )
