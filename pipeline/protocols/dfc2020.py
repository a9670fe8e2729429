"""Protocols of DFC2020: land cover of 8 classes at 10 m from Sentinel-1 and Sentinel-2."""

from __future__ import annotations

from pipeline.protocols.protocol import Labels, Protocol
from pipeline.protocols.splits import ByGroup, LeaveOneOut, Listed, Rule, Shuffled
from shards.sensors import SENSORS

# Codes of the contest; 0 is no data, 3 (savanna) and 8 (snow) do not occur in its validation patches.
LABELS = Labels(
    names=("forest", "shrubland", "grassland", "wetlands", "croplands", "urban", "barren", "water"),
    codes=((1,), (2,), (4,), (5,), (6,), (7,), (9,), (10,)),
    ignored=(0, 3, 8, 255),
)
CONTEST = ("ROIs0000_validation_0", "ROIs0000_test_0")
CITIES = ("BandarAnzali", "BlackForest", "CapeTown", "Chabarovsk", "KippaRing", "MexicoCity", "Mumbai")


def _protocol(split: str, rule: Rule, **sizes: int) -> Protocol:
    return Protocol(
        name=f"dfc2020/{split}",
        version=1,
        archive="dfc2020",
        inputs={name: SENSORS[name].band_names for name in ("s2-l1c", "s1")},
        labels=LABELS,
        split=rule,
        tile=256,
        metrics=("mIoU", "OA", "mAcc", "mF1", "Kappa"),
        sizes=sizes,
    )


PROTOCOLS = (
    # Liu et al. 2025: 80 % of all patches train and the rest tests; sizes of the lists in the published code.
    _protocol("paper-random", Shuffled(CONTEST, train=0.8, seed=0), train=4891, val=1223, test=1223),
    # The contest's test patches, as Copernicus-Bench lists them.
    _protocol(
        "copernicus-bench",
        Listed(r"(ROIs0000_(?:test|validation))(?:_(?:s1|s2|dfc|lc))?_(0_p\d+)"),
        train=3156,
        val=986,
        test=986,
    ),
    _protocol("leave-city-out", LeaveOneOut(CITIES)),
    # Tuned on the patches that the contest gave out with labels, tested on those of its ranking.
    _protocol(
        "competition", ByGroup(CONTEST[0], "", CONTEST[1], held_out=0.2), train=789, val=197, test=5128
    ),
)  # fmt: skip
