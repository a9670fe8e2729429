"""Protocols: their hashes, the rules by which they deal places, and datasets built from trees of each layout."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import configs
from configs import ConfigError
from pipeline.config import ProtocolChoice
from pipeline.protocols import described, find, known, samples
from pipeline.protocols.dfc2020 import CITIES, CONTEST
from pipeline.protocols.places import places_of
from pipeline.protocols.splits import ByGroup, Eastings, Places
from shards.build import BuildError, build
from shards.manifest import ManifestError, Selection, select
from shards.stream import Share, Stream
from tests.benchmark_trees import dfc2020_patch, hunan_tile, spacenet6_tile

# A rule that changes needs another version, so that two numbers of one name and version can be compared.
HASHES = {
    "dfc2020/paper-random": (1, "d18f330f34a25c476f52df2bd524ed6bd0781a7be4785b37ffc29fbba0da89c6"),
    "dfc2020/copernicus-bench": (1, "a76428af4bace34c9a84309d2484146ef554cc6ff220cae403e3614ff5474ff7"),
    "dfc2020/leave-city-out": (1, "4437d8590da8c551c47046cd688c43640edab9f13b85b0d9683f9ee58e33bbbc"),
    "dfc2020/competition": (1, "d4a6852c0318336ba0cb349fdbdbaaafff2a1ede8fd7475e5f71671ad7f153fc"),
    "msaw/easting": (1, "93b4bec35ee943015bf5911d840e8dcf694718038b7bd0f31002b4ea0f2e3ea8"),
    "msaw/strip": (1, "8e2c779ea35b5ff5aa8c718c31d84a5d8e564521e572dbcf17a945ee6f70bcd1"),
    "hunan/official": (1, "35a032ea6a9ebc6323cc54cf15b2457021cb74bedc516af29d8ffb565682d6a6"),
    "hunan/official-11-others": (1, "e7cc27e6b2ec24e2da4526fea9fc8b3ee92fd4be359167b0c9636dadfae97397"),
}
SEASONS = {"BlackForest": "spring", "Chabarovsk": "summer", "KippaRing": "winter", "MexicoCity": "winter"}
STRIPS = [f"201908040{hour}0000_201908040{hour}0230" for hour in range(8)]


def chosen(name: str, **more: Any) -> ProtocolChoice:
    return ProtocolChoice(name=name, **more)


def built(preset: str, root: Path, *overrides: str) -> str:
    """The dataset that a preset makes of `root`/in, in `root`/data; small tiles, one process."""
    out = root / "data"
    settings = [f"archive.root={root / 'in'}", f"out={out}", "workers=1", "tile.size=32", *overrides]
    build(configs.load(preset, settings))
    return str(out)


def keys(selection: Selection) -> list[str]:
    return list(selection.rows(["key"])["key"].to_pylist())


def patches(selection: Selection) -> list[str]:
    return [key.rsplit("-", 2)[0] for key in keys(selection)]


def edited(data: str, folder: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """A copy of a dataset's manifest with another dataset.json; its shards stay where they are."""
    folder.mkdir()
    (folder / "manifest.parquet").write_bytes(Path(data, "manifest.parquet").read_bytes())
    facts = json.loads(Path(data, "dataset.json").read_text())
    change(facts)
    (folder / "dataset.json").write_text(json.dumps(facts))
    return str(folder)


# --- names, versions, hashes -----------------------------------------------------------------------------------------


def test_a_changed_rule_needs_another_version() -> None:
    assert {name: (protocol.version, protocol.hash()) for name, protocol in known().items()} == HASHES


