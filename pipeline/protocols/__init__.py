"""Protocols: named rules that say which samples of a benchmark train, validate and test, and what their labels mean.

A protocol has a version and a hash, which every metric carries. The hash is of the rules alone (and of the user's lists
of ids, where the split reads some), never of data: two people with the same hash have followed the same rules.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from configs import ConfigError
from pipeline.config import ProtocolChoice
from pipeline.protocols import dfc2020, hunan, msaw
from pipeline.protocols.checks import check, warnings
from pipeline.protocols.lists import read_ids
from pipeline.protocols.places import places_of
from pipeline.protocols.protocol import Labels, Protocol
from pipeline.protocols.splits import ROLES, Bools, Ids, LeaveOneOut, Listed, Places, Role
from shards.manifest import ManifestError, Selection, read_facts, select
from shards.store import open_store

__all__ = ["Labels", "Protocol", "Role", "described", "find", "known", "samples"]

log = logging.getLogger(__name__)


def known() -> dict[str, Protocol]:
    """All protocols by name."""
    return {item.name: item for table in (dfc2020, msaw, hunan) for item in table.PROTOCOLS}


def find(name: str) -> Protocol:
    """The protocol of this name.

    Raises:
        ConfigError: there is none; those that exist are listed.
    """
    table = known()
    if name in table:
        return table[name]
    close = difflib.get_close_matches(name, table, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise ConfigError(f"protocol.name: {name!r} is not known{hint} There are {', '.join(table)}")


def described(choice: ProtocolChoice) -> dict[str, Any] | None:
    """Name, version and hash of the chosen protocol, and its fold by the test city; None without a name.

    Raises:
        ConfigError: no such protocol or fold, or lists that cannot be used.
    """
    if not choice.name:
        return None
    protocol, ids = _opened(choice)
    facts: dict[str, Any] = {"name": protocol.name, "version": protocol.version, "hash": protocol.hash(ids)}
    return {**facts, "fold": protocol.split.city(choice.fold)} if isinstance(protocol.split, LeaveOneOut) else facts


def samples(
    choice: ProtocolChoice,
    data: str | Mapping[str, int],
    role: Role,
    *,
    sensors: Sequence[str] = (),
    where: Mapping[str, Sequence[Any]] | None = None,
) -> Selection:
    """The labelled samples that play `role`; without a named protocol, those that `where` allows.

    Args:
        choice: the protocol, its fold and lists.
        data: dataset; with a protocol a single one.
        role: train, val or test.
        sensors: modalities to read; with a protocol some or all of its inputs, all that the dataset has when empty.
        where: narrows what the protocol allows; roles are dealt before.

    Raises:
        ConfigError: the dataset does not fit the protocol, or nobody plays the role.
        ManifestError: no dataset there, an unknown column, or nothing left.
    """
    if not choice.name:
        return select(data, modalities=sensors, where={**(where or {}), "labelled": [True]})
    protocol, ids = _opened(choice)
    if not isinstance(data, str):
        if len(data) != 1:
            raise ConfigError(f"data: protocol {protocol.name} is of one dataset; given {', '.join(data)}")
        (data,) = data
    facts = read_facts(open_store(data))
    modalities = check(protocol, facts, data, sensors)
    everything = select(data, modalities=modalities, where={"labelled": [True]})
    places, number = places_of(everything)
    roles = protocol.split.roles(places, choice.fold, ids or {})
    _check_lists(ids, places)
    for line in warnings(protocol, facts, roles, role):
        log.warning("%s by %s: %s", data, protocol.name, line)
    if not roles[role].any():
        raise ConfigError(_nobody(protocol, data, role, places, roles))
    allowed = select(data, modalities=modalities, where={**where, "labelled": [True]}) if where else everything
    rows, wanted = (np.asarray(chosen.parts[0].chosen) for chosen in (allowed, everything))
    which = np.flatnonzero(np.isin(rows, wanted[roles[role][number]]))
    if not len(which):
        raise ManifestError(f"{data}: no sample that is {role} by {protocol.name} fits where={dict(where or {})}")
    return allowed.only(which, protocol={**(described(choice) or {}), "role": role})


def _nobody(protocol: Protocol, data: str, role: Role, places: Places, roles: Mapping[Role, Bools]) -> str:
    counts = ", ".join(f"{mask.sum()} {name}" for name, mask in roles.items())
    groups = np.unique(places.groups).tolist()
    shown = ", ".join(groups[:10]) + (f" and {len(groups) - 10} more" if len(groups) > 10 else "")
    return (
        f"data: {data} has no labelled place that is {role} by {protocol.name} (places: {counts}); its groups are "
        f"{shown}. docs/protocols.md says what the protocol needs"
    )


def _opened(choice: ProtocolChoice) -> tuple[Protocol, Ids | None]:
    """The protocol and the user's lists, where it reads some."""
    protocol = find(choice.name)
    if choice.fold and not isinstance(protocol.split, LeaveOneOut):
        raise ConfigError(f"protocol.fold={choice.fold}: {protocol.name} has no folds; leave it out")
    if isinstance(protocol.split, Listed):
        return protocol, read_ids(choice.lists, protocol.split.pattern, protocol.name)
    if choice.lists:
        raise ConfigError(f"protocol.lists={choice.lists}: {protocol.name} reads no lists; leave it out")
    return protocol, None


def _check_lists(ids: Ids | None, places: Places) -> None:
    """Say which ids of the lists the dataset does not have; ConfigError when it has none of them."""
    if ids is None:
        return
    listed = [name for role in ROLES for name in ids[role]]
    there = set(places.names.tolist())
    absent = [name for name in listed if name not in there]
    if len(absent) == len(listed):
        raise ConfigError(
            f"protocol.lists: the dataset holds none of the {len(listed)} ids, such as {listed[0]}; it holds "
            f"{', '.join(places.names[:3].tolist())}"
        )
    if absent:
        names = ", ".join(absent[:5])
        log.warning("protocol.lists: the dataset lacks %d of %d ids, such as %s", len(absent), len(listed), names)
