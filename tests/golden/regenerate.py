"""Rewrite the golden cycle counts and digests: ``python -m tests.golden.regenerate``, or ``make golden``."""

from __future__ import annotations

from tests.golden import digests
from tests.golden.cases import cases
from tests.golden.record import CYCLES_FILE, difference, measure, read_golden, write_golden


def main() -> None:
    golden = read_golden() if CYCLES_FILE.exists() else {}
    measured = {name: measure(name, point) for name, point in cases().items()}
    write_golden(measured)
    for name in golden.keys() - measured.keys():
        print(f"gone: {name}")
    n_moved = 0
    for name, now in measured.items():
        if name not in golden:
            print(f"new: {name}, {now.row['cycles']} cycles")
        elif difference(golden[name], now):
            n_moved += 1
            print(f"moved: {name}, {golden[name].row['cycles']} -> {now.row['cycles']} cycles")
    print(f"{len(measured)} cases, {n_moved} moved")
    _rewrite_digests()


def _rewrite_digests() -> None:
    golden = digests.read_digests()
    now = {name: digests.sha256(compute()) for name, compute in digests.cases().items()}
    digests.write_digests(now)
    for name in golden.keys() - now.keys():
        print(f"gone: {name}")
    for name in (name for name in now if name not in golden):
        print(f"new: {name}")
    moved = [name for name in now if name in golden and golden[name] != now[name]]
    for name in moved:
        print(f"moved: {name}, bits of its results")
    print(f"{len(now)} results of the reference, {len(moved)} moved")


if __name__ == "__main__":
    main()
