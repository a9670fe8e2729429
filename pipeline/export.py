"""Stage export: any checkpoint to a release, a folder or S3 prefix of weights, contract, model card and evaluations.

A checkpoint depends on neither ZeRO stage nor number of ranks; where the run kept an average of its parameters, that is
what is released. A release opens with torch and safetensors alone. It is opened again and must give the same logits as
the checkpoint before it takes its name, so a killed export leaves none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from configs import ConfigError
from pipeline.card import card
from pipeline.checkpoint import Checkpoint, CheckpointError, find
from pipeline.export_config import ExportConfig
from pipeline.model import remote
from pipeline.model.mcf_mamba import MCFMamba
from pipeline.model.program import write_program
from pipeline.model.release import PROGRAM, making, write
from pipeline.provenance import lineage
from pipeline.scoring import METRICS

PROBE = (2, 64, 96)  # samples, height and width of the logits that are compared


def export(config: ExportConfig) -> Path | str:
    """Write the release of a checkpoint, and push it to the Hub if asked to.

    Returns:
        Where it is: a folder, or an s3:// address.

    Raises:
        CheckpointError: no checkpoint there, an evaluation of other weights, or different logits after opening again.
        ReleaseError: the place to write to holds something, or the Hub refuses.
        ConfigError: two evaluations of one name.
    """
    checkpoint = find(config.checkpoint)
    reports = _reports(config, checkpoint)
    if config.hub:
        remote.check_free(config.hub)
    model = checkpoint.build()
    with making(config.out) as folder:
        text = card(checkpoint, model, reports, config.licence)
        write(folder, model, checkpoint.facts["contract"], text, lineage(checkpoint.facts))
        for name, report in reports.items():
            (folder / "eval").mkdir(exist_ok=True)
            (folder / "eval" / f"{name}.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        if not _same_logits(model, MCFMamba.from_pretrained(folder)):
            raise CheckpointError(f"the release gave other logits than {checkpoint.address}; nothing was written")
        if config.program:
            write_program(folder / PROGRAM, model, config.program)
        if config.hub:
            remote.push(folder, config.hub)
    return config.out if remote.is_s3(config.out) else Path(config.out)


def _reports(config: ExportConfig, checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The evaluations by name of their folders."""
    reports: dict[str, dict[str, Any]] = {}
    for folder in map(Path, config.evaluations):
        if folder.name in reports:
            raise ConfigError(f"evaluations: two are called {folder.name!r}, and eval/ holds one; rename a folder")
        reports[folder.name] = _read_evaluation(folder, checkpoint)
    return reports


def _read_evaluation(folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """metrics.json of an evaluation; CheckpointError when there is none, or it is of other weights."""
    try:
        report: dict[str, Any] = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no evaluation ({error}); give a folder of mcf evaluate") from None
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
    images: Mapping[str, torch.Tensor] = {
        name: torch.rand(count, bands, height, width, generator=generator) for name, bands in one.channels.items()
    }
    return torch.equal(one(images), other(images))
