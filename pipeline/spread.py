"""How far results of several seeds lie apart: mean, standard deviation, and the interval of the mean."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom.
T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t; above 30 degrees of freedom within 0.001 of it.

    Raises:
        ValueError: no degree of freedom.
    """
    if freedom < 1:
        raise ValueError(f"{freedom} degrees of freedom; an interval takes two values or more")
    return T[freedom - 1] if freedom <= len(T) else 1.96 + 2.44 / freedom


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Of one or more values: `mean`, `std` (that of a sample, n - 1) and the 95 % t-interval of the mean, `interval`.

    The last two are None of a single value.
    """
    found: dict[str, Any] = {"values": list(values), "mean": round(mean(values), 4), "std": None, "interval": None}
    if len(values) > 1:
        half = quantile(len(values) - 1) * stdev(values) / len(values) ** 0.5
        low, high = mean(values) - half, mean(values) + half
        found |= {"std": round(stdev(values), 4), "interval": [round(low, 4), round(high, 4)]}
    return found


def said(found: dict[str, Any]) -> str:
    """`spread` in words, with two decimals."""
    if found["std"] is None:
        return f"{found['mean']:.2f}"
    low, high = found["interval"]
    return f"{found['mean']:.2f} ± {found['std']:.2f} (95 %: {low:.2f} to {high:.2f})"
