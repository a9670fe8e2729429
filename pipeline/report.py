"""RUN/report.html: how a run goes, on one page that is written anew while it goes.

A thread of rank 0 reads metrics.jsonl and writes the page, at most once a minute and for a hundredth of the time at
most, so that training does not feel it. Long curves are drawn as means of bins, in a band from the least to the largest
value of each bin.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.figures import Panel, panels
from pipeline.log import METRICS, read
from shards.report import Figure, Section, Table, write_report

if TYPE_CHECKING:
    from pipeline.loop import Hook
    from pipeline.run import Run

REPORT = "report.html"
EVERY_S = 60.0  # seconds between two pages, at least
SHARE = 100  # times what the last page took, at least
LATELY = 100  # steps that "now" is the mean of
SKIPS, KEYS = 50, 8  # rows in the table of skipped steps, and samples named in each
PNG_END = b"IEND\xaeB`\x82"
DASH = "\N{EN DASH}"
READ = ("bytes", "requests", "retries", "hits", "misses")

Rows = Sequence[Mapping[str, Any]]

log = logging.getLogger(__name__)


def reporter(run: Run, facts: Mapping[str, object]) -> Hook:
    """A hook of the loop that keeps RUN/report.html up to date; of other ranks than 0 one that does nothing.

    It waits for the page at the last step alone. A page that cannot be written is a warning, once.

    Args:
        run: whose page it is.
        facts: what the page says of the run as a whole, name -> value.
    """
    if run.ranks.rank:
        return lambda line: {}
    return _Reporter(run.folder, run.config.steps, {"steps": run.config.steps, **facts})


class _Reporter:
    """The hook of rank 0, with its thread and the time when the next page is due."""

    def __init__(self, folder: Path, steps: int, facts: Mapping[str, object]) -> None:
        self._folder, self._steps, self._facts = folder, steps, facts
        self._pool = ThreadPoolExecutor(1, "report")
        self._writing: Future[None] | None = None
        self._due, self._warned = time.monotonic() + EVERY_S, False

    def __call__(self, line: Mapping[str, Any]) -> Mapping[str, object]:
        """Hand over a page where one is due."""
        last = line["step"] >= self._steps
        idle = self._writing is None or self._writing.done()
        if last or (idle and time.monotonic() >= self._due):
            self._writing = self._pool.submit(self._write, dict(line))
            if last:
                self._writing.result()
        return {}

    def _write(self, line: Mapping[str, Any]) -> None:
        began = time.monotonic()
        try:
            rows = read(self._folder)
            if not rows or rows[-1]["step"] < line["step"]:  # hooks are called before the line is written
                rows.append(dict(line))
            write_report(self._folder / REPORT, sections(self._folder, rows, self._facts), title=f"Run {self._folder}")
        except Exception as error:  # whatever it is, training is worth more than its page
            if not self._warned:
                log.warning("%s could not be written: %s: %s", self._folder / REPORT, type(error).__name__, error)
            self._warned = True
        ended = time.monotonic()
        self._due = ended + max(EVERY_S, SHARE * (ended - began))


def sections(folder: Path, rows: Rows, facts: Mapping[str, object]) -> list[Section]:
    """What the page of a run shows.

    Args:
        folder: of the run, for its pictures.
        rows: at least one line of metrics.jsonl, in the order in which they were written; a step that was done again
            after a roll back is there twice, and curves show the later one.
        facts: of the run as a whole; `steps`, if there, is where it ends.
    """
    latest = sorted({row["step"]: row for row in rows}.values(), key=lambda row: int(row["step"]))
    facts_table = Table("The run", ["what", "value"], [[name, _said(value)] for name, value in facts.items()])
    return [
        facts_table,
        _now(rows, facts.get("steps")),
        *_curves(rows, latest),
        *_reading(rows),
        *_scores(latest),
        *_picture(folder),
        *_skips(rows),
        *_roll_backs(rows),
    ]


def _said(value: object) -> str:
    """A value as it is written, a text, so that all stand under each other: digits in groups of three, four in all."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _now(rows: Rows, steps: object) -> Table:
    last, lately, step = rows[-1], rows[-LATELY:], int(rows[-1]["step"])
    end = steps if isinstance(steps, int) else None
    loss = next((row["loss"] for row in reversed(rows) if row.get("loss") is not None), None)
    per_step = _mean([{"s": _seconds(row)} for row in lately], "s")
    cells: list[tuple[str, object]] = [
        ("step", f"{step:,} of {end:,} ({step / end:.1%})" if end else f"{step:,}"),
        ("time left", _duration((end - step) * per_step) if end and per_step is not None else None),
        ("loss", loss),
        (f"loss, mean of {len(lately)} steps", _mean(_kept(lately), "loss")),
        ("learning rate", last.get("lr")),
        ("samples seen", last["samples"]),
        ("samples/s", _mean(lately, "samples_per_second")),
        ("samples/s per device", _mean(lately, "samples_per_second_per_device")),
        ("waiting for data", _percent(_mean(lately, "data_wait"))),
        ("MFU", _percent(_mean(lately, "mfu"))),
        ("peak memory of rank 0", f"{last['memory']:.3g} GB" if last.get("memory") is not None else None),
        ("held up by checkpoints", _duration(last["saving"]) if last.get("saving") is not None else None),
        ("steps skipped", len(_skipped(rows))),
        ("roll backs", len(_rolled_back(rows))),
    ]
    caption = f"Written at {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC; load the page again for a newer one. "
    caption += f"Speeds and the time left are those of the last {len(lately)} steps."
    return Table(
        "Now", ["what", "value"], [[name, _said(value)] for name, value in cells if value is not None], caption
    )


