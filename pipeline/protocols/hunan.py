"""Protocols of Hunan (DKDFN): land cover of 7 classes from Sentinel-2, elevation and, by option, Sentinel-1.

They differ in code 11 alone. The authors' table makes it an eighth class, which their list of seven does not have; one
loader counts it as others, another ignores it.
"""

from __future__ import annotations

from pipeline.protocols.protocol import Labels, Protocol
from pipeline.protocols.splits import ByGroup
from shards.sensors import SENSORS

NAMES = ("cropland", "forest", "grassland", "wetland", "water", "bare land", "others")


def _protocol(split: str, others: tuple[int, ...], ignored: tuple[int, ...]) -> Protocol:
    return Protocol(
        name=f"hunan/{split}",
        version=1,
        archive="hunan",
        inputs={name: SENSORS[name].band_names for name in ("s2-l1c", "s1", "dem")},
        labels=Labels(names=NAMES, codes=((1,), (2, 4), (3,), (5,), (6,), (9,), others), ignored=ignored),
        split=ByGroup("train", "val", "test"),
        tile=256,
        metrics=("mIoU", "OA", "mF1", "Kappa"),
        sizes={"train": 400, "val": 50, "test": 50},
    )


PROTOCOLS = (
    _protocol("official", (7, 8, 10), (0, 11, 12, 255)),
    _protocol("official-11-others", (7, 8, 10, 11), (0, 12, 255)),
)
