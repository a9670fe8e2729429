"""The manifest as other tools see it; geopandas is in test_build.py."""

from __future__ import annotations

from pathlib import Path

import duckdb
import geopandas
import shapely

from shards.build import build
from tests.scenes import make_archive, shards_config


def test_duckdb_opens_the_manifest_with_its_footprints(tmp_path: Path) -> None:
    """Without its spatial extension, a download: DuckDB 2 knows the geometries of GeoParquet itself."""
    make_archive(tmp_path / "archive")
    build(shards_config(tmp_path / "archive", tmp_path / "data"))
    path = tmp_path / "data/manifest.parquet"
    query = "SELECT key, members[1].name, valid['s1'], typeof(geometry), ST_AsText(geometry) FROM read_parquet(?)"
    rows = {row[0]: row[1:] for row in duckdb.execute(query, [str(path)]).fetchall()}
    assert len(rows) == 27
    member, valid, kind, text = rows["place2-00000-00032"]
    assert (member, valid, kind) == ("place2-00000-00032.s2-l2a.b2nd", 1.0, "GEOMETRY('OGC:CRS84')")
    footprint = geopandas.read_parquet(path).set_index("key").geometry["place2-00000-00032"]
    assert shapely.from_wkt(text).equals_exact(footprint, 1e-9)