def _curves(rows: Rows, latest: Rows) -> list[Section]:
    """Loss, learning rate and norm, speed."""
    # The first and the last line have all keys that every line has.
    names = dict.fromkeys([*latest[0], *latest[-1]])
    keys = [name for name in names if name == "loss" or name.startswith("loss/")]
    marks = {"skipped": [row["step"] for row in _skipped(rows)], "rolled back": [r["step"] for r in _rolled_back(rows)]}
    learning = [Panel("learning rate", ["lr"], smooth=False), Panel("norm of the gradient", ["grad_norm"], "log")]
    speed = [Panel("samples/s", ["samples_per_second"]), Panel("waiting for data", ["data_wait"], "percent")]
    speed += [Panel("MFU", ["mfu"], "percent")] if "mfu" in names else []
    kept = _kept(latest)
    passed = "Whole and by part; steps that were passed over are marks below, not part of the curves."
    how = "Faint: every step, of a long run from the least to the largest of each stretch; dark: the running median."
    return [
        Figure("Loss", panels(kept or latest, [Panel("loss", keys, "auto", marks)]), f"{passed} {how}"),
        Figure("Learning rate and gradient", panels(latest, learning), f"The norm is that before clipping. {how}"),
        Figure("Speed", panels(latest, speed), f"Samples of all ranks; the share of a step that rank 0 waits. {how}"),
    ]


def _reading(rows: Rows) -> list[Section]:
    """What all ranks have read, lately and in the whole run."""
    stretches = [[row for row in some if "io" in row] for some in (rows[-LATELY:], rows)]
    if not stretches[0]:
        return []
    columns = [_traffic(some) for some in stretches]
    cells = [[name, *(column.get(name) for column in columns)] for name in columns[1]]
    head = ["what", f"last {len(stretches[0])} steps", "whole run"]
    return [Table("Reading", head, cells, "By all ranks together.")]


