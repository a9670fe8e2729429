"""The last steps of the demo: the map of the unseen scene, and the report that shows what was made."""

from __future__ import annotations

import csv
import json
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

import configs
from pipeline import figures
from pipeline.predict import predict
from shards.archives import open_archive
from shards.contract import Classes, Contract
from shards.manifest import read_facts
from shards.pictures import picture
from shards.raster_io import read_classes
from shards.report import Figure, Section, Table, Text, write_report
from shards.scene import LABEL, Place
from shards.sensors import SENSORS
from shards.store import open_store
from shards.tile import open_scene, read_tile

Array = NDArray[Any]

INTRODUCTION = """Everything on this page was made by mcf demo: a made-up archive of georeferenced scenes, its \
shards, a small MCF-Mamba pretrained by CMSS on unlabelled tiles, finetuned from those weights and from scratch on the \
same few labelled tiles, and a map of a scene that no step had seen.

Both ways of training had the same budget, seeds and labels. Nothing was tuned on the test places."""


def unseen(out: Path) -> Place:
    """The place that is neither in training nor in the test."""
    return next(place for place in _places(out) if place.split == "predict")


def _places(out: Path) -> list[Place]:
    return [place for place in open_archive("catalog", str(out / "archive")) if isinstance(place, Place)]


def predict_scene(out: Path, run: Path) -> Path:
    """OUT/map.tif: the land cover of the unseen place, by a finetuned run."""
    place = unseen(out)
    sensors = configs.load(run / "config.yaml").sensors
    scene = {name: place.of(name)[0].path for name in sensors}
    raw = {"stage": "predict", "checkpoint": str(run), "scene": scene, "out": str(out / "map.tif")}
    return Path(predict(configs.parse({**raw, "window": 128, "overlap": 32})))


def write(out: Path, seeds: tuple[int, ...], arms: tuple[str, ...]) -> dict[str, list[float]]:
    """OUT/report.html, and three of its pictures as files under OUT/pictures.

    Returns:
        mIoU in percent per arm, one number per seed.
    """
    facts = read_facts(open_store(out / "data"))
    contract = Contract.from_json(facts["contract"])
    assert contract.classes is not None
    runs = {arm: [out / "runs" / f"finetune-{arm}-{seed}" for seed in seeds] for arm in arms}
    metrics = {
        arm: [json.loads((Path(f"{run}-test") / "metrics.json").read_text()) for run in folders]
        for arm, folders in runs.items()
    }
    sections: list[Section] = [
        Text("What this is", INTRODUCTION),
        _scores(metrics, len(seeds)),
        _maps(out, contract),
        _bars(metrics, contract.classes),
        _confusion(runs["pretrained"][0], contract.classes),
        *_pretraining(out),
        _finetuning(runs),
        *_data(out, facts, contract),
    ]
    write_report(out / "report.html", sections, title="MCF-Mamba: the demo")
    for name in ("The map", "Reconstructions", "Class by class"):
        (out / "pictures").mkdir(exist_ok=True)
        png = next(section.png for section in sections if isinstance(section, Figure) and section.title == name)
        (out / "pictures" / f"{name.split()[-1].lower()}.png").write_bytes(png)
    return {arm: [float(found["mIoU"]) for found in per_seed] for arm, per_seed in metrics.items()}


def _scores(metrics: dict[str, list[dict[str, Any]]], seeds: int) -> Table:
    names = ("mIoU", "OA", "mAcc", "mF1", "Kappa", "FWIoU")
    rows = []
    for arm, found in metrics.items():
        values = [[float(one[name]) for one in found] for name in names]
        rows.append([arm, *(f"{mean(each):.2f} ± {stdev(each):.2f}" for each in values)])
    caption = f"In percent, mean and standard deviation over {seeds} seeds, pooled over the pixels of the test places."
    return Table("With and without pretraining, on places never seen", ["start", *names], rows, caption)


def _maps(out: Path, contract: Contract) -> Figure:
    pictures, label = look(unseen(out), contract)
    assert contract.classes is not None
    images = {**pictures, "label": label, "predicted (map.tif)": read_classes(out / "map.tif")}
    caption = "The unseen scene on the grid of Sentinel-2: what the sensors saw, its label and the predicted map."
    return Figure("The map", figures.maps(images, contract.classes), caption)


def look(place: Place, contract: Contract) -> tuple[dict[str, Array], Array]:
    """Colour pictures of a place's scenes and its label, all on the grid of the first modality."""
    with ExitStack() as stack:
        opened = {scene.sensor: stack.enter_context(open_scene(scene)) for scene in place.scenes}
        grid = opened[contract.sensors[0]].grid
        tiles = {name: read_tile(opened[name], grid) for name in (*contract.sensors, LABEL)}
    pictures = {
        f"{name} ({SENSORS[name].kind})": picture(contract.modality(name), tiles[name].values, tiles[name].valid)
        for name in contract.sensors
    }
    label = tiles[LABEL]
    return pictures, np.where(label.valid, label.values[0], 255)


def _bars(metrics: dict[str, list[dict[str, Any]]], classes: Classes) -> Figure:
    scores = {
        arm: np.array([[one.get(f"IoU/{name}", np.nan) for name in classes.names] for one in found], np.float64)
        for arm, found in metrics.items()
    }
    caption = "Intersection over union per class; the line is the standard deviation over seeds."
    return Figure("Class by class", figures.class_bars(scores, classes), caption)


def _confusion(run: Path, classes: Classes) -> Figure:
    with (Path(f"{run}-test") / "confusion.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    matrix = np.array([[int(cell) for cell in row[1:]] for row in rows])
    caption = "Rows: truth, columns: prediction, percent of each true class; pretrained, first seed."
    return Figure("Confusion", figures.confusion(matrix, classes), caption)


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _pretraining(out: Path) -> list[Section]:
    run = out / "runs" / "pretrain"
    rows = _lines(run)
    keys = [key for key in rows[0] if key.startswith("loss")]
    newest = sorted((run / "pictures").glob("*.png"))[-1]
    explained = (
        "For each modality its input, what was left visible, and that completed by the network. Where one modality is "
        "hidden, the other is visible: what the network paints there it can mostly know from the other sensor alone."
    )
    return [
        Figure("Pretraining", figures.loss_curves({"": rows}, keys), "CMSS loss per step, whole and by modality."),
        Figure("Reconstructions", newest.read_bytes(), explained),
    ]


def _finetuning(runs: dict[str, list[Path]]) -> Figure:
    rows = {f"{arm}, seed {number}": _lines(run) for arm, folders in runs.items() for number, run in enumerate(folders)}
    return Figure("Finetuning", figures.loss_curves(rows), "Cross entropy + Dice on the few labelled tiles.")


def _data(out: Path, facts: dict[str, Any], contract: Contract) -> list[Section]:
    first = _places(out)[0]
    assert contract.classes is not None
    pictures, label = look(first, contract)
    shards = [[name, f"{shard['bytes'] / 1e6:.2f}", shard["sha256"][:16]] for name, shard in facts["shards"].items()]
    left_out = "; ".join(f"{count} left out ({reason})" for reason, count in facts["left_out"].items())
    caption = f"{facts['samples']} samples of {facts['planned']} planned; {left_out or 'none left out'}. Fingerprint "
    return [
        Figure("A place of the archive", figures.maps({**pictures, "label": label}, contract.classes), first.name),
        Table("Shards", ["shard", "MB", "sha256"], shards, caption + facts["fingerprint"][:16]),
    ]
