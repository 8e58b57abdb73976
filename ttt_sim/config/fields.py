"""Kinds of fields that a schema is made of. Each reads its part of a YAML tree and describes itself as JSON Schema.

A schema is a table of these (:mod:`ttt_sim.config.chip_schema`). Reading never stops at the first problem: a field that
cannot be read is reported to :class:`Reader` and becomes None, so that one message lists everything that is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from ttt_sim.chip import Certainty, Provenance
from ttt_sim.config.yaml_reader import Place, Problems, YamlList, YamlMapping, YamlNode, YamlScalar, describe
from ttt_sim.data_files import did_you_mean
from ttt_sim.errors import ConfigError
from ttt_sim.units import NUMBER_PATTERN, Dimension, Quantity, parse_quantity, shorten

CERTAINTIES: tuple[str, ...] = get_args(Certainty)
CALIBRATION_KEYS = ("data", "rows", "error", "date")
OVERRIDE = "override"
JsonSchema = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """What is known about one file while its tree is read.

    ``quantities``, ``provenance`` hold every sourced number by dotted path, ``places`` the place of every node read.
    """

    problems: Problems
    sources: Mapping[str, str]
    quantities: dict[str, Quantity] = field(default_factory=dict)
    provenance: dict[str, Provenance] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    used_sources: set[str] = field(default_factory=set)

    def place_of(self, path: str) -> Place:
        """The place of ``path``, or of the nearest thing around it that exists."""
        while path not in self.places:
            path = path.rpartition(".")[0]
        return self.places[path]

    def refuse(self, path: str, text: str) -> None:
        """A problem with a value that was read, found by comparing it with others."""
        self.problems.add(self.place_of(path), path, text)

    def scalar(self, node: YamlNode, path: str, what: str) -> str | None:
        """The text of a scalar node; ``what`` says what was expected."""
        if isinstance(node, YamlScalar) and node.text.strip() not in ("", "~", "null"):
            return node.text.strip()
        self.problems.add(node.place, path, f"must be {what}, found {describe(node)}")
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """``default`` stands in for a missing key; None there means that what is missing stays unknown."""

    doc: str
    required: bool = False
    default: Any = None

    def read(self, node: YamlNode, path: str, reader: Reader) -> Any:
        raise NotImplementedError

    def json_schema(self) -> JsonSchema:
        raise NotImplementedError

    @property
    def expected(self) -> str:
        """What a value looks like, for messages."""
        raise NotImplementedError

    def leaves(self, node: YamlNode | None, path: str) -> Iterator[tuple[str, Field]]:
        """Dotted path and field of every value that could stand below ``node``, present or not."""
        yield path, self


@dataclass(frozen=True, slots=True, kw_only=True)
class Number(Field):
    """A sourced quantity ``{value: 3.35 TB/s, source: ref, certainty: high}`` within ``minimum`` and ``maximum``."""

    dimensions: tuple[Dimension, ...]
    minimum: float = 0.0
    positive: bool = True
    maximum: float | None = None
    whole: bool = False

    @property
    def expected(self) -> str:
        return f"{{value: {self.dimensions[0].example}, source: REF, certainty: {' | '.join(CERTAINTIES)}}}"

    def read(self, node: YamlNode, path: str, reader: Reader) -> float | int | None:
        if isinstance(node, YamlScalar):
            shown = f"{shorten(node.text)}: " if node.text else ""
            value = node.text if self._parses(node.text) else self.dimensions[0].example
            form = self.expected.replace(self.dimensions[0].example, value, 1)
            reader.problems.add(node.place, path, f"{shown}every number needs its source, write {form}")
            return None
        if not isinstance(node, YamlMapping):
            reader.problems.add(node.place, path, f"must be {self.expected}, found {describe(node)}")
            return None
        return _read_sourced(self, node, path, reader)

    def _parses(self, text: str) -> bool:
        try:
            parse_quantity(text, *self.dimensions)
        except ConfigError:
            return False
        return True

    @property
    def base_unit(self) -> str:
        """Unit of a number without one: none where a plain number is allowed, else the base of the first dimension."""
        return "" if any(not dimension.units for dimension in self.dimensions) else self.dimensions[0].base

    def parse(self, text: str) -> Quantity:
        """The quantity in ``text``; raises :class:`ConfigError` when it is malformed or out of range."""
        quantity = parse_quantity(text, *self.dimensions)
        value = quantity.value
        if self.maximum is not None and not (
            self.minimum <= value <= self.maximum and (value > self.minimum or not self.positive)
        ):
            opening = "(" if self.positive else "["
            raise ConfigError(f"{shorten(text)}: must be in {opening}{self.minimum:g}, {self.maximum:g}]")
        if value < self.minimum or (self.positive and value == self.minimum):
            bound = f"greater than {self.minimum:g}" if self.positive else f"at least {self.minimum:g}"
            raise ConfigError(f"{shorten(text)}: must be {bound}")
        if self.whole and value != int(value):
            of_what = f" of {quantity.dimension.base}" if quantity.dimension.base else ""
            raise ConfigError(f"{shorten(text)}: must be a whole number{of_what}")
        return quantity

    def json_schema(self) -> JsonSchema:
        value: list[JsonSchema] = []
        for dimension in self.dimensions:
            if dimension.units:
                units = "|".join(re.escape(unit) for unit in dimension.units)
                value.append({"type": "string", "pattern": f"^\\s*{NUMBER_PATTERN}\\s*({units})\\s*$"})
            else:
                bound = "exclusiveMinimum" if self.positive else "minimum"
                plain: JsonSchema = {"type": "integer" if self.whole else "number", bound: self.minimum}
                value.append(plain | ({} if self.maximum is None else {"maximum": self.maximum}))
        return {
            "type": "object",
            "description": f"{self.doc} Write {self.dimensions[0].name} such as {self.dimensions[0].example}.",
            "properties": {
                "value": value[0] if len(value) == 1 else {"anyOf": value},
                "source": {"type": "string", "description": "A key of `sources`."},
                "certainty": {"enum": list(CERTAINTIES), "description": "How sure the number is."},
                "note": {"type": "string", "description": "Remark in own words."},
                "calibration": {
                    "type": "object",
                    "description": "Record of the fit for a calibrated value.",
                    "properties": {key: {"type": ["string", "number"]} for key in CALIBRATION_KEYS},
                    "required": list(CALIBRATION_KEYS),
                    "additionalProperties": False,
                },
            },
            "required": ["value", "source", "certainty"],
            "additionalProperties": False,
        }


def _read_sourced(number: Number, node: YamlMapping, path: str, reader: Reader) -> float | int | None:
    reader.places[path] = node.place
    refuse_unknown_keys(node, ("value", "source", "certainty", "note", "calibration"), path, reader)
    quantity = None
    text = _entry(node, "value", number.dimensions[0].example, path, reader)
    if text is not None:
        at = node.entries["value"].place
        reader.places[path] = at
        try:
            quantity = number.parse(text)
        except ConfigError as error:
            reader.problems.add(at, path, str(error))
    source = _entry(node, "source", "a key of sources", path, reader)
    if source is not None and source != OVERRIDE and source not in reader.sources:
        hint = did_you_mean(source, list(reader.sources)) or f"; defined: {', '.join(reader.sources) or 'none'}"
        reader.problems.add(
            node.entries["source"].place, f"{path}.source", f"{shorten(source)!r} is not defined under sources{hint}"
        )
        source = None
    certainty = _entry(node, "certainty", " or ".join(CERTAINTIES), path, reader)
    if certainty is not None and certainty not in CERTAINTIES:
        hint = did_you_mean(certainty, CERTAINTIES) or f", expected {', '.join(CERTAINTIES)}"
        unknown = f"{shorten(certainty)!r} is unknown{hint}"
        reader.problems.add(node.entries["certainty"].place, f"{path}.certainty", unknown)
        certainty = None
    note = ""
    if "note" in node.entries:
        note = reader.scalar(node.entries["note"], f"{path}.note", "text") or ""
    calibration = _read_calibration(node, path, reader)
    if source is not None:
        reader.used_sources.add(source)
    if quantity is None or source is None or certainty is None or text is None:
        return None
    reader.quantities[path] = quantity
    reader.provenance[path] = Provenance(
        text=text,
        source=reader.sources.get(source, source),
        certainty=certainty,  # type: ignore[arg-type]
        line=reader.places[path].line,
        note=note,
        calibration=calibration,
    )
    return int(quantity.value) if number.whole else quantity.value


def _entry(node: YamlMapping, key: str, expected: str, path: str, reader: Reader) -> str | None:
    if key not in node.entries:
        reader.problems.add(node.place, path, f"the key {key!r} is missing, expected {expected}")
        return None
    return reader.scalar(node.entries[key], f"{path}.{key}", expected)


def _read_calibration(node: YamlMapping, path: str, reader: Reader) -> dict[str, str]:
    record = node.entries.get("calibration")
    if record is None:
        return {}
    path = f"{path}.calibration"
    if not isinstance(record, YamlMapping):
        reader.problems.add(record.place, path, f"must be a mapping with {', '.join(CALIBRATION_KEYS)}")
        return {}
    refuse_unknown_keys(record, CALIBRATION_KEYS, path, reader)
    entries = {key: _entry(record, key, "text", path, reader) for key in CALIBRATION_KEYS}
    return {key: text for key, text in entries.items() if text is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Text(Field):
    """Plain text; ``pattern`` is a whole-match regular expression, which ``pattern_help`` puts in words."""

    pattern: str = ".+"
    pattern_help: str = "text"

    @property
    def expected(self) -> str:
        return self.pattern_help

    def read(self, node: YamlNode, path: str, reader: Reader) -> str | None:
        reader.places[path] = node.place
        text = reader.scalar(node, path, self.expected)
        if text is not None and re.fullmatch(self.pattern, text) is None:
            reader.problems.add(node.place, path, f"{shorten(text)!r}: must be {self.expected}")
            return None
        return text

    def json_schema(self) -> JsonSchema:
        return {"type": "string", "pattern": f"^{self.pattern}$", "description": self.doc}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice(Field):
    """One of ``options``."""

    options: tuple[str, ...]

    @property
    def expected(self) -> str:
        return f"one of {', '.join(self.options)}"

    def read(self, node: YamlNode, path: str, reader: Reader) -> str | None:
        reader.places[path] = node.place
        text = reader.scalar(node, path, self.expected)
        if text is not None and text not in self.options:
            hint = did_you_mean(text, self.options)
            reader.problems.add(node.place, path, f"{shorten(text)!r}: must be {self.expected}{hint}")
            return None
        return text

    def json_schema(self) -> JsonSchema:
        return {"enum": list(self.options), "description": self.doc}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag(Field):
    """``true`` or ``false``, nothing else."""

    @property
    def expected(self) -> str:
        return "true or false"

    def read(self, node: YamlNode, path: str, reader: Reader) -> bool | None:
        reader.places[path] = node.place
        text = reader.scalar(node, path, self.expected)
        if text is not None and text not in ("true", "false"):
            reader.problems.add(node.place, path, f"{shorten(text)}: must be {self.expected}")
            return None
        return None if text is None else text == "true"

    def json_schema(self) -> JsonSchema:
        return {"type": "boolean", "description": self.doc}


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeNumber(Field):
    """A plain whole number of at least one: a structural choice that needs no source."""

    @property
    def expected(self) -> str:
        return "a whole number of at least 1"

    def read(self, node: YamlNode, path: str, reader: Reader) -> int | None:
        reader.places[path] = node.place
        text = reader.scalar(node, path, self.expected)
        if text is None:
            return None
        number = whole(text)
        if number is None:
            reader.problems.add(node.place, path, f"{shorten(text)}: must be {self.expected}")
        return number

    def json_schema(self) -> JsonSchema:
        return {"type": "integer", "minimum": 1, "description": self.doc}


@dataclass(frozen=True, slots=True, kw_only=True)
class TileList(Field):
    """A menu of output tiles ``[[rows, columns], ...]``, read as a tuple of pairs."""

    @property
    def expected(self) -> str:
        return "a list of [rows, columns] pairs such as [[128, 128], [64, 64]]"

    def read(self, node: YamlNode, path: str, reader: Reader) -> tuple[tuple[int, int], ...] | None:
        reader.places[path] = node.place
        if not isinstance(node, YamlList) or not node.items:
            reader.problems.add(node.place, path, f"must be {self.expected}, found {describe(node)}")
            return None
        tiles: list[tuple[int, int]] = []
        for index, item in enumerate(node.items):
            sides = item.items if isinstance(item, YamlList) else ()
            numbers = [whole(side.text) for side in sides if isinstance(side, YamlScalar)]
            if len(numbers) != 2 or len(sides) != 2 or numbers[0] is None or numbers[1] is None:
                reader.problems.add(
                    item.place, f"{path}[{index}]", "must be a pair [rows, columns] of whole numbers of at least 1"
                )
                continue
            tiles.append((numbers[0], numbers[1]))
        return tuple(tiles) if len(tiles) == len(node.items) else None

    def json_schema(self) -> JsonSchema:
        side = {"type": "integer", "minimum": 1}
        pair = {"type": "array", "items": side, "minItems": 2, "maxItems": 2}
        return {"type": "array", "items": pair, "minItems": 1, "description": self.doc}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTable(Field):
    """A mapping of free names to text (``sources``)."""

    @property
    def expected(self) -> str:
        return "a mapping of names to text"

    def read(self, node: YamlNode, path: str, reader: Reader) -> dict[str, str] | None:
        reader.places[path] = node.place
        if not isinstance(node, YamlMapping):
            reader.problems.add(node.place, path, f"must be {self.expected}, found {describe(node)}")
            return None
        table = {key: reader.scalar(below, f"{path}.{key}", "text") for key, below in node.entries.items()}
        return {key: text for key, text in table.items() if text is not None}

    def json_schema(self) -> JsonSchema:
        return {"type": "object", "additionalProperties": {"type": "string"}, "description": self.doc}

    def leaves(self, node: YamlNode | None, path: str) -> Iterator[tuple[str, Field]]:
        return iter(())


def whole(text: str) -> int | None:
    """A whole number of at least one, None for anything else."""
    return int(text) if re.fullmatch(r"[0-9]{1,15}", text) and int(text) > 0 else None


def refuse_unknown_keys(node: YamlMapping, known: Sequence[str], path: str, reader: Reader) -> None:
    """Report every key of ``node`` that is not ``known``, with the nearest spelling."""
    for key in node.entries:
        if key not in known:
            hint = did_you_mean(key, list(known)) or f", expected one of {', '.join(known)}"
            shown = shorten(key)
            reader.problems.add(node.key_places[key], f"{path}.{shown}" if path else shown, f"unknown key{hint}")
