"""Public checkpoints as release folders: `mcf convert CHECKPOINT OUT`.

Two kinds are known. A published MCF-Mamba (two branches) becomes a whole release of `profile: paper`, its
modalities called `m1` and `m2` unless named; every tensor must find its place and every place its tensor. A
VMamba backbone (v0 or s1l8, trained on RGB photographs) fills the encoders of the modalities asked for; fusion,
decoder, the norms after the stages, the hidden tokens and a head that reconstructs all bands stay at initial values
(seed 0), ready for pretraining. Whatever was not taken or filled is listed in the result and in the folder's README.

Files are opened as safetensors or by `torch.load(weights_only=True)`: nothing in them is executed.
"""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.model.config import PRESETS, ModelConfig, Profile, VMamba
from pipeline.model.mcf_mamba import MCFMamba
from pipeline.model.names import MODALITIES, current_name, from_mcf_mamba, from_vmamba
from pipeline.model.release import load_parameters, save
from shards.contract import Contract, Modality
from shards.sensors import SENSORS

WRAPPERS = ("model", "state_dict")  # entries under which published files keep the parameters
EXAMPLE = "bands=s2-l2a:12,s1:2"
RGB = 3
FIRST: dict[VMamba, str] = {"v0": "patch_embed.proj.weight", "s1l8": "patch_embed.conv1.weight"}
BRANCH = "backbone.branch_m"  # how names of a published MCF-Mamba's encoders begin
CLASSIFIER = re.compile(r"(classifier|head|norm)\..*")  # of a VMamba, of no use here
OF_OURS = re.compile(r"stages\.\d+\.out_norm\.(weight|bias)|patch_embed\.hide\.token")  # not in a classifier
LARGEST = float(torch.finfo(torch.float32).max)


class ConvertError(ValueError):
    """A checkpoint that cannot be converted; the message says what was found and what to do."""


@dataclass(frozen=True)
class Conversion:
    """What `convert` made.

    Attributes:
        folder: the release folder.
        kind: what the checkpoint was.
        model: the network in the folder.
        taken: number of tensors taken from the checkpoint.
        left_out: entries of the checkpoint that were not taken.
        initial: parameters of ours that the checkpoint does not have; they hold initial values.
    """

    folder: Path
    kind: str
    model: MCFMamba
    taken: int
    left_out: tuple[str, ...]
    initial: tuple[str, ...]

    def __str__(self) -> str:
        """A few lines for the user; the README of the folder has all names."""
        bands = ", ".join(f"{name} {count} bands" for name, count in self.model.channels.items())
        parts = Counter(name.split(".")[0] for name in self.initial)
        initial = ", ".join(f"{part} ({count} tensors)" for part, count in parts.items())
        return (
            f"{self.folder}: from a {self.kind}, {self.taken} tensors taken; {bands}; {self.model.outputs} outputs\n"
            f"  left out: {', '.join(self.left_out) or 'nothing'}\n"
            f"  at initial values: {initial or 'nothing'}"
        )


def convert(checkpoint: str | Path, out: str | Path, bands: Mapping[str, int] | None = None) -> Conversion:
    """Write the release folder of a public checkpoint.

    Args:
        checkpoint: a file of torch.save or safetensors.
        out: release folder to make; must be absent or empty.
        bands: number of bands of each modality. A name of `shards.sensors` stands for that sensor with all of
            its bands; any other name is a modality that comes already normalised. A VMamba backbone needs
            them; for an MCF-Mamba they only give its two modalities other names than `m1` and `m2`.

    Raises:
        ConvertError: unreadable, neither kind of checkpoint, tensors without a place or places without a
            tensor, or `bands` missing or out of place.
        ReleaseError: tensors of another shape than the network's, or `out` holds something.
    """
    state, left_out = read(Path(checkpoint))
    if any(name.startswith(BRANCH) for name in state):
        kind, initial = "published MCF-Mamba", list[str]()
        model = _whole(state, bands, checkpoint)
    elif any(current_name(name).startswith("patch_embed.0.") for name in state):
        if not bands:
            raise ConvertError(f"{checkpoint} is a VMamba backbone; write which modalities it is to encode: {EXAMPLE}")
        model, initial, unused = _backbone(state, bands, checkpoint)
        kind, left_out = f"VMamba backbone ({model.config.vmamba})", left_out + unused
    else:
        known = "names like backbone.branch_m1.* (MCF-Mamba) or patch_embed.* and layers.* (VMamba) are known"
        raise ConvertError(f"{checkpoint} holds neither: {known}; found {_listed(list(state)[:5])}, ...")
    taken = len(state) - sum(name in state for name in left_out)
    result = Conversion(Path(out), kind, model, taken, tuple(left_out), tuple(initial))
    save(out, model, contract(model.channels).to_json(), _card(result, Path(checkpoint)))
    return result


