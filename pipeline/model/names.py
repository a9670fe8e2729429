"""Names of public checkpoints in terms of ours.

Letters: K = 4 directions, D inner channels, N states.

A published MCF-Mamba has two branches, here the modalities `m1` and `m2`. Its fusion keeps the weights of 8
directions in one tensor, in the order m1 rows, m2 rows, m1 columns, m2 columns and the same four reversed;
each modality of ours holds every second of them. A_logs and Ds have directions and channels on one axis.

Public VMamba backbones come in two types, which use the same numbers for different layers ("v0" and "s1l8"),
and under several generations of names, which all of them have here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.model.config import VMamba

MODALITIES = ("m1", "m2")

_SCAN = {
    r"in_proj": "in_proj",
    r"conv2d": "conv",
    r"x_proj_weight": "x_proj",
    r"dt_projs_weight": "dt_proj",
    r"dt_projs_bias": "ssm.dt_bias",
    r"A_logs": "ssm.A_log",
    r"Ds": "ssm.D",
}
_REST = {
    r"op\.out_proj": "ss2d.out_proj",
    r"op\.out_norm": "ss2d.norm",
    r"(norm2?|mlp\.fc[12])": r"\1",
}
_GATED = {rf"op\.{old}": f"ss2d.gated.{new}" for old, new in _SCAN.items()} | _REST
_PLAIN = {rf"op\.{old}": f"ss2d.{new}" for old, new in _SCAN.items()} | _REST
_BLOCK: dict[VMamba, dict[str, str]] = {"v0": _GATED, "s1l8": _PLAIN}
_ENCODER: dict[VMamba, dict[str, str]] = {
    "v0": {
        r"patch_embed\.0": "patch_embed.proj",
        r"patch_embed\.2": "patch_embed.norm",
        r"layers\.(\d+)\.downsample\.(norm|reduction)": r"stages.\1.downsample.\2",
        r"layers\.(\d+)\.downsample\.1": r"stages.\1.downsample.norm",
        r"layers\.(\d+)\.downsample\.2": r"stages.\1.downsample.reduction",
        r"outnorm(\d+)": r"stages.\1.out_norm",
    },
    "s1l8": {
        r"patch_embed\.0": "patch_embed.conv1",
        r"patch_embed\.2": "patch_embed.norm1",
        r"patch_embed\.5": "patch_embed.conv2",
        r"patch_embed\.7": "patch_embed.norm2",
        r"layers\.(\d+)\.downsample\.1": r"stages.\1.downsample.conv",
        r"layers\.(\d+)\.downsample\.3": r"stages.\1.downsample.norm",
        r"outnorm(\d+)": r"stages.\1.out_norm",
    },
}
_RENAMED = {  # former names of VMamba's releases
    r"^patch_embed\.proj\.": "patch_embed.0.",
    r"^patch_embed\.norm\.": "patch_embed.2.",
    r"\.ln_1\.": ".norm.",
    r"\.self_attention\.": ".op.",
    r"\.op\.(x_proj|dt_projs)\.weight$": r".op.\1_weight",
}
_FUSION = {
    r"in_norm_(m[12])": r"branches.\1.norm",
    r"in_proj_(m[12])": r"branches.\1.gated.in_proj",
    r"conv2d_(m[12])": r"branches.\1.gated.conv",
    r"out_norm": "norm",
    r"cat_conv\.0": "mix.grouped",
    r"cat_conv\.2": "mix.depthwise",
    r"cat_conv\.4": "mix.project",
}
_DECODER = {
    r"layers_up\.(\d+)\.upsample\.(expand|norm)": r"levels.\1.expand.\2",
    r"layers_up\.(\d+)\.cat_conv": r"levels.\1.merge",
    r"upsample\.(expand|norm)": r"expand.\1",
}
_SHARED = re.compile(
    r"backbone\.fusion_module\.fusion_layers\.(\d+)\.(x_proj_weight|dt_projs_weight|dt_projs_bias|A_logs|Ds)"
)


def _rename(name: str, table: Mapping[str, str]) -> str | None:
    """The new name of a module or parameter by the first pattern that fits all of it, or None."""
    stem, suffix = name.rsplit(".", 1) if name.endswith((".weight", ".bias")) else (name, "")
    for pattern, template in table.items():
        match = re.fullmatch(pattern, stem)
        if match:
            return match.expand(template) + (f".{suffix}" if suffix else "")
    return None


def _in_blocks(name: str, blocks: str, prefix: str, vmamba: VMamba = "v0") -> str | None:
    """The new name of what lies in a list of VSS blocks: `blocks`.i.blocks.j... -> `prefix`.i.blocks.j..."""
    match = re.fullmatch(rf"{blocks}\.(\d+)\.blocks\.(\d+)\.(.*)", name)
    inner = _rename(match[3], _BLOCK[vmamba]) if match else None
    return f"{prefix}.{match[1]}.blocks.{match[2]}.{inner}" if match and inner else None


def current_name(name: str) -> str:
    """The name that today's VMamba gives what `name` is called in any of its releases."""
    for pattern, template in _RENAMED.items():
        name = re.sub(pattern, template, name)
    return name


