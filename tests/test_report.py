"""Reports and their figures: valid pictures, valid HTML, hostile names escaped, and a real browser that agrees."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from numpy.typing import NDArray

from pipeline import figures
from shards import pictures as drawing
from shards.contract import Classes, Contract, Modality
from shards.report import Figure, Section, Table, Text, write_report
from shards.sensors import SENSORS

HOSTILE = "<script>alert('$x_1$')</script> & \"quoted\" \N{GREEK SMALL LETTER ALPHA}"
CLASSES = Classes(names=("water", "built", HOSTILE), palette=((0, 0, 255), (255, 0, 0), (0, 255, 0)))


def modality(name: str) -> Modality:
    sensor = SENSORS[name]
    count, (low, high) = len(sensor.bands), sensor.clip
    return Modality(
        sensor=name, bands=sensor.band_names, unit=sensor.unit, dtype="float32", clip=sensor.clip,
        offset=(low,) * count, scale=(high - low,) * count,
    )  # fmt: skip


CONTRACT = Contract(modalities=tuple(map(modality, ("s2-l1c", "s1", "dem"))), classes=CLASSES, resolution=10.0)


def sample(side: int = 64) -> figures.Reconstruction:
    """A random sample whose left edge has no radar, with one hidden block per modality."""
    rng = np.random.default_rng(0)
    values = {m.sensor: rng.random((len(m.bands), side, side), dtype=np.float32) for m in CONTRACT.modalities}
    valid = {name: np.ones((side, side), dtype=bool) for name in values}
    valid["s1"][:, :8] = False
    hidden = {name: np.zeros((side // 32, side // 32), dtype=bool) for name in values}
    hidden["s1"][0, 0] = hidden["dem"][1, 1] = True
    return figures.Reconstruction(HOSTILE, values, valid, hidden, {name: 1 - image for name, image in values.items()})


def decode(png: bytes) -> NDArray[Any]:
    """The picture [H, W, 4]; fails where the bytes are no PNG."""
    return np.asarray(imread(io.BytesIO(png), format="png"))


def all_figures() -> dict[str, bytes]:
    """One of each kind."""
    rows = [{"step": k + 1, "loss": 1 / (k + 1), "loss/s1": None if k < 3 else 2 / (k + 1)} for k in range(100)]
    label = np.random.default_rng(0).integers(0, 3, (50, 80)).astype(np.uint8)
    label[:5] = CLASSES.ignore
    scores = {"scratch": np.array([[50.0, np.nan, 10.0], [60.0, np.nan, 30.0]]), HOSTILE: np.full((2, 3), 70.0)}
    return {
        "curves": figures.loss_curves({"pretrain": rows, HOSTILE: rows}, keys=("loss", "loss/s1")),
        "reconstructions": figures.reconstructions(CONTRACT, [sample(), sample(96)]),
        "confusion": figures.confusion(np.array([[5, 1, 0], [2, 7, 1], [0, 0, 0]]), CLASSES),
        "bars": figures.class_bars(scores, CLASSES),
        "maps": figures.maps({"label": label, "predicted": label, "picture": np.zeros((50, 80, 3))}, CLASSES),
    }


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    return all_figures()


@pytest.fixture(scope="module")
def report(pictures: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every kind of section and hostile names in all places."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    sections: list[Section] = [Text(HOSTILE, f"First.\n\n{HOSTILE}")]
    sections.append(Table(HOSTILE, ["shard", HOSTILE], [[HOSTILE, 1.23456789], ["b", None]], caption=HOSTILE))
    sections += [Figure(f"{HOSTILE} {name}", png, HOSTILE) for name, png in pictures.items()]
    write_report(path, sections, title=HOSTILE)
    return path


class Page(HTMLParser):
    """What a page holds: its elements, texts and pictures; fails on elements that are not closed in order."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_figures_are_pictures_of_sensible_size_that_show_something(pictures: dict[str, bytes]) -> None:
    for name, png in pictures.items():
        image = decode(png)
        assert 300 <= image.shape[1] <= 2500 and 200 <= image.shape[0] <= 1500, (name, image.shape)
        assert image[..., :3].std() > 0.02, name
        assert len(png) < 2_000_000


def test_equal_inputs_give_equal_pictures(pictures: dict[str, bytes]) -> None:
    assert all_figures() == pictures


