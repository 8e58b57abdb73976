"""YAML text to a tree that keeps line numbers and loses nothing: no guessed types, duplicate keys, aliases or tags.

Scalars stay text; what they mean is decided by the field that reads them. So ``3.35e12``, ``no`` and ``2026-05`` cannot
turn into something else on the way, which a plain YAML loader does not promise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ttt_sim.errors import ConfigError
from ttt_sim.units import shorten

#: libyaml where it is built in (ten times faster), the pure Python reader otherwise; both give the same tree.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
#: Flow collections nested deeper than this are refused before the reader's recursion meets them.
_MAX_DEPTH = 50
_TOO_DEEP = f"is nested more than {_MAX_DEPTH} levels deep"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a piece of input stands: a line of a file, or an override (``line`` 0)."""

    label: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.label}:{self.line}" if self.line else self.label


@dataclass(frozen=True, slots=True, kw_only=True)
class YamlScalar:
    """``text`` as written, without quotes."""

    place: Place
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class YamlList:
    place: Place
    items: tuple[YamlNode, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class YamlMapping:
    """``entries`` in file order; ``key_places`` has the place of each key."""

    place: Place
    entries: dict[str, YamlNode]
    key_places: dict[str, Place] = field(default_factory=dict)


YamlNode = YamlScalar | YamlList | YamlMapping


@dataclass(frozen=True, slots=True)
class Problems:
    """Everything wrong with one input, raised as one :class:`ConfigError` with a line each."""

    found: list[tuple[Place, str, str]] = field(default_factory=list)

    def add(self, place: Place, path: str, text: str) -> None:
        """``path``: dotted key path, empty for the file as a whole."""
        self.found.append((place, path, text))

    def raise_if_any(self) -> None:
        """Raise what was found, files in line order, then overrides."""
        if not self.found:
            return
        ordered = sorted(dict.fromkeys(self.found), key=lambda item: (item[0].line == 0, item[0].line))
        lines = [f"{place}: {path}: {text}" if path else f"{place}: {text}" for place, path, text in ordered]
        raise ConfigError("\n".join(lines))


def read_yaml(path: Path, label: str, content: bytes | None = None) -> tuple[YamlMapping, bytes]:
    """The mapping at the top of a YAML file, and the file's bytes. ``label`` names the file in messages; ``content`` is
    taken for what the file holds where it is given.

    Raises :class:`ConfigError` for a file that cannot be read, is not UTF-8, is empty, is not valid YAML, is not a
    mapping, has duplicate keys, or uses aliases, merge keys or tags.
    """
    try:
        raw = path.read_bytes() if content is None else content
    except OSError as error:
        raise ConfigError(f"{label}: cannot be read: {error.strerror or error}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{label}:{line}: is not UTF-8 text (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
        ) from None
    tree = parse_yaml(text, label)
    if tree is None:
        raise ConfigError(f"{label}: is empty")
    if not isinstance(tree, YamlMapping):
        raise ConfigError(f"{tree.place}: must be a mapping of keys to values, found {describe(tree)}")
    return tree, raw


def parse_yaml(text: str, label: str, *, place: Place | None = None) -> YamlNode | None:
    """The tree of one YAML document, None when it is empty. All nodes get ``place`` where it is given."""

    def place_of(mark: Any) -> Place:
        return place or Place(label=label, line=mark.line + 1)

    problems = Problems()

    def convert(node: yaml.Node, path: str) -> YamlNode:
        at = place_of(node.start_mark)
        if isinstance(node, yaml.ScalarNode):
            return YamlScalar(place=at, text=node.value)
        if isinstance(node, yaml.SequenceNode):
            return YamlList(
                place=at, items=tuple(convert(item, f"{path}[{index}]") for index, item in enumerate(node.value))
            )
        entries: dict[str, YamlNode] = {}
        key_places: dict[str, Place] = {}
        for key_node, value_node in node.value:
            key_at = place_of(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                problems.add(key_at, path, "a key must be plain text")
                continue
            key = key_node.value
            below = f"{path}.{shorten(key)}" if path else shorten(key)
            if key_node.tag == "tag:yaml.org,2002:merge":
                problems.add(key_at, path, "uses a YAML merge key (<<); write the values out")
                continue
            if key in entries:
                problems.add(key_at, below, f"duplicate key, first given on line {key_places[key].line}")
                continue
            entries[key] = convert(value_node, below)
            key_places[key] = key_at
        return YamlMapping(place=at, entries=entries, key_places=key_places)

    try:
        _check_events(text, place_of)
        root = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line if mark else 0
        if "nesting depth" in str(error):  # recent parsers look ahead and have a limit of their own
            raise ConfigError(f"{place or Place(label=label, line=line + 1)}: {_TOO_DEEP}") from None
        what = " ".join(part for part in (error.context, error.problem) if part)
        tab = "; indent with spaces, not tabs" if "\t" in "".join(text.splitlines()[line : line + 1]) else ""
        raise ConfigError(f"{place or Place(label=label, line=line + 1)}: is not valid YAML: {what}{tab}") from None
    except yaml.reader.ReaderError as error:
        at = place or Place(label=label, line=text.count("\n", 0, error.position) + 1)
        raise ConfigError(f"{at}: is not valid YAML: {error.reason}") from None
    if root is None:
        return None
    tree = convert(root, "")
    problems.raise_if_any()
    return tree


def _check_events(text: str, place_of: Callable[[Any], Place]) -> None:
    """Refuse what the node graph would hide (aliases, tags) and nesting that its recursion could not bear."""
    problems = Problems()
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.AliasEvent):
            alias = f"uses a YAML alias (*{shorten(str(event.anchor))}); write the values out"
            problems.add(place_of(event.start_mark), "", alias)
        elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
            tag = f"uses the YAML tag {shorten(event.tag)}; tags are not allowed"
            problems.add(place_of(event.start_mark), "", tag)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            problems.add(place_of(event.start_mark), "", _TOO_DEEP)
            break
    problems.raise_if_any()


def describe(node: YamlNode) -> str:
    """What a node is, for messages."""
    if isinstance(node, YamlScalar):
        return f"the text {shorten(node.text)!r}" if node.text else "nothing"
    if isinstance(node, YamlList):
        return f"a list of {len(node.items)}" if node.items else "an empty list"
    return "a mapping" if node.entries else "an empty mapping"
