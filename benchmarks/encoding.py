"""Encodings: bytes, time to encode and time to decode of S2 + S1 samples, by each encoding that shards can have."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import configs
from benchmarks.timing import compare
from shards.build import build
from shards.manifest import select
from shards.sample import EXTENSIONS, Encoding, Sample, decode, encode
from shards.stream import Share, Stream
from shards.synthetic import make_archive

TILE, PLACES = 256, 3
ORDER: tuple[Encoding, ...] = ("geotiff", "npy", "blosc2-lz4", "blosc2-zstd")


def run() -> None:
    """Two tables over the tiles of a made-up archive, whose images have the texture and noise of their instruments."""
    with TemporaryDirectory() as folder:
        samples = _samples(Path(folder))
    encoded = {name: [encode(sample, name) for sample in samples] for name in ORDER}
    sizes = {name: sum(len(data) for members in found for data in members.values()) for name, found in encoded.items()}
    print(f"\nBytes of {len(samples)} samples of S2 (13 x uint16) + S1 (2 x float32), {TILE} x {TILE}")
    for name, size in sizes.items():
        mean, share = size / len(samples) / 1e6, size / sizes["npy"]
        print(f"  {name:<44} {mean:9.2f} MB a sample  {share:5.2f} of npy  (.{EXTENSIONS[name]})")
    compare("Encoding them, one thread", {name: partial(_encode, samples, name) for name in ORDER})
    compare("Decoding them from memory, one thread", {name: partial(_decode, encoded[name]) for name in ORDER})


def _samples(folder: Path) -> list[Sample]:
    make_archive(folder / "archive", places=PLACES, size=2 * TILE)
    raw = {"stage": "shards", "archive": {"root": str(folder / "archive")}, "out": str(folder / "data")}
    build(configs.parse({**raw, "sensors": ["s2-l1c", "s1"], "tile": {"size": TILE, "min_valid": 0.5}}))
    selection = select(str(folder / "data"))
    return [sample for sample, _ in Stream(selection, 0, 1, Share(1)).once()]


def _encode(samples: list[Sample], encoding: Encoding) -> int:
    return sum(len(encode(sample, encoding)) for sample in samples)


def _decode(encoded: list[dict[str, bytes]]) -> int:
    return sum(decode(members).tiles["s1"].values.nbytes for members in encoded)
