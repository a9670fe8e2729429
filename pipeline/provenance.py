"""Where parameters come from: the trainings they went through, the code and the machine."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def lineage(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every training that a checkpoint's parameters went through, oldest first, its own last.

    Of each: stage, data, where, protocol (its choice, or None), sensors, fingerprint of the selection and those of its
    datasets. Where nothing was recorded, as of public weights and of releases and runs of older versions, there is an
    entry of None alone.
    """
    if "lineage" in facts:
        return list(facts["lineage"])
    config = facts.get("config")
    found: list[Mapping[str, Any]] = []
    if config is None or config.get("checkpoint") or config.get("start"):
        found.append(dict.fromkeys(("stage", "data", "where", "protocol", "sensors", "fingerprint")))
    return [*found, training(config, facts["fingerprint"], facts.get("data", ()))] if config else found


def training(config: Mapping[str, Any], fingerprint: str, data: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An entry of `lineage`, from a config as plain values and the identity of its selection."""
    choice = config.get("protocol") or {}
    return {
        **{name: config[name] for name in ("stage", "data", "where")},
        "protocol": choice if choice.get("name") else None,
        "sensors": data[0]["modalities"] if data else config["sensors"],
        "fingerprint": fingerprint,
        "datasets": [part.get("dataset") for part in data],
    }


def code_version() -> str:
    """Version of the installed distribution; "source" where the code runs without being installed."""
    try:
        return metadata.version("mcf-mamba")
    except metadata.PackageNotFoundError:
        return "source"


def environment() -> dict[str, Any]:
    """What a run was made by: code, Python, packages, machine. No variables of the environment, which hold secrets."""
    packages = sorted({f"{each.name}=={each.version}" for each in metadata.distributions()}, key=str.lower)
    return {
        "version": code_version(),
        "code": code_hash(),
        "python": platform.python_version(),
        "machine": f"{platform.node()}, {platform.platform()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "packages": packages,
    }


def code_hash() -> str:
    """sha256 of the sources of the four packages, which a version alone does not tell in a checkout."""
    found, root = hashlib.sha256(), Path(__file__).resolve().parents[1]
    for package in ("configs", "shards", "pipeline", "launchers"):
        for path in sorted((root / package).rglob("*")):
            if path.suffix in (".py", ".cpp", ".yaml"):
                found.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return found.hexdigest()
