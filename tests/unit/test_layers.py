"""The architecture as a test: which module may import which, and what the documentation may say.

Imports are read from the source, so a lazy import inside a function counts like any other.
"""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "ttt_sim"

#: From the bottom up. A module imports its own layer and those under it. A name covers the modules inside it, unless
#: one has a place of its own; the empty name is the package itself, whose public names come from everywhere.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "units", "data_files", "dtypes", "parallel"),
    ("reference",),
    ("chip", "model", "ops"),
    ("area", "config", "intervals", "lint", "model_config", "show"),
    ("trace_check", "trace_io"),
    ("workload",),
    ("program",),
    ("lower",),
    ("engine",),
    ("bounds", "power", "results", "simulation", "system", "update_cost"),
    ("approaches", "comparison", "grid", "crossover", "drift", "lifecycle", "predict", "replay", "serving", "writing"),
    ("claims",),
    ("report",),
    ("experiment",),
    ("",),
    ("cli",),
    ("__main__",),
)

#: Modules that may import nothing of the package but this.
ONLY: Mapping[str, frozenset[str]] = {
    "errors": frozenset(),
    "reference": frozenset(),
    "units": frozenset({"errors", "data_files"}),
    "dtypes": frozenset(),
    "chip": frozenset({"errors", "units"}),
    "model": frozenset({"errors", "units"}),
    "program": frozenset({"errors"}),
    "engine": frozenset({"data_files", "errors", "program"}),
}

#: Modules that may not depend on others, not even through a third.
NEVER: Mapping[str, frozenset[str]] = {
    "ops": frozenset({"chip"}),
    "trace_check": frozenset({"chip"}),
    "trace_io": frozenset({"chip"}),
    "workload": frozenset({"chip"}),
}

#: Third-party packages that take long to import, and the modules that must load without them: they stand behind
#: ``--help`` and behind every message about a wrong input.
HEAVY = frozenset({"loky", "matplotlib", "numba", "pandas", "pyarrow", "scipy", "simpy"})
LIGHT = ("", "errors", "units", "chip", "model", "config", "ops", "workload", "engine", "cli", "__main__")


def full_name(name: str) -> str:
    """``engine`` to ``ttt_sim.engine``; the empty name is the package itself."""
    return f"{PACKAGE}.{name}" if name else PACKAGE


def modules() -> dict[str, Path]:
    """Every module of the package, by its name inside the package."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported_names(tree: ast.AST, package: str) -> Iterator[tuple[str, str | None]]:
    """Each import as (absolute module, name taken from it or None); ``package`` anchors relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                source = importlib.util.resolve_name("." * node.level + source, package)
            for alias in node.names:
                yield source, alias.name


def imports_of(source: str, name: str, is_package: bool, known: frozenset[str]) -> frozenset[str]:
    """Names inside the package of the modules that the module ``name`` with this ``source`` imports.

    ``from ttt_sim.a import b`` is an import of the module ``a.b`` where there is one, else of ``a``. The version is
    not counted: it is a constant that every module may state.
    """
    own = full_name(name)
    found = set()
    for source_module, taken in imported_names(ast.parse(source), own if is_package else own.rpartition(".")[0]):
        if source_module != PACKAGE and not source_module.startswith(f"{PACKAGE}."):
            continue
        base = source_module.removeprefix(PACKAGE).removeprefix(".")
        inner = f"{base}.{taken}" if base else taken
        if inner in known:
            found.add(inner)
        elif inner != "__version__":
            found.add(base)
    return frozenset(found - {name})


IMPORTS: Mapping[str, frozenset[str]] = {
    name: imports_of(path.read_text(encoding="utf-8"), name, path.name == "__init__.py", frozenset(MODULES))
    for name, path in MODULES.items()
}


def covers(entry: str, name: str) -> bool:
    """Whether a table entry speaks about a module: it names it or a package around it."""
    return entry == name or (entry != "" and name.startswith(f"{entry}."))


def layer_of(name: str) -> int | None:
    """Index into :data:`LAYERS` by the most specific entry; None for a module without a place."""
    places = [(len(entry), rank) for rank, layer in enumerate(LAYERS) for entry in layer if covers(entry, name)]
    return max(places)[1] if places else None


def reachable(name: str, graph: Mapping[str, frozenset[str]]) -> set[str]:
    """Modules that ``name`` imports, directly or through others."""
    seen: set[str] = set()
    pending = [name]
    while pending:
        new = graph.get(pending.pop(), frozenset()) - seen
        seen |= new
        pending.extend(new)
    return seen


@pytest.mark.parametrize("name", MODULES, ids=full_name)
def test_module_has_a_place_and_imports_downward(name: str) -> None:
    own = layer_of(name)
    assert own is not None, f"{full_name(name)} is in no layer: add it to LAYERS in {Path(__file__).name}"
    above = [full_name(other) for other in sorted(IMPORTS[name]) if (layer_of(other) or 0) > own]
    assert not above, f"{full_name(name)}, in the layer of {LAYERS[own][0]}, imports from above it: {above}"