def test_report_is_one_whole_page_with_every_section(report: Path, pictures: dict[str, bytes]) -> None:
    page = Page(report.read_text(encoding="utf-8"))
    assert len(page.all("section")) == 2 + len(pictures)
    links = [link["href"] for link in page.all("a")]
    assert links == [f"#{section['id']}" for section in page.all("section")]
    images = page.all("img")
    for image, png in zip(images, pictures.values(), strict=True):
        assert str(image["src"]).startswith("data:image/png;base64,")
        assert (image["height"], image["width"]) == tuple(map(str, decode(png).shape[:2]))
    assert {"1.235", "\N{EN DASH}", "First."} <= set(page.texts)
    assert list(report.parent.iterdir()) == [report]


def test_report_loads_nothing_and_runs_nothing(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    assert not re.search(
        r"(src|href)=\"(?!data:image/png|#section)|url\(|@import|\son\w+=", re.sub(r"base64,[^\"]+", "", text)
    )


def test_hostile_names_stay_text(report: Path) -> None:
    page = Page(report.read_text(encoding="utf-8"))
    assert page.texts.count(HOSTILE) >= 8
    assert all(image["alt"] == HOSTILE for image in page.all("img"))


def test_ragged_tables_and_pictures_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="row 1 has 3 cells for 2 columns"):
        Table("t", ["a", "b"], [[1, 2], [1, 2, 3]])
    with pytest.raises(ValueError, match="'f': 4 bytes that are no PNG"):
        Figure("f", b"JFIF", "")


def test_hidden_blocks_are_grey_and_the_rest_is_the_input() -> None:
    for name in ("s1", "dem", "s2-l1c"):
        shown = sample()
        before, visible, _ = figures._before_and_after(CONTRACT.modality(name), shown, name)
        hidden = figures.enlarge(shown.hidden[name], 32, (64, 64))
        assert (visible[hidden] == np.float32(drawing.GREY)).all()
        np.testing.assert_array_equal(visible[~hidden], before[~hidden])
    assert (before[..., 0] != before[..., 2]).any()


