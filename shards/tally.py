"""Tally: what a build has done so far, and the table that says so at its end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from shards.store import told
from shards.write import ShardRecord


@dataclass
class Tally:
    """Counts of one run of a build, over the shards that it wrote.

    `finished` shards were there before and are counted nowhere else. `skipped` names every file of this builder's part
    that could not be used, those of finished shards included, each once.
    """

    finished: int = 0
    shards: int = 0
    written: int = 0
    bytes: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    retries: Counter[str] = field(default_factory=Counter)
    skipped: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def add(self, record: ShardRecord) -> None:
        """Count a shard that was just written."""
        self.shards, self.written, self.bytes = (
            self.shards + 1,
            self.written + len(record.rows),
            self.bytes + record.bytes,
        )
        self.left_out.update(record.left_out)
        self.retries.update(record.retries)
        self.skip(record.skipped)
        self.seconds = time.monotonic() - self.started

    def skip(self, reasons: Iterable[str]) -> None:
        """Count files that were skipped."""
        self.skipped = list(dict.fromkeys([*self.skipped, *reasons]))

    @property
    def tiles(self) -> int:
        """Tiles that were dealt with: written or left out."""
        return self.written + self.left_out.total()

    def note(self) -> str:
        """The end of the progress bar."""
        left, skipped = self.left_out.total(), len(self.skipped)
        rate = self._rate(self.bytes / 1e6)
        return f"{rate:.0f} MB/s, {left} left out, {skipped} files skipped, {self.retries.total()} retries"

    def table(self) -> list[tuple[str, str]]:
        """What was done, as rows of a name and a value."""
        before = f" ({self.finished} more were finished before)" if self.finished else ""
        rows = [("tiles written", f"{self.written:,}"), ("tiles left out", f"{self.left_out.total():,}")]
        rows += [(f"  {reason}", f"{count:,}") for reason, count in self.left_out.most_common()]
        rows += [("shards written", f"{self.shards:,}{before}"), ("MB written", f"{self.bytes / 1e6:,.1f}")]
        rows += [("seconds of building", f"{self.seconds:,.1f}"), ("tiles/s", f"{self._rate(self.tiles):,.1f}")]
        rows += [("MB/s", f"{self._rate(self.bytes / 1e6):,.1f}")]
        rows += [("retries", told(self.retries) if self.retries else "0"), ("files skipped", f"{len(self.skipped):,}")]
        return rows

    def _rate(self, amount: float) -> float:
        return amount / self.seconds if self.seconds else 0.0