@pytest.mark.parametrize("name", MODULES, ids=full_name)
def test_module_keeps_its_restrictions(name: str) -> None:
    for entry, allowed in ONLY.items():
        if covers(entry, name):
            for other in sorted(IMPORTS[name]):
                assert covers(entry, other) or any(covers(a, other) for a in allowed), (
                    f"{full_name(name)} imports {full_name(other)}, but {entry} may import only {sorted(allowed)}"
                )
    for entry, forbidden in NEVER.items():
        if covers(entry, name):
            for other in sorted(reachable(name, IMPORTS)):
                assert not any(covers(f, other) for f in forbidden), (
                    f"{full_name(name)} depends on {full_name(other)}, which {entry} must not know"
                )


@pytest.mark.parametrize("name", MODULES, ids=full_name)
def test_module_is_in_no_import_cycle(name: str) -> None:
    cycle = sorted(full_name(other) for other in reachable(name, IMPORTS) if name in reachable(other, IMPORTS))
    assert not cycle, f"{full_name(name)} is in an import cycle among {cycle}"


@pytest.mark.parametrize("name", MODULES, ids=full_name)
def test_module_has_a_docstring(name: str) -> None:
    assert ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8"))), f"{MODULES[name]}: no docstring"


def test_tables_name_each_module_once() -> None:
    entries = [entry for layer in LAYERS for entry in layer]
    assert sorted(entries) == sorted(set(entries))
    named = set(ONLY) | set(NEVER) | set().union(*ONLY.values(), *NEVER.values())
    assert named <= set(entries)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import ttt_sim.a", {"a"}),
        ("from ttt_sim import a", {"a"}),
        ("from ttt_sim import public_name", {""}),
        ("from ttt_sim import __version__", set()),
        ("from ttt_sim.p import inner, name", {"p", "p.inner"}),
        ("from ttt_sim.p.inner import name", {"p.inner"}),
        ("from . import inner", {"p.inner"}),
        ("from .inner import name", {"p.inner"}),
        ("from ..a import name", {"a"}),
        ("def f():\n    from ttt_sim import a", {"a"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ttt_sim.a", {"a"}),
        ("import ttt_simulator, numpy", set()),
    ],
)
def test_imports_are_read_in_every_form(source: str, expected: set[str]) -> None:
    known = frozenset({"", "a", "p", "p.inner", "p.m"})
    assert imports_of(source, "p.m", False, known) == expected


def test_cycles_and_indirect_imports_are_found() -> None:
    graph = {"a": frozenset({"b"}), "b": frozenset({"c"}), "c": frozenset({"b"}), "d": frozenset[str]()}
    assert reachable("a", graph) == {"b", "c"}
    assert "b" in reachable("b", graph)
    assert reachable("d", graph) == set()


@pytest.mark.parametrize("name", [name for name in LIGHT if name in MODULES], ids=full_name)
def test_import_stays_light(name: str) -> None:
    """A fresh interpreter imports the module; none of the slow packages may be loaded afterwards."""
    code = f"import sys, {full_name(name)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


#: A folder of one machine, and hosts or options by which one machine finds its packages.
MACHINE_PATH = re.compile(r"(?<![\w./~:-])/(?:work|root|tmp|home|opt|mnt|srv|Users)(?![\w-])")
PACKAGE_SOURCE = re.compile(r"pypi\.org|pythonhosted\.org|artifactory|(?:extra-)?index-url|find-links", re.IGNORECASE)
PUBLISHED = (
    "*.md",
    "docs/**/*.md",
    "notebooks/*.ipynb",
    "hw_configs/*.yaml",
    "model_configs/*",
    "reports/sample/*.json",
    "reports/sample/*.csv",
    "reports/sample/*.md",
    "reports/sample/*.svg",
)


PUBLISHED_FILES = [path for pattern in PUBLISHED for path in sorted(ROOT.glob(pattern))]


@pytest.mark.parametrize("path", PUBLISHED_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_published_text_names_no_machine(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [
        f"line {number}: {match.group()}"
        for number, line in enumerate(lines, start=1)
        for pattern in (MACHINE_PATH, PACKAGE_SOURCE)
        for match in pattern.finditer(line)
    ]
    assert not found


@pytest.mark.parametrize("text", ["see /work/project", "`/tmp`", "(/root/x)", "cd /opt/wheels", "=/mnt/a"])
def test_machine_paths_are_recognised(text: str) -> None:
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["FLOPs/work", "https://example.org/home/x", "./tmp/x", "~/work", "/workload"])
def test_other_slashes_are_not_machine_paths(text: str) -> None:
    assert not MACHINE_PATH.search(text)
