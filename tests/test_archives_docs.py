"""What docs/archives.md says of archives is what the code knows of them."""

from __future__ import annotations

import configs
from shards.archives import ARCHIVES, about
from tests.test_architecture import ROOT

PAGE = (ROOT / "docs/archives.md").read_text()
OWN = {"catalog", "stac", "folder"}


def test_every_archive_is_described_with_its_bad_files_and_has_a_preset() -> None:
    for name in ARCHIVES:
        assert f"| `{name}`" in PAGE
        for file in about(name).broken:
            assert file in PAGE
        config = configs.load(f"shards-{name}", [])
        assert config.archive.name == name


def test_every_public_archive_names_licence_attribution_and_source() -> None:
    for name in set(ARCHIVES) - OWN:
        assert all((about(name).title, about(name).licence, about(name).attribution, about(name).source)), name
