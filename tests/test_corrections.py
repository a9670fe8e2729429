"""The study of the corrections: every arm switches off what it says and nothing else, and its measures measure."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import benchmarks.__main__
from benchmarks import corrections, holes, mechanisms
from pipeline.batch import Batch
from pipeline.config import BatchSize, EngineConfig, Optim
from pipeline.engine import Engine, State
from pipeline.finetune import objective as finetune_objective
from pipeline.model import MCFMamba, ModelConfig, cmss
from pipeline.model.ss2d import StateSpace
from pipeline.optim import learning_rate, parameter_groups
from pipeline.pretrain import objective as pretrain_objective
from pipeline.ranks import Ranks, init
from pipeline.scoring import classify
from tests.small_dataset import CONTRACT, one_thread  # noqa: F401
from tests.training_scenarios import config

CHANNELS = {"s1": 2, "dem": 1}


def network() -> MCFMamba:
    torch.manual_seed(0)
    return MCFMamba(ModelConfig(dims=(8, 16), depths=(1, 1)), CHANNELS, 3).eval()


def batch(size: int = 64) -> Batch:
    """Four tiles of random numbers with a third of s1 invalid, all labelled 1."""
    generator = torch.Generator().manual_seed(1)
    valid = {name: torch.ones(4, size, size, dtype=torch.bool) for name in CHANNELS}
    valid["s1"][:, :, : size // 3] = False
    values = {
        name: torch.randn(4, bands, size, size, generator=generator) * valid[name][:, None]
        for name, bands in CHANNELS.items()
    }
    return Batch(values, valid, torch.ones(4, size, size, dtype=torch.int64), torch.arange(4), list("abcd"))


def test_every_arm_leaves_the_others_alone() -> None:
    """What the default computes, spares and keeps, against each arm: one thing differs."""
    plain = observed()
    changed = {}
    for name, arm in corrections.ARMS.items():
        with arm():
            found = observed()
        changed[name] = {key for key in plain if found[key] != plain[key]}
    assert changed == {
        "default": set(),
        "control": {"micro-batches"},
        "a-fusion": {"interleaved"},
        "b-decay": {"spared"},
        "c-bf16": {"state after a step is bf16"},
        "d-blind": {"nodata is a target", "nodata is hidden"},
        "e-zeros": {"hidden tokens are zeros"},
    }
    assert observed() == plain  # and every patch is taken back


def observed() -> dict[str, object]:
    """What tells the arms apart, of a new network and of the objectives as the stages call them."""
    data, seen = batch(), []

    def right_where_valid(images: dict[str, Tensor], hidden: dict[str, Tensor], *_: object) -> Tensor:
        seen.append(hidden)
        return torch.cat([torch.where(data.valid[n][:, None], image, 5.0) for n, image in images.items()], 1)

    total = pretrain_objective(config(Path(), "run"), CONTRACT)(right_where_valid, data)[0].sum()
    finetune_objective(255, 0)(right_where_valid, data)
    classify(right_where_valid, data)
    return {
        "interleaved": network().fusion[0].mix.interleave,
        "spared": len(network().no_weight_decay()),
        "state after a step is bf16": state_is_bf16_after_a_step(),
        "micro-batches": BatchSize(global_batch=4).split(1),
        "hidden tokens are zeros": not bool(hidden_token().any()),
        "nodata is a target": float(total) > 0,
        "nodata is hidden": [bool(hidden["s1"][:, :, :5].all()) for hidden in seen],
    }


def hidden_token() -> Tensor:
    hide = network().encoders["s1"].patch_embed.hide
    return hide(torch.ones(1, 1, 1, 8), torch.ones(1, 1, 1, dtype=torch.bool))


def state_is_bf16_after_a_step() -> bool:
    """Of A_log, D and the bias of dt, after a step of the engine; the other parameters never are."""
    init(Ranks())
    engine = Engine(network(), Optim(), EngineConfig(zero=0), BatchSize(global_batch=4), Ranks())
    for _ in range(engine.accumulation):
        engine.backward(engine(batch().values).square().mean())
    engine.step(1e-3)
    state = {id(parameter) for parameter in corrections.state_space(engine.module)}
    exact = {id(p) in state: torch.equal(p, p.bfloat16().float()) for p in engine.module.parameters() if p.numel() > 8}
    assert not exact[False]
    return exact[True]


def test_an_arm_decays_what_the_default_spares() -> None:
    with corrections.decayed():
        (group,) = parameter_groups(network(), Optim(weight_decay=0.05))
    assert len(group["params"]) == len(list(network().parameters()))


def test_the_published_mean_is_over_all_pixels() -> None:
    images = {"s1": torch.zeros(1, 2, 64, 64)}
    blocks = {"s1": torch.tensor([[[True, False], [False, False]]])}
    given = (torch.ones(1, 2, 64, 64), images, blocks, {"s1": torch.ones(1, 64, 64, dtype=torch.bool)}, {}, "default")
    assert float(cmss.loss(*given)[0]) == 1
    with corrections.blind():
        assert float(cmss.loss(*given)[0]) == 0.25


def test_reach_is_zero_only_where_nothing_is_mixed() -> None:
    data = batch()
    assert all(0 < direct <= 1 and 0 < entire <= 1 for direct, entire in mechanisms.reaches(network(), data))
    with corrections.lined_up():
        found = mechanisms.reaches(network(), data)
    assert all(direct == 0 and entire > 0 for direct, entire in found)


def test_decay_alone_is_that_of_adamw() -> None:
    recipe = mechanisms.Recipe("", Optim(lr=0.02, weight_decay=0.3, warmup_samples=40), 30, 8)
    parameter = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimiser = torch.optim.AdamW([parameter], weight_decay=0.3)
    for step in range(30):
        optimiser.param_groups[0]["lr"] = learning_rate(recipe.optim, step * 8, 240)
        parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
    assert parameter.item() == pytest.approx(mechanisms.decay_factor(recipe), rel=1e-9)
    assert parameter.item() < 0.95


def test_errors_of_rounding_are_those_of_the_precision() -> None:
    model = network()
    (scan, *_) = (module for module in model.modules() if isinstance(module, StateSpace))
    fine, coarse = (float(mechanisms.time_error(scan, kind).max()) for kind in (torch.float32, torch.bfloat16))
    assert fine < 1e-6 and 2**-10 < coarse < 2**-4
    tiles = Batch({n: torch.randn(16, c, 64, 64) for n, c in CHANNELS.items()}, {}, None, torch.arange(16), [])
    calls = mechanisms.long_scans(model, tiles)
    assert calls and all(call[0].shape[1:3] == (64, 64) for call in calls)
    small = tuple(t[:, :8, :8] if t.dim() > 3 else t for t in calls[0])
    fine, coarse = (mechanisms.output_error(small, kind) for kind in (torch.float32, torch.bfloat16))
    assert fine < 1e-6 < coarse < 1e-1  # small here: D = 1 is exact, and the state of a new network weighs little


def test_an_update_below_the_spacing_is_lost() -> None:
    model = network()
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    moments = {f"{name}.{kind}": one for name, one in ones.items() for kind in ("exp_avg", "exp_avg_sq")}
    state = State({}, moments, 10**6)  # so many steps that no bias is left: every update is lr
    assert mechanisms.lost_updates(state, model, torch.float32)["D"] == 0
    assert mechanisms.lost_updates(state, model, torch.bfloat16)["D"] == 1  # 1 - 1e-4 rounds to 1
    assert mechanisms.lost_updates(state, model, torch.bfloat16, lr=1e-2)["D"] == 0


def test_tiles_go_together_in_rows() -> None:
    image = torch.arange(8.0)[:, None, None, None].expand(8, 1, 2, 2)
    found = mechanisms.together({"s1": image}, 2)["s1"]
    assert found.shape == (2, 1, 4, 4)
    assert found[1, 0, ::2, ::2].tolist() == [[4, 5], [6, 7]]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8])
def test_holes_have_their_share(share: float) -> None:
    whole = {name: torch.ones(6, 64, 64, dtype=torch.bool) for name in CHANNELS}
    apart, alike = holes.holes(whole, share, 0), holes.holes(whole, share, 0, alike=True)
    for mask in (*apart.values(), *alike.values()):
        assert (~mask).float().mean((1, 2)).tolist() == pytest.approx([share] * 6, abs=1e-3)
    assert torch.equal(alike["s1"], alike["dem"])
    assert torch.equal(apart["s1"], apart["dem"]) == (share == 0)
    assert share == 0 or not torch.equal(apart["s1"][0], apart["s1"][1])


def test_published_loss_sees_nodata_and_shrinks_with_it() -> None:
    data, model = batch(), network()
    whole = Batch(data.values, {n: torch.ones_like(m) for n, m in data.valid.items()}, None, data.positions, data.keys)
    ours = holes.size(model, whole, 0.5, True)
    published = [holes.size(model, whole, share, False) for share in (0.0, 0.5)]
    assert ours[2] == 0 and published[0][2] == 0 and 0 < published[1][2] < 1
    assert published[1][0] < 0.8 * published[0][0]
    assert math.isclose(holes.size(model, whole, 0.0, True)[0], 2 * published[0][0], rel_tol=0.05)


def test_the_study_is_listed_and_runs_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    class Benchmark:
        def __init__(self, name: str) -> None:
            self.run = lambda: ran.append(name)

    monkeypatch.setattr(benchmarks.__main__, "import_module", Benchmark)
    for arguments, expected in (([], False), (["corrections"], True)):
        monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
        ran.clear()
        benchmarks.__main__.main()
        assert ("benchmarks.corrections" in ran) == expected and ran
    monkeypatch.setattr("sys.argv", ["benchmarks", "unknown"])
    with pytest.raises(SystemExit, match="there are .*corrections"):
        benchmarks.__main__.main()
