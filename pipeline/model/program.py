"""A network as a program of torch.export: one file that runs with torch alone, without any of our code.

The file (PT2 archive) holds a graph of ATen operations and the parameters. What it takes and gives:

    images   {sensor: float32 [B, M, H, W]}, normalised as the contract says, every sensor of the model
    hidden   {sensor: bool [B, H / 4, W / 4]}, True for tokens to hide; all True is an absent modality
    result   logits float32 [B, outputs, H, W]

B is dynamic; H = W is fixed when the program is made, since the number of doublings in the scan follows from it.
The scan backends of training do not export: `cpp` calls a shared library through ctypes, `torch` writes into buffers
by autograd functions of its own, `reference` would become one operation per pixel. `scan_doubling.py` does, at more
memory and other rounding: logits agree to about 1e-5 of their range, not bit for bit. Stochastic depth is left out, and
so is autocast.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from pipeline.model.encoder import PATCH
from pipeline.model.mcf_mamba import MCFMamba
from pipeline.model.release import ReleaseError

Inputs = tuple[dict[str, Tensor], dict[str, Tensor]]
TOLERANCE = 1e-4  # of the largest logit


def write_program(path: Path, model: MCFMamba, side: int) -> None:
    """Write the program of a network and compare its logits with the network's. Takes minutes for Tiny.

    Args:
        path: file to write, NAME.pt2.
        model: in evaluation mode, on the CPU.
        side: height and width of the images in pixels, a multiple of 4.

    Raises:
        ReleaseError: the program gives other logits.
    """
    plain = MCFMamba(model.config, model.channels, model.outputs, "doubling").eval()
    plain.load_state_dict(model.state_dict())
    batch = {0: torch.export.Dim("batch", min=1)}
    free = (dict.fromkeys(model.channels, batch),) * 2
    with torch.no_grad():
        program = torch.export.export(plain, random_inputs(model, 2, side), dynamic_shapes=free)
    program.example_inputs = None  # they would be kept as a pickle
    torch.export.save(program, path)
    _check(path, model, side)


@torch.no_grad()
def _check(path: Path, model: MCFMamba, side: int) -> None:
    """What was written, read again, against the network: another batch than it was made with, a modality hidden."""
    run = torch.export.load(path).module()
    images, hidden = random_inputs(model, 1, side)
    next(iter(hidden.values()))[:] = len(hidden) > 1
    wanted, got = model(images, hidden), run(images, hidden)
    error = float((wanted - got).abs().max() / wanted.abs().max())
    if not error <= TOLERANCE:
        raise ReleaseError(f"{path.name}: the program's logits differ by {error:.1e} of their range from the network's")
    logging.getLogger(__name__).info("%s: logits differ by %.1e of their range from the network's", path.name, error)


def random_inputs(model: MCFMamba, count: int, side: int) -> Inputs:
    """Random images and tokens to hide, the same ones at every call."""
    generator = torch.Generator().manual_seed(count)
    tokens = (count, side // PATCH, side // PATCH)
    images = {name: torch.rand(count, bands, side, side, generator=generator) for name, bands in model.channels.items()}
    hidden = {name: torch.rand(tokens, generator=generator) < 0.3 for name in model.channels}
    return images, hidden