def encoder_name(name: str, vmamba: VMamba = "v0") -> str | None:
    """Our name, below `encoders.<modality>.`, of a VMamba backbone's parameter; None if there is none."""
    name = current_name(name)
    return _rename(name, _ENCODER[vmamba]) or _in_blocks(name, "layers", "stages", vmamba)


def mcf_mamba_name(name: str) -> str | None:
    """Our name of a published MCF-Mamba's parameter; None if there is none or if two of ours share it."""
    if match := re.fullmatch(r"backbone\.branch_(m[12])\.(.*)", name):
        inner, prefix = encoder_name(match[2]), f"encoders.{match[1]}"
    elif match := re.fullmatch(r"backbone\.fusion_module\.fusion_layers\.(\d+)\.(.*)", name):
        inner, prefix = _rename(match[2], _FUSION), f"fusion.{match[1]}"
    elif name == "sem_seg_head.output.weight":
        inner, prefix = "weight", "head"
    elif match := re.fullmatch(r"sem_seg_head\.(.*)", name):
        inner, prefix = _rename(match[1], _DECODER) or _in_blocks(match[1], "layers_up", "levels"), "decoder"
    else:
        inner, prefix = None, ""
    return f"{prefix}.{inner}" if inner else None


def _reshaped(name: str, tensor: Tensor, directions: int = 4) -> Tensor:
    """The tensor that we call `name`, with the directions on an axis of their own and 1x1 convolutions as matrices.

    One that cannot be cut into so many directions stays as it is, and does not fit the network.
    """
    flat = {".A_log": 2, ".D": 1, ".x_proj": 2, ".dt_proj": 2}  # axes where K and D (or K and rows) are one
    for ending, axes in flat.items():
        if name.endswith(ending) and tensor.dim() == axes and tensor.shape[0] % directions == 0:
            return torch.unflatten(tensor, 0, (directions, -1))
    matrix = name.endswith((".in_proj.weight", ".out_proj.weight", ".fc1.weight", ".fc2.weight"))
    return tensor.flatten(1) if matrix and tensor.shape[2:] == (1, 1) else tensor


def from_vmamba(state: Mapping[str, Tensor], vmamba: VMamba) -> tuple[dict[str, Tensor], list[str]]:
    """The parameters of a VMamba backbone by our names below `encoders.<modality>.`, and the names that fit none."""
    names = {name: encoder_name(name, vmamba) for name in state}
    converted = {new: _reshaped(new, state[name]) for name, new in names.items() if new}
    return converted, [name for name, new in names.items() if not new]


def from_mcf_mamba(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a published MCF-Mamba (two branches, here `m1` and `m2`) by our names.

    Raises:
        ValueError: names that belong to no part of the network; all are listed.
    """
    converted, unknown = {}, []
    for name, tensor in state.items():
        new = mcf_mamba_name(name)
        if match := _SHARED.fullmatch(name):
            ours = _SCAN[match[2]]
            eight = _reshaped(f".{ours}", tensor, 2 * 4)
            for index, modality in enumerate(MODALITIES):
                target = f"fusion.{match[1]}.branches.{modality}.gated.{ours}"
                converted[target] = eight[index::2].clone()
        elif new:
            converted[new] = _reshaped(new, tensor)
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{len(unknown)} tensors are no part of an MCF-Mamba: {', '.join(unknown)}")
    return converted
