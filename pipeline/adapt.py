"""Modality adaptation: a checkpoint of some modalities as the start of a network for others.

Every modality of the data gets the encoder, and the part in the fusions, of one of the checkpoint's:

    1. of the same name, with the checkpoint's normalisation
    2. otherwise the one, not used yet, whose bands mean most of its own: red is B4 of Sentinel-2, HV is like VH
    3. otherwise none: it is drawn from the seed, as an elevation model beside Sentinel-1 and -2 is

`adapt` of the config chooses by hand. The filters of the first convolution are copied band by band; a band that the
checkpoint does not know gets the mean of its filters, since all of one sensor's bands see the same edges and
surfaces. They are scaled by (bands before) / (bands now), so that what is alike in all bands gives the same response.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from pipeline.model.convert import FIRST
from shards.contract import Contract, ContractError, Modality, Normalisation

# What a band is like, in this order, where there is none of its name. Sentinel-2 by colour (centre wavelengths: ESA
# S2-PDGS-TAS-DI-PSD); the cross-polarised channels are equal by reciprocity, the co-polarised ones alike.
ALIKE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "R": ("B4",),
        "G": ("B3",),
        "B": ("B2",),
        "NIR": ("B8", "B8A"),
        "B4": ("R",),
        "B3": ("G",),
        "B2": ("B",),
        "B8": ("NIR", "B8A"),
        "B8A": ("NIR", "B8"),
        "HH": ("VV",),
        "VV": ("HH",),
        "HV": ("VH",),
        "VH": ("HV",),
    }
)
_PART = re.compile(r"(encoders|fusion\.\d+\.branches)\.([^.]+)\.(.+)")  # of one modality
_GROUPED = re.compile(r"fusion\.\d+\.mix\.grouped\.weight")  # [D, M, 3, 3]: a column of filters per modality
_MIX = re.compile(r"fusion\.\d+\.mix\.")

Choices = Mapping[str, str | None]


def sources(known: Contract, data: Contract, choices: Choices) -> dict[str, str | None]:
    """For every modality of the data the checkpoint's that it begins from; None: it is drawn.

    Of several pairs with as many bands in common, the modality first in the data takes the one first in the checkpoint.

    Args:
        known: what the checkpoint was trained with.
        data: what the new network gets.
        choices: by hand.

    Raises:
        ContractError: a choice names what is not there, or nothing of the data begins from the checkpoint.
    """
    for name, source in choices.items():
        wrong = name if name not in data.sensors else source if source and source not in known.sensors else None
        if wrong:
            raise ContractError(
                f"adapt.{name}: {source}: there is no {wrong}; the data have {', '.join(data.sensors)}, the checkpoint "
                f"{', '.join(known.sensors)}. Write adapt={{MODALITY OF THE DATA: ONE OF THE CHECKPOINT, or null}}"
            )
    found: dict[str, str | None] = {**{name: name for name in data.sensors if name in known.sensors}, **choices}
    left = [name for name in data.sensors if name not in found]
    pairs = [(_common(data.modality(a), known.modality(b)), a, b) for a in left for b in known.sensors]
    for count, name, source in sorted(pairs, key=lambda pair: -pair[0]):
        if count and name not in found and source not in found.values():
            found[name] = source
    if not any(found.values()):
        raise ContractError(
            f"the checkpoint knows {', '.join(known.sensors)}, the data {', '.join(data.sensors)}, and no bands of "
            "theirs mean the same; choose with adapt={DATA: CHECKPOINT}, or start from scratch with checkpoint=null"
        )
    return {name: found.get(name) for name in data.sensors}


def _common(modality: Modality, source: Modality) -> int:
    return sum(_like(band, source.bands) is not None for band in modality.bands)


def _like(band: str, bands: Sequence[str]) -> str | None:
    """The one of `bands` that means what `band` does."""
    return next((name for name in (band, *ALIKE.get(band, ())) if name in bands), None)


@dataclass(frozen=True)
class Adaptation:
    """How a network for other modalities begins from a checkpoint.

    Attributes:
        known: what the checkpoint was trained with.
        contract: of the new network. Its modalities have the checkpoint's order, so that one that only got another
            name stands where it stood; those that are drawn come last, and what the data lack is left out.
        begun: modality of the new network -> of the checkpoint.
    """

    known: Contract
    contract: Contract
    begun: Mapping[str, str]

    def lines(self) -> Iterator[str]:
        """What comes from where, a line per modality."""
        for modality in self.contract.modalities:
            name, source = modality.sensor, self.begun.get(modality.sensor)
            if source is None:
                yield f"{name}: drawn from the seed, as nothing in the checkpoint is like it"
            elif name == source and modality.bands == self.known.modality(source).bands:
                yield f"{name}: its own encoder"
            else:
                pairs = [(band, _like(band, self.known.modality(source).bands)) for band in modality.bands]
                bands = ", ".join(f"{band}<-{other or 'mean of all'}" for band, other in pairs)
                yield f"{name}: encoder of {source}; {bands}"
        if dropped := [name for name in self.known.sensors if name not in self.begun.values()]:
            yield f"not used: {', '.join(dropped)}"

    @property
    def _places(self) -> list[str | None]:
        """For every modality of the new network, in order, the checkpoint's."""
        return [self.begun.get(name) for name in self.contract.sensors]

    def parameters(
        self, given: Mapping[str, Tensor], drawn: Mapping[str, Tensor], interleaved: bool = True
    ) -> dict[str, Tensor]:
        """The checkpoint's parameters by the names of the new network; what is missing stays as it was drawn.

        Args:
            given: of the checkpoint.
            drawn: all of the new network, with fresh values.
            interleaved: whether a fusion's groups of channels hold one of every modality. In `profile: paper` they do
                not: with modalities in other places its mix means nothing any more, and stays as it was drawn.
        """
        moved = self._places != list(self.known.sensors)
        own = _MIX if moved and not interleaved else _GROUPED
        found = {name: given[name] for name in given if not (_PART.fullmatch(name) or own.match(name))}
        for name, fresh in drawn.items():
            if part := _PART.fullmatch(name):
                where, modality, rest = part.groups()
                source = self.begun.get(modality)
                if source and (tensor := given.get(f"{where}.{source}.{rest}")) is not None:
                    found[name] = self._filters(modality, tensor) if rest in FIRST.values() else tensor
            elif own is _GROUPED and own.match(name) and name in given:
                found[name] = self._columns(given[name], fresh) if moved else given[name]
        return found

    def _filters(self, modality: str, weight: Tensor) -> Tensor:
        """First filters [O, bands, k, k] for the bands of a modality."""
        source, bands = self.known.modality(self.begun[modality]).bands, self.contract.modality(modality).bands
        likes = [_like(band, source) for band in bands]
        columns = [weight[:, source.index(like)] if like else weight.mean(1) for like in likes]
        return torch.stack(columns, 1) * (len(source) / len(bands))

    def _columns(self, weight: Tensor, fresh: Tensor) -> Tensor:
        """Filters [D, M, 3, 3] of a fusion's first convolution, which has one per modality."""
        order, places = self.known.sensors, enumerate(self._places)
        columns = [weight[:, order.index(source)] if source else fresh[:, i] for i, source in places]
        return torch.stack(columns, 1)


