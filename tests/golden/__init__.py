"""Numbers computed by the authors' public research code (README.md), and how to read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.model.names import from_mcf_mamba

FOLDER = Path(__file__).parent
MODELS = ("m_4_2_64x64", "m_13_2_96x128", "m_3_1_256x256")


class Golden:
    """One .npz with its .json; `golden[name]` is a tensor."""

    def __init__(self, name: str) -> None:
        with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.facts: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Everything below a prefix, by the rest of its name."""
        return {name[len(prefix) :]: self[name] for name in self.arrays if name.startswith(prefix)}

    def check(self, name: str, mine: Tensor, tolerance: float, golden: Tensor | None = None) -> None:
        """max|mine - golden| <= tolerance * max|golden|, with equal shapes."""
        golden = self[name] if golden is None else golden
        assert mine.shape == golden.shape, f"{name}: shape {tuple(mine.shape)}, not {tuple(golden.shape)}"
        error = float((mine.detach() - golden).abs().max() / golden.abs().max())
        assert error <= tolerance, f"{name}: {error:.2e} of its maximum, allowed {tolerance:.2e}"


def part(state: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    """Parameters of a part of the published network, named without the prefix `theirs`, by our names below `ours`."""
    converted = from_mcf_mamba({f"{theirs}.{name}": tensor for name, tensor in state.items()})
    assert all(name.startswith(f"{ours}.") for name in converted)
    return {name[len(ours) + 1 :]: tensor for name, tensor in converted.items()}
