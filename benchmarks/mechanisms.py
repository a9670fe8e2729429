"""What the corrections of fusion, decay and precision are for, measured on what benchmarks/corrections.py trained.

Letters: B tiles, H W pixels, h w tokens, D channels, N states, K = 4 directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import configs
from benchmarks.corrections import SEEDS, pretrain_run, tiles, trained
from pipeline import checkpoint
from pipeline.batch import Batch
from pipeline.config import Optim
from pipeline.engine import State
from pipeline.model import MCFMamba
from pipeline.model.cmss import hidden_tokens
from pipeline.model.fusion import Fusion
from pipeline.model.precision import LayerNorm
from pipeline.model.scan import ss2d_scan
from pipeline.model.ss2d import StateSpace
from pipeline.optim import learning_rate

# The paper's run: AdamW 1e-4, poly, 300 epochs, batch 8; its published split leaves 4,891 patches for training.
PAPER_STEPS = 300 * 4891 // 8
LENGTH = 4096  # tokens of 256 x 256 pixels at the first stage
KINDS = ("A_log", "D", "dt_bias", "norm")


def run(out: Path) -> None:
    """The tables of (a), (b) and (c)."""
    mixing(out)
    decay(out)
    precision(out)


# (a) the fusion -------------------------------------------------------------------------------------------------------


def mixing(out: Path) -> None:
    """How evenly the modalities reach the outputs of the fusion's grouped convolution."""
    batch = tiles(out, limit=16)
    print(
        "\n(a) Change of the grouped convolution's outputs when one modality's maps are those of another tile: effect"
    )
    print("of the weaker modality over that of the stronger, mean over channels, 4 stages, 3 seeds; 0 = no mixing")
    print("\n| | maps that enter the convolution | maps that enter the fusion |\n|---|---|---|")
    for arm in ("default", "a-fusion"):
        found = [stage for seed in SEEDS for stage in reaches(trained(out, arm, seed), batch)]
        print(f"| {arm} | {' | '.join(f'{mean(column):.3f}' for column in zip(*found, strict=True))} |", flush=True)


@torch.no_grad()
def reaches(model: MCFMamba, batch: Batch) -> list[tuple[float, float]]:
    """Per stage: `reach` from the maps that enter the grouped convolution, and from those that enter the fusion."""
    entering: list[tuple[Fusion, dict[str, Tensor], list[Tensor]]] = []
    forward = Fusion.forward

    def watched(fusion: Fusion, maps: Mapping[str, Tensor]) -> Tensor:
        gated: list[Tensor] = []
        handle = fusion.mix.register_forward_pre_hook(lambda _, given: gated.extend(given[0]))
        fused = forward(fusion, maps)
        handle.remove()
        entering.append((fusion, dict(maps), gated))
        return fused

    with mock.patch.object(Fusion, "forward", watched):
        model(batch.values, hidden_tokens({}, batch.valid))
    return [
        (reach(fusion, fusion.mix, gated), reach(fusion, partial(_by_name, fusion, list(maps)), list(maps.values())))
        for fusion, maps, gated in entering
    ]


def _by_name(fusion: Fusion, names: list[str], maps: list[Tensor]) -> Tensor:
    fused: Tensor = fusion(dict(zip(names, maps, strict=True)))
    return fused


@torch.no_grad()
def reach(fusion: Fusion, call: Callable[[list[Tensor]], Tensor], maps: list[Tensor]) -> float:
    """The weaker modality's effect on a channel over the stronger one's, mean over channels; 0 is no mixing.

    An effect is the root mean square change of a channel of the grouped convolution when the maps [B, h, w, D] of one
    modality go to the next tile. `call` makes the convolution run on the maps.
    """
    outputs: list[Tensor] = []
    handle = fusion.mix.grouped.register_forward_hook(lambda _, __, output: outputs.append(output))  # [B, D, h, w]
    call(maps)
    for index in range(len(maps)):
        call([m.roll(1, 0) if i == index else m for i, m in enumerate(maps)])
    handle.remove()
    effects = torch.stack([(o - outputs[0]).square().mean((0, 2, 3)).sqrt() for o in outputs[1:]])  # [modalities, D]
    return float((effects.amin(0) / effects.amax(0).clamp(min=1e-12)).mean())


