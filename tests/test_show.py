"""Pictures of a dataset: known colours at known places, a map, histograms, and a page that says what is there."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from numpy.typing import NDArray

from launchers import command
from shards.contract import Contract
from shards.index import index
from shards.manifest import select
from shards.pictures import terrain
from shards.sample import Sample, Tile
from shards.show import _chosen, parse_where, show
from shards.show.sheet import HATCH, OUTLINE, Layout, sheet
from shards.show.small import _notes, shrink
from shards.statistics import measure
from shards.store import open_store
from tests.shown_dataset import CLASSES, CONTRACT, SIZE, make_sample, modality, write
from tests.terramesh_trees import terramesh
from tests.test_index import config as index_config
from tests.test_report import HOSTILE, Page, chromium, probe  # noqa: F401


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("show") / "data", [make_sample(number) for number in range(6)])


@pytest.fixture(scope="module")
def shown(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shown") / "new" / "folder"
    paths, missing = show(data, out)
    assert missing == []
    assert paths == [out / name for name in ("index.html", "samples.png", "footprints.png", "histograms.png")]
    assert sorted(out.iterdir()) == sorted(paths)
    return out


@pytest.fixture(scope="module")
def picture_of(data: str, shown: Path) -> Callable[[int, int], NDArray[Any]]:
    """The picture [side, side, 3], 0 to 255, of a sample (by its number) and a column on the sheet."""
    image = np.round(255 * imread(shown / "samples.png")[..., :3])
    chosen = list(_chosen(select(data), 24))
    layout = Layout.of(CONTRACT, chosen)
    keys = [one.sample.key for one in chosen]

    def cut(number: int, column: int) -> NDArray[Any]:
        x, y = layout.corner(keys.index(f"place-{number:03d}"), column)
        return image[y : y + layout.side, x : x + layout.side]

    return cut


# --- the contact sheet -----------------------------------------------------------------------------------------------


def test_true_colour_is_red_where_the_ground_is_red(picture_of: Callable[[int, int], NDArray[Any]]) -> None:
    image = picture_of(0, 0)
    side = len(image)
    red, blue = image[side // 2, side // 4], image[side // 2, 3 * side // 4]
    assert red[0] > 250 and max(red[1:]) < 5
    assert blue[2] > 250 and max(blue[:2]) < 5


def test_equal_values_have_equal_colours_in_all_samples(picture_of: Callable[[int, int], NDArray[Any]]) -> None:
    for column in (0, 1):
        np.testing.assert_array_equal(picture_of(0, column), picture_of(3, column))
    low, high = picture_of(0, 2), picture_of(5, 2)
    assert (low != high).any(axis=-1).all()
    # 100 m higher up in another sample, and 20 pixels of 5 m further right: the same height, the same colour.
    inner = slice(30, 80), slice(60, 100)
    np.testing.assert_array_equal(np.roll(picture_of(1, 2), 40, axis=1)[inner], picture_of(0, 2)[inner])


def test_radar_is_bright_on_land_and_dark_on_the_sea(picture_of: Callable[[int, int], NDArray[Any]]) -> None:
    image = picture_of(0, 1)
    land, sea = image[10, 60], image[-10, 60]
    assert land[0] > 250 and land[1] > 250 and max(sea[:2]) < 5
    assert land[2] > sea[2]  # VV - VH is 6 dB on land, 4 dB on the sea


def test_invalid_pixels_are_striped_and_nothing_else_is(picture_of: Callable[[int, int], NDArray[Any]]) -> None:
    stripes = {tuple(colour) for colour in np.round(255 * HATCH)}
    image = picture_of(0, 0)
    hole = len(image) * 16 // SIZE
    assert {tuple(colour) for colour in image[:hole, :hole].reshape(-1, 3)} == stripes
    rest = {tuple(colour) for colour in image[hole:].reshape(-1, 3)}
    assert not rest & stripes
    assert {tuple(colour) for colour in picture_of(1, 1).reshape(-1, 3)} == stripes  # this sample has no radar
    unlabelled = picture_of(0, 3)[-8 * len(image) // SIZE :]
    assert {tuple(colour) for colour in unlabelled.reshape(-1, 3)} == stripes


def test_labels_have_the_colours_of_the_contract(picture_of: Callable[[int, int], NDArray[Any]]) -> None:
    image = picture_of(3, 3)
    np.testing.assert_array_equal(image[5, 5], CLASSES.palette[0])
    np.testing.assert_array_equal(image[5, -5], CLASSES.palette[1])


def test_polygons_are_outlined_where_there_are_some(picture_of: Callable[[int, int], NDArray[Any]]) -> None:
    yellow = np.round(255 * np.array(OUTLINE))
    zoom = len(picture_of(2, 0)) // SIZE
    for column in range(4):
        there = (picture_of(2, column) == yellow).all(-1)
        rows, cols = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
        assert (rows.min(), rows.max() + 1) == (20 * zoom, 30 * zoom)
        assert (cols.min(), cols.max() + 1) == (40 * zoom, 50 * zoom)
        assert not there[21 * zoom + 1 : 29 * zoom, 41 * zoom + 1 : 49 * zoom].any()
        assert not (picture_of(0, column) == yellow).all(-1).any()


def test_every_sample_has_a_picture_per_modality_and_nothing_overlaps(data: str, shown: Path) -> None:
    chosen = list(_chosen(select(data), 24))
    layout = Layout.of(CONTRACT, chosen)
    image = imread(shown / "samples.png")
    assert (layout.samples, layout.columns) == (6, 4) and image.shape[1] == layout.width
    taken = np.zeros(image.shape[:2], bool)
    for number in range(6):
        for column in range(4):
            x, y = layout.corner(number, column)
            cell = np.s_[y : y + layout.side, x : x + layout.side]
            assert not taken[cell].any() and (image[cell][..., :3] < 1).any(-1).mean() > 0.4  # else the white page
            taken[cell] = True
    assert taken.sum() == 24 * layout.side**2
    assert {text for one in chosen for text in one.notes["s1"]} >= {"absent", "2021-05-03", "shift +0.5, -1.2 px"}
    assert {one.notes["s2-l2a"][1] for one in chosen} == {"valid 93.7 %"}
    tile = make_sample(0).tiles["s1"]
    assert _notes("s1", tile, {"shift": {"s1": [-0.04, 0.04]}})[-1] == "shift +0.0, +0.0 px"
    assert "val \N{MIDDLE DOT} group g1 \N{MIDDLE DOT} cloud 30 %" in {one.lines[1] for one in chosen}


def test_the_same_few_samples_from_all_over_the_dataset(data: str) -> None:
    def keys(samples: int) -> list[str]:
        return [one.sample.key for one in _chosen(select(data), samples)]

    assert keys(3) == keys(3) and set(keys(3)) < set(keys(4)) and len(keys(400)) == 6
    assert keys(3) == select(data, limit=3).rows(["key"])["key"].to_pylist()


@pytest.mark.parametrize(("side", "height", "width"), [(512, 171, 171), (300, 150, 150), (224, 224, 224)])
def test_large_tiles_are_means_of_their_valid_pixels(side: int, height: int, width: int) -> None:
    step = round(side / height)
    valid = np.ones((side, side), bool)
    valid[:step, :step] = False
    valid[step, step] = step == 1
    values = np.random.default_rng(0).normal(size=(1, side, side)).astype(np.float32)
    label = (np.arange(side)[:, None] // step % 2 * np.ones(side, int)).astype(np.uint8)
    small = shrink(Sample("k", {"dem": Tile(values, valid)}, label), Contract(modalities=(modality("dem"),)), {})
    tile = small.sample.tiles["dem"]
    expected = side // step
    assert tile.valid.shape == (expected, expected) and not tile.valid[0, 0]
    square = np.s_[step : 2 * step, step : 2 * step]
    assert tile.values[0, 1, 1] == pytest.approx(values[0][square][valid[square]].mean(), abs=1e-6)
    assert small.sample.label is not None
    np.testing.assert_array_equal(small.sample.label[:, 0], np.arange(expected) % 2)


def test_relief_is_lit_from_the_upper_left_and_tinted_by_height() -> None:
    row, col = np.mgrid[:40, :40].astype(np.float32)
    everywhere = np.ones((40, 40), bool)
    pyramid = -np.maximum(np.abs(row - 20), np.abs(col - 20))
    grey = terrain(pyramid, everywhere, (-1e6, 1e6), 1.0)
    assert grey[20, 8].mean() > grey[20, 32].mean() and grey[8, 20].mean() > grey[32, 20].mean()
    low, high = (terrain(np.full((40, 40), height), everywhere, (0.0, 1000.0), 1.0)[20, 20] for height in (0, 1000))
    assert low[1] > max(low[0], low[2]) and high.min() > 0.7 > low.min()
    half = col < 20
    cliff = terrain(np.where(half, 500.0, 0.0), half, (0.0, 1000.0), 1.0)
    np.testing.assert_allclose(cliff[:, :20], np.broadcast_to(cliff[0, 0], (40, 20, 3)), atol=1e-5)


def test_snow_and_clouds_do_not_leave_land_black() -> None:
    values = np.full((12, SIZE, SIZE), 900.0, np.float32)
    values[:, :, :12] = 9000  # a fifth is snow
    values[:, 32:] = np.linspace(200, 1500, SIZE)
    sample = Sample("k", {"s2-l2a": Tile(values, np.ones((SIZE, SIZE), bool))})
    contract = Contract(modalities=(modality("s2-l2a"),))
    figure = sheet(contract, measure(sample), [shrink(sample, contract, {})])
    layout = Layout.of(contract, [shrink(sample, contract, {})])
    x, y = layout.corner(0)
    canvas = np.asarray(figure.images[0].get_array())
    land, snow = canvas[y + 20, x + layout.side // 2], canvas[y + 20, x + 4]
    assert snow.min() > 240 and 70 < land.mean() < 150


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_holds_all_pictures_and_says_what_is_there(data: str, shown: Path) -> None:
    text = (shown / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    inline = [base64.b64decode(str(image["src"]).split(",")[1]) for image in page.all("img")]
    assert inline == [(shown / f"{name}.png").read_bytes() for name in ("samples", "footprints", "histograms")]
    assert not page.all("script") and not re.search(
        r"(src|href)=\"(?!data:image/png|#section)|url\(|@import", re.sub(r"base64,[^\"]+", "", text)
    )
    words = " ".join(" ".join(page.texts).split())
    for wanted in (
        f"{data}: 6 samples of s2-l2a, s1, dem in 2 tars", "Fingerprint abc", "train 3 50 3 2", "g1 3 1 1 0 1",
        "s1 2 float32, dB 83.3 1 2021-05-01 2021-05-06", "s1 5 1.35 1.35 0.5 -1.25 5 0 0", "to 20 % 2 33.3",
        "too cloudy 3 place-100", "6 of 9 planned", "b.tif: damaged", "licence CC-BY-4.0", "attribution not said",
        "water 3 1 1 1 100",
    ):  # fmt: skip
        assert wanted in words, wanted
    assert page.texts.count(HOSTILE) == 2


def test_a_filter_leaves_the_others_out(data: str, tmp_path: Path) -> None:
    show(data, tmp_path, where=parse_where(["split=train,val", "labelled=true"]))
    words = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "only those with split train or val, labelled True: 4." in words and "4 of 4 samples" in words


def test_one_modality_without_labels_statistics_or_place(tmp_path: Path) -> None:
    contract = Contract(modalities=(modality("s1"),))
    samples = [make_sample(number) for number in range(3)]
    bare = [Sample(one.key, {"s1": one.tiles["s1"]}) for one in samples]
    data = write(tmp_path / "data", bare, contract)
    store = open_store(data)
    facts = store.get("dataset.json").replace(b'"statistics"', b'"other"')
    store.put("dataset.json", facts)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/footprints.png").write_bytes(b"of another dataset")
    paths, missing = show(data, tmp_path / "out")
    assert [path.name for path in paths] == ["index.html", "samples.png"]
    assert missing[0].startswith("no map: the samples have no CRS") and len(missing) == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["index.html", "samples.png"]
    words = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    assert "There is no map" in words and "There is one modality only" in words and "No cloud fraction" in words


def test_an_index_over_foreign_tars(tmp_path: Path) -> None:
    terramesh(tmp_path / "TerraMesh")
    index(index_config(tmp_path / "TerraMesh", tmp_path / "indexed"))
    paths, missing = show(str(tmp_path / "indexed"), tmp_path / "out")
    assert len(paths) == 4 and missing == []
    words = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    assert "an index does not read all pixels" in words and "CC-BY-SA-4.0" in words and "3 of 3 samples" in words
    chosen = list(_chosen(select(str(tmp_path / "indexed")), 1))
    assert "valid 100 %" in chosen[0].notes["s1"]


@pytest.mark.s3
def test_a_dataset_on_s3_looks_the_same(data: str, shown: Path, s3_url: str, tmp_path: Path) -> None:
    store = open_store(s3_url)
    for path in Path(data).iterdir():
        store.put(path.name, path)
    show(s3_url, tmp_path)
    for name in ("samples", "footprints", "histograms"):
        assert (tmp_path / f"{name}.png").read_bytes() == (shown / f"{name}.png").read_bytes()


def test_equal_datasets_give_equal_pictures(data: str, shown: Path, tmp_path: Path) -> None:
    show(data, tmp_path)
    for path in shown.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_the_command_prints_what_it_wrote(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main(["shards", "show", data, "--samples", "2", "split=train"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"show/{name}" for name in ("index.html", "samples.png", "footprints.png", "histograms.png")]
    assert all(Path(name).is_file() for name in printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DATA", "--samples", "0"], "--samples 0: a contact sheet holds 1 to 400"),
        (["DATA", "split"], "'split': write a filter as column=value,..."),
        (["DATA", "labelled=perhaps"], "labelled=perhaps: write labelled=true or labelled=false"),
        (["DATA", "colour=red"], "where.colour: unknown column; allowed: group, split"),
        (["DATA", "split=nowhere"], "no sample fits"),
        (["nowhere"], "nowhere: not a dataset"),
        (["DATA", "--out", "file"], "file: cannot be written"),
        (["DAMAGED"], "differs from the manifest's checksum"),
    ],
)
def test_mistakes_end_with_one_line(
    arguments: list[str], message: str, data: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    if "DAMAGED" in arguments:
        shutil.copytree(data, tmp_path / "damaged")
        for tar in (tmp_path / "damaged").glob("*.tar"):
            tar.write_bytes(bytes(tar.stat().st_size))
    places = {"DATA": data, "DAMAGED": str(tmp_path / "damaged")}
    assert command.main(["shards", "show", *(places.get(item, item) for item in arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mcf: ") and message in error and error.count("\n") == 1
    assert not Path("show").exists()


@pytest.mark.browser
def test_browser_shows_every_picture(chromium: str, shown: Path, tmp_path: Path) -> None:  # noqa: F811
    page = Path(shutil.copy(shown / "index.html", tmp_path / "index.html"))
    found, console = probe(chromium, page, tmp_path)
    assert console == [] and len(found) == 3
    assert all(loaded and width > 200 for loaded, _, width in found)