def _traffic(rows: Rows) -> dict[str, object]:
    """Speeds and counts of lines that have `io`."""
    sums = {name: sum(row["io"].get(name, 0) for row in rows) for name in READ}
    seconds = sum(_seconds(row) or 0.0 for row in rows)
    found: dict[str, object] = {
        "MB/s": sums["bytes"] / 1e6 / seconds if seconds else None,
        "MB per step": sums["bytes"] / 1e6 / len(rows),
        "requests per step": sums["requests"] / len(rows),
        "retries": sums["retries"],
    }
    if asked := sums["hits"] + sums["misses"]:
        found["found in the cache (%)"] = 100 * sums["hits"] / asked
    return found


def _scores(rows: Rows) -> list[Section]:
    """Curves and last values of the linear probe and of validation, where there are any."""
    found: list[Section] = []
    for kind, title in (("probe", "Linear probe"), ("val", "Validation")):
        scored = [row for row in rows if row.get(f"{kind}/mIoU") is not None]
        if scored:
            keys = [f"{kind}/{name}" for name in ("mIoU", "OA", "mAcc", "mF1")]
            keys = [key for key in keys if scored[-1].get(key) is not None]
            values = ", ".join(f"{key} {scored[-1][key]:.2f}" for key in keys)
            caption = f"In percent. At step {scored[-1]['step']:,}: {values}."
            found.append(Figure(title, panels(scored, [Panel("percent", keys)]), caption))
    return found


def _picture(folder: Path) -> list[Section]:
    """The newest picture of reconstructions that is whole: one may be being written."""
    for path in sorted((folder / "pictures").glob("*.png"), reverse=True):
        png = path.read_bytes()
        if png.endswith(PNG_END):
            explained = "each modality, what of it was left visible, and that completed by the network"
            return [Figure("Reconstructions", png, f"{path.name}: {explained}.")]
    return []


def _skips(rows: Rows) -> list[Section]:
    skipped = _skipped(rows)
    cells = [
        [f"{row['step']:,}", _in_a_line(row["skipped"].get("why")), rank, _abridged(keys)]
        for row in skipped[-SKIPS:]
        for rank, keys in (row["skipped"].get("samples") or {DASH: []}).items()
    ][-SKIPS:]
    if not cells:
        return []
    caption = f"In all: {len(skipped):,}; the last are named here, all in {METRICS}. "
    caption += "Look at the samples with mcf shards show DATA key=..."
    return [Table("Skipped steps", ["step", "why", "rank", "samples"], cells, caption)]


def _roll_backs(rows: Rows) -> list[Section]:
    cells = [[f"{row['step']:,}", f"{row['rolled_back_to']:,}"] for row in _rolled_back(rows)]
    caption = f"{len(cells):,} in all. Parameters and moments were taken from the checkpoint of that step."
    return [Table("Roll backs", ["after step", "to step"], cells[-SKIPS:], caption)] if cells else []


def _skipped(rows: Rows) -> list[Mapping[str, Any]]:
    return [row for row in rows if row.get("skipped")]


def _kept(rows: Rows) -> list[Mapping[str, Any]]:
    return [row for row in rows if not row.get("skipped")]


def _rolled_back(rows: Rows) -> list[Mapping[str, Any]]:
    return [row for row in rows if row.get("rolled_back_to") is not None]


def _in_a_line(why: object) -> str:
    """The text with spaces that do not break: beside long lists of samples its column would be a word wide."""
    return str(why).replace(" ", "\N{NO-BREAK SPACE}")


def _abridged(keys: Sequence[str]) -> str:
    return ", ".join(keys[:KEYS]) + (f" and {len(keys) - KEYS} more" if len(keys) > KEYS else "")


def _seconds(row: Mapping[str, Any]) -> float | None:
    """What a step took, from the speed that its line tells."""
    speed = row.get("samples_per_second")
    return row["samples"] / row["step"] / speed if speed else None


def _mean(rows: Rows, key: str) -> float | None:
    """Mean over the lines that have a number."""
    values = [float(row[key]) for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else None


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {int(seconds) % 60} s"
