"""The network and its pretraining objective. Importing this package does not import torch.

Names are resolved on first use (PEP 562), so that reading a config or printing help costs no torch import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.model.config import ModelConfig as ModelConfig
    from pipeline.model.mcf_mamba import MCFMamba as MCFMamba
    from pipeline.model.release import ReleaseError as ReleaseError
    from pipeline.model.release import from_pretrained as from_pretrained
    from pipeline.model.release import save as save

_HOME = {
    "ModelConfig": "pipeline.model.config",
    "MCFMamba": "pipeline.model.mcf_mamba",
    "ReleaseError": "pipeline.model.release",
    "from_pretrained": "pipeline.model.release",
    "save": "pipeline.model.release",
}
__all__ = ["MCFMamba", "ModelConfig", "ReleaseError", "from_pretrained", "save"]


def __getattr__(name: str) -> object:
    """Import the module that holds `name`; AttributeError for names that are not public here."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
