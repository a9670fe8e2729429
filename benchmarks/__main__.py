"""`python -m benchmarks [NAME ...]`: print the tables of the named benchmarks, or of all that measure speed.

`corrections` is a study of accuracy that trains for an hour or two; it runs only by name.
"""

from __future__ import annotations

import sys
from importlib import import_module

from benchmarks.timing import machine

NAMES = ("encoding", "reading", "registration", "scan", "tiling", "training")
STUDIES = ("corrections",)


def main() -> None:
    names = sys.argv[1:] or NAMES
    if unknown := [name for name in names if name not in NAMES + STUDIES]:
        sys.exit(f"unknown benchmark {unknown[0]!r}; there are {', '.join(NAMES)}, and studies {', '.join(STUDIES)}")
    print(machine())
    for name in names:
        import_module(f"benchmarks.{name}").run()


if __name__ == "__main__":
    main()
