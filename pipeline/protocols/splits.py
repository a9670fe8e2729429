"""Rules that deal the places of a dataset to train, val and test, by their names or by where they lie.

A rule never looks at a sample's column `split`, which a merge may have dealt anew, and gives all tiles of a place one
role. What it draws is keyed by (seed, name), so that the order of a manifest does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from configs import ConfigError
from shards.order import Use, hash64, words_of

Role = Literal["train", "val", "test"]
ROLES: tuple[Role, ...] = ("train", "val", "test")
Ids = Mapping[Role, Sequence[str]]
Bools = NDArray[np.bool_]
Names = NDArray[np.str_]


@dataclass(frozen=True)
class Places:
    """The places of a dataset that have labels, in the order of their names.

    Attributes:
        names: [N].
        groups: [N] as the archive has them: city, strip, or the archive's own split.
        west: [N] easting of the left edge in the files' CRS; NaN where there is none.
        crs: [N] of the files; empty where there is none.
    """

    names: Names
    groups: Names
    west: NDArray[np.float64]
    crs: Names

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Rule:
    """Deals places to roles. Its values are part of the protocol's hash."""

    def roles(self, places: Places, fold: int, ids: Ids) -> dict[Role, Bools]:
        """Which of the places have each role; a place may have none, and by some rules two.

        Raises:
            ConfigError: there is no such fold, or the places cannot be dealt in this way.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Shuffled(Rule):
    """All places of some groups in an order drawn by name: the first share trains, the rest tests and validates."""

    groups: tuple[str, ...]
    train: float
    seed: int

    def roles(self, places: Places, fold: int, ids: Ids) -> dict[Role, Bools]:
        """As `Rule`."""
        pool = np.isin(places.groups, self.groups)
        train = first(places.names, pool, self.train, self.seed)
        return {"train": train, "val": pool & ~train, "test": pool & ~train}


@dataclass(frozen=True)
class ByGroup(Rule):
    """A group for each role; without one for `val`, that share of the places that train validates instead."""

    train: str
    val: str
    test: str
    held_out: float = 0.0
    seed: int = 0

    def roles(self, places: Places, fold: int, ids: Ids) -> dict[Role, Bools]:
        """As `Rule`."""
        train, val, test = (places.groups == group for group in (self.train, self.val, self.test))
        if not self.val:
            val = first(places.names, train, self.held_out, self.seed)
        return {"train": train & ~val, "val": val, "test": test}


@dataclass(frozen=True)
class LeaveOneOut(Rule):
    """Fold k: city k tests, the next one validates, all others train. A group ends in `_CITY`."""

    cities: tuple[str, ...]

    def roles(self, places: Places, fold: int, ids: Ids) -> dict[Role, Bools]:
        """As `Rule`."""
        city = np.array([group.rpartition("_")[2] for group in places.groups.tolist()], np.str_)
        test, val = city == self.city(fold), city == self.city((fold + 1) % len(self.cities))
        return {"train": np.isin(city, self.cities) & ~test & ~val, "val": val, "test": test}

    def city(self, fold: int) -> str:
        """The test city of a fold."""
        if fold >= len(self.cities):
            known = ", ".join(f"{number} {name}" for number, name in enumerate(self.cities))
            raise ConfigError(f"protocol.fold={fold}: there are {len(self.cities)} folds: {known}")
        return self.cities[fold]


@dataclass(frozen=True)
class Listed(Rule):
    """The places that the user's lists name."""

    pattern: str  # of an id; its groups, joined by "_", are the place's name

    def roles(self, places: Places, fold: int, ids: Ids) -> dict[Role, Bools]:
        """As `Rule`."""
        return {role: np.isin(places.names, ids[role]) for role in ROLES}


@dataclass(frozen=True)
class Eastings(Rule):
    """Strips of equal width from west to east by the left edge of a place; the last tests and validates.

    What lies beyond either end belongs to the strip there.
    """

    crs: str
    west: float
    east: float
    count: int

    def roles(self, places: Places, fold: int, ids: Ids) -> dict[Role, Bools]:
        """As `Rule`."""
        if (others := places.crs != self.crs).any():
            name, crs = places.names[others][0], places.crs[others][0] or "no CRS"
            raise ConfigError(
                f"data: {others.sum()} of {len(places)} places are not in {self.crs}, such as {name} in {crs}; build "
                "the shards from the files as they were given out"
            )
        strip = np.floor((places.west - self.west) / (self.east - self.west) * self.count)
        last = strip >= self.count - 1
        return {"train": ~last, "val": last, "test": last}


@dataclass(frozen=True)
class Dealt(Rule):
    """Whole groups, each by a number in [0, 1) drawn from its name: under `train`, under `train + val`, or above."""

    train: float
    val: float
    seed: int

    def roles(self, places: Places, fold: int, ids: Ids) -> dict[Role, Bools]:
        """As `Rule`."""
        drawn = draw(places.groups, self.seed) / 2.0**64
        train, test = drawn < self.train, drawn >= self.train + self.val
        return {"train": train, "val": ~train & ~test, "test": test}


def first(names: Names, pool: Bools, share: float, seed: int) -> Bools:
    """A share, to the nearest whole number, of the names in `pool`: the first in the order of their draw."""
    numbers = np.flatnonzero(pool)
    order = numbers[np.argsort(draw(names[numbers], seed), kind="stable")]
    chosen = np.zeros(len(names), np.bool_)
    chosen[order[: round(share * len(numbers))]] = True
    return chosen


def draw(names: Names, seed: int) -> NDArray[np.uint64]:
    """A number of 64 bits for each name, by (seed, name)."""
    return hash64(seed, Use.SPLIT, words_of(names.tolist()))
