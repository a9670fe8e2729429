"""How far pretraining scales, on paper: arithmetic alone, nothing is timed. Prints the tables of docs/scaling.md.

Parameters, products, scans and operations are counted from the model. What a rank holds and sends is what the source of
DeepSpeed 0.19.8 says and two processes did (docs/scaling.md). The rest is assumed and stands in the first table.

Letters: n ranks, P bytes of all parameters in fp32, f = (n - 1) / n. Bytes and seconds unless a name says otherwise;
MB is 10^6 bytes. The speed of a link is per direction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple, get_args

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.flops import watched
from pipeline.model import MCFMamba, ModelConfig
from pipeline.model.config import Size
from shards.order import BLOCK, LANES

SIZES: tuple[Size, ...] = get_args(Size)[1:]  # without nano
CHANNELS = {"s2-l2a": 12, "s1": 2}
PIXELS, BATCH, NODE = 256, 32, 8  # side of a sample, samples per GPU, GPUs per node
RANKS, FLOAT, HALF = (8, 64, 1024), 4, 2  # the last two in bytes
STEPS, GLOBAL_BATCH, WARMUP, EVERY = 100_000, 512, 512_000, 1000  # of the presets; EVERY steps a checkpoint

# One H200, and what is around it.
PEAK, PRODUCTS, PRODUCTS_REACHED = 989e12, 790e12, 0.4  # bf16 FLOP/s: data sheet, long products, and the share of it
MEMORY, EXPONENTIALS = 4.3e12, 132 * 16 * 1.65e9  # a second: 4.8e12 bytes on the data sheet; units x a cycle x cycles
EXP, MOVED = 2, 36 * HALF  # in a whole step, of an element of a scan; bytes, of a token and inner channel
LAUNCH, HOOKS, PASSES = 10e-6, 0.5e-3, 3  # an operation; ZeRO 3 around a module; a step is so many forwards
NVLINK, NETWORK, REACHED = 450e9, 50e9, 0.7  # a GPU; an adapter of 400 Gb/s; the share of both that is reached
LATENCY, TO_GPU, DISK, GOAL = 10e-6, 50e9, 1e9, 1.3  # of a collective, times log2(n); the goal, times the three's sum

# Numbers of DeepSpeed's defaults, and a bucket that is full long before the backward ends.
PERSISTENT, WHOLE_BUCKET, PREFETCH, SMALL_BUCKET = 100_000, 500_000_000, 50_000_000, 10_000_000

# docs/benchmarks.md: blosc2-zstd makes 0.35 of npy of real tiles, 0.56 of made-up ones; reads 256 samples in 536 ms.
STORED, DECODED, PER_SHARD, HELD_BLOCKS = 0.4, 256 / 0.536, 512, 2**30
SAMPLE = STORED * PIXELS**2 * (CHANNELS["s2-l2a"] * HALF + CHANNELS["s1"] * FLOAT)
DATASETS = {"SSL4EO-S12, 4 seasons": 251_079 * 4, "Major TOM Core, 16 windows a cell": 2_245_886 * 16}

Table = tuple[str, Sequence[str], Iterable[Sequence[str]]]  # title, head, rows


class Link(NamedTuple):
    """What leaves a node: `node` bytes a second over all its adapters."""

    name: str
    node: float

    def seconds(self, sent: float, calls: int, ranks: int) -> float:
        """Time of `calls` collectives in which every rank sends `sent` bytes all in all.

        A ring through all ranks is as fast as NVLink inside a node, and beyond it as the narrower of the two.
        """
        narrow = NVLINK if ranks <= NODE else min(NVLINK, self.node)
        return sent / (REACHED * narrow) + calls * LATENCY * math.log2(ranks)


LINKS = (Link("400 Gb/s a GPU", NODE * NETWORK), Link("400 Gb/s a node", NETWORK))
PLACES = ((8, LINKS[0], "8 ranks, NVLink"), *((n, link, f"{n:,}, {link.name}") for n in (64, 1024) for link in LINKS))


class Setting(NamedTuple):
    """A ZeRO stage, the numbers in a bucket of gradients, and in a parameter that ZeRO 3 keeps whole at most."""

    name: str
    stage: int
    bucket: int = WHOLE_BUCKET
    persistent: int = PERSISTENT


DEFAULTS = (Setting("ZeRO 0", 0), Setting("ZeRO 1, 2", 2), Setting("ZeRO 3", 3))
TUNED = (Setting("ZeRO 1, 2, tuned", 2, SMALL_BUCKET), Setting("ZeRO 3, tuned", 3, SMALL_BUCKET, 0))


class Counted(NamedTuple):
    """A model; `flops`, `elements`, `walked` and `operations` are those of one sample's forward.

    Attributes:
        tensors: of each parameter how many numbers it has, and whether DeepSpeed sends it and its gradient in bf16.
        flops: of matrix products and convolutions; a multiplication and an addition are two.
        elements: K D L N of every scan, added up.
        walked: L of every scan, added up.
        operations: of torch without views, a scan being one; `modules`: how many take part.
    """

    size: str
    tensors: tuple[tuple[int, bool], ...]
    flops: int
    elements: int
    walked: int
    operations: int
    modules: int

    @property
    def parameters(self) -> int:
        """How many numbers."""
        return sum(numbers for numbers, _ in self.tensors)

    @property
    def halved(self) -> int:
        """How many of them DeepSpeed sends in bf16."""
        return sum(numbers for numbers, half in self.tensors if half)

    def small(self, limit: int = PERSISTENT) -> list[int]:
        """Numbers of each parameter that has at most `limit`."""
        return [numbers for numbers, _ in self.tensors if numbers <= limit]

    def payload(self, more_than: int = 0) -> int:
        """Bytes on the way of all gradients, or of the parameters of more than so many numbers under ZeRO 3."""
        return sum(numbers * (HALF if half else FLOAT) for numbers, half in self.tensors if numbers > more_than)

    def buckets(self, size: int) -> int:
        """How many buckets of `size` numbers the gradients fill, those in bf16 and those in fp32 apart."""
        return math.ceil(self.halved / size) + math.ceil((self.parameters - self.halved) / size)


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func is torch.ops.aten._unsafe_view.default)
        return func(*args, **(kwargs or {}))


@cache
def count(size: Size, pixels: int = PIXELS) -> Counted:
    """The real model for CMSS of `CHANNELS`, without memory for its numbers, in one forward of one sample."""
    with torch.device("meta"):
        model = MCFMamba(ModelConfig(size=size), CHANNELS, sum(CHANNELS.values()))
        images = {name: torch.empty(1, bands, pixels, pixels) for name, bands in CHANNELS.items()}
    flops, operations = FlopCounterMode(display=False), _Operations()
    with watched(model) as scans, torch.no_grad(), flops, operations:
        model(images)
    length, elements = sum(scan.tokens for scan in scans), sum(scan.elements for scan in scans)
    modules = sum(not isinstance(module, nn.ModuleDict | nn.ModuleList) for module in model.modules())
    return Counted(size, _tensors(model), flops.get_total_flops(), elements, length, operations.count, modules)


def _tensors(model: nn.Module) -> tuple[tuple[int, bool], ...]:
    """What Linear and Conv2d own themselves is what DeepSpeed sends in bf16 (its runtime/torch_autocast.py)."""
    return tuple(
        (parameter.numel(), type(module) in (nn.Linear, nn.Conv2d))
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )


def held(model: Counted, stage: int, ranks: int) -> float:
    """Bytes of parameters, gradients and two moments, and from ZeRO 1 on of a second copy of what a rank updates."""
    P = FLOAT * model.parameters
    whole, shared = {0: (4 * P, 0), 1: (2 * P, 3 * P), 2: (P, 4 * P), 3: (FLOAT * sum(model.small()), 5 * P)}[stage]
    return whole + shared / ranks


def sent_by_the_book(parameters: int, stage: int, ranks: int) -> float:
    """Bytes a rank sends per step, all in fp32: 2 f P by an all-reduce; f P by each scatter and each gather."""
    return (3 if stage == 3 else 2) * FLOAT * parameters * (ranks - 1) / ranks


def sent(model: Counted, setting: Setting, ranks: int) -> dict[str, tuple[float, int]]:
    """Bytes and collectives of a rank's step: gradients, parameters before their use, parameters after the update.

    As DeepSpeed does it: ZeRO 1 and 2 all-reduce gradients too; ZeRO 3 gathers what it keeps whole tensor by tensor.
    """
    f, P = (ranks - 1) / ranks, FLOAT * model.parameters
    if setting.stage == 0:
        return {"gradients": (2 * f * P, 1), "before": (0, 0), "after": (0, 0)}
    buckets, small = model.buckets(setting.bucket), model.small(setting.persistent)
    if setting.stage < 3:  # two groups of parameters: with weight decay and without
        return {"gradients": (2 * f * model.payload(), buckets), "before": (0, 0), "after": (f * P, 2)}
    before = f * model.payload(setting.persistent), model.buckets(PREFETCH)
    after = f * FLOAT * sum(small), len(small)
    return {"gradients": (f * model.payload(), buckets), "before": before, "after": after}


def parts(model: Counted, batch: float = BATCH) -> dict[str, float]:
    """Seconds of a step on one GPU that each of three things needs at least; they may overlap or not."""
    channels = model.elements / (4 * ModelConfig().d_state)  # tokens x inner channels, of 4 directions
    return {
        "products": PASSES * model.flops * batch / (PRODUCTS * PRODUCTS_REACHED),
        "moving": MOVED * channels * batch / MEMORY,
        "exponentials": EXP * model.elements * batch / EXPONENTIALS,
    }


def launching(model: Counted, stage: int) -> float:
    """Seconds in which Python asks for a step's operations; ZeRO 3 has hooks around every module besides."""
    return PASSES * model.operations * LAUNCH + (HOOKS * model.modules if stage == 3 else 0)


