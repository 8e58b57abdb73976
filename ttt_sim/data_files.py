"""Files that ship with the project, found from a checkout and from a wheel alike; writing files; nearest spellings."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from ttt_sim.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent

#: What a file of each folder describes, for messages.
_SUBJECT = {"hw_configs": "chip", "model_configs": "model"}


def folder_path(folder: str) -> Path:
    """The directory of ``folder`` (``hw_configs`` or ``model_configs``): the wheel's copy, else the checkout's.

    Raises :class:`ConfigError` when neither exists (a broken installation).
    """
    for path in (_PACKAGE / "_data" / folder, _PACKAGE.parent / folder):
        if path.is_dir():
            return path
    raise ConfigError(f"the folder {folder} is missing from this installation of ttt_sim; install it again")


def names(folder: str, suffix: str) -> list[str]:
    """Names (without ``suffix``) of the files in ``folder``, sorted."""
    return sorted(path.name.removesuffix(suffix) for path in folder_path(folder).glob(f"*{suffix}"))


def find(folder: str, name: str, suffix: str) -> Path:
    """The built-in file ``name`` of ``folder``; raises :class:`ConfigError` with near and available names."""
    available = names(folder, suffix)
    if name in available:
        return folder_path(folder) / f"{name}{suffix}"
    subject = _SUBJECT.get(folder, "file")
    raise ConfigError(
        f"unknown {subject} {name!r}{did_you_mean(name, available)}; available: {', '.join(available) or 'none'}; "
        f"or give the path of a {suffix} file"
    )


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; raises :class:`ConfigError` where it cannot be written.

    A link stays a link to the new content. What is neither file nor folder (a terminal, a pipe) is written to in place.
    """
    part: Path | None = None
    try:
        if path.is_dir():
            raise ConfigError(f"{path}: cannot be written: Is a directory")
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        target = path.resolve()
        part = target.with_name(f"{target.name}.part")
        part.write_bytes(content)
        os.replace(part, target)
    except (OSError, RuntimeError) as error:  # a loop of links raises either
        if part is not None and part.is_file():
            part.unlink()
        raise ConfigError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None


def did_you_mean(word: str, candidates: list[str] | tuple[str, ...], *, limit: int = 3) -> str:
    """``", did you mean a, b?"`` with the candidates nearest to ``word`` in spelling, or an empty string."""
    near = nearest(word, candidates, limit=limit)
    return f", did you mean {' or '.join(near)}?" if near else ""


def nearest(word: str, candidates: list[str] | tuple[str, ...], *, limit: int = 3) -> list[str]:
    """Candidates that are spelt most like ``word``, upper and lower case ignored, best first."""
    by_lower: dict[str, list[str]] = {}
    for candidate in candidates:
        by_lower.setdefault(candidate.lower(), []).append(candidate)
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=limit, cutoff=0.6)
    return [candidate for lower in close for candidate in by_lower[lower]][:limit]
