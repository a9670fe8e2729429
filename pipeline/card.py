"""The model card of a release: what a user must know before the first image, from checkpoint and evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.checkpoint import Checkpoint
from pipeline.leaks import in_words
from pipeline.model.mcf_mamba import MCFMamba
from pipeline.provenance import lineage

HEADLINE = ("mIoU", "OA", "mF1", "mAcc", "Kappa", "FWIoU")
UNSPECIFIED = "unspecified"  # licence
HEAD = """---
license: {licence}
library_name: mcf-mamba
tags: [remote-sensing, earth-observation, multimodal]
---"""

Reports = Mapping[str, Mapping[str, Any]]  # metrics.json of evaluations by name


def card(checkpoint: Checkpoint, model: MCFMamba, reports: Reports, licence: str) -> str:
    """The model card, Markdown with the metadata block that model hubs read."""
    classes = checkpoint.contract.classes
    task = "semantic segmentation" if classes else "reconstruction of masked images (pretrained)"
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    parts = [
        HEAD.format(licence="unknown" if licence == UNSPECIFIED else licence.lower()),
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
        _training(checkpoint),
        _lineage_table(checkpoint),
        "## Evaluation",
        _evaluation_table(reports) if reports else "None was given at export.",
        *(["## Leaks between training and test", *_leaks(reports)] if reports else []),
        "## Use",
        "```python\nfrom pipeline.model import MCFMamba\n\nmodel = MCFMamba.from_pretrained(FOLDER)\n"
        "logits = model(images)  # {sensor: float [B, bands, H, W]} -> [B, outputs, H, W]\n```",
        f"## Licence\n\n{licence}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


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


def _training(checkpoint: Checkpoint) -> str:
    facts = checkpoint.facts
    if "step" not in facts:
        return f"Written again from the release {checkpoint.address}, which tells more."
    config = facts["config"]
    averaged = "The weights are the moving average of the parameters. " if checkpoint.state.average else ""
    forced = f" Forced in spite of: {'; '.join(facts['forced'])}." if facts.get("forced") else ""
    return (
        f"Stage {config['stage']}, {facts['step']} steps, {facts['position']} samples, seed {facts['seed']}; "
        f"started from {config.get('checkpoint') or config.get('start') or 'scratch'}. {averaged}"
        f"Fingerprint of the training data: `{facts['fingerprint']}`. Code version {facts['version']}.{forced}"
    )


def _lineage_table(checkpoint: Checkpoint) -> str:
    """Every training that the parameters went through, oldest first."""
    rows = ["| stage | data | chosen by | sensors | fingerprint |", "|---|---|---|---|---|"]
    for each in lineage(checkpoint.facts):
        if each["stage"] is None:
            rows.append("| not recorded | | | | |")
            continue
        chosen = _protocol(each["protocol"]) if each["protocol"] else _plain(each["where"])
        sensors = ", ".join(each["sensors"] or ())
        rows.append(f"| {each['stage']} | {_plain(each['data'])} | {chosen} | {sensors} | `{each['fingerprint']}` |")
    return "\n".join(rows) if len(rows) > 2 else ""


def _plain(value: object) -> str:
    """A config's value in a cell of a table."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_plain(each)}" for name, each in value.items()) or "all"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value).replace("|", "\\|")


def _protocol(protocol: Mapping[str, Any]) -> str:
    parts = [f"{name} {value}" for name, value in protocol.items() if name not in ("name", "hash") and value]
    return ", ".join([str(protocol["name"]), *parts])


def _evaluation_table(reports: Reports) -> str:
    rows = [f"| evaluation | protocol | samples | {' | '.join(HEADLINE)} |", "|---|---|---|" + "---|" * len(HEADLINE)]
    for name, report in reports.items():
        protocol = report.get("protocol")
        by = f"{_protocol(protocol)}, `{str(protocol.get('hash'))[:12]}`" if protocol else "none"
        numbers = " | ".join(str(report[key]) for key in HEADLINE)
        rows.append(f"| {name} | {by} | {report['samples']} | {numbers} |")
    forced = [
        f"{name} was forced in spite of: {'; '.join(report['forced'])}."
        for name, report in reports.items()
        if report.get("forced")
    ]
    return "\n".join(rows) + "".join(f"\n\n{line}" for line in forced)


def _leaks(reports: Reports) -> Iterator[str]:
    """The leak certificates in words."""
    for name, report in reports.items():
        if not (certificate := report.get("leaks")):
            yield f"{name}: not examined."
            continue
        yield f"{name}:\n\n" + "\n".join(f"- {line}" for line in in_words(certificate))
