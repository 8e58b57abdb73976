"""Fields that hold other fields: mappings with fixed keys, tables keyed by dtype, and lists of named items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ttt_sim.config.fields import Field, JsonSchema, Number, Reader, refuse_unknown_keys
from ttt_sim.config.yaml_reader import YamlList, YamlMapping, YamlNode, YamlScalar, describe


def join(path: str, key: str) -> str:
    """``path.key``, or ``key`` at the top."""
    return f"{path}.{key}" if path else key


@dataclass(frozen=True, slots=True, kw_only=True)
class Group(Field):
    """A mapping with the keys of ``fields``. Read as a dict that has every key, defaults filled in."""

    fields: Mapping[str, Field]

    @property
    def expected(self) -> str:
        return f"a mapping with {', '.join(key for key, below in self.fields.items() if below.required)}"

    def read(self, node: YamlNode, path: str, reader: Reader) -> dict[str, Any] | None:
        reader.places[path] = node.place
        if not isinstance(node, YamlMapping):
            reader.problems.add(node.place, path, f"must be {self.expected}, found {describe(node)}")
            return None
        refuse_unknown_keys(node, tuple(self.fields), path, reader)
        values: dict[str, Any] = {}
        for key, below in self.fields.items():
            if key in node.entries:
                values[key] = below.read(node.entries[key], join(path, key), reader)
                continue
            if below.required:
                reader.problems.add(node.place, join(path, key), f"is missing, expected {below.expected}")
            values[key] = below.absent() if isinstance(below, Group) else below.default
        return values

    def absent(self) -> dict[str, Any] | None:
        """What stands for a missing group: its defaults, unless it is one that must be given whole."""
        if any(below.required for below in self.fields.values()):
            return None
        return {
            key: below.absent() if isinstance(below, Group) else below.default for key, below in self.fields.items()
        }

    def json_schema(self) -> JsonSchema:
        return {
            "type": "object",
            "description": self.doc,
            "properties": {key: below.json_schema() for key, below in self.fields.items()},
            "required": [key for key, below in self.fields.items() if below.required],
            "additionalProperties": False,
        }

    def leaves(self, node: YamlNode | None, path: str) -> Iterator[tuple[str, Field]]:
        for key, below in self.fields.items():
            child = node.entries.get(key) if isinstance(node, YamlMapping) else None
            yield from below.leaves(child, join(path, key))


@dataclass(frozen=True, slots=True, kw_only=True)
class Table(Field):
    """Numbers of one kind by key, the keys among ``keys``."""

    keys: tuple[str, ...]
    value: Number

    @property
    def expected(self) -> str:
        return f"a mapping of {', '.join(self.keys)} to {self.value.expected}"

    def read(self, node: YamlNode, path: str, reader: Reader) -> dict[str, float | int | None] | None:
        reader.places[path] = node.place
        if not isinstance(node, YamlMapping) or (self.required and not node.entries):
            reader.problems.add(node.place, path, f"must be {self.expected}, found {describe(node)}")
            return None
        refuse_unknown_keys(node, self.keys, path, reader)
        return {
            key: self.value.read(below, join(path, key), reader)
            for key, below in node.entries.items()
            if key in self.keys
        }

    def json_schema(self) -> JsonSchema:
        schema: JsonSchema = {
            "type": "object",
            "description": self.doc,
            "properties": {key: self.value.json_schema() for key in self.keys},
            "additionalProperties": False,
        }
        return schema | ({"minProperties": 1} if self.required else {})

    def leaves(self, node: YamlNode | None, path: str) -> Iterator[tuple[str, Field]]:
        for key in self.keys:
            yield join(path, key), self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Items(Field):
    """A list of groups, each with a ``name`` of its own that stands in dotted paths."""

    item: Group

    @property
    def expected(self) -> str:
        return f"a list of items, each {self.item.expected}"

    def read(self, node: YamlNode, path: str, reader: Reader) -> list[dict[str, Any]] | None:
        reader.places[path] = node.place
        if not isinstance(node, YamlList) or (self.required and not node.items):
            reader.problems.add(node.place, path, f"must be {self.expected}, found {describe(node)}")
            return None
        values: list[dict[str, Any]] = []
        names: set[str] = set()
        for index, item in enumerate(node.items):
            name = item_name(item)
            below = f"{path}[{index}]" if name is None or name in names else join(path, name)
            if name is not None and name in names:
                reader.problems.add(item.place, f"{below}.name", f"{name!r} is the name of an earlier item")
            names.add(name or "")
            value = self.item.read(item, below, reader)
            if value is not None:
                values.append(value)
        return values

    def json_schema(self) -> JsonSchema:
        schema: JsonSchema = {"type": "array", "description": self.doc, "items": self.item.json_schema()}
        return schema | ({"minItems": 1} if self.required else {})

    def leaves(self, node: YamlNode | None, path: str) -> Iterator[tuple[str, Field]]:
        for item in node.items if isinstance(node, YamlList) else ():
            name = item_name(item)
            if name is not None:
                yield from (
                    (below, leaf)
                    for below, leaf in self.item.leaves(item, join(path, name))
                    if below != f"{path}.{name}.name"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Variants(Field):
    """Sold versions by device name: dotted paths with the values in which they differ.

    Only the shape is read here; the loader applies each variant to the file and reads the result as a whole.
    """

    @property
    def expected(self) -> str:
        return "a mapping of device names to {dotted.path: value}"

    def read(self, node: YamlNode, path: str, reader: Reader) -> dict[str, YamlMapping] | None:
        reader.places[path] = node.place
        if not isinstance(node, YamlMapping):
            reader.problems.add(node.place, path, f"must be {self.expected}, found {describe(node)}")
            return None
        variants: dict[str, YamlMapping] = {}
        for name, body in node.entries.items():
            if isinstance(body, YamlMapping):
                variants[name] = body
            else:
                reader.problems.add(
                    body.place,
                    join(path, name),
                    f"must map dotted paths to values ({{}} for none), found {describe(body)}",
                )
        return variants

    def json_schema(self) -> JsonSchema:
        return {"type": "object", "additionalProperties": {"type": "object"}, "description": self.doc}

    def leaves(self, node: YamlNode | None, path: str) -> Iterator[tuple[str, Field]]:
        return iter(())


def item_name(item: YamlNode) -> str | None:
    """The ``name`` of a list item, None where it has none that could stand in a path."""
    name = item.entries.get("name") if isinstance(item, YamlMapping) else None
    return name.text if isinstance(name, YamlScalar) and name.text and "." not in name.text else None
