"""The user's lists of ids: train.txt, val.txt and test.txt in one folder, an id or a file's name per line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from configs import ConfigError
from pipeline.protocols.splits import ROLES, Ids


def read_ids(folder: str, pattern: str, protocol: str) -> Ids:
    """Names of places by role.

    Args:
        folder: that holds the lists; what stands before the last slash or after the first comma of a line is not read.
        pattern: of an id without the file's suffix; its groups, joined by "_", are the place's name.
        protocol: that reads them.

    Raises:
        ConfigError: no folder, a list is absent or empty, a line is no id, or an id stands there twice.
    """
    if not folder:
        raise ConfigError(f"protocol.lists: {protocol} reads lists of ids; write protocol.lists=FOLDER, which holds "
                          f"{', '.join(f'{role}.txt' for role in ROLES)}")  # fmt: skip
    ids = {role: list(_ids(Path(folder) / f"{role}.txt", pattern)) for role in ROLES}
    counts = Counter(name for names in ids.values() for name in names)
    if twice := [name for name, count in counts.items() if count > 1]:
        where = [role for role in ROLES if twice[0] in ids[role]]
        raise ConfigError(
            f"protocol.lists: {len(twice)} ids of {folder} stand there twice, such as {', '.join(twice[:5])} (the "
            f"first in {' and '.join(where)}); a place has one role"
        )
    return ids


def _ids(path: Path, pattern: str) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"protocol.lists: {path} cannot be read: {error}") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"protocol.lists: {path} is empty")
    for number, line in lines:
        name = re.sub(r"\.tiff?$", "", line.split(",")[0].rpartition("/")[2])
        match = re.fullmatch(pattern, name)
        if match is None:
            raise ConfigError(
                f"protocol.lists: line {number} of {path} is no id: {line[:80]!r}; write one id or file name per line, "
                "such as ROIs0000_test_0_p30"
            )
        yield "_".join(match.groups())
