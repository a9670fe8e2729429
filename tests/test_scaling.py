"""docs/scaling.md: its arithmetic against small cases by hand, its tables against what the command prints."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from torch import nn

from benchmarks import scaling
from benchmarks.scaling import DEFAULTS, LINKS, TUNED, Counted, Link, Setting
from pipeline.model import MCFMamba, ModelConfig
from shards.config import ShardsConfig
from shards.reading import Reading
from shards.stream import Stream

ROOT = Path(__file__).parent.parent
NUMBER = r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)*"
# 250,000 numbers: 200,000 of a Linear, and 50,000 that ZeRO 3 keeps whole.
TOY = Counted("toy", ((200_000, True), (50_000, False)), 10**9, 64 * 10**6, 100, 1000, 10)


@pytest.fixture(scope="module")
def printed() -> str:
    """By a process of its own: what other tests load, such as torch.export, changes how operations are counted."""
    code = "from benchmarks import scaling; scaling.run()"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def on_paper() -> str:
    """The document but for its last section, which holds measurements."""
    return (ROOT / "docs/scaling.md").read_text().partition("## Measured")[0]


def test_the_document_holds_the_tables_as_printed(printed: str) -> None:
    tables = [line for line in on_paper().splitlines() if line.startswith(("|", "### "))]
    assert tables == [line for line in printed.splitlines() if line]


def test_every_number_of_its_prose_is_printed_too(printed: str) -> None:
    prose = "\n".join(line for line in on_paper().splitlines() if not line.startswith(("|", "### ")))
    numbers = re.findall(NUMBER, re.sub(r"`[^`]*`|arXiv [\d.]+|\b0\.19\.8\b", "", prose))
    assert len(numbers) > 40
    missing = set(numbers) - set(re.findall(NUMBER, printed))
    assert not missing, f"say what the command prints, or print {missing}"


@pytest.fixture(scope="module")
def nano() -> MCFMamba:
    return MCFMamba(ModelConfig(size="nano"), scaling.CHANNELS, 14)


def test_parameters_are_those_of_a_model_that_is_really_built(nano: MCFMamba) -> None:
    counted = scaling.count("nano")
    assert counted.parameters == sum(parameter.numel() for parameter in nano.parameters())
    assert len(counted.tensors) == len(list(nano.parameters()))
    layers = [module for module in nano.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert counted.halved == sum(parameter.numel() for layer in layers for parameter in layer.parameters())


def test_elements_and_products_of_nano_by_formula() -> None:
    """Letters as in pipeline/model: C channels, D = 2 C, K = 4, N = 16, R = ceil(C / 16), L tokens."""
    tokens, dims, depths = (4096, 1024, 256, 64), (12, 24, 48, 96), (1, 1, 2, 1)
    elements, products = 0, 0
    for stage, (length, c, depth) in enumerate(zip(tokens, dims, depths, strict=True)):
        d, rank, levels = 2 * c, -(-c // 16), 2 if stage < 3 else 0
        scans = 2 * depth + 2 + levels
        elements += scans * 4 * d * length * 16
        scan = c * 2 * d + 9 * d + d * 4 * (rank + 32)  # in_proj, conv, x_proj
        scan += 4 * rank * d if rank > 1 else 0  # dt_proj: einsum over a rank of 1 is no matrix product
        products += length * (scans * scan + (2 * depth + levels) * d * c)  # out_proj
        products += length * (2 * 9 * d + 9 * d + d * c)  # the fusion's three convolutions
        if levels:  # merging, the level's MLPs, expanding to it, its skip
            products += length // 4 * (4 * c * 2 * c) * 2 + length * 2 * 8 * c * c
            products += length // 4 * (2 * c * 4 * c) + length * 2 * c * c
    products += tokens[0] * 16 * 12 * (12 + 2)  # patches of both modalities
    products += tokens[0] * 12 * 16 * 12 + 256 * 256 * 12 * 14  # to pixels, and the head
    assert scaling.count("nano").elements == elements
    assert scaling.count("nano").flops == 2 * products


def test_bytes_held_by_two_ranks_by_hand() -> None:
    assert [scaling.held(TOY, stage, 2) for stage in range(4)] == [4_000_000, 3_500_000, 3_000_000, 2_700_000]


def test_each_zero_stage_holds_less_than_the_one_before() -> None:
    for ranks in scaling.RANKS:
        bytes_held = [scaling.held(scaling.count("tiny"), stage, ranks) for stage in range(4)]
        assert bytes_held == sorted(bytes_held, reverse=True) and len(set(bytes_held)) == 4


def test_bytes_sent_by_two_ranks_by_hand() -> None:
    assert [scaling.sent_by_the_book(250_000, stage, 2) for stage in range(4)] == [1e6, 1e6, 1e6, 1.5e6]
    zero0, zero2, zero3 = (scaling.sent(TOY, setting, 2) for setting in DEFAULTS)
    assert zero0 == {"gradients": (1_000_000, 1), "before": (0, 0), "after": (0, 0)}
    # 200,000 numbers in bf16 and 50,000 in fp32 are 600,000 bytes.
    assert zero2 == {"gradients": (600_000, 2), "before": (0, 0), "after": (500_000, 2)}
    assert zero3 == {"gradients": (300_000, 2), "before": (200_000, 2), "after": (100_000, 1)}
    assert scaling.sent(TOY, TUNED[1], 2)["after"] == (0, 0)
    assert scaling.sent(TOY, Setting("", 2, 60_000), 2)["gradients"] == (600_000, 4 + 1)


def test_one_rank_sends_nothing() -> None:
    for setting in (*DEFAULTS, *TUNED):
        assert sum(size for size, _ in scaling.sent(TOY, setting, 1).values()) == 0


def test_a_ring_is_as_fast_as_its_narrowest_link() -> None:
    wide, narrow = LINKS
    assert wide.seconds(315e6, 1, 8) == narrow.seconds(315e6, 1, 8) == pytest.approx(1e-3 + 30e-6)
    assert wide.seconds(280e6, 0, 64) == pytest.approx(1e-3)
    assert narrow.seconds(35e6, 2, 1024) == pytest.approx(1e-3 + 200e-6)


def test_small_buckets_hide_all_but_the_last_behind_the_backward() -> None:
    link, setting = Link("slow", 1e6 / scaling.REACHED), Setting("", 2, 60_000)
    gradients, after = (link.seconds(*scaling.sent(TOY, setting, 64)[name], 64) for name in ("gradients", "after"))
    assert scaling.exposed(TOY, setting, 64, link, 1e3) == pytest.approx(gradients / 5 + after)
    assert scaling.exposed(TOY, setting, 64, link, 0.03) == pytest.approx(gradients - 0.02 + after)
    assert scaling.exposed(TOY, DEFAULTS[1], 64, link, 1e3) == pytest.approx(gradients + after - 3 * 60e-6)


def test_a_step_is_the_sum_of_its_parts_or_launching() -> None:
    assert scaling.parts(TOY, 32) == pytest.approx(
        {"products": 96e9 / 316e12, "moving": 72e6 * 32 / 4.3e12, "exponentials": 2 * 64e6 * 32 / 3.4848e12}
    )
    assert scaling.computing(TOY, 1) == pytest.approx(30e-3)
    assert scaling.computing(TOY, 1, stage=3) == pytest.approx(35e-3)
    assert scaling.computing(TOY, 1e4) == pytest.approx(sum(scaling.parts(TOY, 1e4).values()))


@pytest.mark.parametrize("setting", [*DEFAULTS, *TUNED])
def test_efficiency_is_a_share_and_more_ranks_or_less_network_do_not_raise_it(setting: Setting) -> None:
    model = scaling.count("tiny")
    wide, narrow = ([scaling.efficiency(model, setting, n, link) for n in scaling.RANKS] for link in LINKS)
    assert all(0 < low <= high < 1 for low, high in zip(narrow, wide, strict=True))
    assert wide == sorted(wide, reverse=True) and narrow == sorted(narrow, reverse=True)


@pytest.mark.parametrize(("lanes", "ranks"), [(32, 8), (32, 64), (64, 64), (1000, 8), (2048, 8), (1024, 1024)])
def test_whole_blocks_are_read_where_the_stream_reads_them(lanes: int, ranks: int) -> None:
    class Part(SimpleNamespace):
        def __len__(self) -> int:
            return 1000

    part = Part(sizes={"tar": 1000 * scaling.SAMPLE}, table=range(1000), foreign=None)
    stream = SimpleNamespace(
        reader=SimpleNamespace(near=False, reading=Reading()),
        selection=SimpleNamespace(parts=[part]),
        order=SimpleNamespace(orders=[SimpleNamespace(lanes=lanes)]),
        share=SimpleNamespace(ranks=ranks, workers=1),
    )
    assert Stream._takes_whole_blocks(cast("Any", stream)) == (scaling.whole_blocks(lanes, ranks) is not None)


@pytest.mark.parametrize("size", scaling.SIZES)
def test_what_the_presets_say(size: str) -> None:
    preset = yaml.safe_load((ROOT / f"configs/pretrain-{size}.yaml").read_text())
    assert preset["batch"]["global_batch"] == scaling.GLOBAL_BATCH and preset["steps"] == scaling.STEPS
    assert preset["optim"]["warmup_samples"] == scaling.WARMUP and preset["checkpoint_every"] == scaling.EVERY
    assert preset["engine"]["precision"] == "bf16"


def test_what_reading_and_building_say() -> None:
    assert Reading().memory == scaling.HELD_BLOCKS
    fields: dict[str, Any] = cast("Any", ShardsConfig).__dataclass_fields__
    assert fields["samples_per_shard"].default.default == scaling.PER_SHARD


def test_what_deepspeed_says() -> None:
    """Its defaults that the document rests on; read as text, since importing it takes seconds."""
    found = find_spec("deepspeed")
    assert found and found.origin
    runtime = Path(found.origin).parent / "runtime"
    settings = (runtime / "zero/config.py").read_text()
    for line in (
        "reduce_bucket_size: int = Field(pp_int(5e8)",
        "use_multi_rank_bucket_allreduce: bool = True",
        "param_persistence_threshold: int = Field(pp_int(1e5)",
        "prefetch_bucket_size: int = Field(pp_int(5e7)",
        "max_reuse_distance: int = Field(pp_int(1e9)",
        "self.overlap_comm = self.stage == ZeroStageEnum.weights",
    ):
        assert line in settings, f"read DeepSpeed's source again, for benchmarks/scaling.py: {line}"
    assert "module.__class__ in lower_precision_safe_module_classes" in (runtime / "torch_autocast.py").read_text()
