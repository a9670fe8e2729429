"""Numbers as people say them."""

from __future__ import annotations


def counted(number: int, what: str) -> str:
    """A number of things: "1 rank", "2 ranks"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def in_bytes(count: float) -> str:
    """Bytes in words, of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def in_hours(seconds: float) -> str:
    """Hours, or minutes below one."""
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