# (b) weight decay -----------------------------------------------------------------------------------------------------


class Recipe(NamedTuple):
    """A run, as far as decay is concerned."""

    title: str
    optim: Optim
    steps: int
    global_batch: int


def recipes() -> list[Recipe]:
    """The paper's run with two decays, and two presets of this project."""
    paper = [
        Recipe(f"the paper's, decay {weight}", Optim(lr=1e-4, weight_decay=weight), PAPER_STEPS, 8)
        for weight in (0.05, 0.01)
    ]
    presets = {name: configs.load(name) for name in ("pretrain-tiny", "demo-pretrain")}
    return paper + [Recipe(name, c.optim, c.steps, c.batch.global_batch) for name, c in presets.items()]


def decay_factor(recipe: Recipe) -> float:
    """What AdamW's decay alone leaves of a parameter: the product of (1 - lr decay) over the steps."""
    optim, batch = recipe.optim, recipe.global_batch
    rates = (learning_rate(optim, step * batch, recipe.steps * batch) for step in range(recipe.steps))
    return math.exp(math.fsum(math.log1p(-rate * optim.weight_decay) for rate in rates))


def decay(out: Path) -> None:
    """Decay alone, and how far parameters moved in the demo's run with and without it."""
    print("\n(b) Decay alone, without any gradient: what it makes of initial values")
    print("\n| run | steps | D = 1, norm weight 1 | rate exp(A_log) = 16 | step softplus(dt bias) = 0.001 |")
    print("|---|---|---|---|---|")
    for recipe in recipes():
        factor = decay_factor(recipe)
        step = math.log1p(math.exp(factor * math.log(math.expm1(1e-3))))
        print(f"| {recipe.title} | {recipe.steps} | {factor:.3f} | {16**factor:.2f} | {step:.4f} |")
    print("\n(b) The demo's run: sum of magnitudes after pretraining over that before, mean of 3 seeds")
    print("\n| | A_log | D | dt bias | norm weights |\n|---|---|---|---|---|")
    for arm in ("default", "b-decay"):
        seeds = [shrinkage(out, arm, seed) for seed in SEEDS]
        print(f"| {arm} | {' | '.join(f'{mean(f[kind] for f in seeds):.4f}' for kind in KINDS)} |", flush=True)


def shrinkage(out: Path, arm: str, seed: int) -> dict[str, float]:
    """Sum of magnitudes of each kind of parameter after pretraining, over that before."""
    found = checkpoint.find(pretrain_run(out, arm, seed))
    torch.manual_seed(seed)  # as a run from scratch draws its parameters
    before = MCFMamba(found.model_config, found.contract.channels, found.state.parameters["head.weight"].shape[0])
    start, end = kinds(before), kinds(found.build())

    def magnitude(parameters: Mapping[str, Tensor]) -> float:
        return sum(float(parameter.abs().sum()) for parameter in parameters.values())

    return {kind: magnitude(end[kind]) / magnitude(start[kind]) for kind in KINDS}


def kinds(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """A_log, D and the bias of dt of all scans, and the weights of all norms, by kind and name."""
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, LayerNorm)}
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
    for name, parameter in model.named_parameters():
        kind = "norm" if name in norms else name.rsplit(".", 1)[-1]
        if kind in found:
            found[kind][name] = parameter.detach()
    return found


# (c) precision --------------------------------------------------------------------------------------------------------


