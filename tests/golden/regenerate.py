"""Rewrite the golden cycle counts: ``python -m tests.golden.regenerate``, or ``make golden``."""

from __future__ import annotations

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


if __name__ == "__main__":
    main()
