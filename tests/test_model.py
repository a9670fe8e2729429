"""What the network promises beyond the published numbers: any size, any modalities, keys, precision, errors."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from pipeline.model.config import ModelConfig
from pipeline.model.mcf_mamba import MCFMamba
from pipeline.model.ss2d import DropPath

CHANNELS = {"s2-l2a": 3, "s1": 2, "dem": 1}


@functools.cache
def network(*names: str, profile: str = "default", drop_path: float = 0.0) -> MCFMamba:
    torch.manual_seed(0)
    config = ModelConfig(size="nano", dims=(8, 16, 32), depths=(1, 2, 1), profile=profile, drop_path=drop_path)
    return MCFMamba(config, {name: CHANNELS[name] for name in names or CHANNELS}, 4, scan="torch")


def pictures(
    names: tuple[str, ...] = tuple(CHANNELS), batch: int = 2, height: int = 32, width: int = 32
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {name: torch.randn(batch, CHANNELS[name], height, width, generator=g) for name in names}


def checkerboard(names: tuple[str, ...], size: int = 32) -> dict[str, Tensor]:
    """Every other block of 4 x 4 tokens hidden."""
    cells = torch.arange(size // 4) // 4
    hidden = (cells[:, None] + cells) % 2 == 1
    return {name: hidden.expand(2, -1, -1) for name in names}


@settings(max_examples=15, deadline=None)
@given(height=st.integers(4, 70), width=st.integers(4, 70))
def test_any_size(height: int, width: int) -> None:
    out = network()(pictures(batch=1, height=height, width=width))
    assert out.shape == (1, 4, height, width)
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("size", [(66, 50), (68, 72), (33, 31), (4, 4)])
def test_padding_is_whole_zero_patches(size: tuple[int, int]) -> None:
    """An image gives what the same image, filled with zeros to whole patches, gives inside it."""
    height, width = size
    images = pictures(height=height, width=width)
    padded = {name: torch.nn.functional.pad(x, (0, -width % 4, 0, -height % 4)) for name, x in images.items()}
    whole = network()(padded)
    assert torch.equal(network()(images), whole[..., :height, :width])


@pytest.mark.parametrize("profile", ["paper", "default"])
@pytest.mark.parametrize("names", [("s1",), ("s2-l2a", "s1"), ("s2-l2a", "s1", "dem")])
def test_one_to_three_modalities_learn(names: tuple[str, ...], profile: str) -> None:
    model = network(*names, profile=profile)
    model(pictures(names), checkerboard(names)).square().mean().backward()
    silent = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert not silent
    model.zero_grad()


@pytest.mark.parametrize("absent", [("dem",), ("s2-l2a",), ("s1", "dem")])
def test_an_absent_modality_is_a_wholly_hidden_one(absent: tuple[str, ...]) -> None:
    images = pictures(height=36, width=40)
    hidden = {name: torch.ones(2, 9, 10, dtype=torch.bool) for name in absent}
    there = {name: x for name, x in images.items() if name not in absent}
    assert torch.equal(network()(there), network()(images, hidden))


def test_hidden_tokens_carry_nothing() -> None:
    """Whatever lies under a hidden token, the output is the same; under a visible one it is not."""
    images = pictures()
    hidden = {"s1": torch.zeros(2, 8, 8, dtype=torch.bool)}
    hidden["s1"][:, 2, 3] = True
    other = dict(images, s1=images["s1"].clone())
    other["s1"][:, :, 8:12, 12:16] += 5
    assert torch.equal(network()(images, hidden), network()(other, hidden))
    assert not torch.equal(network()(images), network()(other))


@pytest.mark.parametrize("vmamba", ["v0", "s1l8"])
def test_hidden_tokens_do_not_blow_up_the_gradient_of_a_deep_network(vmamba: str) -> None:
    """Of Tiny, whose stage 3 has 9 blocks: with zeros for hidden tokens, as published, the norm is over 1e15."""
    names = ("s2-l2a", "s1")
    norms = {}
    for profile in ("default", "paper"):
        torch.manual_seed(0)
        model = MCFMamba(ModelConfig(vmamba=vmamba, profile=profile), {n: CHANNELS[n] for n in names}, 4)
        for hidden in ({}, checkerboard(names)):
            model.zero_grad()
            model(pictures(names), hidden).square().mean().backward()
            squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
            norms[profile, bool(hidden)] = float(torch.stack(squares).sum().sqrt())
    assert norms["default", True] < 10 * norms["default", False]
    assert vmamba != "v0" or norms["paper", True] > 1e15 * norms["paper", False]


def test_default_fusion_mixes_modalities_in_the_grouped_convolution() -> None:
    """Each output channel of the first convolution sees one modality in the paper's profile, all in ours."""
    for profile, seen_by_each in (("paper", 1), ("default", 2)):
        mix = network("s2-l2a", "s1", profile=profile).fusion[0].mix
        maps = [torch.ones(1, 4, 4, 16, requires_grad=True) for _ in range(2)]
        seen = torch.zeros(2, 16)
        for channel in range(16):
            captured: list[Tensor] = []
            hook = mix.grouped.register_forward_hook(lambda _m, _i, out, captured=captured: captured.append(out))
            mix(maps)
            hook.remove()
            gradients = torch.autograd.grad(captured[0][:, channel].sum(), maps)
            seen[:, channel] = torch.tensor([float(gradient.abs().sum() > 0) for gradient in gradients])
        assert seen.sum(0).tolist() == [seen_by_each] * 16


