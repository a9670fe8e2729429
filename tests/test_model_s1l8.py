"""The encoder type s1l8 against numbers of the public VMamba code, and inside an MCF-Mamba."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn

from pipeline.model.config import ModelConfig, Size
from pipeline.model.encoder import Downsample, Encoder, Stem
from pipeline.model.mcf_mamba import MCFMamba
from pipeline.model.names import from_vmamba
from pipeline.model.ss2d import DropPath, VSSBlock
from tests.golden import FOLDER, Golden
from tests.scan_backends import ON_CPU, working

SCANS = working(ON_CPU)


@functools.cache
def golden(name: str) -> Golden:
    return Golden(f"s1l8/{name}")


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ours, unknown = from_vmamba(state, "s1l8")
    assert not unknown
    return ours


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("name", ["s1l8_64x64", "s1l8_96x128"])
def test_backbone(name: str, scan: str) -> None:
    g = golden(name)
    facts = g.facts
    structure = {"dims": tuple(facts["dims"]), "depths": tuple(facts["depths"])}
    config = ModelConfig(vmamba="s1l8", profile="paper", **structure)
    encoder = Encoder(config, facts["in_chans"], scan)
    encoder.load_state_dict(converted(g.under("state/") | g.under("state_outnorm/")))
    image = g["in/x"].requires_grad_()
    maps = [x.permute(0, 3, 1, 2) for x in encoder(image, None, None)]
    tolerance = {key: value["rtol_of_absmax"] for key, value in facts["tolerance"].items()}
    for i, found in enumerate(maps):
        g.check(f"out/stage{i}", found, tolerance[f"out/stage{i}"])
    torch.stack([(x * g[f"cot/stage{i}"]).sum() for i, x in enumerate(maps)]).sum().backward()
    assert image.grad is not None
    g.check("dIn/x", image.grad, tolerance["dIn/x"])
    check_gradients(g, encoder, tolerance)


def check_gradients(g: Golden, encoder: nn.Module, tolerance: dict[str, float]) -> None:
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    for theirs, expected in g.under("grad/").items():
        ((ours, value),) = converted({theirs: expected}).items()
        g.check(f"grad/{theirs}", gradients[ours], tolerance[f"grad/{theirs}"], value)
    norms = g.facts["grad_l2"]
    assert len(norms) == len(gradients), "the goldens have a norm for every parameter"
    for theirs, norm in norms.items():
        ((ours, _),) = converted({theirs: (g.under("state/") | g.under("state_outnorm/"))[theirs]}).items()
        assert math.sqrt(float(gradients[ours].double().square().sum())) == pytest.approx(norm, rel=1e-4), theirs


UNITS = {
    "block": (lambda scan: VSSBlock(20, 1, 0.0, scan, mlp=True, gated=False), "layers.0.blocks.0", "stages.0.blocks.0"),
    "stem": (lambda scan: Stem(3, 20, "paper"), "patch_embed", "patch_embed"),
    "downsample": (lambda scan: Downsample(20), "layers.0.downsample", "stages.0.downsample"),
}


def renamed(state: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    found = converted({f"{theirs}.{name}": tensor for name, tensor in state.items()})
    return {name.removeprefix(f"{ours}."): tensor for name, tensor in found.items()}


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("name", UNITS)
def test_unit(name: str, scan: str) -> None:
    g = golden("s1l8_block")
    make, theirs, ours = UNITS[name]
    module = make(scan)
    module.load_state_dict(renamed(g.under(f"{name}/state/"), theirs, ours))
    x = g[f"{name}/in0"].requires_grad_()
    out = module(x, None) if name == "stem" else module(x.permute(0, 2, 3, 1))
    out = out.permute(0, 3, 1, 2)
    out.backward(g[f"{name}/cotangent"])
    tolerance = {key: value["rtol_of_absmax"] for key, value in g.facts["tolerance"].items()}
    g.check(f"{name}/out", out, tolerance[f"{name}/out"])
    assert x.grad is not None
    g.check(f"{name}/dIn0", x.grad, tolerance[f"{name}/dIn0"])
    parameters = dict(module.named_parameters())
    gradients = g.under(f"{name}/grad/")
    assert len(gradients) == len(parameters)
    for key, gradient in gradients.items():
        ((mine, expected),) = renamed({key: gradient}, theirs, ours).items()
        g.check(f"{name}/grad/{key}", parameters[mine].grad, tolerance[f"{name}/grad/{key}"], expected)


@pytest.mark.parametrize(
    ("size", "dim", "depths", "drop_path"),
    # vssm1_tiny_0230s, vssm1_small_0229s, vssm1_base_0229s of the public release
    [("tiny", 96, (2, 2, 8, 2), 0.2), ("small", 96, (2, 2, 20, 2), 0.3), ("base", 128, (2, 2, 20, 2), 0.6)],
)
def test_sizes_are_those_of_the_public_release(size: Size, dim: int, depths: tuple[int, ...], drop_path: float) -> None:
    config = ModelConfig(size=size, vmamba="s1l8")
    assert config.stage_dims == (dim, 2 * dim, 4 * dim, 8 * dim) and config.stage_depths == depths
    with torch.device("meta"):
        encoder = Encoder(config, 3, "torch")
    assert [len(stage.blocks) for stage in encoder.stages] == list(depths)
    rates = [block.drop_path.rate for stage in encoder.stages for block in stage.blocks]
    assert rates == pytest.approx([drop_path * i / (sum(depths) - 1) for i in range(sum(depths))])
    assert ModelConfig(size="base").encoder_drop_path == 0.5  # v0 has its own


def test_names_of_the_public_tiny() -> None:
    """All 276 public names give exactly the parameters of our encoder; left over is the classifier alone."""
    rows = [line.split() for line in (FOLDER / "s1l8/keys_tiny_s1l8.txt").read_text().splitlines() if line[0] != "#"]
    state = {name: torch.empty([int(size) for size in shape.split("x")], device="meta") for name, shape in rows}
    assert len(state) == 276
    ours, unknown = from_vmamba(state, "s1l8")
    assert {name.split(".")[0] for name in unknown} == {"classifier"} and len(unknown) == 4
    with torch.device("meta"):
        encoder = Encoder(ModelConfig(vmamba="s1l8", profile="paper"), 3, "torch")
    expected = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    assert {name for name in expected if name not in found} == {
        f"stages.{i}.out_norm.{kind}" for i in range(4) for kind in ("weight", "bias")
    }
    assert found == {name: shape for name, shape in expected.items() if name in found}
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 29_481_408


def test_drop_path_and_initial_values() -> None:
    torch.manual_seed(0)
    encoder = Encoder(ModelConfig(vmamba="s1l8", size="nano", depths=(2, 2, 8, 2), drop_path=0.2), 3, "torch")
    rates = [module.rate for module in encoder.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.2 * i / 13 for i in range(14) for _ in range(2)])
    ss2d = encoder.stages[2].blocks[0].ss2d
    assert ss2d.ssm.A_log.shape == (4, 48, 1) and not ss2d.ssm.A_log.any()
    assert float(ss2d.in_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


@functools.cache
def network() -> MCFMamba:
    torch.manual_seed(0)
    config = ModelConfig(vmamba="s1l8", dims=(8, 16, 32), depths=(1, 2, 1), drop_path=0.0)
    return MCFMamba(config, {"s2": 3, "s1": 2}, 4, scan="torch")


def pictures(height: int, width: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {"s2": torch.randn(2, 3, height, width, generator=g), "s1": torch.randn(2, 2, height, width, generator=g)}


@pytest.mark.parametrize("size", [(32, 32), (4, 4), (33, 50), (75, 53), (66, 68)])
def test_any_size(size: tuple[int, int]) -> None:
    out = network()(pictures(*size))
    assert out.shape == (2, 4, *size) and bool(out.isfinite().all())


def test_everything_learns() -> None:
    hidden = {name: torch.eye(8, dtype=torch.bool).expand(2, -1, -1) for name in ("s2", "s1")}
    network()(pictures(32, 32), hidden).square().mean().backward()
    silent = [
        name for name, parameter in network().named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert not silent
    network().zero_grad()


def test_hidden_tokens_carry_nothing_although_tokens_overlap() -> None:
    """A changed pixel of a hidden token changes nothing; the same pixel, not hidden, does."""
    images = pictures(33, 32)
    hidden = {"s1": torch.zeros(2, 9, 8, dtype=torch.bool)}
    hidden["s1"][:, 2, 3] = hidden["s1"][:, 8, 7] = True
    other = dict(images, s1=images["s1"].clone())
    other["s1"][:, :, 8:12, 12:16] += 5
    other["s1"][:, :, 32:, 28:] += 5
    assert torch.equal(network()(images, hidden), network()(other, hidden))
    assert not torch.equal(network()(images), network()(other))
    absent = {"s1": torch.ones(2, 9, 8, dtype=torch.bool)}
    assert torch.equal(network()({"s2": images["s2"]}), network()(images, absent))


def test_precision_and_decay() -> None:
    model = MCFMamba(ModelConfig(vmamba="s1l8", size="nano"), {"s1": 2}, 3).bfloat16()
    assert set(model.precision().values()) == {torch.float32}
    assert {"encoders.s1.stages.0.blocks.0.ss2d.ssm.A_log", "encoders.s1.patch_embed.norm1.weight"} <= set(
        model.precision()
    ) & model.no_weight_decay()
    out = model({"s1": torch.randn(1, 2, 32, 32).bfloat16()})
    assert out.dtype == torch.bfloat16 and bool(out.isfinite().all())


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ValueError, match="vmamba: 'v1' is not one of v0, s1l8"):
        ModelConfig(vmamba="v1")
