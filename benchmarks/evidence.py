"""A study of accuracy, not of speed: what pretraining, complementary masks and fusion are worth on the demo's archive.

    python -m benchmarks.evidence [OUT [STEPS]]

OUT (demo) is the folder of `mcf demo`, whose archive and shards are used, or made if they are not there. Every arm is
trained on the same labelled tiles with the same number of steps, augmentation, loss and seeds, and is scored on the
test places. What is finished lies in OUT/evidence and is not done again. Two trainings run side by side.
With STEPS, three of the arms train so long at the smallest and the largest number of labels: what is left of the
differences when nobody is in a hurry.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import configs
from benchmarks.timing import machine
from benchmarks.unet import UNet
from launchers.demo import Scale, build_shards, fill_archive
from pipeline.augment import augmentation
from pipeline.checkpoint import write_text
from pipeline.dataset import training_batches
from pipeline.evaluate import evaluate
from pipeline.finetune import finetune, labelled, objective
from pipeline.finetune_config import FinetuneConfig
from pipeline.metrics import scores
from pipeline.optim import learning_rate
from pipeline.pretrain import pretrain
from pipeline.ranks import Ranks
from pipeline.scoring import METRICS, confusion
from shards.manifest import select
from shards.stream import Share, Stream

FRACTIONS = (0.1, 0.3, 0.6, 1.0)  # of the labelled training tiles, as in the paper
ENDS = (0.1, 1.0)
LONG = ("scratch", "complementary", "unet")
SEEDS = (0, 1, 2)  # of the choice of labels, of new weights and of the order
MASKS = ("complementary", "independent")
BOTH = ("s2-l1c", "s1")


@dataclass(frozen=True)
class Arm:
    """What is trained: a title, the fractions it is trained at, and what differs from a run from scratch."""

    title: str
    fractions: tuple[float, ...]
    masks: str = ""
    sensors: tuple[str, ...] = BOTH
    unet: bool = False


ARMS = {
    "scratch": Arm("MCF-Mamba from scratch", FRACTIONS),
    "complementary": Arm("MCF-Mamba, CMSS", FRACTIONS, masks="complementary"),
    "unet": Arm("U-Net from scratch, early fusion", FRACTIONS, unet=True),
    "independent": Arm("MCF-Mamba, masks independent of each other", ENDS, masks="independent"),
    "s2": Arm("MCF-Mamba from scratch, Sentinel-2 alone", ENDS, sensors=("s2-l1c",)),
    "s1": Arm("MCF-Mamba from scratch, Sentinel-1 alone", ENDS, sensors=("s1",)),
}


def run(out: Path = Path("demo"), steps: int | None = None) -> None:
    """Train what is not trained yet, and print the table."""
    if not (out / "data" / "dataset.json").exists():
        fill_archive(out, Scale())
    build_shards(out)
    cells = [(name, fraction) for name, arm in ARMS.items() for fraction in arm.fractions]
    if steps is not None:
        cells = list(product(LONG, ENDS))
    trainings = [(out, *cell, seed, steps) for cell, seed in product(cells, SEEDS)]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), _one_thread) as pool:
        for jobs, what in (([(out, masks) for masks in MASKS], pretrained), (trainings, result)):
            _side_by_side(pool, what, jobs)
    print_table({cell: [result(out, *cell, seed, steps) for seed in SEEDS] for cell in cells})


def _one_thread() -> None:
    torch.set_num_threads(1)


def _side_by_side(pool: ProcessPoolExecutor, function: Callable[..., object], jobs: list[tuple[Any, ...]]) -> None:
    pending = [pool.submit(function, *job) for job in jobs]
    for each in tqdm(pending, desc=function.__name__, disable=None):
        each.result()


def pretrained(out: Path, masks: str) -> Path:
    """Run folder of a pretraining with these masks; the stage passes over a finished one."""
    run = f"run={_pretrain_run(out, masks)}"
    return pretrain(configs.load("demo-pretrain", [run, f"data={out / 'data'}", f"cmss.strategy={masks}"]))


def _pretrain_run(out: Path, masks: str) -> Path:
    return out / "evidence" / f"pretrain-{masks}"


def result(out: Path, name: str, fraction: float, seed: int, steps: int | None) -> dict[str, Any]:
    """The metrics of an arm on the test places; trained if need be, for `steps` or as long as the demo."""
    run = out / "evidence" / f"{name}-{fraction:g}-{seed}{'' if steps is None else f'-{steps}-steps'}"
    path = run.with_name(f"{run.name}.json")
    if not path.exists():
        config = _config(out, name, fraction, seed, [f"run={run}", *([] if steps is None else [f"steps={steps}"])])
        found = (_unet if ARMS[name].unet else _mcf_mamba)(config)
        write_text(path, json.dumps(found))
    return dict(json.loads(path.read_text()))


def _config(out: Path, name: str, fraction: float, seed: int, further: list[str]) -> FinetuneConfig:
    arm = ARMS[name]
    overrides = [
        *further,
        f"data={out / 'data'}",
        f"checkpoint={_pretrain_run(out, arm.masks) if arm.masks else 'null'}",
        f"sensors=[{','.join(arm.sensors)}]",
        f"fraction={fraction}",
        "limit=null",
        f"seed={seed}",
    ]
    config: FinetuneConfig = configs.load("demo-finetune", overrides)
    return config


def _mcf_mamba(config: FinetuneConfig) -> dict[str, Any]:
    folder = finetune(config)
    raw = {"stage": "evaluate", "run": f"{folder}-test", "checkpoint": str(folder), "data": config.data}
    return dict(json.loads((evaluate(configs.parse({**raw, "micro_batch": 16})) / METRICS).read_text()))


def _unet(config: FinetuneConfig) -> dict[str, Any]:
    """The same samples in the same order, turned alike, with the same loss, optimiser and schedule; no drop path."""
    torch.manual_seed(config.seed)
    selection = labelled(config)
    contract, batch = selection.contract.normalised(config.normalise), config.batch.global_batch
    assert contract.classes is not None
    model = UNet(contract.channels, len(contract.classes.names))
    stream = Stream(selection, config.seed, config.lanes, Share(batch), 0, config.reading)
    batches = training_batches(stream, batch, contract, augmentation(config), config.reading.threads)
    losses = objective(contract.classes.ignore, config.seed)
    optimiser = torch.optim.AdamW(model.parameters(), betas=config.optim.betas, weight_decay=config.optim.weight_decay)
    for step in range(config.steps):
        optimiser.param_groups[0]["lr"] = learning_rate(config.optim, step * batch, config.steps * batch)
        loss: Tensor = losses(model, next(batches)).total.mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimiser.step()
    test = select(str(config.data), modalities=config.sensors, where={"split": ["test"], "labelled": [True]})
    matrix = confusion(model.eval(), test, contract, 16, Ranks(), torch.device("cpu"))
    return dict(scores(matrix, contract.classes.names))


def print_table(results: dict[tuple[str, float], list[dict[str, Any]]]) -> None:
    """mIoU in percent, mean and standard deviation over the seeds: a row per arm, a column per share of the labels."""
    print("\n| mIoU, test places | " + " | ".join(f"{fraction:.0%} of the labels" for fraction in FRACTIONS) + " |")
    print("|---|" + "---|" * len(FRACTIONS))
    for name, arm in ARMS.items():
        if not any((name, fraction) in results for fraction in FRACTIONS):
            continue
        cells = []
        for fraction in FRACTIONS:
            values = [float(one["mIoU"]) for one in results.get((name, fraction), ())]
            cells.append(f"{mean(values):.1f} ± {stdev(values):.1f}" if values else "")
        print(f"| {arm.title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    print(machine())
    run(*map(Path, sys.argv[1:2]), *map(int, sys.argv[2:3]))