def precision(out: Path) -> None:
    """What rounding A_log, D and the bias of dt to bf16 does to time constants, outputs and updates."""
    found = checkpoint.find(pretrain_run(out, "default", SEEDS[0]))
    model = found.build()
    print(f"\n(c) Relative error against float64, trained parameters, real tiles, L = {LENGTH}: median (largest)")
    print("\n| A_log, D, dt bias | time constants | output of a scan, root mean square |\n|---|---|---|")
    calls = long_scans(model, tiles(out, limit=16))
    scans = [module for module in model.modules() if isinstance(module, StateSpace)]
    for title, kind in (("float32", torch.float32), ("rounded to bf16", torch.bfloat16)):
        times = torch.cat([time_error(scan, kind).flatten() for scan in scans]).tolist()
        outputs = [output_error(call, kind) for call in calls]
        cells = (f"{median(errors):.1e} ({max(errors):.1e})" for errors in (times, outputs))
        print(f"| {title} | {' | '.join(cells)} |", flush=True)
    print(
        "\n(c) Numbers that AdamW's next step at learning rate 1e-4 leaves as they are, moments of the demo's last step"
    )
    print("\n| stored in | A_log | D | dt bias | norm weights |\n|---|---|---|---|---|")
    for title, kind in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        lost = lost_updates(found.state, model, kind)
        print(f"| {title} | {' | '.join(f'{100 * lost[kind]:.1f} %' for kind in KINDS)} |", flush=True)


@torch.no_grad()
def long_scans(model: MCFMamba, batch: Batch) -> list[tuple[Tensor, ...]]:
    """The inputs of all scans over `LENGTH` tokens, for 16 tiles of 64 x 64 pixels put together to one image."""
    calls: list[tuple[Tensor, ...]] = []

    def watch(*given: Any) -> Tensor:
        calls.append(given[:7])
        return ss2d_scan(*given)

    with mock.patch("pipeline.model.ss2d.ss2d_scan", watch):
        model(together(batch.values, 4))
    return [call for call in calls if call[0].shape[1] * call[0].shape[2] == LENGTH]


def together(images: Mapping[str, Tensor], side: int) -> dict[str, Tensor]:
    """Every side x side tiles of [B, ..., H, W] as one image [B / side^2, ..., side H, side W]."""

    def join(squares: Iterator[Tensor]) -> Tensor:
        return torch.cat([torch.cat([next(squares) for _ in range(side)], -1) for _ in range(side)], -2)

    return {
        name: torch.stack([join(iter(some)) for some in image.unflatten(0, (-1, side * side))])
        for name, image in images.items()
    }


def time_error(scan: StateSpace, kind: torch.dtype) -> Tensor:
    """Relative error of the time constants 1 / (softplus(dt bias) exp(A_log)), in tokens, [K, D, N]."""

    def constants(a: Tensor, bias: Tensor) -> Tensor:
        return 1 / (torch.nn.functional.softplus(bias)[..., None] * a.exp())

    a, bias = scan.A_log.detach(), scan.dt_bias.detach()
    rough = constants(a.to(kind).float(), bias.to(kind).float())
    return (rough / constants(a.double(), bias.double()) - 1).abs()


def output_error(call: tuple[Tensor, ...], kind: torch.dtype) -> float:
    """Relative error, root mean square, of a scan in float32 with A_log, D and dt bias of `kind`, against float64."""
    x, delta, a, b, c, d, bias = (tensor.detach() for tensor in call)
    exact = ss2d_scan(*(tensor.double() for tensor in (x, delta, a, b, c, d, bias)), backend="reference")
    rough = a if kind == a.dtype else -(-a).log().to(kind).float().exp()
    y = ss2d_scan(x, delta, rough, b, c, d.to(kind).float(), bias.to(kind).float())
    return float(((y - exact).square().mean() / exact.square().mean()).sqrt())


def lost_updates(state: State, model: MCFMamba, kind: torch.dtype, lr: float = 1e-4) -> dict[str, float]:
    """Share of the numbers of each kind of parameter that AdamW's next step at `lr` leaves as they are.

    Betas and epsilon are those of the demo (0.9, 0.999, 1e-8); decay is off, as on these parameters.
    """
    lost = {}
    for group, parameters in kinds(model).items():
        same = []
        for name, parameter in parameters.items():
            first = state.moments[f"{name}.exp_avg"] / (1 - 0.9**state.updates)
            second = state.moments[f"{name}.exp_avg_sq"] / (1 - 0.999**state.updates)
            stored = parameter.to(kind)
            after = (stored.float() - lr * first / (second.sqrt() + 1e-8)).to(kind)
            same.append((after == stored).flatten())
        lost[group] = float(torch.cat(same).float().mean())
    return lost