def computing(model: Counted, batch: float = BATCH, stage: int = 0) -> float:
    """Seconds of a step: the three one after the other, or Python if that takes longer."""
    return max(sum(parts(model, batch).values()), launching(model, stage))


def exposed(model: Counted, setting: Setting, ranks: int, link: Link, seconds: float) -> float:
    """Seconds of communication that a step of `seconds` does not hide.

    Small buckets are sent while the backward, two thirds of the step, fills the next: all but the last. ZeRO 3 gathers
    during the forward, all but the first. What is gathered after the update has nothing to hide behind.
    """
    sent_ = sent(model, setting, ranks)
    gradients, before, after = (link.seconds(*each, ranks) for each in sent_.values())
    if setting.bucket < model.parameters:
        gradients = max(gradients / sent_["gradients"][1], gradients - seconds * 2 / 3)
    before = max(before / max(1, sent_["before"][1]), before - seconds / 3)
    return gradients + before + after


def efficiency(model: Counted, setting: Setting, ranks: int, link: Link, batch: float = BATCH) -> float:
    """Samples a second and GPU, as a share of those of one GPU alone at its usual batch."""
    seconds = computing(model, batch, setting.stage)
    return computing(model) * batch / BATCH / (seconds + exposed(model, setting, ranks, link, seconds))


