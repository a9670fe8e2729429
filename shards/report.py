"""A report as one HTML file: tables, texts and pictures inside it, no script, nothing loaded from anywhere.

It opens from disk, prints, and follows the reader's light or dark setting. Everything that comes from outside (names of
classes, scenes, runs) is escaped.
"""

from __future__ import annotations

import base64
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Text:
    """Paragraphs, parted by an empty line."""

    title: str
    body: str

    @property
    def paragraphs(self) -> list[str]:
        """The paragraphs of `body` that are not empty."""
        return [part.strip() for part in self.body.split("\n\n") if part.strip()]


@dataclass(frozen=True)
class Table:
    """Rows of cells; a number is written with four digits and set to the right, None as a dash.

    Raises:
        ValueError: a row that is not as long as `columns`.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""

    def __post_init__(self) -> None:
        """Refuse ragged rows."""
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r}: row {number} has {len(row)} cells for {len(self.columns)} columns"
                )

    @property
    def cells(self) -> list[list[tuple[str, bool]]]:
        """Per row and column: the text, and whether it is a number."""
        return [[(_text(cell), isinstance(cell, int | float)) for cell in row] for row in self.rows]


@dataclass(frozen=True)
class Figure:
    """A PNG picture with a caption, which is also its description for those who cannot see it.

    Raises:
        ValueError: `png` is not a PNG file.
    """

    title: str
    png: bytes
    caption: str

    def __post_init__(self) -> None:
        """Refuse anything but PNG."""
        if not self.png.startswith(PNG_SIGNATURE) or len(self.png) < 24:
            raise ValueError(f"figure {self.title!r}: {len(self.png)} bytes that are no PNG; see shards.pictures")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the file's header (PNG specification, 11.2.2 IHDR)."""
        width, height = struct.unpack(">II", self.png[16:24])
        return width, height

    @property
    def source(self) -> str:
        """The picture as a data URL."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


Section = Text | Table | Figure


def write_report(path: Path, sections: Sequence[Section], *, title: str = "Report") -> None:
    """Write `sections` in their order to the HTML file `path`; it appears whole or not at all."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("shards").joinpath("report.html.j2").read_text(encoding="utf-8"))
    kinds = [(type(section).__name__.lower(), section) for section in sections]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(template.render(title=title, sections=kinds), encoding="utf-8")
    os.replace(temporary, path)


def _text(cell: object) -> str:
    if cell is None:
        return "\N{EN DASH}"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