@pytest.mark.parametrize("shape", [(64, 64), (70, 33)])
def test_masks_of_blocks_cover_images_of_any_size(shape: tuple[int, int]) -> None:
    blocks = np.zeros((-(-shape[0] // 32), -(-shape[1] // 32)), dtype=bool)
    blocks[0, 0] = blocks[-1, -1] = True
    wanted = np.zeros(shape, dtype=bool)
    for row, column in np.argwhere(blocks):
        wanted[32 * row : 32 * row + 32, 32 * column : 32 * column + 32] = True
    np.testing.assert_array_equal(figures.enlarge(blocks, 32, shape), wanted)
    with pytest.raises(ValueError, match="cells of 4 pixels does not cover"):
        figures.enlarge(blocks, 4, shape)


def test_physical_values_undo_the_normalisation() -> None:
    s1 = replace(modality("s1"), offset=(-12.0, -19.0), scale=(4.0, 5.0))
    decibels = np.array([[[-20.0]], [[-9.0]]], dtype=np.float32)
    normalised = (decibels - [[[-12.0]], [[-19.0]]]) / [[[4.0]], [[5.0]]]
    np.testing.assert_allclose(figures.physical(s1, normalised), decibels, rtol=1e-6)


def test_true_colour_shows_red_as_red_and_invalid_pixels_grey() -> None:
    values = np.zeros((13, 20, 20), dtype=np.float32)
    values[3, :, 10:] = 3000  # B4
    values[1:3, :, :10] = 3000  # B2, B3
    valid = np.ones((20, 20), dtype=bool)
    valid[0] = False
    image = drawing.picture(modality("s2-l1c"), values, valid)
    np.testing.assert_array_equal(image[5, 15], [1, 0, 0])
    np.testing.assert_array_equal(image[5, 5], [0, 1, 1])
    np.testing.assert_allclose(image[0, 5], drawing.GREY)


def test_relief_is_light_towards_the_upper_left() -> None:
    down, right = np.mgrid[:30, :30].astype(np.float32)
    pyramid = -np.maximum(np.abs(down - 15), np.abs(right - 15)) * 30
    image = drawing.picture(modality("dem"), pyramid[None], np.ones((30, 30), dtype=bool))[..., 0]
    assert image[15, 5] > image[15, 25] and image[5, 15] > image[25, 15]


@pytest.mark.parametrize("name", list(SENSORS))
def test_every_sensor_has_a_picture_even_of_nothing(name: str) -> None:
    kind = modality(name)
    for valid in (np.zeros((8, 8), dtype=bool), np.ones((8, 8), dtype=bool)):
        image = drawing.picture(kind, np.full((len(kind.bands), 8, 8), 5.0), valid)
        assert image.shape == (8, 8, 3) and np.isfinite(image).all() and 0 <= image.min() <= image.max() <= 1


def test_classes_are_drawn_in_their_colours() -> None:
    image = drawing.coloured(np.array([[0, 1, 2, 255]], dtype=np.uint8), CLASSES)
    np.testing.assert_array_equal((255 * image[0, :3]).round(), CLASSES.palette)
    np.testing.assert_allclose(image[0, 3], drawing.GREY)


def test_large_maps_are_thinned_out() -> None:
    label = np.zeros((3000, 2500), dtype=np.uint8)
    label[:1500] = 1
    assert max(decode(figures.maps({"label": label}, CLASSES)).shape) < 1000


def test_the_legend_of_a_single_map_has_all_classes() -> None:
    names = tuple(f"class number {number}" for number in range(8))
    classes = Classes(names=names, palette=tuple((30 * number, 255 - 30 * number, 77) for number in range(8)))
    image = decode(figures.maps({"label": np.full((40, 40), 255)}, classes))
    found = {tuple(colour) for colour in np.unique((255 * image[..., :3]).round().astype(int).reshape(-1, 3), axis=0)}
    assert set(classes.palette) <= found


# The browser: Chromium, without a driver. A copy of the page gets a script that writes what the browser
# found into the page itself, and Chromium prints the page; the original is opened as it is, for its console
# and a screenshot.

PROBE = """<script>addEventListener("load", () => {
  document.documentElement.dataset.found = JSON.stringify(
    [...document.images].map(image => [image.complete, image.naturalWidth, image.clientWidth]));
});</script>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    """Path of Chromium; without it, tests marked `browser` are not collected."""
    path = shutil.which("chromium")
    assert path
    return path


def browse(chromium: str, page: Path, *wanted: str) -> tuple[str, list[str]]:
    """Open `page`; what Chromium prints, and what the page wrote to the console."""
    profile = page.parent / f"profile-{page.stem}"
    profile.mkdir()
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}",
        "--enable-logging=stderr", "--window-size=1100,1400", *wanted, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, re.findall(r":CONSOLE[:(]\d+\)?\] (.*)", done.stderr)


def probe(chromium: str, page: Path, folder: Path) -> tuple[list[list[float]], list[str]]:
    """Per picture of `page`: loaded, natural and shown width; and the console."""
    text = page.read_text(encoding="utf-8").replace(
        "default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'"
    )
    copy = folder / "probed.html"
    copy.write_text(text.replace("</head>", PROBE + "</head>"), encoding="utf-8")
    printed, console = browse(chromium, copy, "--dump-dom")
    found = Page(printed).all("html")[0]["data-found"]
    return json.loads(str(found)), console


@pytest.mark.browser
def test_browser_shows_every_picture_and_reports_no_error(
    chromium: str, report: Path, pictures: dict[str, bytes], tmp_path: Path
) -> None:
    found, console = probe(chromium, report, tmp_path)
    assert console == []
    assert [natural for _, natural, _ in found] == [decode(png).shape[1] for png in pictures.values()]
    assert all(loaded and shown > 200 for loaded, _, shown in found)


@pytest.mark.browser
def test_browser_draws_the_page(chromium: str, report: Path, tmp_path: Path) -> None:
    page = Path(shutil.copy(report, tmp_path / "report.html"))
    shot = tmp_path / "shot.png"
    _, console = browse(chromium, page, f"--screenshot={shot}")
    assert console == []
    assert imread(shot).std() > 0.05


@pytest.mark.browser
def test_browser_test_would_notice_a_broken_page(chromium: str, tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    broken = '<img src="data:image/png;base64,AAAA"><script>console.error("boom"); missing()</script>'
    page.write_text(f"<!doctype html><html><head></head><body>{broken}</body></html>", encoding="utf-8")
    found, console = probe(chromium, page, tmp_path)
    assert [natural for _, natural, _ in found] == [0]
    assert len(console) == 2 and "boom" in console[0] and "missing is not defined" in console[1]