def test_every_part_of_a_protocol_is_in_its_hash() -> None:
    protocol = find("dfc2020/competition")
    others = [
        replace(protocol, version=2),
        replace(protocol, inputs={"s1": ("VH", "VV")}),
        replace(protocol, labels=replace(protocol.labels, ignored=(0, 3, 8))),
        replace(protocol, split=ByGroup(CONTEST[0], "", CONTEST[1], held_out=0.2, seed=1)),
        replace(protocol, split=Eastings("EPSG:32631", 0, 1, 2)),
        replace(protocol, tile=128),
        replace(protocol, metrics=("mIoU",)),
    ]
    assert len({protocol.hash(), *(other.hash() for other in others)}) == 1 + len(others)
    assert replace(protocol, sizes={}).hash() == protocol.hash()


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'dfc2020/random' is not known(?s:.*)dfc2020/paper-random(?s:.*)hunan/"):
        described(chosen("dfc2020/random"))
    with pytest.raises(ConfigError, match=r"fold=2: hunan/official has no folds"):
        described(chosen("hunan/official", fold=2))
    with pytest.raises(ConfigError, match=r"lists=here: hunan/official reads no lists"):
        described(chosen("hunan/official", lists="here"))
    with pytest.raises(ConfigError, match=r"fold=7: there are 7 folds: 0 BandarAnzali, 1 BlackForest"):
        described(chosen("dfc2020/leave-city-out", fold=7))


def test_what_metrics_say_of_a_protocol() -> None:
    assert described(ProtocolChoice()) is None
    assert described(chosen("hunan/official")) == {
        "name": "hunan/official", "version": 1, "hash": HASHES["hunan/official"][1],
    }  # fmt: skip
    found = described(chosen("dfc2020/leave-city-out", fold=2))
    assert found is not None and found["fold"] == "CapeTown"
    assert found["hash"] == HASHES["dfc2020/leave-city-out"][1]


# --- rules on names alone --------------------------------------------------------------------------------------------


def contest_places() -> Places:
    counts = {"validation": 986, "test": 5128}
    names = sorted(f"ROIs0000_{split}_0_p{n}" for split, count in counts.items() for n in range(count))
    groups = [name.rpartition("_")[0] for name in names]
    return Places(np.array(names), np.array(groups), np.zeros(len(names)), np.array(["EPSG:32633"] * len(names)))


@pytest.mark.parametrize("name", ["dfc2020/paper-random", "dfc2020/competition"])
def test_the_whole_contest_gives_the_published_sizes(name: str) -> None:
    protocol, places = find(name), contest_places()
    roles = protocol.split.roles(places, 0, {})
    assert {role: int(mask.sum()) for role, mask in roles.items()} == protocol.sizes
    assert not (roles["train"] & (roles["val"] | roles["test"])).any()
    # Nobody's place hangs on the order of the manifest.
    turned = Places(*(getattr(places, field)[::-1] for field in ("names", "groups", "west", "crs")))
    assert (protocol.split.roles(turned, 0, {})["train"][::-1] == roles["train"]).all()


def test_random_takes_patches_of_both_splits_and_competition_keeps_them_apart() -> None:
    places = contest_places()
    random = find("dfc2020/paper-random").split.roles(places, 0, {})
    assert all({*places.groups[mask].tolist()} == {*CONTEST} for mask in random.values())
    apart = find("dfc2020/competition").split.roles(places, 0, {})
    assert [{*places.groups[apart[role]].tolist()} for role in ("train", "val", "test")] == [
        {CONTEST[0]}, {CONTEST[0]}, {CONTEST[1]},
    ]  # fmt: skip


def test_eastings_are_those_of_the_baseline() -> None:
    west = np.array([591_000.0, 591_550.0, 595_309.0, 595_310.0, 599_000.0])
    names = np.array(list("abcde"))
    places = Places(names, names, west, np.array(["EPSG:32631"] * 5))
    roles = find("msaw/easting").split.roles(places, 0, {})
    assert roles["test"].tolist() == roles["val"].tolist() == [False, False, False, True, True]
    assert roles["train"].tolist() == [True, True, True, False, False]
    with pytest.raises(ConfigError, match=r"1 of 5 places are not in EPSG:32631, such as c in no CRS"):
        find("msaw/easting").split.roles(replace(places, crs=np.where(names == "c", "", places.crs)), 0, {})