def test_drop_path_is_keyed_by_sample_and_layer() -> None:
    model = network(drop_path=0.5)
    keys = torch.tensor([11, 22, 33, 44])
    images = pictures(batch=4)
    first = model(images, keys=keys)
    assert torch.equal(first, model(images, keys=keys)), "the same keys drop the same"
    assert not torch.equal(first, model(images, keys=keys + 1))
    assert not torch.equal(first, model(images)), "no keys, no drop path"
    order = torch.tensor([2, 0, 3, 1])
    shuffled = model({name: x[order] for name, x in images.items()}, keys=keys[order])
    torch.testing.assert_close(shuffled, first[order], rtol=1e-4, atol=1e-5)
    layers = [module.layer for module in model.modules() if isinstance(module, DropPath)]
    assert len(set(layers)) == len(layers) == 3 * 4 + 2 * 2 * 2


def test_drop_path_keeps_the_mean() -> None:
    drop = DropPath(0.3)
    x = torch.ones(20_000, 1)
    out = drop(x, torch.arange(20_000))
    assert sorted(out.unique().tolist()) == pytest.approx([0, 1 / 0.7])
    assert float(out.mean()) == pytest.approx(1, abs=0.02)


def test_drop_path_rates_are_the_published_ramps() -> None:
    with torch.device("meta"):
        model = MCFMamba(ModelConfig(size="tiny", profile="paper"), {"m1": 4, "m2": 2}, 8)
    encoder = [m.rate for m in model.encoders["m1"].modules() if isinstance(m, DropPath)]
    assert encoder == pytest.approx([0.2 * i / 14 for i in range(15)])
    decoder = [block.drop_path.rate for level in model.decoder.levels for block in level.blocks]
    assert decoder == pytest.approx([0.1 * i / 7 for i in range(6)])


