"""Folders of results are replaced whole or not at all."""

import json
import os
from pathlib import Path

import pytest

from ttt_sim.errors import ConfigError
from ttt_sim.report.folder import GENERATOR, check_out, replaced_folder, write_summary


def write(out: Path, **files: str) -> None:
    with replaced_folder(out) as new:
        for name, text in files.items():
            path = new / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        write_summary(new, {"answer": 42})


def texts(folder: Path) -> dict[str, str]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_text(encoding="utf-8") for name, path in found.items() if path.name != "summary.json"}


def test_folder_and_its_parents_are_made(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b", figure="x", data__table="y")
    assert texts(tmp_path) == {"a/b/figure": "x", "a/b/data/table": "y"}
    summary = json.loads((tmp_path / "a" / "b" / "summary.json").read_text(encoding="utf-8"))
    assert summary == {"answer": 42, "generator": GENERATOR, "files": ["data/table", "figure", "summary.json"]}


def test_later_results_replace_all_earlier_ones(tmp_path: Path) -> None:
    write(tmp_path / "out", one="1", two="2")
    write(tmp_path / "out", two="new")
    assert texts(tmp_path) == {"out/two": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_failure_inside_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    write(tmp_path / "out", one="1")
    with pytest.raises(error), replaced_folder(tmp_path / "out") as new:  # noqa: PT012
        (new / "half").write_text("half", encoding="utf-8")
        raise error
    assert texts(tmp_path) == {"out/one": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("which", [1, 2])
def test_interrupt_while_folders_change_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    """Before the first rename, and between the two: the old folder is there afterwards either way."""
    write(tmp_path / "out", one="1")
    rename, calls = os.rename, []

    def interrupted(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == which:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", one="2")
    assert texts(tmp_path) == {"out/one": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_full_disk_is_one_message(tmp_path: Path) -> None:
    write(tmp_path / "out", one="1")
    with pytest.raises(ConfigError, match="out: cannot be written: No space left"), replaced_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert texts(tmp_path) == {"out/one": "1"}


def test_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, one="1")
    (out / "sub").mkdir()
    (out / "sub" / "notes").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds sub/notes, which no report"):
        check_out(out)
    (out / "another").symlink_to(tmp_path)  # a link is a file of somebody, whatever it points to
    with pytest.raises(ConfigError, match="holds another and 1 more"):
        check_out(out)


@pytest.mark.parametrize("summary", ["", "[]", "{}", '{"generator": "x", "files": ["summary.json"]}', '{"files": 3}'])
def test_only_our_own_summary_counts(tmp_path: Path, summary: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text(summary, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"holds summary\.json"):
        check_out(tmp_path / "out")


def test_empty_folder_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    check_out(tmp_path / "out")
    write(tmp_path / "out", one="1")
    assert texts(tmp_path) == {"out/one": "1"}


def test_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    write(tmp_path / "real", one="1")
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    write(tmp_path / "link", one="2")
    assert (tmp_path / "link").is_symlink()
    assert texts(tmp_path / "real") == {"one": "2"}


def test_check_leaves_nothing_behind(tmp_path: Path) -> None:
    check_out(tmp_path / "a" / "b" / "c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("inside", [".", "..", "sub/.."])
def test_current_folder_and_those_above_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError, match="current folder"):
        check_out(Path(inside))
