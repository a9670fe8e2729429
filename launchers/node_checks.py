"""What one process finds out alone about its node, before a run: store, clock, disk, scan, GPU.

A check takes the config and the place of this rank, and answers whether a run may begin and what was found. It may
raise, which is an answer too. None changes anything or leaves anything.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from pipeline import ranks
from pipeline.checkpoint import CheckpointError, facts_of_all, name_of
from pipeline.config import PretrainConfig, Training
from pipeline.model import scan as scans
from pipeline.ranks import Ranks
from shards.cache import CACHED
from shards.manifest import MANIFEST, read_facts
from shards.store import FolderStore, Store, StoreError, open_store

Answer = tuple[bool, str]
Check = Callable[[Training, Ranks], Answer | None]  # None: another rank of this node answers

# S3 refuses signatures that are 15 minutes off. A clock that is a minute off is not being set, and goes on drifting.
CLOCK_S = 60.0
CLOCK_ADVICE = f"at most {CLOCK_S:g} s are allowed: set the clock (chronyc tracking, NTP)"
GB = 10**9
ROOM = 1 * GB  # free on a disk of which nothing better is known
PROBE = b"preflight"
TOLERANCE = {"cpu": (5e-7, 1e-6), "cuda": (5e-6, 1e-5)}  # of y and gradients; GPUs have an exp2 of their own
SMI_S = 15  # seconds for nvidia-smi, which hangs where a GPU is ill
SMI = ("uuid", "index", "ecc.errors.uncorrected.volatile.total", "clocks_throttle_reasons.active", "memory.used")
# Bits of the throttle reasons that mean trouble; the others are idling, power caps and clocks that somebody chose.
THROTTLED = {0x8: "slowed down by its hardware", 0x20: "hot", 0x40: "too hot", 0x80: "short of power"}
TAKEN_MB = 4096  # used on a GPU before a run; a rank's own context and NCCL take a part of that


def store(config: Training, place: Ranks) -> Answer | None:
    """Whether the data can be read and checkpoints be written, read and removed, with this process's credentials."""
    if place.local_rank:
        return None
    for data in _datasets(config):
        if open_store(data).range(MANIFEST, 0, 4) != b"PAR1":
            return False, f"{data}/{MANIFEST} is not a Parquet file; restore it, or run `mcf shards merge` again"
    for where in _kept(config):
        there = _near(where)
        with _probe(there, "store") as name:
            if there.get(name) != PROBE:
                return False, f"{there.url}/{name} holds other bytes than were written; the store cannot be trusted"
    return True, f"{', '.join(_datasets(config))} can be read, {', '.join(_kept(config))} written"


def clock(config: Training, place: Ranks) -> Answer | None:
    """How far this node's clock is from that of each store."""
    if place.local_rank:
        return None
    off = {}
    with suppress(StoreError):  # `store` tells why
        for where in _kept(config):
            there = _near(where)
            with _probe(there, "clock") as name:
                off[where] = _offset(there, name)
        off.update({data: _offset(open_store(data), MANIFEST) for data in _datasets(config) if "://" in data})
    if not off:
        return True, "not compared: the store does not answer"
    where, most = max(off.items(), key=lambda item: abs(item[1]))
    said = f"{abs(most):.1f} s {'behind' if most > 0 else 'ahead of'} {where}"
    return (True, said) if abs(most) <= CLOCK_S else (False, f"{said}; {CLOCK_ADVICE}")


def disk(config: Training, place: Ranks) -> Answer | None:
    """Whether checkpoints, temporary files and the cache have room."""
    if place.local_rank:
        return None
    lacks, found = [], []
    for what, (folder, need, advice) in _needs(config).items():
        free = shutil.disk_usage(existing(folder)).free
        found.append(f"{what} {free / GB:.1f} GB")
        if free < need:
            lacks.append(f"{what}: {folder} has {free / GB:.2f} GB free, {need / GB:.2f} are needed; {advice}")
    return (False, "; ".join(lacks)) if lacks else (True, f"free: {', '.join(found)}")


