"""A study of accuracy, not of speed: each correction of `profile: default` switched off by itself.

    python -m benchmarks.corrections [OUT]

OUT (demo) is the folder of `mcf demo`, whose archive and shards are used, or made if they are not there. Every arm is
the default network with ONE correction off, patched in here: the product has one switch, `profile`. A control shows how
far two runs come apart that differ by rounding alone. An arm pretrains as the demo does with three seeds, and finetunes
each result with three choices of 8 labelled tiles. It takes an hour or two on two cores; what is finished lies in
OUT/corrections and is not done again, and a run that was cut short goes on.

After the table of accuracy come direct measurements of what each correction is for: mechanisms.py and holes.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import configs
from benchmarks.timing import machine
from launchers.demo import Scale, build_shards, fill_archive
from pipeline import checkpoint
from pipeline.batch import Batch, collate
from pipeline.config import BatchSize
from pipeline.engine import Engine
from pipeline.evaluate import evaluate
from pipeline.finetune import finetune
from pipeline.model import MCFMamba, cmss
from pipeline.model.cmss import hidden_tokens, hide, loss, presence  # as they are, whatever an arm patches
from pipeline.model.encoder import Hide
from pipeline.model.fusion import Mix
from pipeline.model.ss2d import StateSpace
from pipeline.pretrain import pretrain
from pipeline.scoring import METRICS
from shards.manifest import select
from shards.stream import Share, Stream

SEEDS = (0, 1, 2)  # of pretraining
CHOICES = (0, 1, 2)  # of labelled tiles
MASK_SEEDS = (100, 101, 102, 103)  # of the masks that held-out tiles are scored with; no training uses them
RATIO = 0.5
BATCH = 25
Arm = Callable[[], AbstractContextManager[object]]


def regrouped() -> AbstractContextManager[object]:
    """A control with everything on: two micro-batches a step, which adds the same numbers in another order."""
    split = BatchSize.split

    def halves(self: BatchSize, ranks: int) -> tuple[int, int]:
        micro_batch, accumulation = split(self, ranks)
        return micro_batch // 2, accumulation * 2

    return mock.patch.object(BatchSize, "split", halves)


def lined_up() -> AbstractContextManager[object]:
    """(a) off: modalities one behind the other in the fusion's grouped convolution, as published."""
    return mock.patch("pipeline.model.fusion.Mix", lambda dim, modalities, profile: Mix(dim, modalities, "paper"))


def decayed() -> AbstractContextManager[object]:
    """(b) off: weight decay on everything."""
    return mock.patch.object(MCFMamba, "no_weight_decay", lambda self: set())


def rounded() -> AbstractContextManager[object]:
    """(c) off: A_log, D and the bias of dt are numbers of bf16 after every step, as in a network cast to bf16."""
    step = Engine.step

    def step_and_round(self: Engine, lr: float) -> float:
        norm = step(self, lr)
        with torch.no_grad():
            for parameter in state_space(self.module):
                parameter.copy_(parameter.bfloat16())
        return norm

    return mock.patch.object(Engine, "step", step_and_round)


@contextmanager
def blind() -> Iterator[None]:
    """(d) off: nobody asks what is valid: not the choice of blocks, not the hidden tokens, not the loss."""

    def everywhere(valid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.ones_like(mask) for name, mask in valid.items()}

    def blind_tokens(blocks: Mapping[str, Tensor], valid: Mapping[str, Tensor], *how: Any) -> dict[str, Tensor]:
        return hidden_tokens(blocks, everywhere(valid), *how)

    with ExitStack() as stack:
        for owner in ("pipeline.model.cmss", "pipeline.finetune", "pipeline.scoring"):
            stack.enter_context(mock.patch(f"{owner}.hidden_tokens", blind_tokens))
        stack.enter_context(mock.patch.object(cmss, "presence", lambda valid, *how: presence(everywhere(valid), *how)))
        paper = lambda *given, **how: loss(*given[:5], profile="paper", **how)  # noqa: E731
        stack.enter_context(mock.patch.object(cmss, "loss", paper))
        yield


@contextmanager
def zeroed() -> Iterator[None]:
    """(e) off: hidden tokens are zeros instead of a learned vector."""
    zeros = lambda self, tokens, hidden: tokens if hidden is None else tokens.masked_fill(hidden[..., None], 0)  # noqa: E731
    with mock.patch.object(Hide, "forward", zeros):
        yield


