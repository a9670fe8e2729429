"""Names of public checkpoints in terms of ours.

Letters: K = 4 directions, D inner channels, N states.

A published MCF-Mamba has two branches, here the modalities `m1` and `m2`. Its fusion keeps the weights of 8
directions in one tensor, in the order m1 rows, m2 rows, m1 columns, m2 columns and the same four reversed;
each modality of ours holds every second of them. A_logs and Ds have directions and channels on one axis.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

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
_BLOCK = {rf"op\.{old}": f"ss2d.gated.{new}" for old, new in _SCAN.items()} | {
    r"op\.out_norm": "ss2d.norm",
    r"op\.out_proj": "ss2d.out_proj",
    r"(norm2?|mlp\.fc[12])": r"\1",
}
_ENCODER = {
    r"patch_embed\.0": "patch_embed.proj",
    r"patch_embed\.2": "patch_embed.norm",
    r"layers\.(\d+)\.downsample\.(norm|reduction)": r"stages.\1.downsample.\2",
    r"outnorm(\d+)": r"stages.\1.out_norm",
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


def _in_blocks(name: str, blocks: str, prefix: str) -> str | None:
    """The new name of what lies in a list of VSS blocks: `blocks`.i.blocks.j... -> `prefix`.i.blocks.j..."""
    match = re.fullmatch(rf"{blocks}\.(\d+)\.blocks\.(\d+)\.(.*)", name)
    inner = _rename(match[3], _BLOCK) if match else None
    return f"{prefix}.{match[1]}.blocks.{match[2]}.{inner}" if match and inner else None


def encoder_name(name: str) -> str | None:
    """Our name, below `encoders.<modality>.`, of a VMamba v0 backbone's parameter; None if there is none."""
    return _rename(name, _ENCODER) or _in_blocks(name, "layers", "stages")


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


def _per_direction(name: str, tensor: Tensor, directions: int) -> Tensor:
    """A_logs [K D, N] and Ds [K D] with the directions on an axis of their own; others unchanged."""
    return torch.unflatten(tensor, 0, (directions, -1)) if name.endswith(("A_logs", "Ds")) else tensor


def from_mcf_mamba(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a published MCF-Mamba (two branches, here `m1` and `m2`) by our names.

    Raises:
        ValueError: names that belong to no part of the network; all are listed.
    """
    converted, unknown = {}, []
    for name, tensor in state.items():
        new = mcf_mamba_name(name)
        if match := _SHARED.fullmatch(name):
            eight = _per_direction(name, tensor, 2 * 4)
            for index, modality in enumerate(MODALITIES):
                target = f"fusion.{match[1]}.branches.{modality}.gated.{_SCAN[match[2]]}"
                converted[target] = eight[index::2].clone()
        elif new:
            converted[new] = _per_direction(name, tensor, 4)
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{len(unknown)} tensors are no part of an MCF-Mamba: {', '.join(unknown)}")
    return converted
