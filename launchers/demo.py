"""`mcf demo`: the whole pipeline on a made-up archive, with what every stage really does, in minutes on two cores.

Archive -> shards -> CMSS pretraining by two processes -> finetuning from the pretrained weights and from scratch on
the same few labels, with the same budget and seeds -> evaluation on places never seen -> map of one unseen scene ->
report and release. Every step is an ordinary stage with an ordinary preset, and finds what it finished before, so that
a second call goes on where the first one stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from time import monotonic
from typing import Any

from tqdm import tqdm

import configs
from launchers.local import launch
from pipeline.signals import EXIT_STOPPED

ARMS = ("scratch", "pretrained")
PROCESSES = 2


@dataclass(frozen=True)
class Scale:
    """How much the demo does: places and pixels of the archive, seeds, and steps (None: those of the presets)."""

    places: int = 40
    size: int = 384
    seeds: tuple[int, ...] = (0, 1, 2)
    pretrain_steps: int | None = None
    finetune_steps: int | None = None


class DemoError(RuntimeError):
    """A step of the demo failed; the message says which and where its log is."""


def demo(out: Path, scale: Scale = Scale()) -> int:
    """Run everything that is not finished yet under `out`.

    Returns:
        0, or the exit code for "stopped as asked, can go on".

    Raises:
        DemoError: a stage failed.
        BuildError: `out` holds something else than an earlier demo.
    """
    began = monotonic()
    print(f"The demo writes everything under {out}. A second call goes on where one stopped.")
    _say(began, "1 archive: made-up scenes of Sentinel-2, Sentinel-1 and elevation, with labels")
    fill_archive(out, scale)
    _say(began, "2 shards: tiles on the grid of Sentinel-2, in WebDataset tars")
    build_shards(out)
    stages = (pretraining(out, scale), *trainings(out, scale), *evaluations(out, scale))
    files = [write_config(out, config) for config in stages]
    for title, jobs in (
        ("3 pretrain: CMSS on the unlabeled training places", files[:1]),
        (f"4 finetune {len(scale.seeds)} x {' and '.join(ARMS)}, and evaluate on places never seen", files[1:]),
    ):
        _say(began, title)
        code = launch(["launchers.job", *map(str, jobs)], PROCESSES, out / "runs" / "logs")
        if code == EXIT_STOPPED:
            return code
        if code:
            raise DemoError(f"step {title} ended with code {code}; its log: {out / 'runs' / 'logs' / 'rank-0.log'}")
    from launchers import demo_report

    _say(began, "5 predict: a map of one unseen scene")
    best = out / "runs" / run_name(ARMS[1], scale.seeds[0])
    demo_report.predict_scene(out, best)
    _say(began, "6 export: the finetuned model as a release")
    export_release(out, best)
    _say(began, "7 report")
    scores = demo_report.write(out, scale.seeds, ARMS)
    print(verdict(scores, out / "report.html"))
    return 0


def _say(began: float, title: str) -> None:
    print(f"[{monotonic() - began:4.0f} s] {title}", flush=True)


def fill_archive(out: Path, scale: Scale) -> None:
    """Step 1: the scenes and their catalog."""
    from shards.synthetic import make_archive

    with tqdm(desc="archive", unit="place", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        make_archive(out / "archive", places=scale.places, size=scale.size, progress=progress)


def build_shards(out: Path) -> None:
    """Step 2: a dataset of verified shards."""
    from shards.build import build
    from shards.verify import verify

    data = str(out / "data")
    if not (out / "data" / "dataset.json").exists():
        build(configs.load("demo-shards", [f"archive.root={out / 'archive'}", f"out={data}"]))
    if problems := verify(data):
        raise DemoError(f"{data} is damaged; remove it and run the demo again: {problems[0]}")


def pretraining(out: Path, scale: Scale) -> Any:
    """Config of the pretraining run."""
    return _load("demo-pretrain", scale.pretrain_steps, f"run={out / 'runs' / 'pretrain'}", f"data={out / 'data'}")


def _load(preset: str, steps: int | None, *overrides: str) -> Any:
    return configs.load(preset, [*overrides, *([] if steps is None else [f"steps={steps}"])])


def run_name(arm: str, seed: int) -> str:
    """Folder name of one finetuning run."""
    return f"finetune-{arm}-{seed}"


def trainings(out: Path, scale: Scale) -> Iterator[Any]:
    """Configs of all finetuning runs: equal but for the seed (which also chooses the labels) and the start."""
    base = _load("demo-finetune", scale.finetune_steps, f"data={out / 'data'}")
    for seed in scale.seeds:
        for arm in ARMS:
            start = None if arm == "scratch" else str(out / "runs" / "pretrain")
            yield replace(base, run=str(out / "runs" / run_name(arm, seed)), seed=seed, checkpoint=start)


def evaluations(out: Path, scale: Scale) -> Iterator[Any]:
    """Configs of the evaluations of all finetuning runs on the test places."""
    for config in trainings(out, scale):
        raw = {"stage": "evaluate", "run": f"{config.run}-test", "checkpoint": config.run, "data": config.data}
        whole = Path(config.run).name == run_name(ARMS[1], scale.seeds[0])  # of the run that is exported, everything
        raw |= {"modalities": whole, "maps": 6 if whole else 0}
        yield configs.parse({**raw, "sensors": list(config.sensors), "micro_batch": 16})


def write_config(out: Path, config: Any) -> Path:
    """The config as a file, for the processes that run it."""
    path = out / "runs" / "configs" / f"{Path(config.run).name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(configs.dump(config), encoding="utf-8")
    return path


def export_release(out: Path, run: Path) -> None:
    """Step 6: a finetuned run as a release folder with its evaluation."""
    from pipeline.export import export

    shutil.rmtree(out / "release", ignore_errors=True)  # a folder that this demo made, from the same run
    raw = {"stage": "export", "checkpoint": str(run), "out": str(out / "release"), "licence": "Apache-2.0"}
    export(configs.parse({**raw, "evaluations": [f"{run}-test"]}))


def verdict(scores: dict[str, list[float]], report: Path) -> str:
    """The demo's last line, whichever arm wins."""
    parts = [f"{arm} {mean(values):.1f} +- {stdev(values):.1f}" for arm, values in scores.items()]
    seeds = len(next(iter(scores.values())))
    return f"mIoU {', '.join(parts)} ({seeds} seeds), report {report}"