def whole_blocks(lanes: int, ranks: int) -> float | None:
    """Bytes of blocks that a rank holds (`Stream._takes_whole_blocks`); None where it reads samples one by one."""
    needed = 1.25 * BLOCK * SAMPLE * lanes / ranks
    return needed if lanes % ranks == 0 and needed <= HELD_BLOCKS else None


def run() -> None:
    """All tables, in the order of docs/scaling.md."""
    models = [count(size) for size in SIZES]
    ofmodels = (_models, _one_gpu, _held, _buckets, _sent, _weak, _strong, _batches, _data)
    for title, head, rows in (_assumed(), *(table(models) for table in ofmodels), _lanes(), _sets(), _saved(models)):
        print(f"\n### {title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
        for row in rows:
            print(f"| {' | '.join(row)} |")


def _assumed() -> Table:
    rows = [
        ("matrix products in bf16", f"{PRODUCTS / 1e12:.0f} TFLOP/s x {PRODUCTS_REACHED}", f"peak {PEAK / 1e12:.0f}"),
        ("memory of the GPU", f"{MEMORY / 1e12} TB/s", "peak 4.8"),
        ("exponentials", f"{EXPONENTIALS / 1e12:.2f} T/s", "132 processors x 16 a cycle x 1.65 GHz"),
        ("exponentials, per element of a scan", f"{EXP} a step", "fused; states computed again in the backward"),
        ("bytes moved, per token and inner channel", f"{MOVED} a step", "36 numbers in bf16, all fused"),
        ("an operation of eager torch", f"{LAUNCH * 1e6:.0f} us", f"guess; a step has {PASSES} times the forward's"),
        ("hooks of ZeRO 3 around a module", f"{HOOKS * 1e3} ms a step", "guess; 2 ms of a slow, busy core"),
        ("goal of a step", f"{GOAL} x the three in sum", "45 ms for tiny"),
        ("NVLink, inside a node of 8 GPUs", f"{NVLINK / 1e9:.0f} GB/s x {REACHED}", "data sheet; the share a guess"),
        ("adapter of 400 Gb/s", f"{NETWORK / 1e9:.0f} GB/s x {REACHED}", "one a GPU, or one a node"),
        ("latency of a collective", f"{LATENCY * 1e6:.0f} us x log2(ranks)", "guess"),
        ("activations of a sample, tiny, fp32", "1.2 GiB", "docs/benchmarks.md: 6.18 - 2.57 GiB for 3 more"),
        ("from the CPU's memory to the GPU", f"{TO_GPU / 1e9:.0f} GB/s", "PCIe 5 x16, pinned"),
        ("a sample in a shard", f"{SAMPLE / 1e6:.2f} MB", f"{STORED} of npy; docs/benchmarks.md: 0.35 to 0.56"),
        ("reading, checking, decoding", f"{DECODED:.0f} samples/s a core", "docs/benchmarks.md: 256 in 536 ms"),
    ]
    return "Assumptions", ("", "value", "from"), rows


def _models(models: list[Counted]) -> Table:
    t = BATCH / 1e12
    rows = [
        ("parameters, millions", *(f"{m.parameters / 1e6:.1f}" for m in models)),
        ("parameters, tensors", *(f"{len(m.tensors):,}" for m in models)),
        ("of Linear and Conv2d, share of the parameters", *(f"{m.halved / m.parameters:.2f}" for m in models)),
        ("products and convolutions, GFLOP forward", *(f"{m.flops / 1e9:.1f}" for m in models)),
        ("elements of scans, millions forward", *(f"{m.elements / 1e6:,.0f}" for m in models)),
        ("steps of scans, one after the other, forward", *(f"{m.walked:,}" for m in models)),
        ("operations of torch, forward; modules", *(f"{m.operations:,}; {m.modules}" for m in models)),
        (f"step of {BATCH}, TFLOP; with recompute", *(f"{3 * t * m.flops:.2f}; {4 * t * m.flops:.2f}" for m in models)),
    ]
    return f"Counted: one sample of 12 + 2 bands, {PIXELS} x {PIXELS}", ("", *SIZES), rows


def _one_gpu(models: list[Counted]) -> Table:
    needed, copied = [parts(m) for m in models], FLOAT * sum(CHANNELS.values()) * PIXELS**2 * BATCH
    total = [sum(each.values()) for each in needed]
    rows = [(f"{name}, ms", *(f"{each[name] * 1e3:.1f}" for each in needed)) for name in needed[0]]
    asked = [f"{launching(m, 0) * 1e3:.1f}; {launching(m, 3) * 1e3:.0f}" for m in models]
    rows.append(("launching; under ZeRO 3, ms", *asked))
    rows.append((f"copying {copied / 1e6:.0f} MB to the GPU, ms", *[f"{copied / TO_GPU * 1e3:.1f}"] * len(models)))
    ends = {"overlapped": [max(each.values()) for each in needed], "one after the other": total}
    for name, seconds in (ends | {"goal": [GOAL * each for each in total]}).items():
        shares = [PASSES * m.flops * BATCH / each / PEAK for m, each in zip(models, seconds, strict=True)]
        cells = (f"{s * 1e3:.1f}, {BATCH / s:,.0f}, {share:.2f}" for s, share in zip(seconds, shares, strict=True))
        rows.append((f"step, {name}: ms, samples/s, share of peak", *cells))
    return f"A step of {BATCH} samples on one GPU", ("", *SIZES), rows


def _held(models: list[Counted]) -> Table:
    each = [(m, stage) for m in models for stage in range(4)]
    rows = [(f"{m.size}, ZeRO {stage}", *(f"{held(m, stage, n) / 1e9:.2f}" for n in RANKS)) for m, stage in each]
    return "Held per rank, GB", ("", *(f"{n:,} ranks" for n in RANKS)), rows


def _buckets(_: list[Counted]) -> Table:
    sizes, kinds = (WHOLE_BUCKET, SMALL_BUCKET), {"ZeRO 1, 2": 8, "ZeRO 1, 2, overlap_comm": 16, "ZeRO 3": 6}
    rows = [(name, *(f"{size * each / 1e9:.2f}" for size in sizes)) for name, each in kinds.items()]
    return "Buckets of gradients besides, GB", ("reduce_bucket_size", *(f"{size:,}" for size in sizes)), rows


def _sent(models: list[Counted]) -> Table:
    rows = [_sent_row(m, setting) for m in models for setting in DEFAULTS]
    head = ("", "by the book, MB", "DeepSpeed, MB", "collectives", *(f"{name}, ms" for *_, name in PLACES))
    return "Sent per rank and step (1,024 ranks), and how long it takes if nothing hides it", head, rows


def _sent_row(model: Counted, setting: Setting) -> Sequence[str]:
    book, ours = sent_by_the_book(model.parameters, setting.stage, RANKS[-1]), _total(model, setting, RANKS[-1])
    times = [link.seconds(*_total(model, setting, n), n) for n, link, _ in PLACES]
    row = f"{model.size}, {setting.name}", f"{book / 1e6:,.0f}", f"{ours[0] / 1e6:,.0f}", str(ours[1])
    return *row, *(f"{seconds * 1e3:.1f}" for seconds in times)


def _total(model: Counted, setting: Setting, ranks: int) -> tuple[float, int]:
    sizes, calls = zip(*sent(model, setting, ranks).values(), strict=True)
    return sum(sizes), sum(calls)


def _weak(models: list[Counted]) -> Table:
    rows = []
    for m, setting in ((m, setting) for m in models for setting in (*DEFAULTS, *TUNED)):
        shares = [efficiency(m, setting, n, link) for n, link, _ in PLACES]
        rows.append((f"{m.size}, {setting.name}", *(f"{share:.2f}" for share in shares)))
    return f"Efficiency at {BATCH} samples a GPU", ("", *(name for *_, name in PLACES)), rows


def _strong(models: list[Counted]) -> Table:
    rows = []
    for m, ranks in ((m, ranks) for m in models for ranks in (64, GLOBAL_BATCH)):
        batch = GLOBAL_BATCH / ranks
        shares = [efficiency(m, TUNED[0], ranks, link, batch) for link in LINKS]
        cells = [f"{share:.2f}, {share * ranks:.0f} x one GPU" for share in shares]
        rows.append((f"{m.size}, {ranks} GPUs, {batch:.0f} each", f"{computing(m, batch) * 1e3:.1f}", *cells))
    head = ("", "computing, ms", *(link.name for link in LINKS))
    return f"Efficiency at a global batch of {GLOBAL_BATCH}, {TUNED[0].name}", head, rows


def _batches(models: list[Counted]) -> Table:
    samples, batches = STEPS * GLOBAL_BATCH, [n * BATCH for n in RANKS]
    rows = [
        ("global batch", *(f"{batch:,}" for batch in batches)),
        ("steps", *(f"{samples / batch:,.0f}" for batch in batches)),
        (f"of them warm-up, {WARMUP:,} samples", *(f"{WARMUP / batch:,.0f}" for batch in batches)),
    ]
    for m in models:
        rows.append((f"{m.size}, minutes", *(f"{samples / b * computing(m) / 60:,.1f}" for b in batches)))
    head = ("", *(f"{n:,} GPUs" for n in RANKS))
    return f"The presets' {samples / 1e6:.1f} M samples at {BATCH} a GPU, if nothing is lost", head, rows


def _data(models: list[Counted]) -> Table:
    rows = []
    for m, n in ((m, n) for m in models for n in (1, *RANKS)):
        rate = n * BATCH / computing(m)
        asked = f"{rate * SAMPLE / 1e9:,.1f}", f"{rate / BLOCK:,.0f}", f"{rate / DECODED:,.1f}"
        rows.append((f"{m.size}, {n:,} GPU{'s' * (n > 1)}", f"{rate:,.0f}", *asked))
    return "What training asks for", ("", "samples/s", "GB/s", f"requests/s, blocks of {BLOCK}", "cores"), rows


def _lanes() -> Table:
    rows = []
    for lanes in (LANES, *RANKS[1:]):
        needed = [whole_blocks(lanes, ranks) for ranks in RANKS]
        cells = [f"blocks, {held / 1e6:,.0f} MB" if held else "single samples" for held in needed]
        rows.append((f"lanes={lanes}", *cells, f"{2 * lanes * PER_SHARD * SAMPLE / 1e9:,.0f} GB"))
    return "Lanes", ("", *(f"{n:,} ranks" for n in RANKS), "cache of a node, at least"), rows


def _sets() -> Table:
    batches, rows = (GLOBAL_BATCH, RANKS[-1] * BATCH), []
    for name, samples in DATASETS.items():
        epochs = [f"{STEPS * batch / samples:,.1f}" for batch in batches]
        rows.append((name, f"{samples:,}", f"{samples * SAMPLE / 1e12:.2f}", *epochs))
    head = ("", "samples", "TB in shards", *(f"epochs at batch {batch:,}" for batch in batches))
    return f"Datasets, and their epochs in {STEPS:,} steps", head, rows


def _saved(models: list[Counted]) -> Table:
    rows = []
    for m in models:
        P, calls = FLOAT * m.parameters, 3 * len(m.tensors)  # the value and two moments, an all-reduce each
        gathered = [LINKS[0].seconds(3 * 2 * P * (n - 1) / n, calls, n) for n in RANKS]
        sizes = f"{P / 1e9:.2f}", f"{2 * P / 1e9:.2f}", f"{3 * P / DISK:.1f}", f"{EVERY * computing(m):.0f}"
        rows.append((m.size, *sizes, *(f"{seconds:.2f}" for seconds in gathered)))
    head = ("", "model, GB", "moments, GB", "written at 1 GB/s, s", f"{EVERY:,} steps, s")
    return "Checkpoints of a run", (*head, *(f"gathered, {n:,} ranks, s" for n in RANKS)), rows
