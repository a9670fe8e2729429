"""What SSL4EO-S12, Major TOM, MMEarth and TerraMesh have in common."""

from __future__ import annotations

from pathlib import Path

import pytest

import configs
from shards.archives import ArchiveError, about, open_archive
from shards.sensors import SENSORS
from tests.scenes import write_scene

NAMES = ("ssl4eo-s12", "ssl4eo-s12-v1.1", "majortom", "mmearth", "terramesh")


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_the_archive_is_an_error_that_shows_the_layout(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="nowhere"):
        list(open_archive(name, str(tmp_path / "nowhere")))
    for folder in ("s1/notes", "train/S2L2A", "a/b/c/d"):
        (tmp_path / folder).mkdir(parents=True)
    write_scene(tmp_path / "some.tif", "dem", size=8)
    with pytest.raises(ArchiveError) as caught:
        list(open_archive(name, str(tmp_path)))
    assert str(tmp_path) in str(caught.value) and str(caught.value).count("\n") >= 2


@pytest.mark.parametrize("name", NAMES)
def test_what_is_said_of_an_archive(name: str) -> None:
    known = about(name)
    assert known.title and known.licence.startswith("CC-BY") and "Copernicus" in known.attribution
    assert known.source.startswith(("https://", "Hugging Face: ")) and set(known.notes) <= set(SENSORS)
    assert configs.load(f"shards-{name}").archive.name == name