def _needs(config: Training) -> dict[str, tuple[Path, float, str]]:
    """Where room is needed: folder, bytes, and what to do without."""
    kept, cache = config.store or config.run, config.reading.cache_dir
    two = max(ROOM, 2 * _newest(kept))  # the next is whole before an old one goes
    remote = "://" in kept
    make = "make room, or choose another with run= or store="
    needs: dict[str, tuple[Path, float, str]] = {"run": (Path(config.run), two if not config.store else ROOM, make)}
    if config.store and not remote:
        needs["store"] = Path(config.store), two, make
    # What goes to S3 is written there first.
    needs["temporary files"] = Path(tempfile.gettempdir()), two if remote else ROOM, "make room, or set TMPDIR"
    if cache:
        folder = Path(cache)
        wanted = min(float(config.reading.cache_limit), _far(config))
        there = held(folder / CACHED)
        advice = "lower reading.cache_limit, or choose another reading.cache_dir"
        needs["cache"] = folder, max(0.0, wanted - there), advice
    return needs


def _newest(kept: str) -> int:
    """Bytes of the newest checkpoint; 0 where there is none, or no answer, of which `store` tells."""
    with suppress(StoreError, CheckpointError):
        there = open_store(kept)
        for facts in facts_of_all(there):
            return sum(_size(there, name) for name in there.list(f"{name_of(facts['step'])}/"))
    return 0


def _size(there: Store, name: str) -> int:
    with there.reading(name) as file:
        return file.seek(0, os.SEEK_END)


def _far(config: Training) -> float:
    """Bytes of the tars that a cache may keep; without end where a dataset does not tell."""
    with suppress(StoreError, ValueError, KeyError):
        facts = [read_facts(open_store(data)) for data in _datasets(config) if "://" in data]
        return float(sum(shard["bytes"] for one in facts for shard in one["shards"].values()))
    return math.inf


def scan(config: Training, place: Ranks) -> Answer:
    """Whether the scan that the run will use computes what its specification says, gradients included."""
    device = ranks.device(place)
    backend = scans.resolve(config.engine.scan, device)
    wanted, found = _scanned("reference", torch.device("cpu"), torch.float64), _scanned(backend, device, torch.float32)
    allowed = TOLERANCE.get(device.type, TOLERANCE["cuda"])
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True)]
    y, gradients = errors[0], max(errors[1:])
    said = f"{backend}: relative errors {y:.1e} of y, {gradients:.1e} of gradients"
    if y <= allowed[0] and gradients <= allowed[1]:  # never with NaN
        return True, said
    advice = "write engine.scan=torch, and report it" if backend != "torch" else "this node computes wrongly"
    return False, f"{said}; allowed are {allowed[0]:.0e} and {allowed[1]:.0e}: {advice}"


