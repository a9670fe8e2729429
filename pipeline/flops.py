"""How much a model computes, and which share of what its device can do a run reaches.

The share is model FLOPs utilisation (Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B): the operations that
the model needs, however it does them, by the most that the device does in that time. What is computed again to save
memory does not count.

Letters: B batch, H W rows and columns of tokens, K = 4 directions, D channels, N states per channel.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.average import full_shape
from pipeline.engine import Engine
from pipeline.model.mcf_mamba import MCFMamba
from pipeline.model.ss2d import DirectionalScan

SIDE = 32  # pixels of the sample that is counted: the least without padding
PASSES = 3  # forwards that a training step is worth: the backward takes two
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# FLOP/s in bf16, fp16 and fp32 by words of a GPU's name, the first that fits; None: not on its tensor cores. From
# NVIDIA's data sheets, without sparsity, fp32 without TF32 (torch's default). Of H100, H200 and V100 the last is SXM.
DATA_SHEETS: Mapping[str, tuple[float | None, float | None, float]] = {
    "h200 nvl": (835e12, 835e12, 60e12),
    "h200": (989e12, 989e12, 67e12),
    "gh200": (989e12, 989e12, 67e12),
    "h100 nvl": (835e12, 835e12, 60e12),
    "h100 pcie": (756e12, 756e12, 51e12),
    "h100": (989e12, 989e12, 67e12),
    "a100": (312e12, 312e12, 19.5e12),
    "a10": (125e12, 125e12, 31.2e12),
    "l40s": (362e12, 362e12, 91.6e12),
    "l40": (181e12, 181e12, 90.5e12),
    "l4": (121e12, 121e12, 30.3e12),
    "v100 pcie": (None, 112e12, 14e12),
    "v100": (None, 125e12, 15.7e12),
    "t4": (None, 65e12, 8.1e12),
}
SIDES, REPEATS, LONG = (256, 512, 1024, 2048, 4096, 8192), 3, 0.01  # of products that are timed; LONG in seconds


class Flops(NamedTuple):
    """Floating point operations of one sample's forward.

    Attributes:
        products: of matrix products and convolutions; a multiplication and an addition are two.
        scans: of the selective scans.
    """

    products: int
    scans: int

    @property
    def step(self) -> int:
        """Of one sample in a step of training, forward and backward."""
        return PASSES * (self.products + self.scans)


class Scan(NamedTuple):
    """The size of a scan: B H W tokens, K D channels, N states."""

    tokens: int
    channels: int
    states: int

    @property
    def elements(self) -> int:
        """How many numbers all its states are."""
        return self.tokens * self.channels * self.states

    @property
    def flops(self) -> int:
        """VMamba's count, 9 an element and 1 a channel for D x.

        Its `flops_selective_scan_fn` says so after https://github.com/state-spaces/mamba/issues/110.
        """
        return 9 * self.elements + self.tokens * self.channels


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Scan]]:
    """A list to which every scan of the model's forwards inside is added."""
    scans: list[Scan] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        directions, channels, states = full_shape(cast("DirectionalScan", module).ssm.A_log)
        scans.append(Scan(inputs[0].shape[:3].numel(), directions * channels, states))  # of [B, H, W, C]

    layers = [module for module in model.modules() if isinstance(module, DirectionalScan)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield scans
    finally:
        for hook in hooks:
            hook.remove()


def count(forward: Callable[[Mapping[str, Tensor]], Tensor], model: nn.Module, images: Mapping[str, Tensor]) -> Flops:
    """Count a forward while it is made.

    Args:
        forward: makes it: the model itself, or the engine that holds it (then collective).
        model: an MCFMamba, on any device, also meta.
        images: one sample, float [1, M, H, W] by modality.
    """
    products = FlopCounterMode(display=False)
    with watched(model) as scans, torch.no_grad(), products:
        forward(images)
    return Flops(products.get_total_flops(), sum(scan.flops for scan in scans))


def peak(device: torch.device, precision: str) -> tuple[float, str]:
    """The most that a device does, FLOP/s, and where the number is from.

    Of a GPU in `DATA_SHEETS` it is the data sheet's, of any other device and of a part of a GPU (MIG) the best of
    matrix products that take about 0.3 s in all.

    Args:
        device: a GPU or the CPU (with the threads of this process).
        precision: fp32, bf16 or fp16.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        words = set(re.findall(r"\w+", name.lower()))
        rows = (row for known, row in DATA_SHEETS.items() if words.issuperset(known.split()) and "mig" not in words)
        sheet = next(rows, (None,) * len(DTYPES))
        if found := dict(zip(("bf16", "fp16", "fp32"), sheet, strict=True))[precision]:
            return found, f"data sheet of {name}"
    return _measured(device, DTYPES[precision])


def _measured(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The fastest matrix product, each side twice the one before until one takes long."""
    best, fastest, random = 0.0, 0, torch.Generator(device)  # its own: a run draws from torch's
    for side in SIDES:
        matrix = torch.rand(side, side, device=device, generator=random).to(dtype)
        times = [_seconds(matrix) for _ in range(REPEATS)]
        best, fastest = max((best, fastest), (2 * side**3 / min(times), side))
        if min(times) > LONG:
            break
    return best, f"measured: matrix product of {fastest}"


def _seconds(matrix: Tensor) -> float:
    began = time.perf_counter()
    (matrix @ matrix)[0, 0].item()  # which waits for a GPU
    return time.perf_counter() - began


def utilisation(
    engine: Engine, pixels: tuple[int, int], precision: str
) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """A hook of the loop that tells which share of the devices' peak is used: `mfu`, 0 to 1. Collective.

    Says on stderr what it is a share of.

    Args:
        engine: holds the MCFMamba in training.
        pixels: height and width of what it is shown.
        precision: of its matrix products: fp32, bf16 or fp16.
    """
    channels = cast("MCFMamba", engine.module).channels
    images = {name: torch.zeros(1, bands, SIDE, SIDE, device=engine.device) for name, bands in channels.items()}
    share = pixels[0] * pixels[1] / SIDE**2  # everything grows with the pixels
    flops = Flops(*(round(share * number) for number in count(engine, engine.module, images)))
    most, origin = peak(engine.device, precision)
    if engine.ranks.rank == 0:
        each = (PASSES * number / 1e9 for number in flops)
        text = "{:.4g} GFLOP a sample and step ({:.4g} products, {:.4g} scans); peak {:.3g} TFLOP/s ({})"
        print(text.format(flops.step / 1e9, *each, most / 1e12, origin), file=sys.stderr)

    def reached(numbers: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"mfu": flops.step * numbers["samples_per_second"] / engine.ranks.world / most}

    return reached