@pytest.mark.real_data
def test_the_real_strips_of_msaw(real_data: Path) -> None:
    ids = sorted((real_data / "layout_files/SN6_train_tile_ids.txt").read_text().split()[1:])
    strips = [name.split("_tile_")[0] for name in ids]
    places = Places(np.array(ids), np.array(strips), np.full(len(ids), np.nan), np.array([""] * len(ids)))
    roles = find("msaw/strip").split.roles(places, 0, {})
    assert {role: int(mask.sum()) for role, mask in roles.items()} == find("msaw/strip").sizes
    dealt = [set(places.groups[mask].tolist()) for mask in roles.values()]
    assert [len(strips) for strips in dealt] == [157, 17, 30] and len(set.union(*dealt)) == 204
    assert (np.sum(list(roles.values()), axis=0) == 1).all() and len(places) == 3401


# --- DFC2020 ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def contest(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("contest")
    for number in range(5):
        dfc2020_patch(root / "in", "ROIs0000_validation", "0", number, "validation", "s1 s2 dfc lc")
    for number in range(10):
        dfc2020_patch(root / "in", "ROIs0000_test", "0", number)
    dfc2020_patch(root / "in", "ROIs0000_test", "0", 77, kinds="s1 s2")  # not labelled
    return built("shards-dfc2020", root)