def adaptation(
    known: Contract, data: Contract, chosen: Mapping[str, str | None], by_hand: Choices, how: Normalisation
) -> Adaptation | None:
    """How to begin; None where the data are among what the checkpoint knows, so that nothing is to be adapted.

    What keeps its name keeps the checkpoint's normalisation. Anything else is normalised from its own data, in the way
    that its source was: by statistics or by clip range.

    Args:
        known: what the checkpoint was trained with.
        data: what the new network gets.
        chosen: by modality of the data, from `sources`.
        by_hand: those of them that the config names.
        how: to normalise what is drawn.
    """
    kept = [name for name, source in chosen.items() if name == source and name not in by_hand]
    if len(kept) == len(chosen):
        return None
    places = {name: index for index, name in enumerate(known.sensors)}
    order = sorted(chosen, key=lambda name: places.get(chosen[name] or "", len(places)))
    modalities = []
    for name in order:
        source = known.modality(chosen[name] or "") if chosen[name] else None
        if source and name in kept:
            modalities.append(source)
        else:
            modalities.append(data.modality(name).normalised(_manner(source) if source else how))
    contract = replace(data, modalities=tuple(modalities))
    return Adaptation(known, contract, {name: source for name, source in chosen.items() if source})


def _manner(modality: Modality) -> Normalisation:
    """How a modality is normalised."""
    ranged = modality.normalised("range")
    return "range" if (modality.offset, modality.scale) == (ranged.offset, ranged.scale) else "statistics"
