"""From a finetuned (or pretrained) run to a release folder: weights, contract, model card and evaluations.

A release opens with torch and safetensors alone. It is opened again here and must give the same logits as the
checkpoint before it counts as made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint import Checkpoint, CheckpointError, find
from pipeline.model.mcf_mamba import MCFMamba
from pipeline.model.release import save
from pipeline.scoring import METRICS

HEADLINE = ("mIoU", "OA", "mF1", "mAcc", "Kappa", "FWIoU")
PROBE = (2, 64, 96)  # samples, height and width of the logits that are compared


def export(
    run: str | Path, out: str | Path, *, evaluations: Sequence[str | Path] = (), licence: str = "unspecified"
) -> Path:
    """Write the release of a run's newest checkpoint.

    Args:
        run: run folder or checkpoint folder.
        out: release folder to make; must be absent or empty.
        evaluations: folders of `mcf evaluate`, copied to eval/NAME.json and told in the card.
        licence: of the weights, as an SPDX identifier.

    Returns:
        The release folder.

    Raises:
        CheckpointError: no checkpoint there, an evaluation of other weights, or different logits after opening again.
        ReleaseError: `out` holds something.
    """
    checkpoint = find(run)
    reports = {Path(folder).name: _read_evaluation(Path(folder), checkpoint) for folder in evaluations}
    model = checkpoint.build()
    folder = save(out, model, checkpoint.facts["contract"], card(checkpoint, model, reports, licence))
    for name, report in reports.items():
        (folder / "eval").mkdir(exist_ok=True)
        (folder / "eval" / f"{name}.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    if not _same_logits(model, MCFMamba.from_pretrained(folder)):
        shutil.rmtree(folder)
        raise CheckpointError(f"{folder} gave other logits than {checkpoint.address} and was removed")
    return folder


def _read_evaluation(folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """metrics.json of an evaluation; CheckpointError when it is of other weights."""
    report: dict[str, Any] = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    if report["checkpoint_sha256"] != checkpoint.sha256:
        raise CheckpointError(
            f"{folder} evaluated {report['checkpoint']}, not {checkpoint.address}; evaluate this checkpoint first"
        )
    return report


@torch.no_grad()
def _same_logits(one: MCFMamba, other: MCFMamba) -> bool:
    """Whether two models give the same bits for the same random images."""
    generator = torch.Generator().manual_seed(0)
    count, height, width = PROBE
    images = {
        name: torch.rand(count, bands, height, width, generator=generator) for name, bands in one.channels.items()
    }
    return torch.equal(one(images), other(images))


def card(checkpoint: Checkpoint, model: MCFMamba, reports: dict[str, dict[str, Any]], licence: str) -> str:
    """The model card, Markdown with the metadata block that model hubs read."""
    facts, classes = checkpoint.facts, checkpoint.contract.classes
    task = "semantic segmentation" if classes else "reconstruction of masked images (pretrained)"
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    parts = [
        f"---\nlicense: {licence}\nlibrary_name: mcf-mamba\ntags: [remote-sensing, earth-observation, multimodal]\n---",
        "# MCF-Mamba",
        f"A network of {millions:.1f} M parameters for {task} of co-registered {', '.join(model.channels)} images.",
        "## Intended use",
        "Images of the sensors below, in these bands, units and order, on one grid"
        f"{_resolution(checkpoint)}. Other units, sensors, regions or resolutions than it was trained on need an "
        "evaluation of their own first.",
        "## Inputs",
        "The network's input is `(clip(value) - offset) / scale`; invalid pixels are 0 after that.",
        _inputs_table(checkpoint),
        *(["## Classes", ", ".join(f"{i} {name}" for i, name in enumerate(classes.names))] if classes else []),
        "## Training",
        f"Stage {facts['config']['stage']}, {facts['step']} steps, {facts['position']} samples, seed {facts['seed']}; "
        f"started from {facts['config'].get('checkpoint') or facts['config'].get('start') or 'scratch'}. "
        f"Fingerprint of the training data: `{facts['fingerprint']}`. Code version {facts['version']}.",
        "## Evaluation",
        _evaluation_table(reports) if reports else "None was given at export.",
        "## Use",
        "```python\nfrom pipeline.model import MCFMamba\n\nmodel = MCFMamba.from_pretrained(FOLDER)\n"
        "logits = model(images)  # {sensor: float [B, bands, H, W]} -> [B, outputs, H, W]\n```",
        f"## Licence\n\n{licence}",
    ]
    return "\n\n".join(parts) + "\n"


def _resolution(checkpoint: Checkpoint) -> str:
    metres = checkpoint.contract.resolution
    return f" of about {metres:g} m per pixel" if metres else ""


def _inputs_table(checkpoint: Checkpoint) -> str:
    rows = ["| sensor | bands | unit | clip | offset | scale |", "|---|---|---|---|---|---|"]
    for item in checkpoint.contract.modalities:
        offset, scale = (", ".join(f"{value:g}" for value in values) for values in (item.offset, item.scale))
        clip = f"{item.clip[0]:g} to {item.clip[1]:g}"
        rows.append(f"| {item.sensor} | {', '.join(item.bands)} | {item.unit} | {clip} | {offset} | {scale} |")
    return "\n".join(rows)


def _evaluation_table(reports: dict[str, dict[str, Any]]) -> str:
    rows = [f"| evaluation | samples | {' | '.join(HEADLINE)} |", "|---|---|" + "---|" * len(HEADLINE)]
    for name, report in reports.items():
        rows.append(f"| {name} | {report['samples']} | {' | '.join(str(report[key]) for key in HEADLINE)} |")
    return "\n".join(rows)
