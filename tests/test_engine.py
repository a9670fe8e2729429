"""One launch of 2 ranks, without a compiler on PATH, makes the runs that these tests compare."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import configs
from configs import ConfigError
from launchers.local import launch
from pipeline import checkpoint
from pipeline.average import Average
from pipeline.config import DEEPSPEED, BatchSize, EngineConfig, Optim
from pipeline.engine import (
    Engine,
    PrecisionError,
    check_agreement,
    check_device,
    deepspeed_config,
    guard_precision,
    precision_line,
)
from pipeline.export import export
from pipeline.model.config import ModelConfig
from pipeline.model.mcf_mamba import MCFMamba
from pipeline.optim import learning_rate, parameter_groups
from pipeline.pretrain import pretrain
from pipeline.ranks import Ranks, init
from tests.golden import FOLDER
from tests.small_dataset import one_thread, quiet, write_dataset  # noqa: F401
from tests.training_scenarios import STOP, config

SAME = 1e-6  # relative: other partitions, world sizes and scan backends add up in another order
GOLDEN = 1e-4  # relative: other processors and libraries round otherwise


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    write_dataset(folder / "data")
    nowhere = {"PATH": str(folder / "bin"), "TORCH_EXTENSIONS_DIR": str(folder / "built"), "OMP_NUM_THREADS": "1"}
    with mock.patch.dict(os.environ, nowhere):
        assert shutil.which("g++") is None and shutil.which("ninja") is None
        for ranks in (2, 4):
            assert launch(["tests.training_scenarios", str(folder)], ranks, folder / "logs") == 0
    assert not (folder / "built").exists(), "an operator was compiled"
    with mock.patch("pipeline.pretrain.pictures", lambda *_: lambda line: {}):
        pretrain(config(folder, "alone"))
        pretrain(config(folder, "alone-from-two"))
    return folder


def column(run: Path, name: str, *default: Any) -> list[Any]:
    return [dict.pop(json.loads(line), name, *default) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return column(run, "loss")


def weights(run: Path, file: str) -> dict[str, torch.Tensor]:
    newest = run / "checkpoints" / (run / "latest").read_text().strip()
    return load_file(newest / file)


def test_losses_change_so_that_equality_means_something(runs: Path) -> None:
    values = losses(runs / "whole")
    assert len(set(values)) == len(values)
    assert values[-1] < 0.9 * values[0]


def test_losses_are_those_of_the_day_they_were_written_down(runs: Path) -> None:
    """A refactoring proves itself by these numbers; who means to change them runs this and copies what it says."""
    golden = json.loads((FOLDER / "losses.json").read_text())
    assert losses(runs / "whole") == pytest.approx(golden["loss"], rel=GOLDEN)
    assert column(runs / "whole", "digest") == golden["digest"]


@pytest.mark.parametrize("other", ["alone", "accumulated", "four", "zero0", "zero2", "zero3"])
def test_ranks_accumulation_zero_stage_and_recomputation_change_nothing(runs: Path, other: str) -> None:
    assert losses(runs / other) == pytest.approx(losses(runs / "whole"), rel=SAME)
    assert column(runs / other, "digest") == column(runs / "whole", "digest")
    assert column(runs / other, "grad_norm") == pytest.approx(column(runs / "whole", "grad_norm"), rel=1e-3)


def test_resume_is_exact(runs: Path) -> None:
    assert losses(runs / "resumed") == losses(runs / "whole")
    assert column(runs / "resumed", "digest") == column(runs / "whole", "digest")
    for file in ("model.safetensors", "average.safetensors", "optimizer.safetensors"):
        again, whole = weights(runs / "resumed", file), weights(runs / "whole", file)
        assert all(torch.equal(again[name], whole[name]) for name in whole) and len(again) == len(whole)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_step_passed_over_updates_nothing_under_any_zero_stage(runs: Path, zero: int) -> None:
    run = runs / f"poisoned{zero}"
    skipped = column(run, "skipped", None)
    assert skipped[:2] == skipped[3:] == [None, None]
    assert skipped[2]["why"] == "loss nan" and list(skipped[2]["samples"]) == ["1"], "rank and keys are named"
    assert column(run, "digest") == column(runs / "whole", "digest"), "the data go on"
    found, first = losses(run), losses(runs / "poisoned0")
    assert found[:2] == pytest.approx(losses(runs / "whole")[:2], rel=SAME) and found[2] is None
    assert found[3:] == pytest.approx(first[3:], rel=SAME)
    assert found[3:] != pytest.approx(losses(runs / "whole")[3:], rel=1e-3), "as if it had been trained on"
    state = json.loads((run / "checkpoints/step-000005/state.json").read_text())
    assert state["updates"] == 4


@pytest.mark.parametrize("other", ["zero0-from-1", "zero3-from-1", "alone-from-two", "four-from-two"])
def test_a_checkpoint_goes_on_under_another_zero_stage_or_world(runs: Path, other: str) -> None:
    assert losses(runs / other)[:STOP] == losses(runs / "whole")[:STOP]
    assert losses(runs / other) == pytest.approx(losses(runs / "whole"), rel=SAME)
    assert column(runs / other, "digest") == column(runs / "whole", "digest")


@pytest.mark.parametrize("other", ["whole", "alone", "zero0", "zero3", "zero3-from-1", "four-from-two"])
def test_the_average_is_that_of_the_parameters_under_every_zero_stage(runs: Path, other: str) -> None:
    average, last = weights(runs / other, "average.safetensors"), weights(runs / other, "model.safetensors")
    whole = weights(runs / "whole", "average.safetensors")
    assert average.keys() == last.keys()
    for name, value in whole.items():
        assert torch.allclose(average[name], value, rtol=1e-4, atol=1e-6), name
    moved = [name for name in last if not torch.equal(average[name], last[name])]
    assert len(moved) > 0.9 * len(last)


@pytest.mark.parametrize("other", ["zero0", "zero2", "zero3", "four"])
def test_a_release_of_any_zero_stage_and_world_is_the_average(runs: Path, other: str, tmp_path: Path) -> None:
    raw = {"stage": "export", "checkpoint": str(runs / other), "out": str(tmp_path / "release")}
    released = MCFMamba.from_pretrained(export(configs.parse(raw))).state_dict()
    average = checkpoint.find(runs / other).state.average
    assert average and all(torch.equal(released[name], tensor) for name, tensor in average.items())


def test_the_average_follows_its_rule() -> None:
    module = nn.Linear(2, 1)
    average, expected = Average(module, 0.5), module.weight.detach().clone()
    for updates in (1, 2, 3):
        with torch.no_grad():
            module.weight += updates
        average.update(updates)
        decay = min(0.5, (1 + updates) / (10 + updates))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    assert torch.allclose(average.full("weight"), expected)


def test_bf16_computes_otherwise_but_keeps_every_parameter_and_moment_in_fp32(runs: Path) -> None:
    assert losses(runs / "bf16") != pytest.approx(losses(runs / "whole"), rel=SAME)
    assert losses(runs / "bf16") == pytest.approx(losses(runs / "whole"), rel=2e-2)
    for name in ("model.safetensors", "optimizer.safetensors"):
        tensors = weights(runs / "bf16", name)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    # Values that bf16 could not hold: nothing was rounded on the way.
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in tensors.values())


def test_a_run_says_once_in_which_precision_its_state_space_and_norms_are(runs: Path) -> None:
    said = (runs / "logs/rank-0.log").read_text().splitlines()
    model = MCFMamba(ModelConfig(dims=(8, 16), depths=(1, 1)), {"s1": 2, "dem": 1}, 3)
    scans = sum(name.endswith("A_log") for name in model.precision())
    norms = len(model.precision()) - 3 * scans
    each = ", ".join(f"{kind} float32 ({scans})" for kind in ("A_log", "D", "dt bias"))
    line = f"{runs / 'bf16'}: precision: {each}, norms float32 ({norms}); matrix products bf16"
    assert said.count(line) == 1
    assert not any("precision: " in text for text in (runs / "logs/rank-1.log").read_text().splitlines())


def test_the_line_tells_types_apart() -> None:
    found = {"a.ssm.A_log": torch.bfloat16, "b.ssm.A_log": torch.float32, "c.norm.weight": torch.float32}
    assert precision_line(found, "fp32") == (
        "precision: A_log bfloat16 (1), A_log float32 (1), norms float32 (1); matrix products fp32"
    )


def test_guard_names_a_parameter_that_is_not_fp32() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2).bfloat16())
    with pytest.raises(PrecisionError, match=r"1\.weight became torch\.bfloat16"):
        guard_precision(module)


def test_guard_catches_what_deepspeed_casts() -> None:
    casting = {"train_batch_size": 1, "bf16": {"enabled": True}}  # the config would refuse this key
    with (
        mock.patch("pipeline.engine.deepspeed_config", lambda *_: casting),
        pytest.raises(PrecisionError, match="weight became"),
    ):
        _engine(EngineConfig())


def _engine(settings: EngineConfig, accumulation: int = 1) -> Engine:
    init(Ranks())
    batch = BatchSize(global_batch=accumulation, micro_batch=1)
    return Engine(nn.Linear(3, 2), Optim(), settings, batch, Ranks())


def test_step_before_all_micro_batches_is_refused() -> None:
    engine = _engine(EngineConfig(), accumulation=2)
    engine.backward(engine(torch.ones(1, 3)).mean())
    with pytest.raises(RuntimeError, match="after 1 of the global batch's 2"):
        engine.step(1e-3)


@pytest.mark.parametrize("zero", [0, 1])
def test_gradient_norm_is_that_before_clipping(zero: int) -> None:
    engine = _engine(EngineConfig(zero=zero))
    engine.backward(100 * engine(torch.ones(1, 3)).sum())
    # d/dw = 100 for 6 weights and 2 biases.
    assert engine.step(0.0) == pytest.approx(100 * 8**0.5, rel=1e-5)


def test_users_deepspeed_keys_pass_and_ours_are_refused() -> None:
    settings = EngineConfig(
        zero=2, deepspeed={"zero_optimization": {"reduce_bucket_size": 7}, "prescale_gradients": True}
    )
    built = deepspeed_config(Optim(clip=0.25), settings, BatchSize(global_batch=12, micro_batch=2), 3)
    assert built["zero_optimization"] == {"reduce_bucket_size": 7, "stage": 2}
    assert built["prescale_gradients"] is True
    assert built["gradient_accumulation_steps"] == 2
    assert built["gradient_clipping"] == 0.25
    with pytest.raises(ValueError, match=r"zero_optimization\.stage is decided by engine\.zero"):
        EngineConfig(deepspeed={"zero_optimization": {"stage": 3}})


def test_keys_that_deepspeed_would_pass_over_are_refused() -> None:
    with pytest.raises(ValueError, match="'wall_clock_breakdwon' is no key of DeepSpeed.*mean 'wall_clock_breakdown'"):
        EngineConfig(deepspeed={"wall_clock_breakdwon": True})
    with pytest.raises(ValueError, match="'banana' is no key of DeepSpeed.* it knows activation_checkpointing"):
        EngineConfig(deepspeed={"banana": 1})


def test_every_key_that_may_be_given_is_one_of_deepspeed() -> None:
    source = Path(deepspeed.__file__).parent
    text = "".join(path.read_text() for path in source.rglob("*.py") if "inference" not in path.parts)
    assert [key for key in DEEPSPEED if f'"{key}"' not in text] == []


def test_what_deepspeed_made_of_the_config_is_compared_with_ours() -> None:
    engine = _engine(EngineConfig())
    config = deepspeed_config(Optim(), EngineConfig(), BatchSize(global_batch=1, micro_batch=1), 1)
    check_agreement(engine._deepspeed, config)
    with pytest.raises(ConfigError, match=r"DeepSpeed runs with gradient_clipping: 1\.0, not 0\.5; take out the key"):
        check_agreement(engine._deepspeed, config | {"gradient_clipping": 0.5})


def test_half_precision_is_autocast_and_offloading_moves_what_it_says() -> None:
    batch = BatchSize(global_batch=1)
    half = deepspeed_config(Optim(), EngineConfig(precision="fp16"), batch, 1)
    assert half["torch_autocast"] == {"enabled": True, "dtype": "float16"} and "fp16" not in half
    away = deepspeed_config(Optim(), EngineConfig(zero=3, offload="all"), batch, 1)
    cpu = {"device": "cpu"}
    assert away["zero_optimization"] == {"stage": 3, "offload_optimizer": cpu, "offload_param": cpu}
    own = EngineConfig(zero=1, offload="optimizer", deepspeed={"zero_optimization": {"offload_optimizer": {"x": 1}}})
    assert deepspeed_config(Optim(), own, batch, 1)["zero_optimization"]["offload_optimizer"] == {"x": 1}


@pytest.mark.parametrize(("offload", "zero", "least"), [("optimizer", 0, 1), ("all", 2, 3)])
def test_offloading_what_a_stage_does_not_partition_is_refused(offload: Any, zero: Any, least: int) -> None:
    with pytest.raises(ValueError, match=f"offload={offload} needs zero={least} or more, zero={zero} given"):
        EngineConfig(offload=offload, zero=zero)


@pytest.mark.parametrize("settings", [{"precision": "fp16"}, {"zero": 1, "offload": "optimizer"}])
def test_what_needs_a_gpu_is_refused_on_a_cpu(settings: dict[str, Any]) -> None:
    check_device(EngineConfig(**settings), "cuda")
    with pytest.raises(ConfigError, match=r"engine\.(precision=fp16|offload): needs a CUDA GPU, this is a cpu"):
        check_device(EngineConfig(**settings), "cpu")


def test_recomputation_gives_the_same_bits_and_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    images = {"a": torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))}
    keys, hidden = torch.tensor([7]), {"a": torch.eye(16, dtype=torch.bool)[None]}
    found: dict[bool, Any] = {}
    for recompute in (False, True):
        torch.manual_seed(0)
        model = MCFMamba(ModelConfig(dims=(8, 16), depths=(1, 1), drop_path=0.5), {"a": 2}, 3)
        if recompute:
            model.recompute()
        kept: list[int] = []
        pack = lambda tensor, kept=kept: kept.append(tensor.nbytes) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(images, hidden, keys)
        held = sum(kept)
        output.square().mean().backward()
        found[recompute] = (output.detach(), [p.grad for p in model.parameters()], held)
    assert torch.equal(found[True][0], found[False][0])
    assert all(torch.equal(one, two) for one, two in zip(found[True][1], found[False][1], strict=True))
    assert found[True][2] < 0.5 * found[False][2]


def test_impossible_batches_are_refused_with_the_numbers() -> None:
    assert BatchSize(global_batch=12, micro_batch=2).split(3) == (2, 2)
    assert BatchSize(global_batch=12).split(3) == (4, 1)
    with pytest.raises(ConfigError, match=r"global_batch=12 .* 2 ranks x batch.micro_batch=4 .* one of \[1, 2, 3, 6\]"):
        BatchSize(global_batch=12, micro_batch=4).split(2)
    with pytest.raises(ConfigError, match="multiple of 5"):
        BatchSize(global_batch=12).split(5)


def test_decay_spares_norms_biases_and_the_state_space() -> None:
    model = MCFMamba(ModelConfig(dims=(8, 16), depths=(1, 1)), {"a": 2}, 3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = parameter_groups(model, Optim(weight_decay=0.05))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    without = {names[id(parameter)].rsplit(".", 1)[1] for parameter in spared["params"]}
    assert {"A_log", "D", "dt_bias", "bias"} <= without
    assert "head.weight" in {names[id(parameter)] for parameter in decayed["params"]}
    model.head.requires_grad_(False)
    assert len(parameter_groups(model, Optim(weight_decay=0.05))[0]["params"]) == len(decayed["params"]) - 1


def test_learning_rate_is_that_of_the_published_code() -> None:
    cases = json.loads((FOLDER / "units.json").read_text())["poly_lr"].values()
    for case in cases:
        warmup = case["warmup_epochs"] * case["iters_per_epoch"]
        optim = Optim(lr=case["base_lr"], schedule="poly", warmup_samples=2 * warmup)
        total = len(case["lr"])
        mine = [learning_rate(optim, 2 * step, 2 * total) for step in range(total)]
        assert mine == pytest.approx(case["lr"], rel=1e-6)


def test_cosine_schedule() -> None:
    optim = Optim(lr=1.0, schedule="cosine", warmup_samples=10)
    assert [learning_rate(optim, seen, 110) for seen in (0, 5, 10, 60, 110)] == pytest.approx([0, 0.5, 1, 0.5, 0])
