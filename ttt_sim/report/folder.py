"""Folders of results that are replaced whole or not at all, and never when they hold something of somebody else."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ttt_sim.errors import ConfigError

#: Marks a summary, and with it the folder, as ours; a later run may replace the files that the summary lists.
GENERATOR = "ttt_sim report"
SUMMARY = "summary.json"
#: Start of the names of unfinished folders, which stand beside the folder whose place they will take.
PART_PREFIX = ".ttt_sim-part-"


def check_out(out: Path) -> None:
    """Refuse a folder that results may not be written to, before any time is spent. Leaves nothing behind.

    Raises:
        ConfigError: ``out`` is a file, the current folder or one above it, cannot be written, or holds files that we
            did not write.
    """
    try:
        _check_out(out, out.resolve())
    except OSError as error:
        raise _unwritable(out, error) from None


def _check_out(out: Path, target: Path) -> None:
    if Path.cwd().resolve().is_relative_to(target):
        raise ConfigError(
            f"{out}: is the current folder or holds it and would be replaced whole, name a folder inside it"
        )
    if target.is_dir():
        foreign = _foreign_files(target)
        if foreign:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise ConfigError(
                f"{out}: holds {foreign[0]}{more}, which no report of ttt_sim wrote; a report replaces its whole "
                "folder, so name another one"
            )
    elif target.exists():
        raise ConfigError(f"{out}: is a file, expected a folder")
    above = next(path for path in target.parents if path.exists())
    if not above.is_dir():
        raise ConfigError(f"{out}: {above} is a file, expected a folder")
    # Permissions alone do not tell: the file system may be read-only or of a special kind.
    os.rmdir(tempfile.mkdtemp(prefix=PART_PREFIX, dir=above))


@contextmanager
def replaced_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder to write to, which takes the place of ``out`` when the block ends without an exception.

    Until then, and after an exception or an interrupt, ``out`` is what it was. :func:`write_summary` ends the block, so
    that a later run may replace the folder.

    Raises:
        ConfigError: as :func:`check_out`, or a file cannot be written.
    """
    check_out(out)
    target = out.resolve()
    part: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=PART_PREFIX, dir=target.parent))
        new, old = part / "new", part / "old"
        new.mkdir()
        yield new
        try:
            if target.exists():
                os.rename(target, old)
            os.rename(new, target)
        except BaseException:  # an interrupt too: put back what is already out of the way
            if old.exists() and not target.exists():
                os.rename(old, target)
            raise
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def write_summary(folder: Path, content: Mapping[str, object]) -> None:
    """Write ``summary.json``: ``content`` (plain values, no NaN), the generator and all files of ``folder``."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    summary = {**content, "generator": GENERATOR, "files": sorted({*files, SUMMARY})}
    text = json.dumps(summary, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    (folder / SUMMARY).write_text(text + "\n", encoding="utf-8", newline="\n")


def _unwritable(out: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{out}: cannot be written: {error.strerror or error}")


def _foreign_files(folder: Path) -> list[str]:
    """What lies in ``folder`` and is not listed in its summary."""
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        known = set(summary["files"]) if summary["generator"] == GENERATOR else set()
    except (FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        known = set()
    if not known:  # another's folder may be huge: its first entries say enough
        return sorted(path.name for path in folder.iterdir())
    present = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted({path.relative_to(folder).as_posix() for path in present} - known)
