"""The scan and the whole network on a CUDA GPU: Triton against mamba-ssm, and both against what the GPU could do.

Letters: B batch, K = 4 directions, D channels, L tokens, N states. Everything is Tiny at 256 x 256 pixels. Those of a
table run in turn (timing.compare), each waiting for the GPU, so medians are of the GPU's time.

The floor of a scan is one exponential an element (B K D L N), forward; its backward needs one more. A multiprocessor
computes 16 special functions a clock (CUDA programming guide, arithmetic instructions, compute capability 8.0 and 9.0).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from importlib import metadata
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.timing import compare
from pipeline import flops
from pipeline.model import MCFMamba, ModelConfig, cmss, scan_triton
from pipeline.model.scan import available, ss2d_scan
from pipeline.model.ss2d import SS2D

SPECIAL = 16  # functions a clock and multiprocessor
CHANNELS = {"s2": 12, "s1": 2}
TILES = {  # constants of scan_triton that are tried, the first as they are
    "SECTION": (16, 8, 32, 64),
    "CHUNK": (4, 2, 8),
    "AHEAD": (4, 2, 8),
    "STATE_LANES": (4, 2, 8),
}


class Size(NamedTuple):
    """What is measured: on which device, how many samples of how many pixels, which network."""

    device: str = "cuda"
    batch: int = 32
    pixels: int = 256
    network: str = "tiny"
    states: int = 16

    @property
    def stages(self) -> dict[str, tuple[int, int]]:
        """Inner channels and tokens on a side of the stages of Tiny."""
        return {f"stage {i + 1}": (192 << i, max(1, self.pixels // (4 << i))) for i in range(4)}


def run() -> None:
    """All tables; about five minutes on one GPU."""
    if not torch.cuda.is_available():
        sys.exit("benchmarks gpu needs a CUDA GPU; `python -m benchmarks compiled` says what can be said without one")
    tables(Size())


def tables(size: Size, repetitions: int = 10) -> None:
    """Print everything for a size."""
    _describe(size)
    names = [name for name in ("triton", "mamba_ssm", "torch") if available(name)]
    _first_call(size, names[0])
    for stage, (channels, side) in size.stages.items():
        tensors = _tensors(size, channels, side)
        _errors(names, tensors)
        for what, of in (("forward", _forward), ("forward and backward", _training)):
            title = f"Scan {what}, {stage}, {size.batch} x {side} x {side} x {channels}, bf16 in"
            compare(title, {name: _waiting(of(name, tensors)) for name in names}, repetitions)
            elements = size.batch * 4 * channels * side * side * size.states
            _floor(elements * (1 if what == "forward" else 2))
        del tensors
    _blocks(size, names, repetitions)
    if "triton" in names:
        _tune(size)
    _steps(size, names, repetitions)


def _describe(size: Size) -> None:
    versions = {}
    for name in ("torch", "triton", "mamba-ssm"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    print(f"{date.today()}, {', '.join(f'{name} {version}' for name, version in versions.items())}")
    if size.device == "cuda":
        print(_smi("name,driver_version,clocks.max.sm,power.limit"))


def _smi(fields: str, *form: str) -> str:
    query = ["nvidia-smi", f"--query-gpu={fields}", f"--format={','.join(('csv', 'noheader', *form))}"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


def _tensors(size: Size, channels: int, side: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(size.device)

    pixels = (size.batch, side, side)
    x, delta = random(*pixels, channels).bfloat16(), (random(*pixels, 4, channels) - 4).bfloat16()
    b, c = random(*pixels, 4, size.states).bfloat16(), random(*pixels, 4, size.states).bfloat16()
    rates = -torch.arange(1, size.states + 1).float().expand(4, channels, size.states).contiguous().to(size.device)
    return [t.requires_grad_() for t in (x, delta, rates, b, c, random(4, channels), random(4, channels))]


def _forward(name: str, tensors: list[Tensor]) -> Callable[[], object]:
    def once() -> None:
        with torch.no_grad():
            ss2d_scan(*tensors, backend=name)

    return once


def _training(name: str, tensors: list[Tensor]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(ss2d_scan(*tensors, backend=name).sum(), tensors)


def _waiting(function: Callable[[], object]) -> Callable[[], object]:
    def once() -> None:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return once


def _errors(names: list[str], tensors: list[Tensor]) -> None:
    """What is compared must compute the same: one sample of 8 x 8 tokens and 40 channels against float64."""
    x, delta, rates, b, c, skip, bias = (tensor.detach() for tensor in tensors)
    few = [x[:1, :8, :8, :40], delta[:1, :8, :8, :, :40], rates[:, :40], b[:1, :8, :8], c[:1, :8, :8]]
    few += [skip[:, :40], bias[:, :40]]
    truth = ss2d_scan(*(tensor.cpu().double() for tensor in few), backend="reference")
    for name in names:
        y = ss2d_scan(*few, backend=name).cpu()
        error = float((y - truth).abs().max() / truth.abs().max())
        if not error < 1e-5:
            raise RuntimeError(f"{name} differs from the reference by {error:.1e} of its maximum")


def _first_call(size: Size, name: str) -> None:
    """Compiling included, unless the folder of TRITON_CACHE_DIR has it."""
    began = time.perf_counter()
    _waiting(_training(name, _tensors(size, 32, 4)))()
    print(f"\nFirst forward and backward of a scan by {name}: {time.perf_counter() - began:.1f} s")


def _floor(exponentials: int) -> None:
    if torch.cuda.is_available():
        clock = float(_smi("clocks.max.sm", "nounits").splitlines()[0]) * 1e6
        seconds = exponentials / (torch.cuda.get_device_properties(0).multi_processor_count * SPECIAL * clock)
        print(f"  floor: {exponentials:.3g} exponentials at {clock / 1e9:.2f} GHz {seconds * 1e3:31.2f} ms")


def _blocks(size: Size, names: list[str], repetitions: int) -> None:
    """The layer SS2D of stage 1 under bf16 autocast."""
    channels, side = size.stages["stage 1"]
    layers = {name: SS2D(channels // 2, size.states, name).to(size.device) for name in names}
    x = torch.randn(size.batch, side, side, channels // 2, device=size.device, requires_grad=True)

    def training(layer: SS2D) -> Callable[[], object]:
        def once() -> None:
            with torch.autocast(size.device, torch.bfloat16):
                layer(x).float().sum().backward()
            x.grad = None
            layer.zero_grad()

        return once

    title = f"SS2D of stage 1, forward and backward, {size.batch} x {side} x {side} x {channels // 2}, bf16 autocast"
    compare(title, {name: _waiting(training(layer)) for name, layer in layers.items()}, repetitions)


def _tune(size: Size) -> None:
    """Stage 1 with other sections, chunks and shapes; each row changes one constant, and compiles again."""
    tensors = _tensors(size, *size.stages["stage 1"])
    print("\nTriton's constants, stage 1, forward and backward")
    for constant, values in TILES.items():
        for value in values:
            with mock.patch.object(scan_triton, constant, value):
                if scan_triton.SECTION % scan_triton.CHUNK or scan_triton.SECTION % scan_triton.AHEAD:
                    continue
                once = _waiting(_training("triton", tensors))
                once()
                times = []
                for _ in range(10):
                    began = time.perf_counter()
                    once()
                    times.append(time.perf_counter() - began)
            print(f"  {constant} = {value:<4} {statistics.median(times) * 1e3:9.2f} ms", flush=True)


def _steps(size: Size, names: list[str], repetitions: int) -> None:
    """A whole step of pretraining: masks, forward, backward, AdamW. The published network trains in fp32."""
    ways = {f"bf16, {names[0]}": (names[0], True)}
    ways |= {f"fp32, {name}": (name, False) for name in names if name != "torch"}
    steps, peaks = {}, {}
    for title, (name, half) in ways.items():
        steps[title] = _waiting(step(size, name, half))
        steps[title]()
        if size.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            steps[title]()
            peaks[title] = torch.cuda.max_memory_allocated() / 2**30
    compare(f"Step of pretraining, {size.network}, {size.batch} x {size.pixels} x {size.pixels}", steps, repetitions)
    for title, peak in peaks.items():
        print(f"  {title:<44} {peak:9.1f} GiB at most")
    if size.device == "cuda":
        _utilisation(size, steps[f"bf16, {names[0]}"])


def step(size: Size, name: str, half: bool) -> Callable[[], object]:
    """One step of CMSS on made-up images."""
    torch.manual_seed(0)
    model = MCFMamba(ModelConfig(size=size.network), CHANNELS, sum(CHANNELS.values()), scan=name).to(size.device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=size.device == "cuda")
    shape = (size.batch, size.pixels, size.pixels)
    images = {sensor: torch.rand(shape[0], bands, *shape[1:], device=size.device) for sensor, bands in CHANNELS.items()}
    valid = {sensor: torch.ones(shape, dtype=torch.bool, device=size.device) for sensor in CHANNELS}
    position = torch.arange(size.batch, device=size.device)

    def once() -> None:
        context: AbstractContextManager[object] = torch.autocast(size.device, torch.bfloat16) if half else nullcontext()
        blocks = cmss.hide(cmss.presence(valid), position, seed=0, ratio=0.5)
        with context:
            recon = model(images, cmss.hidden_tokens(blocks, valid), keys=position)
        optimiser.zero_grad()
        cmss.loss(recon.float(), images, blocks, valid)[0].mean().backward()
        optimiser.step()

    return once


def _utilisation(size: Size, once: Callable[[], object]) -> None:
    model = MCFMamba(ModelConfig(size=size.network), CHANNELS, sum(CHANNELS.values()), scan="torch").to(size.device)
    images = {
        sensor: torch.zeros(1, bands, size.pixels, size.pixels, device=size.device)
        for sensor, bands in CHANNELS.items()
    }
    needed = flops.count(model, model, images).step * size.batch
    most, origin = flops.peak(torch.device(size.device), "bf16")
    began = time.perf_counter()
    once()
    seconds = time.perf_counter() - began
    print(f"  MFU of the first: {needed / seconds / most:.1%} of {most / 1e12:.0f} TFLOP/s ({origin})")
    print(f"  {size.batch / seconds:.0f} samples/s")
