"""Protocols of MSAW (SpaceNet 6): buildings in Rotterdam from quad-pol SAR and WorldView-2."""

from __future__ import annotations

from pipeline.protocols.protocol import Labels, Protocol
from pipeline.protocols.splits import Dealt, Eastings, Rule
from shards.sensors import SENSORS


def _protocol(split: str, rule: Rule, **sizes: int) -> Protocol:
    return Protocol(
        name=f"msaw/{split}",
        version=1,
        archive="spacenet6",
        inputs={name: SENSORS[name].band_names for name in ("sar-quadpol", "rgbnir")},
        labels=Labels(names=("background", "building"), min_area=20),
        split=rule,
        tile=448,
        metrics=("IoU/building", "F1/building", "instances/F1", "instances/precision", "instances/recall"),
        sizes=sizes,
    )


PROTOCOLS = (
    # As CosmiQ_SN6_Baseline (baseline.py, pretrain) sets a fifth of the way from west to east aside.
    _protocol("easting", Eastings("EPSG:32631", west=591_550, east=596_250, count=5), all=3401),
    _protocol("strip", Dealt(train=0.7, val=0.1, seed=0), train=2618, val=270, test=513),
)