@pytest.mark.parametrize(
    ("size", "dim", "depths"),
    [
        ("nano", 12, [1, 1, 2, 1]),
        ("tiny", 96, [2, 2, 9, 2]),
        ("small", 96, [2, 2, 27, 2]),
        ("base", 128, [2, 2, 27, 2]),
    ],
)
def test_sizes(size: str, dim: int, depths: list[int]) -> None:
    with torch.device("meta"):
        model = MCFMamba(ModelConfig(size=size), {"m1": 4, "m2": 2}, 8)
    for encoder in model.encoders.values():
        assert [len(stage.blocks) for stage in encoder.stages] == depths
        assert [stage.out_norm.weight.numel() for stage in encoder.stages] == [dim, 2 * dim, 4 * dim, 8 * dim]
    if size == "tiny":
        hidden = sum(encoder.patch_embed.hide.token.numel() for encoder in model.encoders.values())
        assert sum(parameter.numel() for parameter in model.parameters()) == 63_431_808 + hidden


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = MCFMamba(ModelConfig(size="nano"), {"s1": 2}, 3)
    gated = model.encoders["s1"].stages[2].blocks[0].ss2d.gated
    steps = torch.nn.functional.softplus(gated.ssm.dt_bias).detach()
    assert float(steps.min()) >= 1e-3 * 0.999 and float(steps.max()) <= 1e-1 * 1.001
    assert torch.equal(gated.ssm.A_log, torch.arange(1, 17).float().log().expand(4, 96, 16))
    assert bool((gated.ssm.D == 1).all())
    assert float(gated.in_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(gated.dt_proj.detach().abs().max()) <= 3**-0.5


def test_no_state_space_parameter_or_norm_below_float32() -> None:
    for half in (MCFMamba.bfloat16, MCFMamba.half):
        model = half(MCFMamba(ModelConfig(size="nano", depths=(1, 1, 1, 1)), {"s1": 2}, 3))
        precision = model.precision()
        assert {name.rsplit(".", 1)[1] for name in precision} == {"A_log", "D", "dt_bias", "weight", "bias"}
        assert set(precision.values()) == {torch.float32}
        assert model.head.weight.dtype != torch.float32
    image = pictures(("s1",))["s1"].half()
    out = model({"s1": image})
    assert out.dtype == torch.float16 and bool(out.isfinite().all())


def test_autocast_is_close_to_float32() -> None:
    images = pictures()
    exact = network()(images)
    with torch.autocast("cpu", torch.bfloat16):
        fast = network()(images)
    assert float((fast.float() - exact).detach().abs().max() / exact.detach().abs().max()) < 0.05


def test_what_is_not_decayed() -> None:
    names = network().no_weight_decay()
    assert {"encoders.s1.stages.0.blocks.0.ss2d.gated.ssm.A_log", "decoder.expand.norm.weight"} <= names
    assert {name.rsplit(".", 1)[-1] for name in names} == {"A_log", "D", "dt_bias", "weight", "bias", "token"}
    decayed = {name for name, _ in network().named_parameters()} - names
    assert {"head.weight", "encoders.s1.patch_embed.proj.weight"} <= decayed
    assert all(name.endswith((".weight", ".x_proj", ".dt_proj")) for name in decayed)
    assert network(profile="paper").no_weight_decay() == set(), "the paper decays everything"


def refused(images: dict[str, Tensor], hidden: dict[str, Tensor] | None = None) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        network()(images, hidden)
    return str(caught.value)


def test_bad_input_is_named() -> None:
    images = pictures()
    assert "'s3'; this model has s2-l2a, s1, dem" in refused({"s3": images["s1"]})
    assert "'s3'; this model has" in refused(images, {"s3": torch.zeros(2, 8, 8, dtype=torch.bool)})
    assert "at least one of s2-l2a, s1, dem" in refused({})
    assert "images['s1'] is (2, 3, 32, 32); [B, 2, H, W] is needed" in refused({"s1": images["s2-l2a"]})
    assert "images['s1'] is torch.int16" in refused({"s1": images["s1"].short()})
    assert "3 x 32 pixels; at least one patch of 4 x 4" in refused({"s1": images["s1"][:, :, :3]})
    assert "B, H, W must agree" in refused(dict(images, s1=images["s1"][:, :, :16]))
    assert "hidden['s1'] is (2, 4, 8); these images have (2, 8, 8) tokens" in refused(
        images, {"s1": torch.zeros(2, 4, 8, dtype=torch.bool)}
    )
    assert "hidden['s1'] is torch.float32" in refused(images, {"s1": torch.zeros(2, 8, 8)})


def test_values_that_are_not_finite_are_found_in_checked_mode() -> None:
    images = pictures()
    images["s1"][0, 0, 0, 0] = torch.nan
    with torch.autograd.set_detect_anomaly(True):
        assert "images['s1'] has values that are not finite" in refused(images)


def test_building_is_refused_without_modalities_bands_or_outputs() -> None:
    for channels, outputs in (({}, 2), ({"s1": 0}, 2), ({"s1": 2}, 0)):
        with pytest.raises(ValueError, match="at least one modality, band and output"):
            MCFMamba(ModelConfig(size="nano"), channels, outputs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "huge"}, "size: 'huge' is not one of nano, tiny, small, base"),
        ({"profile": "mine"}, "profile: 'mine'"),
        ({"dims": (8, 16, 24, 48)}, "twice the channels"),
        ({"dims": (8, 16)}, "depths: 4 stages, but dims has 2"),
        ({"dims": (8,), "depths": (1,)}, "at least 2"),
        ({"depths": (1, 0, 1, 1)}, "at least 1 block"),
        ({"d_state": 0}, "d_state: 0"),
        ({"drop_path": 1.0}, r"drop_path: 1.0 is outside \[0, 1\)"),
    ],
)
def test_impossible_configs_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)


def test_config_in_pydantic_forbids_typos() -> None:
    adapter = TypeAdapter(ModelConfig)
    assert adapter.validate_python({"size": "base", "dims": [4, 8], "depths": [1, 1]}).stage_dims == (4, 8)
    with pytest.raises(ValidationError, match="sizes"):
        adapter.validate_python({"sizes": "base"})


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, pipeline.model as m, pipeline.model.config; print('MCFMamba' in dir(m), 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "False"]
