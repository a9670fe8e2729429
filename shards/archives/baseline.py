"""Sentinel-2's radiometric offset, for files that travel without their product's metadata.

Since processing baseline 04.00, in use from 25 January 2022, ESA adds 1000 to the numbers of Level-1C and Level-2A, so
that reflectance a little below zero can be stored (ESA, "Sentinel-2 Processing Baseline 04.00"; in the metadata:
RADIO_ADD_OFFSET and BOA_ADD_OFFSET). Older acquisitions that were processed again (Collection 1, baseline 05.00) have
it too, so a product's name says more than its date.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime

SINCE = datetime(2022, 1, 25, tzinfo=UTC)
OFFSET = -1000.0
# S2A_MSIL2A_20230823T095559_N0509_R122_T34UCF_...; in names of granules and datatakes the baseline has a dot: N05.09.
_TOKEN = re.compile(r"S2[A-D]_.*_N(\d\d)\.?(\d\d)(?!\d)")


def offset(product: str, time: datetime | None) -> float:
    """What to add to the numbers of a Sentinel-2 file to get reflectance x 10000: -1000 or 0.

    Args:
        product: any text that may hold a product's or granule's name, such as a path. Its baseline decides; N9999
            (products that users made, such as BigEarthNet's) has no offset.
        time: of the acquisition; decides where the name says nothing. Without a zone it is UTC.
    """
    if found := _TOKEN.search(product):
        return of_baseline(f"{found[1]}.{found[2]}")
    if time is None:
        return 0.0
    return OFFSET if (time if time.tzinfo else time.replace(tzinfo=UTC)) >= SINCE else 0.0


def of_baseline(baseline: str) -> float:
    """The same for a processing baseline as the metadata write it: "05.09"."""
    return OFFSET if 4.0 <= float(baseline) < 90.0 else 0.0
