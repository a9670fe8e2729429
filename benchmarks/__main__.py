"""`python -m benchmarks [NAME ...]`: print the tables of the named benchmarks, or of all."""

from __future__ import annotations

import sys
from importlib import import_module

from benchmarks.timing import machine

NAMES = ("reading", "scan", "tiling", "training")


def main() -> None:
    names = sys.argv[1:] or NAMES
    if unknown := [name for name in names if name not in NAMES]:
        sys.exit(f"unknown benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    print(machine())
    for name in names:
        import_module(f"benchmarks.{name}").run()


if __name__ == "__main__":
    main()
