"""The network against numbers of the published research code: values, loss and gradients, on every scan backend."""

from __future__ import annotations

import ast
import functools
import math

import pytest
import torch
from torch import Tensor, nn

from pipeline.model import cmss
from pipeline.model.config import ModelConfig
from pipeline.model.decoder import Level, PatchExpand
from pipeline.model.encoder import PatchMerging
from pipeline.model.fusion import Fusion
from pipeline.model.mcf_mamba import MCFMamba
from pipeline.model.names import from_mcf_mamba
from pipeline.model.ss2d import VSSBlock
from tests.golden import FOLDER, MODELS, Golden, part
from tests.scan_backends import ON_CPU, working

# The plain loop only on the smallest model: it takes seconds a model, and the tests of the scan cover the rest.
RUNS = [
    pytest.param(name, *scan.values, marks=scan.marks, id=f"{name}-{scan.values[0]}")
    for name in MODELS
    for scan in working(ON_CPU)
    if scan.values != ("reference",) or name == MODELS[0]
]


@functools.cache
def golden(name: str) -> Golden:
    return Golden(name)


def build(g: Golden, reconstruct: bool, scan: str) -> MCFMamba:
    facts = g.facts
    config = ModelConfig(profile="paper", dims=tuple(facts["dims"]), depths=tuple(facts["depths"]))
    bands = {"m1": facts["m1_channels"], "m2": facts["m2_channels"]}
    outputs = sum(bands.values()) if reconstruct else facts["num_classes"]
    model = MCFMamba(config, bands, outputs, scan)
    state = g.under("state/") | (g.under("state_cmss/") if reconstruct else {})
    model.load_state_dict(from_mcf_mamba(state))
    return model


def stages(model: MCFMamba, images: dict[str, Tensor], hidden: dict[str, Tensor]) -> dict[str, Tensor]:
    """Encoder outputs and fused maps NCHW, by the goldens' names."""
    seen: dict[str, Tensor] = {}
    for modality, encoder in model.encoders.items():
        encoder.register_forward_hook(
            lambda _module, _inputs, maps, modality=modality: seen.update(
                {f"enc_{modality}_{i}": x.permute(0, 3, 1, 2) for i, x in enumerate(maps)}
            )
        )
    for i, fusion in enumerate(model.fusion):
        fusion.register_forward_hook(
            lambda _module, _inputs, x, i=i: seen.update({f"fused_{i}": x.permute(0, 3, 1, 2)})
        )
    seen["logits"] = model(images, hidden)
    return seen


@pytest.mark.parametrize(("name", "scan"), RUNS)
def test_segmentation(name: str, scan: str) -> None:
    g = golden(name)
    with torch.no_grad():
        seen = stages(build(g, False, scan), {m: g[f"in/{m}"] for m in ("m1", "m2")}, {})
    expected = [key for key in g.arrays if key.startswith("out/")]
    assert len(expected) == 13
    for key in expected:
        g.check(key, seen[key.removeprefix("out/")], g.facts["tolerance"][key]["rtol_of_absmax"])


@pytest.mark.parametrize(("name", "scan"), RUNS)
def test_masked_reconstruction_and_gradients(name: str, scan: str) -> None:
    g = golden(name)
    tolerance = {key: value["rtol_of_absmax"] for key, value in g.facts["tolerance"].items()}
    model = build(g, True, scan)
    images = {m: g[f"in/{m}"] for m in ("m1", "m2")}
    hidden = {m: g[f"in/mask{m[1]}"][:, 0].bool() for m in images}
    seen = stages(model, images, hidden)
    for key in [key for key in g.arrays if key.startswith("cmss/fused")]:
        g.check(key, seen[key.removeprefix("cmss/")], tolerance[key])
    recon = seen["logits"]
    g.check("cmss/recon", recon, tolerance["cmss/recon"])
    blocks = {m: mask[:, ::8, ::8] for m, mask in hidden.items()}
    valid = {m: torch.zeros_like(image[:, 0], dtype=torch.bool) for m, image in images.items()}
    loss = cmss.loss(recon, images, blocks, valid, profile="paper")[0].mean()
    g.check("cmss/loss", loss[None], tolerance["cmss/loss"])
    loss.backward()
    check_gradients(g, dict(model.named_parameters()), tolerance)


def check_gradients(g: Golden, parameters: dict[str, nn.Parameter], tolerance: dict[str, float]) -> None:
    for key in [key for key in g.arrays if key.startswith("grad/")]:
        for ours, expected in from_mcf_mamba({key.removeprefix("grad/"): g[key]}).items():
            gradient = parameters[ours].grad
            assert gradient is not None
            g.check(key, gradient, tolerance[key], expected)
    shapes = g.under("state/") | g.under("state_cmss/")
    for theirs, norm in g.facts["grad_l2"].items():
        mine = [parameters[ours].grad for ours in from_mcf_mamba({theirs: shapes[theirs]})]
        total = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in mine if gradient is not None))
        assert total == pytest.approx(norm, rel=1e-4), theirs


