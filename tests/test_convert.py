"""Public checkpoints, made from the goldens' parameters, become release folders that compute the golden numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from launchers import command
from pipeline import checkpoint
from pipeline.model import MCFMamba, ReleaseError
from pipeline.model.convert import ConvertError, adapt, convert, parse_settings
from pipeline.model.release import read_contract
from pipeline.pretrain import pretrain
from shards.contract import Contract
from tests.golden import MODELS, Golden
from tests.small_dataset import one_thread, quiet, write_dataset  # noqa: F401
from tests.training_scenarios import config

State = dict[str, Tensor]


def published(name: str = MODELS[0]) -> State:
    return Golden(name).under("state/")


def s1l8() -> State:
    """A classification checkpoint of VMamba s1l8 for 3 bands, as it is published."""
    classifier = {"classifier.norm.weight": torch.ones(64), "classifier.head.weight": torch.ones(10, 64)}
    return Golden("s1l8/s1l8_96x128").under("state/") | classifier


def v0(bands: int = 3) -> State:
    """A classification checkpoint of VMamba v0, under the names that its table of renamed keys starts from."""
    branch = "backbone.branch_m1."
    state = {k.removeprefix(branch): v for k, v in published().items() if k.startswith(branch) and "outnorm" not in k}
    table = {new: old for old, new in Golden("units").facts["ckpt_key_map"].items()}
    state["patch_embed.0.weight"] = state["patch_embed.0.weight"][:, :bands]
    old = {table.get(name, name): tensor for name, tensor in state.items()}
    assert any("self_attention" in name for name in old) and "patch_embed.proj.weight" in old
    return old | {"norm.weight": torch.ones(96), "head.weight": torch.ones(10, 96), "head.bias": torch.ones(10)}


def write(path: Path, state: State) -> Path:
    torch.save({"model": state}, path)
    return path


@pytest.mark.parametrize("name", MODELS[:2])
def test_a_published_mcf_mamba_gives_its_logits(name: str, tmp_path: Path) -> None:
    g = Golden(name)
    result = convert(write(tmp_path / "best.pth", published(name)), tmp_path / "out")
    assert result.left_out == () and result.initial == () and result.taken == len(published(name))
    model = MCFMamba.from_pretrained(tmp_path / "out")
    facts = g.facts
    assert model.channels == {"m1": facts["m1_channels"], "m2": facts["m2_channels"]}
    assert model.outputs == facts["num_classes"] and model.config.profile == "paper"
    assert (list(model.config.stage_dims), list(model.config.stage_depths)) == (facts["dims"], facts["depths"])
    with torch.no_grad():
        logits = model({m: g[f"in/{m}"] for m in ("m1", "m2")})
    g.check("out/logits", logits, facts["tolerance"]["out/logits"]["rtol_of_absmax"])
    opened = Contract.from_json(read_contract(tmp_path / "out"))
    assert opened.channels == model.channels and opened.modality("m2").scale == (1.0,) * facts["m2_channels"]
    json.dumps(read_contract(tmp_path / "out"), allow_nan=False)


def test_the_modalities_of_a_published_one_can_be_named(tmp_path: Path) -> None:
    g, path = Golden(MODELS[0]), write(tmp_path / "best.pth", published())
    convert(path, tmp_path / "out", {"rgbnir": 4, "s1": 2})
    model = MCFMamba.from_pretrained(tmp_path / "out")
    assert model.channels == {"rgbnir": 4, "s1": 2}
    with torch.no_grad():
        logits = model({"rgbnir": g["in/m1"], "s1": g["in/m2"]})
    g.check("out/logits", logits, g.facts["tolerance"]["out/logits"]["rtol_of_absmax"])
    assert Contract.from_json(read_contract(tmp_path / "out")).modality("s1").offset == (-25.0, -25.0)
    for bands in ({"s1": 2, "rgbnir": 4}, {"rgbnir": 4}):
        with pytest.raises(ConvertError, match="the checkpoint has m1:4, m2:2; give two names"):
            convert(path, tmp_path / "other", bands)
    swapped = convert(path, tmp_path / "swapped", {"m2": 4, "m1": 2}).model
    with torch.no_grad():
        assert torch.equal(swapped({"m2": g["in/m1"], "m1": g["in/m2"]}), logits)


@pytest.mark.parametrize("form", ["bare", "state_dict", "safetensors"])
def test_forms_of_the_file(form: str, tmp_path: Path) -> None:
    state, path = published(), tmp_path / ("a.safetensors" if form == "safetensors" else "a.pth")
    if form == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state if form == "bare" else {"state_dict": state, "epoch": 3, "optimizer": {}}, path)
    result = convert(path, tmp_path / "out")
    assert result.left_out == (("epoch", "optimizer") if form == "state_dict" else ())
    assert result.taken == len(state)


@pytest.mark.parametrize("modality", ["s1", "rgb", "rgbnir", "s2-l2a"])
def test_a_vmamba_s1l8_fills_every_encoder(modality: str, tmp_path: Path) -> None:
    g = Golden("s1l8/s1l8_96x128")
    bands = {"photo": 3, modality: {"s1": 2, "rgb": 3, "rgbnir": 4, "s2-l2a": 12}[modality]}
    result = convert(write(tmp_path / "vssm.pth", s1l8()), tmp_path / "out", bands)
    assert set(result.left_out) == {"classifier.norm.weight", "classifier.head.weight"}
    model = MCFMamba.from_pretrained(tmp_path / "out")
    assert model.config.vmamba == "s1l8" and model.channels == bands and model.outputs == sum(bands.values())
    kept = {name.split(".")[0] for name in result.initial if ".out_norm." not in name and ".hide." not in name}
    assert kept == {"fusion", "decoder", "head"}
    assert set(result.initial) | {name for name in model.state_dict() if name.startswith("encoders.")} == set(
        model.state_dict()
    )
    encoder = model.encoders["photo"]
    for index, stage in enumerate(encoder.stages):
        for kind in ("weight", "bias"):
            assert torch.equal(getattr(stage.out_norm, kind), torch.full_like(stage.out_norm.bias, kind == "weight"))
            getattr(stage.out_norm, kind).data = g[f"state_outnorm/outnorm{index}.{kind}"]
    with torch.no_grad():
        for index, found in enumerate(encoder(g["in/x"], None, None)):
            key = f"out/stage{index}"
            g.check(key, found.permute(0, 3, 1, 2), g.facts["tolerance"][key]["rtol_of_absmax"])
    own = dict(model.encoders[modality].named_parameters())
    differ = [
        name for name, p in encoder.named_parameters() if p.shape != own[name].shape or not torch.equal(p, own[name])
    ]
    assert [name for name in differ if "out_norm" not in name and ".hide." not in name] == (
        [] if modality == "rgb" else ["patch_embed.conv1.weight"]
    )


def test_a_vmamba_v0_by_its_old_names(tmp_path: Path) -> None:
    result = convert(write(tmp_path / "v0.pth", v0()), tmp_path / "out", {"rgb": 3})
    assert set(result.left_out) == {"norm.weight", "head.weight", "head.bias"}
    model, expected = MCFMamba.from_pretrained(tmp_path / "out"), published()
    assert (model.config.vmamba, model.config.d_state, model.config.profile) == ("v0", 16, "default")
    encoder = model.encoders["rgb"].state_dict()
    assert torch.equal(encoder["patch_embed.proj.weight"], expected["backbone.branch_m1.patch_embed.0.weight"][:, :3])
    theirs = expected["backbone.branch_m1.layers.1.blocks.0.op.A_logs"]
    assert torch.equal(encoder["stages.1.blocks.0.ss2d.gated.ssm.A_log"].flatten(0, 1), theirs)
    assert torch.equal(
        encoder["stages.0.downsample.reduction.weight"],
        expected["backbone.branch_m1.layers.0.downsample.reduction.weight"],
    )


def test_names_and_shapes_of_the_one_file_release(tmp_path: Path) -> None:
    """It keeps projections as matrices (or 1x1 convolutions) under other names."""
    state = s1l8()
    for name in list(state):
        if name.endswith(("x_proj_weight", "dt_projs_weight")):
            state[name.replace("_weight", ".weight")] = state.pop(name).flatten(0, 1)
        elif name.endswith(("in_proj.weight", "fc1.weight")):
            state[name] = state[name][..., None, None]
    one = convert(write(tmp_path / "a.pth", state), tmp_path / "one", {"rgb": 3})
    other = convert(write(tmp_path / "b.pth", s1l8()), tmp_path / "other", {"rgb": 3})
    both = [(result.folder / "model.safetensors").read_bytes() for result in (one, other)]
    assert both[0] == both[1], "the same tensors, and the same initial values for the rest"


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 13])
def test_first_filters_by_the_published_rule(bands: int) -> None:
    g = Golden("units")
    found = adapt(g["ckpt/patch_embed.proj.weight"], bands)
    torch.testing.assert_close(found, g[f"ckpt/adapted_{bands}ch"], rtol=1e-6, atol=1e-7)


def test_colours_of_a_known_sensor_go_to_its_colour_bands(tmp_path: Path) -> None:
    state = s1l8()
    convert(write(tmp_path / "a.pth", state), tmp_path / "out", {"s2-l2a": 12})
    weight = MCFMamba.from_pretrained(tmp_path / "out").encoders["s2-l2a"].patch_embed.conv1.weight.detach()
    theirs = state["patch_embed.0.weight"]
    assert torch.equal(weight[:, [3, 2, 1]], theirs), "B4, B3, B2 are red, green, blue"
    torch.testing.assert_close(weight[:, [0, 4, 11]], theirs.mean(1, keepdim=True).repeat(1, 3, 1, 1))
    assert Contract.from_json(read_contract(tmp_path / "out")).modality("s2-l2a").scale == (10000.0,) * 12


def refused(tmp_path: Path, state: object, bands: dict[str, int] | None = None) -> str:
    path = tmp_path / "a.pth"
    torch.save(state, path)
    with pytest.raises((ConvertError, ReleaseError)) as caught:
        convert(path, tmp_path / "out", bands)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def without(state: State, name: str) -> State:
    return {key: tensor for key, tensor in state.items() if key != name}


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    whole, extra = published(), {"backbone.branch_m3.x": torch.ones(1), "ema.decay": torch.ones(1)}
    assert "2 tensors are no part of an MCF-Mamba: backbone.branch_m3.x, ema.decay" in refused(tmp_path, whole | extra)
    lost = without(whole, "sem_seg_head.upsample.norm.bias")
    assert "missing decoder.expand.norm.bias" in refused(tmp_path, lost)
    assert "missing head.weight" in refused(tmp_path, without(whole, "sem_seg_head.output.weight"))
    other = whole | {"sem_seg_head.upsample.norm.bias": torch.ones(5)}
    assert "decoder.expand.norm.bias is (5,), the model has (12,)" in refused(tmp_path, other)
    backbone = s1l8()
    assert "1 tensors are no part of a VMamba s1l8: extra" in refused(
        tmp_path, backbone | {"extra": torch.ones(1)}, {"a": 3}
    )
    lost = without(backbone, "layers.2.blocks.1.op.Ds")
    assert "1 tensors are missing: stages.2.blocks.1.ss2d.ssm.D" in refused(tmp_path, lost, {"a": 3})
    lost = {name: tensor for name, tensor in backbone.items() if not name.startswith("layers.1.")}
    assert "stages [0, 2, 3] only" in refused(tmp_path, lost, {"a": 3})


def test_mistakes_are_explained(tmp_path: Path) -> None:
    assert "write which modalities it is to encode: bands=s2-l2a:12,s1:2" in refused(tmp_path, s1l8())
    assert "s1 has the 2 bands VV, VH, not 3; write s1:2" in refused(tmp_path, s1l8(), {"s1": 3})
    four = Golden("s1l8/s1l8_64x64").under("state/")
    assert "filters for 4 bands; 3 (RGB) or 5 are needed" in refused(tmp_path, four, {"a": 5})
    assert "holds neither" in refused(tmp_path, {"conv.weight": torch.ones(1)})
    assert "not tensors: epoch" in refused(tmp_path, {"epoch": 3, "a": torch.ones(1)})
    assert "holds a list" in refused(tmp_path, [torch.ones(1)])
    with pytest.raises(ConvertError, match="no such file"):
        convert(tmp_path / "none.pth", tmp_path / "out")


class Boom:
    """Pickles to a call that leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    message = refused(tmp_path, {"model": published(), "config": Boom(tmp_path / "trace")})
    assert "Python objects besides tensors, which are never run" in message
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_damaged_files_are_named(name: str, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is None:
        state = {key: tensor.contiguous() for key, tensor in published().items()}
        save_file(state, path) if name.endswith("safetensors") else torch.save(state, path)
        content = path.read_bytes()[:1000]
    path.write_bytes(content)
    with pytest.raises(ConvertError, match=r"a\.(pth|safetensors) is (damaged|no file)"):
        convert(path, tmp_path / "out")


@pytest.mark.parametrize("kind", ["v0", "s1l8"])
@pytest.mark.parametrize("start", ["release", "a.pth"])
def test_pretraining_starts_from_a_backbone_converted_before_or_then(kind: str, start: str, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    state = v0() if kind == "v0" else s1l8()
    made = convert(write(tmp_path / "a.pth", state), tmp_path / "release", {"s1": 2, "dem": 1})
    settings = config(tmp_path, "run", start=str(tmp_path / start), steps=1, normalise="range", optim={"lr": 1e-9})
    found = checkpoint.find(pretrain(settings))
    assert found.model_config.vmamba == kind and found.contract.sensors == ("s1", "dem")
    ours = found.state.parameters
    assert all(torch.allclose(ours[name], tensor, atol=1e-7) for name, tensor in made.model.named_parameters())
    again = pretrain(settings)  # finished: nothing is converted anew
    assert checkpoint.find(again).sha256 == found.sha256


def test_public_weights_bring_no_normalisation(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    settings = config(tmp_path, "run", start=str(write(tmp_path / "a.pth", s1l8())), steps=1, normalise="statistics")
    assert checkpoint.find(pretrain(settings)).contract.modality("s1").offset == (-12.0, -14.0)


def test_settings_of_the_command_line() -> None:
    assert parse_settings([]) == {}
    assert parse_settings(["bands=s2-l2a:12,s1:2"]) == {"s2-l2a": 12, "s1": 2}
    for wrong in ("bands=s1", "bands=s1:0", "bands=s1:2,s1:2", "bands=", "band=s1:2", "bands=a.b:2"):
        with pytest.raises(ConvertError, match="bands=s2-l2a:12,s1:2"):
            parse_settings([wrong])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path / "vssm.pth", s1l8()), tmp_path / "out"
    assert command.main(["convert", str(path), str(out), "bands=s2-l2a:12,s1:2"]) == 0
    text = capsys.readouterr().out
    assert "from a VMamba backbone (s1l8)" in text and "s2-l2a 12 bands, s1 2 bands; 14 outputs" in text
    assert "left out: classifier.norm.weight, classifier.head.weight" in text
    readme = (out / "README.md").read_text()
    assert "`classifier.head.weight`" in readme and "`fusion.0.norm.bias`" in readme
    line = [sys.executable, "-m", "launchers.command", "convert", str(path), str(out), "bands=s1:2"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("mcf: ") and "is not empty" in done.stderr and len(done.stderr.splitlines()) == 1
