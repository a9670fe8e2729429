from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline import flops
from pipeline.flops import Flops, peak, utilisation
from pipeline.model import MCFMamba, ModelConfig
from pipeline.ranks import Ranks

CHANNELS = {"s1": 2, "dem": 1}
SMALL = ModelConfig(dims=(8, 16), depths=(1, 1))


def count(
    config: ModelConfig, channels: dict[str, int], outputs: int, size: tuple[int, int], device: str = "cpu"
) -> Flops:
    with torch.device(device):
        model = MCFMamba(config, channels, outputs)
        return flops.count(model, model, {name: torch.zeros(1, bands, *size) for name, bands in channels.items()})


@pytest.mark.parametrize(
    "config",
    [SMALL, ModelConfig(size="nano"), ModelConfig(dims=(16, 32), depths=(1, 2), vmamba="s1l8", profile="paper")],
    ids=lambda config: f"{config.size}-{config.vmamba}-{config.stage_dims[0]}",
)
def test_a_model_without_numbers_counts_as_one_that_is_really_run(config: ModelConfig) -> None:
    assert count(config, CHANNELS, 3, (36, 52)) == count(config, CHANNELS, 3, (36, 52), "meta")
    assert count(config, CHANNELS, 3, (36, 52)).products > 0


def test_a_convolution_by_hand() -> None:
    """Only the head depends on the number of outputs: 8 products and sums for each and each pixel."""
    one, two = (count(SMALL, CHANNELS, outputs, (32, 32)).products for outputs in (1, 2))
    assert two - one == 2 * 8 * 32 * 32


def test_scans_by_hand() -> None:
    """32 x 32 pixels: 64 tokens of 8 channels, then 16 of 16; every scan has 4 directions and twice the channels."""
    found = count(SMALL, CHANNELS, 3, (32, 32))
    fine, coarse = (tokens * 4 * 2 * dim * (9 * 16 + 1) for tokens, dim in ((64, 8), (16, 16)))
    # Two encoders of one block a stage, a fusion of two branches a stage, and one level of two blocks in the decoder.
    assert found.scans == (2 + 2 + 2) * fine + (2 + 2) * coarse
    assert found.step == 3 * (found.products + found.scans)


def test_encoders_without_a_gate_scan_one_state_of_half_the_channels() -> None:
    config = ModelConfig(dims=(8, 16), depths=(1, 1), vmamba="s1l8")
    less = count(SMALL, CHANNELS, 3, (32, 32)).scans - count(config, CHANNELS, 3, (32, 32)).scans
    assert less == 2 * sum(tokens * 4 * dim * (2 * 145 - 10) for tokens, dim in ((64, 8), (16, 16)))


def test_all_grows_with_the_pixels() -> None:
    once, fourfold = count(SMALL, CHANNELS, 3, (32, 32)), count(SMALL, CHANNELS, 3, (64, 64))
    assert fourfold == Flops(4 * once.products, 4 * once.scans)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", (989e12, 989e12, 67e12)),
        ("NVIDIA H100 80GB HBM3", (989e12, 989e12, 67e12)),
        ("NVIDIA H100 PCIe", (756e12, 756e12, 51e12)),
        ("NVIDIA A100-SXM4-40GB", (312e12, 312e12, 19.5e12)),
        ("NVIDIA A10", (125e12, 125e12, 31.2e12)),
        ("NVIDIA L40S", (362e12, 362e12, 91.6e12)),
        ("Tesla V100-SXM2-32GB", (None, 125e12, 15.7e12)),
        ("Tesla V100-PCIE-16GB", (None, 112e12, 14e12)),
        ("NVIDIA A10G", (None, None, None)),  # half an A10
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", (None, None, None)),
    ],
)
def test_peak_of_a_gpu_is_its_data_sheets(
    name: str, expected: tuple[float | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(flops, "_measured", lambda device, dtype: (1.0, f"measured {dtype}"))
    for precision, sheet in zip(("bf16", "fp16", "fp32"), expected, strict=True):
        told = (sheet, f"data sheet of {name}") if sheet else (1.0, f"measured {flops.DTYPES[precision]}")
        assert peak(torch.device("cuda", 0), precision) == told


@pytest.mark.parametrize("precision", flops.DTYPES)
def test_peak_of_a_cpu_is_measured(precision: str) -> None:
    state = torch.get_rng_state()
    speed, origin = peak(torch.device("cpu"), precision)
    assert 1e7 < speed < 1e15 and origin.startswith("measured: matrix product of ")
    assert torch.equal(torch.get_rng_state(), state)


class Held(SimpleNamespace):
    def __init__(self, module: MCFMamba, ranks: Ranks) -> None:
        super().__init__(module=module, device=torch.device("cpu"), ranks=ranks)

    def __call__(self, images: Any) -> torch.Tensor:
        return self.module(images)


def engine(rank: int) -> Any:
    model = MCFMamba(SMALL, CHANNELS, 3)
    return Held(model, Ranks(rank, 4))


def test_utilisation_by_hand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(flops, "peak", lambda device, precision: (2e12, f"{device}, {precision}"))
    flop = count(SMALL, CHANNELS, 3, (32, 64))
    hook = utilisation(engine(0), (32, 64), "bf16")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{flop.step / 1e9:.4g} GFLOP a sample and step (" in said
    assert f"{3 * flop.products / 1e9:.4g} products, {3 * flop.scans / 1e9:.4g} scans" in said
    assert "peak 2 TFLOP/s (cpu, bf16)" in said
    # 1000 samples a second over 4 devices.
    share = 3 * (flop.products + flop.scans) * 250 / 2e12
    assert hook({"step": 1, "samples_per_second": 1000.0}) == {"mfu": pytest.approx(share)}
    assert 0 < share < 1


def test_only_rank_0_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(flops, "peak", lambda device, precision: (2e12, ""))
    assert utilisation(engine(1), (32, 32), "fp32")({"samples_per_second": 8.0})["mfu"] > 0
    assert capsys.readouterr().err == ""