def state_space(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """A_log, D and the bias of dt of every scan."""
    owners = [part for part in module.modules() if isinstance(part, StateSpace)]
    return [parameter for owner in owners for parameter in owner.parameters()]


ARMS: dict[str, Arm] = {
    "default": nullcontext,
    "control": regrouped,
    "a-fusion": lined_up,
    "b-decay": decayed,
    "c-bf16": rounded,
    "d-blind": blind,
    "e-zeros": zeroed,
}
TITLES = {
    "default": "nothing",
    "control": "nothing, sums in another order",
    "a-fusion": "(a) fusion not interleaved",
    "b-decay": "(b) weight decay on everything",
    "c-bf16": "(c) A_log, D, dt bias in bf16",
    "d-blind": "(d) validity ignored, mean over all pixels",
    "e-zeros": "(e) hidden tokens are zeros",
}


def run(out: Path = Path("demo")) -> None:
    """Train what is not trained yet, and print all tables."""
    from benchmarks import holes, mechanisms  # they import the arms from here

    torch.set_num_threads(1)
    if not (out / "data" / "dataset.json").exists():
        fill_archive(out, Scale())
    build_shards(out)
    results = {(arm, seed): result(out, arm, seed) for seed in SEEDS for arm in ARMS}
    print_accuracy(results)
    mechanisms.run(out)
    holes.run(out)


def result(out: Path, arm: str, seed: int) -> dict[str, Any]:
    """CMSS loss on held-out tiles, and mIoU in percent on the val places per choice of labels; trained if need be."""
    path = out / "corrections" / f"{arm}-{seed}.json"
    if not path.exists():
        with ARMS[arm]():
            found = train(out, arm, seed)
        checkpoint.write_text(path, json.dumps(found))
    return dict(json.loads(path.read_text()))


def train(out: Path, arm: str, seed: int) -> dict[str, Any]:
    """What `result` gives, with the arm's patches in place."""
    pretrained = pretrain_run(out, arm, seed)
    # ZeRO 0 keeps no second copy of the parameters, so that (c) rounds the only one.
    common = [f"data={out / 'data'}", "engine.zero=0"]
    pretrain(configs.load("demo-pretrain", [*common, f"run={pretrained}", f"seed={seed}"]))
    cmss_loss = held_out_loss(trained(out, arm, seed), tiles(out))
    scores = []
    for choice in CHOICES:
        folder = pretrained.with_name(f"{pretrained.name}-finetune-{choice}")
        start = [f"run={folder}", f"checkpoint={pretrained}", f"seed={choice}"]
        finetune(configs.load("demo-finetune", [*common, *start]))
        raw = {"stage": "evaluate", "run": f"{folder}-val", "checkpoint": str(folder), "data": str(out / "data")}
        scored = evaluate(configs.parse({**raw, "where": {"split": ["val"]}, "micro_batch": 16}))
        scores.append(json.loads((scored / METRICS).read_text())["mIoU"])
    return {"cmss": cmss_loss, "mIoU": scores}


def trained(out: Path, arm: str, seed: int) -> MCFMamba:
    """A pretrained network of an arm, in evaluation mode."""
    with ARMS[arm]():
        return checkpoint.find(pretrain_run(out, arm, seed)).build()


def pretrain_run(out: Path, arm: str, seed: int) -> Path:
    """Run folder of an arm's pretraining."""
    return out / "corrections" / f"{arm}-{seed}"


def tiles(out: Path, split: str = "val", limit: int | None = None) -> Batch:
    """All tiles of a split, or the manifest's choice of `limit`, as one batch; positions are those in the manifest."""
    contract = checkpoint.find(pretrain_run(out, "default", SEEDS[0])).contract
    selection = select(str(out / "data"), modalities=contract.sensors, where={"split": [split]}, limit=limit)
    return collate(list(Stream(selection, 0, 1, Share(1)).once()), contract)


@torch.no_grad()
def held_out_loss(model: MCFMamba, batch: Batch) -> float:
    """Mean CMSS loss per tile: hidden and valid pixels, four masks per tile, the same for every arm.

    The network sees what its arm shows it; what is hidden and how it is scored is that of the default profile.
    """
    losses = []
    for seed in MASK_SEEDS:
        for values, valid, positions in parts(batch):
            blocks = hide(presence(valid), positions, seed, RATIO)
            recon = model(values, cmss.hidden_tokens(blocks, valid))
            losses.append(loss(recon, values, blocks, valid)[0])
    return float(torch.cat(losses).mean())


def parts(batch: Batch, size: int = BATCH) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor], Tensor]]:
    """Values, validity and positions of `size` tiles after the other."""
    for first in range(0, len(batch), size):
        rows = slice(first, first + size)
        yield (
            {name: tensor[rows] for name, tensor in batch.values.items()},
            {name: tensor[rows] for name, tensor in batch.valid.items()},
            batch.positions[rows],
        )


def print_accuracy(results: Mapping[tuple[str, int], Mapping[str, Any]]) -> None:
    """One row per arm: mean and standard deviation over the seeds, and of the difference to the default per seed."""
    print("\n| off | CMSS loss, val tiles | minus default | mIoU, val places, % | minus default |")
    print("|---|---|---|---|---|")
    for arm in ARMS:
        cells = []
        for measure, digits in (("cmss", 4), ("mIoU", 1)):
            values = [_mean(results[arm, seed][measure]) for seed in SEEDS]
            base = [_mean(results["default", seed][measure]) for seed in SEEDS]
            cells.append(_spread(values, digits))
            same = arm == "default"
            cells.append("" if same else _spread([a - b for a, b in zip(values, base, strict=True)], digits, "+"))
        print(f"| {TITLES[arm]} | {' | '.join(cells)} |")


def _mean(values: float | list[float]) -> float:
    return mean(values) if isinstance(values, list) else values


def _spread(values: list[float], digits: int, sign: str = "") -> str:
    return f"{mean(values):{sign}.{digits}f} ± {stdev(values):.{digits}f}"


if __name__ == "__main__":
    print(machine())
    run(*map(Path, sys.argv[1:]))