def test_paper_random(contest: str, caplog: pytest.LogCaptureFixture) -> None:
    choice = chosen("dfc2020/paper-random")
    with caplog.at_level(logging.WARNING):
        train, val, test = (samples(choice, contest, role) for role in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (12, 3, 3) and keys(val) == keys(test)
    assert not set(keys(train)) & set(keys(test)) and not any("_p77" in key for key in keys(train) + keys(test))
    assert "12 of 4,891 train, 3 of 1,223 val, 3 of 1,223 test places" in caplog.text
    assert "val and test are the same places" in caplog.text
    assert "tiles have 32 pixels on a side, the protocol's 256" in caplog.text
    assert train.contract.sensors == ("s2-l1c", "s1")
    (identity,) = test.identity
    assert identity["protocol"] == {**(described(choice) or {}), "role": "test"}
    assert len({selection.fingerprint for selection in (train, val, test)}) == 3
    assert samples(choice, {contest: 1}, "test").identity == test.identity


def test_the_images_tell_the_labels(contest: str) -> None:
    """So that a test that learns from such trees can only fail for its own reasons."""
    stream = Stream(samples(chosen("dfc2020/competition"), contest, "test"), 0, 1, Share(1))
    for sample, _ in stream.once():
        assert sample.label is not None
        right = np.rint((sample.tiles["s1"].values.mean(0) + 22) / 2)
        counted = sample.label != 255
        assert 0.5 < counted.mean() < 1 and (right[counted] == sample.label[counted]).mean() > 0.95


def test_competition_and_what_narrows_it(contest: str) -> None:
    choice = chosen("dfc2020/competition")
    train, val, test = (samples(choice, contest, role) for role in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (4, 1, 10)
    assert all("_validation_" in key for key in keys(train) + keys(val)) and all("_test_" in key for key in keys(test))
    alone = samples(choice, contest, "test", sensors=["s1"])
    assert alone.contract.sensors == ("s1",) and keys(alone) == keys(test) and alone.fingerprint != test.fingerprint
    # Roles are dealt before: what `where` leaves out of a role does not come back in another.
    one = keys(train)[:1]
    assert keys(samples(choice, contest, "train", where={"key": one})) == one
    with pytest.raises(ManifestError, match=r"no sample that is val by dfc2020/competition fits where="):
        samples(choice, contest, "val", where={"key": one})


def test_without_a_name_where_decides(contest: str) -> None:
    assert len(samples(ProtocolChoice(), contest, "train")) == 15
    assert len(samples(ProtocolChoice(), contest, "train", where={"split": ["val"]})) == 5
    assert "protocol" not in samples(ProtocolChoice(), contest, "val").identity[0]


def lists(folder: Path, **names: list[str]) -> str:
    folder.mkdir()
    for role, lines in names.items():
        (folder / f"{role}.txt").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_copernicus_bench_follows_the_users_lists(
    contest: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = ["s2/ROIs0000_test_s2_0_p2.tif", "ROIs0000_test_0_p4", "ROIs0000_test_0_p500"]
    first = lists(tmp_path / "a", train=train, val=["ROIs0000_test_dfc_0_p1.tif,x"], test=["ROIs0000_test_0_p3"])
    choice = chosen("dfc2020/copernicus-bench", lists=first)
    found = {role: patches(samples(choice, contest, role)) for role in ("train", "val", "test")}
    assert found == {
        "train": ["ROIs0000_test_0_p2", "ROIs0000_test_0_p4"], "val": ["ROIs0000_test_0_p1"],
        "test": ["ROIs0000_test_0_p3"],
    }  # fmt: skip
    assert "the dataset lacks 1 of 5 ids, such as ROIs0000_test_0_p500" in caplog.text
    # The hash is of the ids, not of the files: another order is the same, another id is not.
    same = lists(tmp_path / "b", train=train[::-1], val=["ROIs0000_test_0_p1"], test=["ROIs0000_test_0_p3"])
    other = lists(tmp_path / "c", train=train[:2], val=["ROIs0000_test_0_p1"], test=["ROIs0000_test_0_p3"])
    hashes = [(described(replace(choice, lists=folder)) or {})["hash"] for folder in (first, same, other)]
    assert hashes[0] == hashes[1] != hashes[2] and HASHES[choice.name][1] not in hashes


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (["ROIs0000_test_0_p1", "patch 7"], r"line 2 of .*train.txt is no id: 'patch 7'"),
        (
            ["ROIs0000_test_0_p1", "ROIs0000_test_s1_0_p1.tif"],
            r"1 ids of .* stand there twice.* \(the first in train\)",
        ),
        (["ROIs0000_test_0_p3"], r"such as ROIs0000_test_0_p3 \(the first in train and test\)"),
        ([], r"train.txt is empty"),
    ],
)
def test_lists_that_cannot_be_used(train: list[str], words: str, contest: str, tmp_path: Path) -> None:
    folder = lists(tmp_path / "a", train=train, val=["ROIs0000_test_0_p2"], test=["ROIs0000_test_0_p3"])
    with pytest.raises(ConfigError, match=words):
        samples(chosen("dfc2020/copernicus-bench", lists=folder), contest, "test")


def test_lists_that_are_absent_or_of_other_patches(contest: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"copernicus-bench reads lists of ids; write protocol.lists=FOLDER"):
        samples(chosen("dfc2020/copernicus-bench"), contest, "test")
    with pytest.raises(ConfigError, match=r"train.txt cannot be read"):
        samples(chosen("dfc2020/copernicus-bench", lists=str(tmp_path)), contest, "test")
    ids = {role: [f"ROIs0000_test_0_p{900 + n}"] for n, role in enumerate(("train", "val", "test"))}
    with pytest.raises(ConfigError, match=r"holds none of the 3 ids, such as ROIs0000_test_0_p900; it holds ROIs0000_"):
        samples(chosen("dfc2020/copernicus-bench", lists=lists(tmp_path / "a", **ids)), contest, "test")


def test_leave_city_out(tmp_path: Path) -> None:
    for number, city in enumerate(CITIES):
        dfc2020_patch(tmp_path / "in/DFC_Public_Dataset", f"ROIs0000_{SEASONS.get(city, 'autumn')}", city, number)
    data = built("shards-dfc2020", tmp_path)
    for fold, city in enumerate(CITIES):
        choice = chosen("dfc2020/leave-city-out", fold=fold)
        found = {role: {name.split("_")[2] for name in patches(samples(choice, data, role))}
                 for role in ("train", "val", "test")}  # fmt: skip
        validated = CITIES[(fold + 1) % 7]
        assert found == {"train": {*CITIES} - {city, validated}, "val": {validated}, "test": {city}}
    with pytest.raises(ConfigError, match=r"no labelled place that is test by dfc2020/competition .*BandarAnzali"):
        samples(chosen("dfc2020/competition"), data, "test")


def test_a_tree_with_the_land_cover_of_modis_alone_is_refused(tmp_path: Path) -> None:
    dfc2020_patch(tmp_path / "in", "ROIs0000_test", "0", 1, kinds="s1 s2 lc")
    with pytest.raises(BuildError, match=r"no place has a label(?s:.*)MODIS land cover of 500 m; the labels are dfc"):
        built("shards-dfc2020", tmp_path)
    assert len(select(built("shards-dfc2020", tmp_path, "label=null"))) == 1


def test_datasets_that_do_not_fit(contest: str, tmp_path: Path) -> None:
    choice = chosen("dfc2020/competition")

    def refused(words: str, change: Callable[[dict[str, Any]], None], **more: Any) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(ConfigError, match=words):
            samples(choice, edited(contest, folder, change), "test", **more)

    refused(r"classes water, .* has forest, .*; build it with `mcf shards build shards-dfc2020`",
            lambda facts: facts["contract"]["classes"]["names"].reverse())  # fmt: skip
    refused(r"is made of sen12ms", lambda facts: facts["builds"]["shard"]["archive"].update(name="sen12ms"))
    refused(r"s1 .* has bands VH, VV; dfc2020/competition has VV, VH",
            lambda facts: facts["contract"]["modalities"][1].update(bands=["VH", "VV"]))  # fmt: skip
    refused(r"built with label.codes=\[\[1\],\[2,3\].*has label.codes=\[\[1\],\[2\]",
            lambda facts: facts["builds"]["shard"]["label"]["codes"][1].append(3))  # fmt: skip
    refused(r"label.ignored=\[0,3,8,255,11\]", lambda facts: facts["builds"]["shard"]["label"]["ignored"].append(11))
    refused(r"dem is no input of dfc2020/competition; it has s2-l1c, s1", lambda facts: None, sensors=["dem"])
    with pytest.raises(ConfigError, match=r"is of one dataset"):
        samples(choice, {contest: 1, "other": 2}, "test")


def test_a_dataset_that_does_not_tell_its_label_map(
    contest: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = edited(contest, tmp_path / "old", lambda facts: facts["builds"]["shard"].pop("label"))
    assert len(samples(chosen("dfc2020/competition"), old, "test")) == 10
    assert "does not tell its label map" in caplog.text


# --- MSAW ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def msaw(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("msaw")
    for number, strip in enumerate(STRIPS):
        spacenet6_tile(root / "in", strip, number, 591_300.0 + 600 * number, houses=2 if number % 3 else 0)
    spacenet6_tile(root / "in", STRIPS[0], 90, 593_000.0, houses=None)
    spacenet6_tile(root / "in", STRIPS[1], 91, 593_000.0, split="Test_Public")
    return built("shards-spacenet6", root, "split.by=archive", "sensors=[sar-quadpol,rgbnir]")


def test_easting(msaw: str) -> None:
    train, test = (samples(chosen("msaw/easting"), msaw, role) for role in ("train", "test"))
    # Left edges of tiles 0 to 6 lie west of 595,310 m, that of tile 7 east of it; the four samples of a tile together.
    assert {name.split("_tile_")[1] for name in patches(train)} == {*"0123456"} and len(train) == 28
    assert {name.split("_tile_")[1] for name in patches(test)} == {"7"} and len(test) == 4


def test_a_place_is_where_its_file_is_also_when_its_first_tile_was_left_out(msaw: str) -> None:
    everything = samples(ProtocolChoice(), msaw, "train")
    rest = [number for number, key in enumerate(keys(everything)) if not key.endswith("-00000-00000")]
    places, number = places_of(everything.only(np.array(rest)))
    assert places.west.tolist() == [591_300.0 + 600 * tile for tile in range(len(STRIPS))] == sorted(places.west)
    assert places.groups.tolist() == STRIPS and np.bincount(number).tolist() == [3] * len(STRIPS)


def test_strips_stay_whole_and_unlabelled_tiles_are_never_chosen(msaw: str) -> None:
    found = {}
    for role in ("train", "val", "test"):
        try:
            selection = samples(chosen("msaw/strip"), msaw, role)
        except ConfigError as error:
            assert "no labelled place" in str(error)
            continue
        found[role] = set(selection.rows(["group"])["group"].to_pylist())
        assert not any("_tile_9" in key for key in keys(selection))
    assert sum(map(len, found.values())) == len(set().union(*found.values())) == len(STRIPS) and len(found) > 1


def test_buildings_keep_their_numbers_in_every_tile(msaw: str) -> None:
    selection = samples(chosen("msaw/easting"), msaw, "train")
    numbers: dict[str, set[int]] = {}
    for sample, _ in Stream(selection, 0, 1, Share(1)).once():
        assert sample.label is not None and sample.instances is not None
        np.testing.assert_array_equal(sample.instances > 0, sample.label == 1)
        numbers.setdefault(sample.key.rsplit("-", 2)[0], set()).update(np.unique(sample.instances).tolist())
    # Two houses of 50 m2 each; the third polygon has 2 m2. Tiles 0, 3 and 6 have an empty GeoJSON: all background.
    found = {name.split("_tile_")[1]: values for name, values in numbers.items()}
    assert found == {n: {0} if n in "036" else {0, 1, 2} for n in "0123456"}


def test_small_buildings_belong_to_the_label_map(msaw: str, tmp_path: Path) -> None:
    other = edited(msaw, tmp_path / "a", lambda facts: facts["builds"]["shard"]["label"].update(min_area=0))
    with pytest.raises(ConfigError, match=r"label.min_area=0; msaw/strip has label.min_area=20"):
        samples(chosen("msaw/strip"), other, "train")


# --- Hunan -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hunan(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Both readings of code 11, by protocol."""
    root = tmp_path_factory.mktemp("hunan")
    for split, numbers in {"train": (2604, 11624, 7), "val": (15184,), "test": (3, 9)}.items():
        for number in numbers:
            hunan_tile(root / "in/Hunan_Dataset", split, number)
    first = built("shards-hunan", root)
    (root / "data").rename(root / "ignored")
    rule = ["label.codes=[1,[2,4],3,5,6,9,[7,8,10,11]]", "label.ignored=[0,12,255]"]
    return {"official": first.replace("data", "ignored"), "official-11-others": built("shards-hunan", root, *rule)}


def test_hunan_has_the_archives_splits(hunan: dict[str, str]) -> None:
    found = {}
    for name, data in hunan.items():
        choice = chosen(f"hunan/{name}")
        assert [len(samples(choice, data, role)) for role in ("train", "val", "test")] == [3, 1, 2]
        assert all(key.startswith("test_") for key in keys(samples(choice, data, "test")))
        narrow = samples(choice, data, "test", sensors=["s2-l1c", "dem"])
        assert narrow.contract.sensors == ("s2-l1c", "dem") and narrow.identity[0]["modalities"] == ["s2-l1c", "dem"]
        sample, _ = next(iter(Stream(narrow, 0, 1, Share(1)).once()))
        assert sample.label is not None
        found[name] = set(np.unique(sample.label[:8, :8]).tolist())
    assert found == {"official": {255}, "official-11-others": {6}}


def test_code_11_is_an_explicit_choice(hunan: dict[str, str]) -> None:
    for name, other in zip(hunan, reversed(hunan.values()), strict=True):
        with pytest.raises(ConfigError, match=rf"hunan/{name} has label.codes=.*Build it again with these"):
            samples(chosen(f"hunan/{name}"), other, "train")