def _scanned(backend: str, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of all inputs in a small case, float64."""
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 8, 8, 6), (2, 8, 8, 4, 6), (4, 6, 16), (2, 8, 8, 4, 16), (2, 8, 8, 4, 16), (4, 6), (4, 6)]
    inputs = [torch.randn(shape, generator=g) for shape in shapes]
    inputs[2] = -(1 + inputs[2].abs())  # decay rates
    leaves = [tensor.to(device, dtype).requires_grad_() for tensor in inputs]
    x, delta, A, B, C, D, bias = leaves
    y = scans.ss2d_scan(x, delta, A, B, C, D, bias, backend)
    gradients = torch.autograd.grad(y, leaves, torch.randn(shapes[0], generator=g).to(y))
    return [tensor.detach().cpu().double() for tensor in (y, *gradients)]


def gpu(config: Training, place: Ranks) -> Answer:
    """Whether this rank has a sound GPU to itself. Tried with a made-up nvidia-smi only, not yet on CUDA."""
    return gpus(place)


def gpus(place: Ranks) -> Answer:
    """Like `gpu`, without a config."""
    if not torch.cuda.is_available():
        return True, "no GPU: trains on the CPU"
    count, device, problems = torch.cuda.device_count(), ranks.device(place), []
    if 1 < count < place.local_world:  # 1: each rank is shown its own
        problems.append(f"{place.local_world} ranks on {count} GPUs; start as many ranks as there are GPUs")
    g = torch.Generator().manual_seed(0)
    a = torch.randn(256, 256, generator=g)
    error = float(((a.to(device) @ a.to(device)).cpu() - a @ a).abs().max() / (a @ a).abs().max())
    if not error <= 1e-2:  # TF32 included
        problems.append(f"a matrix product is off by {error:.1e}; the GPU computes wrongly, leave this node out")
    problems += smi_problems({str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")})
    name = f"{torch.cuda.get_device_name(device)}, {torch.cuda.mem_get_info(device)[0] / GB:.1f} GB free"
    return not problems, "; ".join(problems) or name


def smi_problems(uuids: set[str]) -> list[str]:
    """What nvidia-smi says against these GPUs; nothing where it is not installed, or knows no such fields."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits"]
    ok, said = call(command, SMI_S)
    if not ok:
        return [] if "not a valid field" in said else [f"{said}; the GPU or its driver is ill, leave this node out"]
    problems = []
    for line in said.splitlines():
        uuid, index, ecc, reasons, used = (cell.strip() for cell in line.split(","))
        if uuid.removeprefix("GPU-") not in uuids:
            continue
        bits = int(reasons, 16) if reasons.startswith("0x") else 0
        if ecc.isdigit() and int(ecc):
            problems.append(f"GPU {index}: {ecc} uncorrected ECC errors; none are allowed, reset the GPU")
        if slow := [text for bit, text in THROTTLED.items() if bits & bit]:
            problems.append(f"GPU {index} is {', '.join(slow)}; look at its cooling and power")
        if used.isdigit() and int(used) > TAKEN_MB:
            problems.append(f"GPU {index}: {used} MB are taken before the run, {TAKEN_MB} allowed; end what runs there")
    return problems


def call(
    command: Sequence[str], seconds: float, given: str = "", environment: Mapping[str, str] | None = None
) -> Answer:
    """Whether a command succeeds, and what it says; if it does not succeed, its last line, and its name."""
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return False, f"{command[0]} gives no answer in {seconds:g} s"
    if done.returncode:
        last = ((done.stderr or done.stdout).strip() or f"exit code {done.returncode}").splitlines()[-1]
        return False, last if last.startswith(command[0]) else f"{command[0]}: {last}"
    return True, done.stdout.strip()


def _datasets(config: Training) -> list[str]:
    """Addresses of all data that the run reads."""
    data = [config.data] if isinstance(config.data, str) else [*config.data]
    return data + ([config.probe.data] if isinstance(config, PretrainConfig) and config.probe.data else [])


def _kept(config: Training) -> list[str]:
    """Where the run writes: checkpoints, and its folder."""
    return [config.store, config.run] if config.store else [config.run]


def held(folder: Path) -> int:
    """Bytes of all files in a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there already."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _near(where: str) -> Store:
    """The store there; of a folder that is still to be made, the nearest that is there, so that nothing is left."""
    if "://" in where:
        return open_store(where)
    if not (folder := existing(Path(where))).is_dir():
        raise StoreError(f"{where}: {folder} is a file where a folder must be; choose another with run= or store=")
    return open_store(folder)


@contextmanager
def _probe(there: Store, use: str) -> Iterator[str]:
    """Name of a small object, in the store while this is open."""
    name = f".preflight-{ranks.node_name()}-{os.getpid()}-{use}"
    there.put(name, PROBE)
    try:
        yield name
    finally:
        there.remove(name)


def _offset(there: Store, name: str) -> float:
    """Seconds by which a store's clock is ahead of this node's; a file's must just have been written."""
    before = time.time()
    if isinstance(there, FolderStore):
        return (there.root / name).stat().st_mtime - before
    from shards.s3 import S3Store  # with boto3, which a folder does not need

    assert isinstance(there, S3Store)
    return there.server_time(name) - (before + time.time()) / 2


CHECKS: Mapping[str, Check] = MappingProxyType({"store": store, "clock": clock, "disk": disk, "scan": scan, "gpu": gpu})