def parse_settings(items: Sequence[str]) -> dict[str, int]:
    """`bands` of `convert` from the words of a command line such as "bands=s2-l2a:12,s1:2"; empty for none.

    Raises:
        ConvertError: another key, or a text that is not of this form.
    """
    bands: dict[str, int] = {}
    for item in items:
        key, _, text = item.partition("=")
        if key != "bands":
            raise ConvertError(f"{item!r}: the only setting is {EXAMPLE}")
        for part in text.split(","):
            match = re.fullmatch(r"([\w-]+):([1-9]\d*)", part)
            if not match or match[1] in bands:
                raise ConvertError(f"bands: {part!r} is not NAME:COUNT of a new modality; write {EXAMPLE}")
            bands[match[1]] = int(match[2])
    return bands


def read(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The parameters in a file, and the names of what lies beside them (an optimiser, an epoch).

    Raises:
        ConvertError: no file, damaged, or holding something other than tensors by name.
    """
    content = _open(path)
    entry = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
    state = content[entry] if entry else content
    if odd := [str(name) for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ConvertError(
            f"{path}: not tensors: {_listed(odd)}; parameters by name are needed, at the top or in 'model'"
        )
    return dict(state), [str(name) for name in content if entry and name != entry]


def _open(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ConvertError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ConvertError(
            f"{path} is no file of torch.save, or holds Python objects besides tensors, which are never run here; "
            "save its state_dict alone where you trust it"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ConvertError(
            f"{path} is damaged: {str(error).splitlines()[0] if str(error) else 'it ends early'}"
        ) from None
    if not isinstance(content, Mapping) or not content:
        raise ConvertError(f"{path} holds a {type(content).__name__}; parameters by name are needed")
    return content


def _whole(state: Mapping[str, Tensor], bands: Mapping[str, int] | None, source: str | Path) -> MCFMamba:
    """The network of a published MCF-Mamba, its modalities called as in `bands`; all names and shapes must fit."""
    try:
        converted = from_mcf_mamba(state)
    except ValueError as error:
        raise ConvertError(f"{source}: {error}") from None
    structure = _structure(_under(converted, f"encoders.{MODALITIES[0]}."), "v0", "paper", source)
    needed = [f"encoders.{name}.{FIRST['v0']}" for name in MODALITIES]
    if missing := [name for name in [*needed, "head.weight"] if name not in converted]:
        raise ConvertError(f"{source}: missing {_listed(missing)} (by our names)")
    channels = {name: converted[first].shape[1] for name, first in zip(MODALITIES, needed, strict=True)}
    names = _new_names(channels, bands or channels)
    model = _fresh(
        structure, dict(zip(names.values(), channels.values(), strict=True)), converted["head.weight"].shape[0]
    )
    named = {
        re.sub(r"^(encoders|fusion\.\d+\.branches)\.(m[12])\.", lambda m: f"{m[1]}.{names[m[2]]}.", name): tensor
        for name, tensor in converted.items()
    }
    load_parameters(model, named, source)
    return model


def _new_names(channels: Mapping[str, int], bands: Mapping[str, int]) -> dict[str, str]:
    """What the modalities of a published MCF-Mamba are to be called: `bands` names them in order."""
    if list(bands.values()) != list(channels.values()):
        found = ", ".join(f"{name}:{count}" for name, count in channels.items())
        raise ConvertError(f"bands: the checkpoint has {found}; give two names with these numbers of bands, or none")
    for name, count in bands.items():
        colours(name, count)  # a sensor's name must mean that sensor
    return dict(zip(channels, bands, strict=True))


def _backbone(
    state: Mapping[str, Tensor], bands: Mapping[str, int], source: str | Path
) -> tuple[MCFMamba, list[str], list[str]]:
    """A network whose encoders are the backbone; also what stays initial of ours, and what is unused of theirs."""
    vmamba: VMamba = "s1l8" if "patch_embed.5.weight" in state else "v0"
    converted, unused = from_vmamba(state, vmamba)
    if unknown := [name for name in unused if not CLASSIFIER.fullmatch(name)]:
        raise ConvertError(f"{source}: {len(unknown)} tensors are no part of a VMamba {vmamba}: {_listed(unknown)}")
    model = _fresh(_structure(converted, vmamba, "default", source), bands, sum(bands.values()))
    own = model.state_dict()
    first = next(iter(bands))
    missing = [
        name for name in _under(own, f"encoders.{first}.") if name not in converted and not OF_OURS.fullmatch(name)
    ]
    if missing:
        raise ConvertError(f"{source}: {len(missing)} tensors are missing: {_listed(missing)} (by our names)")
    filled: dict[str, Tensor] = {}
    for name, count in bands.items():
        adapted = {FIRST[vmamba]: adapt(converted[FIRST[vmamba]], count, colours(name, count))}
        filled |= {f"encoders.{name}.{key}": tensor for key, tensor in (converted | adapted).items()}
    load_parameters(model, own | filled, source)
    return model, [name for name in own if name not in filled], unused


def colours(name: str, count: int) -> tuple[int, int, int]:
    """Where red, green and blue are among the bands of a modality; the first three if it is no optical sensor.

    Raises:
        ConvertError: a sensor with another number of bands.
    """
    sensor = SENSORS.get(name)
    if sensor is None:
        return 0, 1, 2
    names = sensor.band_names
    if len(names) != count:
        raise ConvertError(
            f"bands: {name} has the {len(names)} bands {', '.join(names)}, not {count}; "
            f"write {name}:{len(names)}, or a name that is no sensor's"
        )
    if sensor.kind != "optical":
        return 0, 1, 2
    red, green, blue = (names.index(band) for band in sensor.rgb)
    return red, green, blue


def adapt(weight: Tensor, count: int, positions: tuple[int, int, int] = (0, 1, 2)) -> Tensor:
    """Filters of a first convolution trained on RGB, for `count` bands.

    With fewer than three bands the first filters; with more, those of red, green and blue at `positions` and
    their mean everywhere else, which with positions 0, 1, 2 is the published rule.

    Args:
        weight: [O, 3, k, k], or [O, count, k, k], which is taken as it is.
        count: bands of the modality.
        positions: of red, green and blue.

    Returns:
        [O, count, k, k].

    Raises:
        ConvertError: filters for another number of bands.
    """
    given = weight.shape[1]
    if given not in (RGB, count):
        raise ConvertError(f"bands: the checkpoint has filters for {given} bands; {RGB} (RGB) or {count} are needed")
    if given != RGB or count < RGB:
        return weight[:, :count].clone()
    adapted = weight.mean(1, keepdim=True).repeat(1, count, 1, 1)  # [O, count, k, k]
    adapted[:, list(positions)] = weight
    return adapted


def contract(channels: Mapping[str, int]) -> Contract:
    """What the inputs of a converted network mean: a sensor's range to 0..1, or values that are already normalised."""
    return Contract(modalities=tuple(_modality(name, count) for name, count in channels.items()))


def _modality(name: str, count: int) -> Modality:
    sensor = SENSORS.get(name)
    if sensor is not None:
        return Modality(
            sensor=name,
            bands=sensor.band_names,
            unit=sensor.unit,
            dtype="float32",
            clip=sensor.clip,
            offset=(),
            scale=(),
        ).normalised("range")
    return Modality(
        sensor=name,
        bands=tuple(f"band {index + 1}" for index in range(count)),
        unit="normalised as in training, which the checkpoint does not tell",
        dtype="float32",
        clip=(-LARGEST, LARGEST),
        offset=(0.0,) * count,
        scale=(1.0,) * count,
    )


def _structure(encoder: Mapping[str, Tensor], vmamba: VMamba, profile: Profile, source: str | Path) -> ModelConfig:
    """The configuration whose encoder has these parameters (by our names below `encoders.<modality>.`)."""
    dims: dict[int, int] = {}
    depths: Counter[int] = Counter()
    for name, tensor in encoder.items():
        if match := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.norm\.weight", name):
            dims[int(match[1])] = tensor.shape[0]
            depths[int(match[1])] += 1
    stages = range(len(dims))
    if not dims or set(dims) != set(stages):
        raise ConvertError(f"{source}: blocks of stages {sorted(dims)} only; stages 0 to 3 are needed")
    size = tuple(dims[i] for i in stages), tuple(depths[i] for i in stages)
    named = [name for name, preset in PRESETS.items() if (preset.dims, preset.depths[vmamba]) == size]
    given: dict[str, Any] = {"size": named[0]} if named else {"dims": size[0], "depths": size[1]}
    states = [tensor.shape[-1] for name, tensor in encoder.items() if name.endswith(".A_log")]
    if vmamba == "v0" and states:
        given["d_state"] = states[0]
    try:
        return ModelConfig(profile=profile, vmamba=vmamba, **given)
    except ValueError as error:
        raise ConvertError(f"{source}: no such network is known: {error}") from None


def _fresh(structure: ModelConfig, channels: Mapping[str, int], outputs: int) -> MCFMamba:
    """A network with the initial values of seed 0; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MCFMamba(structure, channels, outputs).eval()


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _card(result: Conversion, source: Path) -> str:
    left_out, initial = (
        "\n".join(f"- `{name}`" for name in names) or "Nothing." for names in (result.left_out, result.initial)
    )
    return f"""# MCF-Mamba, converted

Parameters of `{source.name}`, a {result.kind}, by the names of this library. The licence is that of the checkpoint.

```python
from pipeline.model import MCFMamba

model = MCFMamba.from_pretrained(FOLDER)
outputs = model(images)  # {{name: float [B, bands, H, W]}} -> [B, {result.model.outputs}, H, W]
```

Modalities: {", ".join(f"{name} ({count} bands)" for name, count in result.model.channels.items())}.

## Not taken from the checkpoint

{left_out}

## At initial values, because the checkpoint does not have them

{initial}
"""
