"""Whether a dataset is what a protocol is about. What makes its numbers a lie is refused, the rest is said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from configs import ConfigError
from pipeline.protocols.protocol import Protocol
from pipeline.protocols.splits import Bools, Role
from shards.contract import Contract

Facts = Mapping[str, Any]


def check(protocol: Protocol, facts: Facts, data: str, sensors: Sequence[str]) -> tuple[str, ...]:
    """Refuse datasets of other archives, sensors, bands, classes or label maps.

    Args:
        protocol: that is to be followed.
        facts: dataset.json.
        data: the dataset's address.
        sensors: that are wanted; empty = all inputs of the protocol that the dataset has.

    Returns:
        The sensors to read.

    Raises:
        ConfigError: the dataset does not fit; the message says how to build one that does.
    """
    contract = Contract.from_json(facts["contract"])
    build = f"build it with `mcf shards build shards-{protocol.archive}`"
    if others := {made["archive"]["name"] for made in _builds(facts)} - {protocol.archive}:
        raise ConfigError(f"data: {data} is made of {', '.join(sorted(others))}, {protocol.name} is not; {build}")
    inputs = ", ".join(protocol.inputs)
    if strange := [name for name in sensors if name not in protocol.inputs]:
        raise ConfigError(f"sensors: {', '.join(strange)} is no input of {protocol.name}; it has {inputs}")
    chosen = tuple(sensors) or tuple(name for name in contract.sensors if name in protocol.inputs)
    if not chosen:
        raise ConfigError(f"data: {data} has {', '.join(contract.sensors)}; {protocol.name} has {inputs}; {build}")
    for name in chosen:
        if (bands := contract.modality(name).bands) != protocol.inputs[name]:
            raise ConfigError(f"data: {name} of {data} has bands {', '.join(bands)}; {protocol.name} has "
                              f"{', '.join(protocol.inputs[name])}; {build}")  # fmt: skip
    names = contract.classes.names if contract.classes else ()
    if names != protocol.labels.names:
        raise ConfigError(f"data: {data} has the classes {', '.join(names) or '(none)'}; {protocol.name} has "
                          f"{', '.join(protocol.labels.names)}; {build}")  # fmt: skip
    _check_labels(protocol, facts, data)
    return chosen


def _builds(facts: Facts) -> list[Facts]:
    return list(facts.get("builds", {}).values()) or [{"archive": facts.get("archive", {"name": "an index"})}]


def _check_labels(protocol: Protocol, facts: Facts, data: str) -> None:
    """Compare the label map of every build with the protocol's."""
    wanted = protocol.labels
    for made in _builds(facts):
        if not (label := made.get("label")):
            continue  # of older datasets, which is said among the warnings
        codes = tuple(map(tuple, label["codes"]))
        same = (not wanted.codes or (codes, set(label["ignored"])) == (wanted.codes, set(wanted.ignored))) and (
            label["min_area"] == wanted.min_area
        )
        if not same:
            rule = f"label.codes={_listed(wanted.codes)} label.ignored={_listed(wanted.ignored)}"
            rule = rule if wanted.codes else f"label.min_area={wanted.min_area:g}"
            raise ConfigError(
                f"data: {data} was built with label.codes={_listed(codes)} label.ignored={_listed(label['ignored'])} "
                f"label.min_area={label['min_area']:g}; {protocol.name} has {rule}. Build it again with these"
            )


def _listed(values: Sequence[Any]) -> str:
    return f"[{','.join(_listed(value) if isinstance(value, tuple) else str(value) for value in values)}]"


def warnings(protocol: Protocol, facts: Facts, roles: Mapping[Role, Bools], role: Role) -> Iterator[str]:
    """What else should be known of the samples of a role, a line each."""
    if role == "val":
        if (roles["val"] & roles["test"]).any():
            yield "val and test are the same places: a checkpoint kept by its val score was chosen on the test set"
        return
    yield from facts.get("warnings", ())
    if not all(made.get("label") for made in _builds(facts)):
        yield "the dataset does not tell its label map; it was taken to be the protocol's"
    if (size := facts.get("tile", {}).get("size", protocol.tile)) != protocol.tile:
        yield f"tiles have {size} pixels on a side, the protocol's {protocol.tile}: the model sees other surroundings"
    found = {str(name): int(mask.sum()) for name, mask in roles.items()}
    found["all"] = int((roles["train"] | roles["val"] | roles["test"]).sum())
    if wrong := [f"{found[name]:,} of {count:,} {name}" for name, count in protocol.sizes.items()
                 if found[name] != count]:  # fmt: skip
        yield f"not the whole benchmark, so its numbers are not those of others: {', '.join(wrong)} places"