UNITS = {
    # name: our module, prefix of their names, prefix of ours
    "vssblock_enc": (
        lambda scan: VSSBlock(12, 16, 0.0, scan),
        "backbone.branch_m1.layers.0.blocks.0",
        "encoders.m1.stages.0.blocks.0",
    ),
    "vssblock_dec": (
        lambda scan: VSSBlock(12, 16, 0.0, scan, mlp=True),
        "sem_seg_head.layers_up.0.blocks.0",
        "decoder.levels.0.blocks.0",
    ),
    "mc_ss2d": (
        lambda scan: Fusion(12, 16, ["m1", "m2"], "paper", scan),
        "backbone.fusion_module.fusion_layers.0",
        "fusion.0",
    ),
    "decoder_layer": (
        lambda scan: Level(12, 16, [0.0, 0.0], scan),
        "sem_seg_head.layers_up.0",
        "decoder.levels.0",
    ),
    "final_expand_x4": (lambda scan: PatchExpand(12, 4, 12), "sem_seg_head.upsample", "decoder.expand"),
    **{
        f"patch_merging_{size}": (
            lambda scan: PatchMerging(12),
            "backbone.branch_m1.layers.0.downsample",
            "encoders.m1.stages.0.downsample",
        )
        for size in ("7x5", "8x5", "7x6", "6x4")
    },
}


def run_unit(name: str, module: nn.Module, inputs: list[Tensor]) -> Tensor:
    """The unit's output in the layout of the goldens: NHWC for blocks and merging, NCHW for the others."""
    if name.startswith(("vssblock", "patch_merging")):
        return module(*inputs)
    maps = [x.permute(0, 2, 3, 1) for x in inputs]
    if name == "mc_ss2d":
        out = module(dict(zip(("m1", "m2"), maps, strict=True)))
    else:
        out = module(*maps, None) if name == "decoder_layer" else module(*maps)
    return out.permute(0, 3, 1, 2)


@pytest.mark.parametrize("scan", working(ON_CPU))
@pytest.mark.parametrize("name", UNITS)
def test_unit(name: str, scan: str) -> None:
    g = golden("units")
    make, theirs, ours = UNITS[name]
    module = make(scan)
    module.load_state_dict(part(g.under(f"{name}/state/"), theirs, ours))
    inputs = [g[f"{name}/{key}"].requires_grad_() for key in ("in0", "in1") if f"{name}/{key}" in g.arrays]
    out = run_unit(name, module, inputs)
    out.backward(g[f"{name}/cotangent"])

    def tolerance(key: str) -> float:
        return max(20 * g.facts["fp32_vs_fp64"][f"{name}/{key}"]["rel_to_absmax"], 2e-5)

    g.check(f"{name}/out", out, tolerance("out"))
    for i, x in enumerate(inputs):
        assert x.grad is not None
        g.check(f"{name}/dIn{i}", x.grad, tolerance(f"dIn{i}"))
    gradients = g.under(f"{name}/grad/")
    assert gradients
    parameters = dict(module.named_parameters())
    for key, gradient in gradients.items():
        for mine, expected in part({key: gradient}, theirs, ours).items():
            found = parameters[mine].grad
            assert found is not None
            g.check(f"{name}/grad/{key}", found, tolerance(f"grad/{key}"), expected)


def test_cmss_loss() -> None:
    g = golden("units")
    images = {m: g[f"cmss_loss/{m}"] for m in ("m1", "m2")}
    blocks = {m: g[f"cmss_loss/mask{m[1]}"][:, 0, ::8, ::8].bool() for m in images}
    valid = {m: torch.ones_like(image[:, 0], dtype=torch.bool) for m, image in images.items()}
    recon = g["cmss_loss/pred"].requires_grad_()
    loss = cmss.loss(recon, images, blocks, valid, profile="paper")[0].mean()
    loss.backward()
    g.check("cmss_loss/loss", loss[None], 2e-5)
    assert recon.grad is not None
    g.check("cmss_loss/d_pred", recon.grad, 2e-5)


def test_masks() -> None:
    """Same counts, same blocks, same enlargement to tokens; only the order of the blocks is ours (keyed)."""
    g = golden("units")
    for i, facts in enumerate(g.facts["masks"]):
        if facts["mask_patch"] != cmss.BLOCK:
            continue
        valid = {m: torch.ones(1, *facts["input"], dtype=torch.bool) for m in ("m1", "m2")}
        blocks = cmss.hide(cmss.presence(valid), torch.tensor([0]), seed=i, ratio=facts["ratio"])
        assert int(blocks["m1"].sum()) == facts["hidden"] == int(g[f"mask/{i}/mask1"][:, ::8, ::8].sum())
        assert int(blocks["m2"].sum()) == facts["patches"] - facts["hidden"]
        theirs = {m: g[f"mask/{i}/mask{m[1]}"].bool() for m in valid}
        given = {m: mask[:, ::8, ::8] for m, mask in theirs.items()}
        tokens = cmss.hidden_tokens(given, valid)
        assert all(torch.equal(tokens[m], theirs[m]) for m in valid)


def test_names_of_the_published_tiny() -> None:
    """All 657 published names, with their shapes, give exactly the parameters of our Tiny."""
    rows = [line.split("\t") for line in (FOLDER / "keys_tiny.txt").read_text().splitlines() if line[0] != "#"]
    state = {name: torch.empty(ast.literal_eval(shape), device="meta") for name, shape, _ in rows}
    assert len(state) == 657
    with torch.device("meta"):
        model = MCFMamba(ModelConfig(size="tiny", profile="paper"), {"m1": 4, "m2": 2}, 8, scan="torch")
    converted = {name: tuple(tensor.shape) for name, tensor in from_mcf_mamba(state).items()}
    assert converted == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert sum(parameter.numel() for parameter in model.parameters()) == 63_431_808


def test_unknown_names_are_listed() -> None:
    with pytest.raises(ValueError, match=r"2 tensors .* classifier\.head\.weight, backbone\.branch_m3\.outnorm0\.bias"):
        from_mcf_mamba(
            {name: torch.zeros(1) for name in ("classifier.head.weight", "backbone.branch_m3.outnorm0.bias")}
        )
