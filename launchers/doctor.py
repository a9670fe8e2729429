"""`mcf doctor`: what is here for training, and what to mend, found by one process on a login node or anywhere."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from launchers.config import SlurmConfig
from launchers.node_checks import GB, Answer, call, gpus
from launchers.preflight import Finding, alone, asked, network
from pipeline.config import Training
from pipeline.model import scan
from pipeline.model.scan_cpp import COMPILERS
from pipeline.ranks import Ranks, child_environment

TOOL_S, IMPORT_S = 20.0, 120.0  # seconds for a command of Slurm, for the import of DeepSpeed
SHARED = 512 << 20  # bytes; NCCL and the workers of a DataLoader meet there
EXTRAS = {"h5": "h5py", "zarr": "numcodecs", "stac": "pystac", "wandb": "wandb"}


def doctor(config: Any | None, slurm: SlurmConfig | None) -> list[Finding]:
    """Look at this machine, and at what a run of this config needs of it.

    Args:
        config: of a stage; unless it is one of training, stores and disks are not looked at.
        slurm: where the run is to go; None: somewhere else, or not known yet.
    """
    checks: dict[str, Callable[[], Answer]] = {
        "versions": versions,
        "deepspeed": deepspeed,
        "compiler": compiler,
        "extras": lambda: extras(getattr(config, "track", ())),
        "shm": shared_memory,
        "slurm": lambda: slurm_answers(config, slurm),
    }
    findings = [asked(name, check) for name, check in checks.items()]
    if isinstance(config, Training):
        return [*findings, *alone(config, Ranks()), asked("network", lambda: network(Ranks()))]
    return [*findings, asked("gpu", lambda: gpus(Ranks()))]


def versions() -> Answer:
    """Python, torch, and whether torch is one for the GPUs of this machine."""
    cuda = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    said = f"Python {platform.python_version()}, torch {torch.__version__} {cuda}"
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        return False, f"{said}, but nvidia-smi is here; install a CUDA build of torch (docs/install.md)"
    return True, said


def deepspeed() -> Answer:
    """Whether DeepSpeed can be imported; in a process of its own, because it looks for hardware and says so."""
    code = "import deepspeed; print(deepspeed.__version__)"
    ok, said = call([sys.executable, "-P", "-c", code], IMPORT_S, environment=child_environment(Ranks()))
    if ok:
        return True, f"DeepSpeed {said.split()[-1]}"
    return False, f"DeepSpeed cannot be imported ({said}); pip install it as constraints.txt pins it"


def compiler() -> Answer:
    """The C++ compiler, and which scan is chosen with it."""
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    said = f"{found or 'no C++ compiler'}; the scan runs in {scan.resolve(None, device)!r} on {device.type}"
    if device.type == "cuda" or scan.available("cpp"):
        return True, said
    return False, f"{said}, several times slower than in 'cpp'; install g++ ({', '.join(COMPILERS)} are looked for)"


def extras(track: Sequence[str]) -> Answer:
    """Which optional extras are installed; only one that the config asks for must be."""
    absent = [name for name, module in EXTRAS.items() if find_spec(module) is None]
    said = f"installed: {', '.join(name for name in EXTRAS if name not in absent) or 'none'}"
    if absent:
        said += f"; not: {', '.join(absent)} (pip install 'mcf-mamba[{','.join(absent)}]')"
    return not set(track) & set(absent), said


def shared_memory() -> Answer:
    """Size of /dev/shm, which is 64 MB in a container by default."""
    size = shutil.disk_usage("/dev/shm").total
    said = f"/dev/shm has {size / GB:.2f} GB"
    return (
        (True, said) if size >= SHARED else (False, f"{said}, {SHARED / GB:.2f} are needed; docker run --shm-size=8g")
    )


def slurm_answers(config: Any | None, slurm: SlurmConfig | None) -> Answer:
    """Whether Slurm's commands and its database answer, and whether it would take this job."""
    if shutil.which("sbatch") is None:
        said = "no sbatch on PATH"
        if slurm is None:
            return True, f"{said}: --on here and --on local work"
        return False, f"{said}; load the module of Slurm, or go to a login node"
    ok, version = call(["sbatch", "--version"], TOOL_S)
    controller = call(["scontrol", "ping"], TOOL_S)
    if not ok or not controller[0] or "UP" not in controller[1]:
        return False, f"{version if not ok else controller[1]}; Slurm's controller does not answer, ask who runs it"
    ok, said = call(["sacct", "--noheader", "--starttime=now"], TOOL_S)
    if not ok:
        return False, f"{said}; without sacct (slurmdbd) a job that dies is not noticed, ask who runs the cluster"
    if config is None or slurm is None:
        return True, f"{version}, sbatch, scontrol and sacct answer"
    from launchers.slurm import script  # with submitit

    text = script(config, slurm, Path.cwd())  # a folder without a name of its own: nothing is submitted
    ok, said = call(["sbatch", "--test-only"], TOOL_S, text)
    return (ok, f"{version} would take this job") if ok else (False, f"{said}; mend the config of Slurm")
