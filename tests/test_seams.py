"""The demo's shards on a real S3 server; tests/test_slurm_training.py trains from one on two nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import configs
from shards.build import build
from shards.manifest import select
from shards.stream import Share, Stream
from shards.synthetic import make_archive
from shards.verify import verify


def demo_shards(root: Path, out: str) -> None:
    """The demo's shards, of a smaller archive."""
    make_archive(root / "archive", places=3, size=128)
    build(configs.load("demo-shards", [f"archive.root={root / 'archive'}", f"out={out}", "workers=1"]))


@pytest.mark.s3
def test_the_demos_shards_on_s3_are_those_of_a_folder(tmp_path: Path, s3_url: str) -> None:
    for out in (str(tmp_path / "data"), f"{s3_url}/data"):
        demo_shards(tmp_path, out)
        assert verify(out) == []
    local, remote = select(str(tmp_path / "data")), select(f"{s3_url}/data")
    assert local.fingerprint == remote.fingerprint
    streams = (iter(Stream(selection, 1, 4, Share(4))) for selection in (local, remote))
    for _, (one, p), (two, q) in zip(range(len(local) + 8), *streams, strict=False):
        assert (one.key, p) == (two.key, q)
        np.testing.assert_array_equal(one.tiles["s2-l1c"].values, two.tiles["s2-l1c"].values)
