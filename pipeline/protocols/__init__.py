"""Protocols: named rules that say which samples of a benchmark train, validate and test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pipeline.config import ProtocolChoice
from shards.manifest import Selection, select

Role = Literal["train", "val", "test"]


def samples(
    choice: ProtocolChoice,
    data: str | Mapping[str, int],
    role: Role,
    *,
    sensors: Sequence[str] = (),
    where: Mapping[str, Sequence[Any]] | None = None,
) -> Selection:
    """The labelled samples that play `role`; without a named protocol, those that `where` allows."""
    return select(data, modalities=sensors, where={**(where or {}), "labelled": [True]})
