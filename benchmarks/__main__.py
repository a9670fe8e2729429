"""`python -m benchmarks [NAME ...]`: print the tables of the named benchmarks, or of all that measure speed.

Only by name: `corrections` and `evidence`, studies of accuracy that train for an hour or two; `predicting`,
which takes half an hour and 2 GB of a disk; `uploading` and `reading_s3`, which need the S3 server of the tests
(`make services`); `gpu`, which needs a CUDA GPU (`make bench-gpu`), and `compiled`, which needs Triton.
"""

from __future__ import annotations

import sys
from importlib import import_module

from benchmarks.timing import machine

NAMES = (
    "encoding",
    "engine",
    "overhead",
    "reading",
    "registration",
    "resuming",
    "scaling",
    "scan",
    "shuffling",
    "tiling",
    "training",
)
ONLY_BY_NAME = ("compiled", "corrections", "evidence", "gpu", "predicting", "reading_s3", "uploading")


def main() -> None:
    names = sys.argv[1:] or NAMES
    if unknown := [name for name in names if name not in NAMES + ONLY_BY_NAME]:
        sys.exit(f"unknown benchmark {unknown[0]!r}; there are {', '.join(NAMES + ONLY_BY_NAME)}")
    print(machine())
    for name in names:
        import_module(f"benchmarks.{name}").run()


if __name__ == "__main__":
    main()
